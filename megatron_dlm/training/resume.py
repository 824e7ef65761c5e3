"""What a run goes on from, and what of its options it can change when it does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.config import Config
from megatron_dlm.config.fields import flag_of, option_fields, plain_value, value_of
from megatron_dlm.config.rules.usage import is_used
from megatron_dlm.errors import bad_value
from megatron_dlm.rollout import curriculum
from megatron_dlm.training.checkpointing import Progress

if TYPE_CHECKING:
    from megatron_dlm.training.inputs import RunInputs

DATA_FINGERPRINT = "data_fingerprint"
TEACHER_FINGERPRINT = "teacher_fingerprint"
LOAD_FINGERPRINT = "load_fingerprint"

SCHEDULE_LENGTHS = (
    "lr_decay_iters",
    "teacher_response_fraction_rollouts",
    "dynamic_threshold_rollouts",
)
"""Options that follow the length of the run where they are not given; `--extend` changes them."""

_ABOUT_THE_START = frozenset({"load", "finetune", "save"})
"""Options that a run has no use for once it has a checkpoint, or that only name its folder. Of
another `--load` the fingerprints are compared."""


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from.

    Attributes:
        path: The folder that is loaded: of the run, whose newest checkpoint that is not damaged is
            meant, or one of its checkpoints.
        field: The flag that named it.
        checkpoint: The checkpoint that was found there.
        saved: Flat configuration in it (`resumable_config`).
        progress: How far it has come.
    """

    path: str
    field: str
    checkpoint: Path
    saved: dict[str, Any]
    progress: Progress


@dataclass(frozen=True)
class Difference:
    """Something of a resumed run that is not as before.

    Attributes:
        option: Flat name of the option that says it.
        then: Value of the run.
        now: Value of this start.
        about: What differs, where it is not the value itself.
        is_allowed: Whether it may.
    """

    option: str
    then: Any
    now: Any
    about: str = ""
    is_allowed: bool = False

    def __str__(self) -> str:
        about = f"{self.about}: " if self.about else ""
        return f"{flag_of(self.option)} ({about}then {self.then!r}, now {self.now!r})"


def resolved_options(config: Config) -> dict[str, Any]:
    """The flat configuration, `of_data`, with defaults resolved where a resumed run must match."""
    chosen = config.diffusion_kind if config.traits.chooses_attention else None
    return config.to_dict() | {
        "attention_pattern": None if chosen is None else chosen.attention_pattern,
        "lr_decay_iters": config.lr_decay_iters,
        "lr_warmup_iters": config.lr_warmup_iters,
        "teacher_response_fraction_rollouts": curriculum.teacher_response_fraction_rollouts(config),
        "dynamic_threshold_rollouts": curriculum.dynamic_threshold_rollouts(config),
        "param_groups": [plain_value(group) for group in config.param_groups],
    }


def resumable_config(config: Config, inputs: "RunInputs") -> dict[str, Any]:
    """The flat configuration with all that a resumed run is compared by."""
    load_fingerprint = inputs.load_fingerprint
    if load_fingerprint is None and inputs.resumed is not None:
        load_fingerprint = inputs.resumed.saved.get(LOAD_FINGERPRINT)
    return resolved_options(config) | {
        DATA_FINGERPRINT: inputs.data.file.fingerprint,
        "num_records": config.num_records,
        TEACHER_FINGERPRINT: None if inputs.teacher is None else inputs.teacher.computes(config),
        LOAD_FINGERPRINT: load_fingerprint,
    }


def keep_schedules(config: Config, saved: dict[str, Any]) -> Config:
    """A longer or shorter run, with schedules that end where those of the run would have ended.

    Args:
        config: Of this start.
        saved: Of the run.
    """
    lengths = {
        name: saved[name]
        for name in SCHEDULE_LENGTHS
        if saved.get(name) and value_of(config, name) is None and is_used(config, name)
    }
    return config.changed(**lengths)


