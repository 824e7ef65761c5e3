"""Whether a run goes on from a checkpoint, and what it cannot change when it does."""

from typing import Any

from megatron_dlm.config import Config
from megatron_dlm.config.fields import option_fields, plain_value
from megatron_dlm.config.rules.usage import is_used
from megatron_dlm.errors import bad_value
from megatron_dlm.training.checkpointing import saved_config
from megatron_dlm.training.inputs import RunInputs

RESUME_FIXED = tuple(
    name for name, option in option_fields(Config).items() if option.fixed_on_resume
)
"""Options that a resumed run cannot change, where it has a use for them: it would be another run,
or they would be ignored, as they live on in the checkpointed optimizer and schedule."""

DATA_FINGERPRINT = "data_fingerprint"
TEACHER_FINGERPRINT = "teacher_fingerprint"


def resumable_config(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """The flat configuration with what a resumed run is compared by, resolved."""
    chosen = config.diffusion_kind if config.traits.chooses_attention else None
    return config.to_dict() | {
        "attention_pattern": None if chosen is None else chosen.attention_pattern,
        "lr_decay_iters": config.lr_decay_iters,
        "lr_warmup_iters": config.lr_warmup_iters,
        "teacher_response_fraction_rollouts": config.teacher_response_fraction_rollouts,
        "dynamic_threshold_rollouts": config.dynamic_threshold_rollouts,
        "param_groups": [plain_value(group) for group in config.param_groups],
        DATA_FINGERPRINT: inputs.data.file.fingerprint,
        "num_records": config.num_records,
        TEACHER_FINGERPRINT: None if inputs.teacher is None else inputs.teacher.fingerprint,
    }


def check_resumable(config: Config, inputs: RunInputs, load: str) -> None:
    """Refuse what would make another run of the one in `load`.

    Args:
        config: Of the run that goes on.
        inputs: What it reads.
        load: The run folder.

    Raises:
        UserError: An option, the data or the teacher is not what the run was started with.
    """
    now, before = resumable_config(config, inputs), saved_config(load)
    if "num_rollouts" in before:
        before = {"teacher_response_fraction_rollouts": before["num_rollouts"], **before}
    if before.get(DATA_FINGERPRINT, now[DATA_FINGERPRINT]) != now[DATA_FINGERPRINT]:
        raise bad_value(
            "--" + config.data_option.replace("_", "-"),
            inputs.data.file.path,
            f"is not what the run in {load} was reading",
            "name that to resume it, or --finetune for a new run from its weights",
        )
    for name in RESUME_FIXED:
        if name in before and before[name] != now[name] and is_used(config, name):
            raise bad_value(
                "--" + name.replace("_", "-"),
                now[name],
                f"the run in {load} was started with {before[name]!r}",
                f"use {before[name]!r} to resume it, or --finetune for a new run from its weights",
            )
    records = now["num_records"]
    if before.get("num_records", records) != records:
        raise bad_value(
            "--max-prompt-length",
            config.data.max_prompt_length,
            f"leaves {records} records of {inputs.data.file.path}, the run in {load} was reading "
            f"{before['num_records']}",
            "choose what it was to resume it, or --finetune for a new run from its weights",
        )
    if before.get(TEACHER_FINGERPRINT, now[TEACHER_FINGERPRINT]) != now[TEACHER_FINGERPRINT]:
        problem, remedy = f"the run in {load} was its own teacher", "drop it"
        if before[TEACHER_FINGERPRINT] is not None:
            named = before["teacher_load"] or before["load"]
            problem = f"is not the teacher of the run in {load}, {named!r} as it was then"
            remedy = "name those weights, wherever they are,"
        raise bad_value(
            "--teacher-load",
            config.distillation.teacher_load,
            problem,
            f"{remedy} to resume it, or --finetune for a new run from its weights",
        )
