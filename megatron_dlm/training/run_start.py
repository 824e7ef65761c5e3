"""What a start of a run is: a new run, or one that goes on. Decided on one rank, for all."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.config import Config
from megatron_dlm.config.fields import flag_of
from megatron_dlm.errors import bad_value
from megatron_dlm.launcher import attempt
from megatron_dlm.training.best_checkpoint import lacks_accuracy
from megatron_dlm.training.run_folder import (
    find_checkpoint,
    is_iteration_folder,
    is_of_run,
    is_run_folder,
)
from megatron_dlm.training.run_history import HISTORY

if TYPE_CHECKING:
    from megatron_dlm.training.resume import Resumption


@dataclass(frozen=True)
class RunStart:
    """What a start of a run is.

    Attributes:
        config: Its configuration: of a run that goes on with the weights in `--load` that it was
            started from, and with schedules that end where they would have ended.
        resumed: What it goes on from; None for a new run.
        is_finished: Whether there is nothing left to do.
        notice: What a person has to know of it; empty if nothing.
    """

    config: Config
    resumed: "Resumption | None" = None
    is_finished: bool = False
    notice: str = ""


def decide_start(config: Config) -> RunStart:
    """Find out whether the run in `--save`, or that in `--load`, goes on.

    Reads no data and no weights. On several ranks only one may do this (`parallel.from_rank_zero`):
    in a shared folder they would not all find the same.

    Raises:
        UserError: `--resume` forbids what would happen, or the folder cannot be used.
    """
    load, save, finetune = config.model.load, config.logging.save, config.model.finetune
    names_own_run = load is not None and save is not None and is_of_run(load, save)
    resumed: Resumption | None = None
    if is_run_folder(save):
        assert save is not None
        _check_may_resume(config, names_own_run)
        # A launcher that starts the same command again does not want to wind the run back again.
        winds_back = names_own_run and is_iteration_folder(str(load)) and not _is_restart()
        path, field = (str(load), "--load") if winds_back else (save, "--save")
        resumed = _resumption(path, field)
        if resumed is None and not names_own_run:
            raise bad_value(
                "--save",
                save,
                "holds weights without a training state, with which no run can go on",
                f"choose a new folder, or start from these weights with --load {save}",
            )
    elif load is not None and not finetune and _is_megatron(load):
        resumed = _resumption(load, "--load")
        if resumed is not None and config.resume == "never":
            raise bad_value(
                "--resume",
                config.resume,
                f"--load {load} is a run, which would go on",
                "add --finetune to take only its weights",
            )
    if resumed is not None:
        return _goes_on(config, resumed, names_own_run)
    if config.resume == "must":
        raise bad_value(
            "--resume",
            config.resume,
            f"--save {save} holds no checkpoint of a run",
            "name the folder of a run, or drop --resume to start one",
        )
    notice = ""
    if save is not None and (Path(save) / HISTORY).is_file():
        notice = f"the run in {save} has no checkpoint yet: it starts from the beginning"
    return RunStart(config, notice=notice)


def _check_may_resume(config: Config, names_own_run: bool) -> None:
    save = config.logging.save
    if config.resume == "never":
        raise bad_value(
            "--resume",
            config.resume,
            f"--save {save} holds a run",
            "choose a new folder, or drop --resume to go on with that run",
        )
    if names_own_run and config.model.finetune:
        raise bad_value(
            "--save",
            save,
            "holds the run whose weights --load --finetune would start from",
            "choose a new folder, or resume that run with --no-finetune",
        )


def _is_restart() -> bool:
    """Whether the launcher has started the same command before."""
    return attempt() > 0 or os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _is_megatron(load: str) -> bool:
    """Whether a folder is one of Megatron checkpoints; what else it may be is found out later."""
    folder = Path(load)
    is_hugging_face = (folder / "config.json").is_file()
    is_checkpoint = folder.is_dir() and is_iteration_folder(folder)
    return not is_hugging_face and (is_run_folder(folder) or is_checkpoint)


def _resumption(path: str, field: str) -> "Resumption | None":
    """What of a folder can be resumed; None if its checkpoint holds weights only.

    Raises:
        UserError: It holds no checkpoint that is not damaged.
    """
    checkpoint = find_checkpoint(path, field)
    from megatron_dlm.training.checkpointing import saved_config, saved_progress  # loads PyTorch
    from megatron_dlm.training.resume import Resumption

    progress = saved_progress(checkpoint, field)
    if progress is None:
        return None
    return Resumption(path, field, checkpoint, saved_config(checkpoint, field), progress)


def _goes_on(config: Config, resumed: "Resumption", names_own_run: bool) -> RunStart:
    from megatron_dlm.training.evaluation_inputs import evaluates_after  # loads PyTorch
    from megatron_dlm.training.resume import keep_schedules, option_differences

    saved = resumed.saved
    load, save, named = saved.get("load"), config.logging.save, config.model.load
    names_start = named is not None and not names_own_run and Path(named).exists()
    if not names_start and load and not is_of_run(load, str(save)):
        config = config.changed(load=load, finetune=saved.get("finetune", False))
    if not config.extend:
        config = keep_schedules(config, saved)
    progress, of_data = resumed.progress, config.of_data(saved.get("num_records") or 0)
    changed = option_differences(of_data, saved)
    ended = of_data.num_samples == progress.consumed_samples > 0
    if evaluates_after(of_data, progress.iteration) and lacks_accuracy(resumed.checkpoint):
        ended = False  # a request to stop broke the last evaluation off
    if ended and all(difference.is_allowed for difference in changed):
        done = f"{progress.iteration} updates, {progress.rollout} "
        done += "rollouts" if config.uses_rollouts else "batches"
        what = f"the run in {resumed.path} is finished ({done})"
        notice = f"{what}; nothing to do; {flag_of(config.length_option)} may grow"
        return RunStart(config, resumed, is_finished=True, notice=notice)
    notice = f"going on from {resumed.checkpoint}: {progress.iteration} updates are done"
    return RunStart(config, resumed, notice=notice)
