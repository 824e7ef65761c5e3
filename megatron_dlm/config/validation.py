"""Checks of a whole configuration: the rules of each, in order.

Nothing here needs process groups or weights: `validate` runs before torch.distributed starts, so
that a run that cannot work ends within seconds. Each check raises `UserError` for the first rule
that is broken, with the values that would work.
"""

import importlib
import pkgutil
import re
from itertools import chain

from megatron_dlm.config import rules
from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.rules import Refusals, refusals
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.types.model_sizes import ModelSizes

for _module in pkgutil.iter_modules(rules.__path__):  # they register themselves
    importlib.import_module(f"{rules.__name__}.{_module.name}")

_LAYOUT_FLAG = re.compile(r"--((?:tensor-model|pipeline-model|expert-\w+)-parallel-size)")


def _refuse(config: Config, *rules: Refusals, of_teacher: bool = False) -> None:
    """Raise the first refusal of some rules; of a teacher's own layout, by its options' names."""
    for refusal in chain(*rules):
        if isinstance(refusal, str):
            name, _, reason = refusal.partition(": ")
            problem, _, remedy = reason.partition("; ")
            refusal = bad_value(flag_of(name), value_of(config, name), problem, remedy)
        if of_teacher and config.teacher.teacher_ranks:
            refusal = UserError(_LAYOUT_FLAG.sub(r"--teacher-\1", str(refusal)))
        raise refusal


def validate(config: Config, world_size: int) -> None:
    """Check every rule that needs no model, for a run of so many processes."""
    _refuse(config, *refusals("use", config))
    _refuse(config, *refusals("options", config))  # they look only at options that are used
    _refuse(config, *refusals("teacher processes", config, world_size), of_teacher=True)
    _refuse(config, *refusals("processes", config, config.student_ranks(world_size)))
    validate_length(config)


def validate_length(config: Config) -> None:
    """Check the rules that need the number of records, of a configuration `of_data`."""
    _refuse(config, *refusals("length", config))


def validate_architecture(
    config: Config, student: ModelSizes, teacher: ModelSizes | None = None
) -> None:
    """Check every rule about the sizes of the model that is trained, and of its teacher."""
    models = (student,) if teacher is None or config.has_remote_teacher else (student, teacher)
    _refuse(config, *refusals("models", config, *models), *refusals("model", config, student))
    if config.decodes_itself or config.evaluates:
        _refuse(config, *refusals("decoding", config, student))
    if teacher is not None:
        validate_teacher(config, teacher)


def validate_teacher(config: Config, sizes: ModelSizes) -> None:
    """Check every rule about the sizes of a teacher with weights of its own."""
    try:
        _refuse(config, *refusals("teacher model", config, sizes), of_teacher=True)
    except UserError as error:
        where, named = ("--teacher-load", config.teacher_load)
        if config.teacher.teacher_url:
            where, named = "--teacher-url", config.teacher.teacher_url[0]
        raise UserError(f"{where} {named}: {error}") from None


def validate_layout(
    config: Config, world_size: int, student: ModelSizes, teacher: ModelSizes | None = None
) -> None:
    """Check only how processes share model and batch, of a configuration that is valid but for it.

    To try many layouts; `validate` and `validate_architecture` check these rules too.
    """
    _refuse(config, *refusals("processes", config, world_size))
    validate_architecture(config, student, teacher)


def validate_inference(
    config: Config, world_size: int, sizes: ModelSizes, *, decodes: bool = False
) -> None:
    """Check the rules for a model that is only loaded: to generate, or to be converted.

    `GenerationConfig` checks what depends on how the model decodes.

    Args:
        config: With the options that there are.
        world_size: Processes.
        sizes: Of the model.
        decodes: Whether it generates.
    """
    _refuse(config, *refusals("inference options", config))
    of = {"use": decodes, "processes": world_size, "models": sizes, "model": sizes}
    for stage, what in (of | {"decoding": sizes}).items():
        _refuse(config, *refusals(f"inference {stage}", config, what))