def option_differences(config: Config, saved: dict[str, Any]) -> list[Difference]:
    """Options that a run has a use for and that differ from what it was started with.

    Args:
        config: Of this start, `of_data`.
        saved: Flat configuration of the run. What it lacks did not exist then, and was as the
            default is.
    """
    found, now = [], resolved_options(config)
    for name, option in option_fields(Config).items():
        if name in _ABOUT_THE_START or name not in now or not is_used(config, name):
            continue
        default = value_of(config, name) == option.default
        then = saved.get(name, now[name] if default else plain_value(option.default))
        if then == now[name]:
            continue
        stretched = name in (*SCHEDULE_LENGTHS, "lr_warmup_iters") and config.extend
        is_allowed = stretched or not option.fixed_on_resume
        found.append(Difference(name, then, now[name], is_allowed=is_allowed))
    return found


def check_resumable(config: Config, inputs: "RunInputs", resumed: Resumption) -> list[Difference]:
    """Compare what a run goes on with, options and files, with what it was started with.

    Args:
        config: Of the run that goes on, `of_data`.
        inputs: What it reads.
        resumed: What it goes on from.

    Returns:
        The differences, all of which are allowed.

    Raises:
        UserError: Some are not; all of them are named.
    """
    saved, now = resumed.saved, resumable_config(config, inputs)
    if "num_rollouts" in saved:  # of a version without that entry
        saved = {"teacher_response_fraction_rollouts": saved["num_rollouts"], **saved}
    found = option_differences(config, saved) + _input_differences(config, saved, now, resumed)
    done = resumed.progress.consumed_samples
    if config.num_samples < done:
        unit = {"num_rollouts": "rollout", "train_iters": "iteration"}.get(config.length_option)
        progress = f"{done} samples" if unit is None else getattr(resumed.progress, unit)
        name, about = config.length_option, f"{progress} are done"
        found.append(Difference(name, saved.get(name), value_of(config, name), about))
    refused = [difference for difference in found if not difference.is_allowed]
    names = {difference.option for difference in refused}
    allowed = [difference for difference in found if difference.option not in names]
    if not refused:
        return allowed
    can = f", these can: {_listed(allowed)}" if allowed else ""
    raise bad_value(
        resumed.field,
        resumed.path,
        f"is a run that was started otherwise; these cannot change: {_listed(refused)}{can}",
        "use the old values to resume it, or another --save for a new run (from its weights: "
        f"--load {resumed.path} --finetune)",
    )


def _input_differences(
    config: Config, saved: dict[str, Any], now: dict[str, Any], resumed: Resumption
) -> list[Difference]:
    """Files and folders whose content is not what the run was reading, wherever it lies."""

    def differs(key: str) -> bool:
        return bool(saved.get(key, now[key]) != now[key])

    found = []
    if differs(DATA_FINGERPRINT):
        option = config.data_option
        found.append(Difference(option, saved.get(option), value_of(config, option), "other data"))
    elif differs("num_records"):
        then, records = saved["num_records"], now["num_records"]
        found.append(Difference("max_prompt_length", then, records, "records that it leaves"))
    if differs(TEACHER_FINGERPRINT):
        urls = config.teacher.teacher_url
        before, after = saved[TEACHER_FINGERPRINT], now[TEACHER_FINGERPRINT]
        then = before and (saved["teacher_load"] or saved["load"])
        teacher = after and (urls[0] if urls else config.teacher_load)
        about = "another teacher" if before and after else "whether it teaches itself"
        if before and after and before.split()[0] == after.split()[0]:
            about = "the teacher in another precision"
        found.append(Difference("teacher_url" if urls else "teacher_load", then, teacher, about))
    load, named = saved["load"], config.model.load
    fingerprints = saved.get(LOAD_FINGERPRINT), now[LOAD_FINGERPRINT]
    if named not in (load, resumed.path) and None not in fingerprints:
        same = fingerprints[0] == fingerprints[1]
        found.append(Difference("load", load, named, "" if same else "other weights", same))
    return found


def _listed(differences: list[Difference]) -> str:
    return ", ".join(map(str, differences))
