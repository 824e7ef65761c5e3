"""Checks of a whole configuration: the rules of each, in order.

Nothing here needs process groups or weights: `validate` runs before torch.distributed starts, so
that a run that cannot work ends within seconds. Each check raises `UserError` for the first rule
that is broken, with the values that would work.
"""

from itertools import chain

from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.rules import Refusals, model, objective, usage, values
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.types.model_sizes import ModelSizes


def _refuse(config: Config, *rules: Refusals) -> None:
    """Raise the first refusal of some rules."""
    for refusal in chain(*rules):
        if isinstance(refusal, UserError):
            raise refusal
        name, _, reason = refusal.partition(": ")
        problem, _, remedy = reason.partition("; ")
        raise bad_value(flag_of(name), value_of(config, name), problem, remedy)


def validate(config: Config, world_size: int) -> None:
    """Check every rule that needs no model, for a run of so many processes."""
    needs, unused = objective.needs(config), usage.unused(config)
    # From here on, rules look only at options that are used.
    combinations = (
        objective.combinations(config),
        objective.rollout_engine(config),
        values.combinations(config),
    )
    layout = model.processes(config, world_size), model.batches(config, world_size)
    _refuse(config, needs, unused, *combinations, *layout)
    validate_length(config)


def validate_length(config: Config) -> None:
    """Check the rules that need the number of records, of a configuration `of_data`."""
    _refuse(config, values.length(config))


def validate_architecture(
    config: Config, student: ModelSizes, teacher: ModelSizes | None = None
) -> None:
    """Check every rule about the sizes of the model that is trained, and of its teacher."""
    models = (student,) if teacher is None else (student, teacher)
    of_student = model.parts(config, student), model.architecture(config, student)
    _refuse(config, model.experts_exist(config, *models), *of_student)
    try:
        for other in models[1:]:
            _refuse(config, model.parts(config, other), model.positions(config, other))
    except UserError as error:
        raise UserError(f"--teacher-load {config.teacher_load}: {error}") from None


def validate_layout(
    config: Config, world_size: int, student: ModelSizes, teacher: ModelSizes | None = None
) -> None:
    """Check only how processes share model and batch, of a configuration that is valid but for it.

    To try many layouts; `validate` and `validate_architecture` check these rules too.
    """
    _refuse(config, model.processes(config, world_size), model.batches(config, world_size))
    validate_architecture(config, student, teacher)


def validate_inference(config: Config, world_size: int, sizes: ModelSizes) -> None:
    """Check the rules for a model that is only loaded: to generate, or to be converted.

    `GenerationConfig` checks what depends on how the model decodes.
    """
    split = values.sequence_parallel(config), values.context_parallel(config)
    of_model = model.experts_exist(config, sizes), model.parts(config, sizes)
    _refuse(config, *split, model.processes(config, world_size), *of_model)
