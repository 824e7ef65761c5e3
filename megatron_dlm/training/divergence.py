"""What a run does when its loss, its gradient or its weights are no numbers any more.

The update is not made, so weights and optimizer stay what they were. `--on-divergence` says whether
the run then ends, with `DIVERGED_STATUS`, or leaves the update out.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.conversion.hf_checkpoint import is_finite
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.entry import warn
from megatron_dlm.errors import TrainingDiverged, UserError
from megatron_dlm.output_file import write_file
from megatron_dlm.parallel import on_all_ranks, on_rank_zero
from megatron_dlm.training import run_history
from megatron_dlm.training.run import Run
from megatron_dlm.training.run_folder import iteration_folder, latest_iteration
from megatron_dlm.training.train_step import StepResult
from megatron_dlm.types.trajectory import Trajectory


def check_weights(run: Run) -> None:
    """Check that all weights are finite numbers, so that no other ones are saved; collective.

    Raises:
        TrainingDiverged: On all ranks: the last update has made some that are not.
    """
    finite = all(is_finite(parameter.detach()) for parameter in run.student.model.parameters())
    if not on_all_ranks(finite):
        raise end(run, run.progress.iteration, "its weights are NaN or infinite", None)


def handle(run: Run, samples: Sequence[Trajectory], result: StepResult) -> str:
    """Save the samples of an update that was not made, and end the run or go on without it.

    Args:
        run: Its progress counts the update already; all ranks call this.
        samples: This rank's own ones of the update.
        result: Of the update.

    Returns:
        A line about the update that is left out.

    Raises:
        TrainingDiverged: The run ends here.
    """
    progress = run.progress
    allowed = int(run.config.training.on_divergence.removeprefix("stop").removeprefix("skip:") or 0)
    what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    file = _write_samples(run, samples, result)
    progress.skipped_updates += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row > allowed:
        if allowed:
            what += f", after {allowed} updates in a row that were left out"
        raise end(run, progress.iteration, what, file)
    where = "" if file is None else f", its samples are in {file}"
    return (
        f"update {progress.iteration} diverged ({what}) and is left out, "
        f"{progress.skipped_in_a_row} of {allowed} in a row{where}"
    )


def end(run: Run, update: int, what: str, samples: Path | None) -> TrainingDiverged:
    """The end of a run that diverged, written into its history."""
    run.finish_saving()
    folder, rollout = run.config.logging.save, run.progress.rollout + 1
    good = None
    if folder is not None and (latest := latest_iteration(folder)) is not None:
        good = iteration_folder(folder, latest)
    run_history.record(
        folder,
        "diverged",
        iteration=update,
        rollout=rollout,
        what=what,
        last_good_checkpoint=good,
        samples=samples,
    )
    kept = "none is saved without --save" if folder is None else str(samples or "not known")
    return TrainingDiverged(
        f"training diverged at update {update} of rollout {rollout}: {what}; the last good "
        f"checkpoint is {good or 'none'}, samples of the batch: {kept}; lower --lr, or leave such "
        "updates out with --on-divergence skip:N"
    )


def _write_samples(run: Run, samples: Sequence[Trajectory], result: StepResult) -> Path | None:
    """Save what an update was made of, one sample a line; the file, None without a run folder."""
    folder = run.config.logging.save
    if folder is None:
        return None
    groups = run.groups
    speaks = groups.is_last_stage and groups.cp_rank == 0
    speaks = speaks and (groups.tp is None or groups.tp.rank() == 0)
    lines = on_rank_zero(_described(run, samples, result) if speaks else [])
    file = Path(folder) / f"diverged_update_{run.progress.iteration:07d}.jsonl"
    if torch.distributed.get_rank() == 0:
        lines.sort(key=lambda line: int(line["sample"]))
        try:
            write_file(file, "".join(json.dumps(line) + "\n" for line in lines))
        except UserError as error:  # of the two, the divergence is what ends the run
            warn(str(error))
            return None
    return file


def _described(run: Run, samples: Sequence[Trajectory], result: StepResult) -> list[dict[str, Any]]:
    """This rank's samples, as a person looks at them."""
    data, size = run.inputs.data, run.config.training.micro_batch_size
    losses = result.micro_batch_losses
    # Rows of a budget of tokens are not in the order of samples.
    is_known = run.config.training.max_tokens_per_micro_batch is None
    lines = []
    for i, trajectory in enumerate(samples):
        record = run.sampler.record_index(trajectory.sample_index)
        loss = losses[i // size] if is_known else None
        lines.append(
            {
                "update": run.progress.iteration,
                "rollout": run.progress.rollout + 1,
                "loss": _plain(result.loss),
                "grad_norm": _plain(result.grad_norm),
                "sample": trajectory.sample_index,
                "record": record,
                "line": None if isinstance(data, CorpusDataset) else data.file.where(record),
                "micro_batch_loss": None if loss is None else _plain(loss),
                "prompt": run.inputs.tokenizer.decode(trajectory.prompt_ids.tolist()),
                "response": run.inputs.tokenizer.decode(trajectory.response_ids.tolist()),
            }
        )
    return lines


def _plain(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
