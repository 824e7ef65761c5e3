"""Checks of a whole configuration, each over the rules of some stages.

Nothing here needs process groups or weights: `validate` runs before torch.distributed starts, so
that a run that cannot work ends within seconds.
"""

from megatron_dlm.config.rules.registry import Stage, check_rules
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError
from megatron_dlm.types.model_sizes import ModelSizes


def validate(config: Config, world_size: int) -> None:
    """Check every rule that needs no model.

    Args:
        config: The configuration.
        world_size: Number of processes of the run.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    for stage in (Stage.VALUES, Stage.NEEDS, Stage.USAGE, Stage.COMBINATIONS):
        check_rules("training", stage, config)
    check_rules("training", Stage.LAYOUT, config, world_size)
    check_rules("training", Stage.LENGTH, config)


def validate_length(config: Config) -> None:
    """Check the rules that need the number of records, of a configuration `of_data`.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    check_rules("training", Stage.LENGTH, config)


def validate_architecture(
    config: Config, student: ModelSizes, teacher: ModelSizes | None = None
) -> None:
    """Check every rule that depends on the models' sizes; weights are not needed.

    Args:
        config: The configuration.
        student: The model that is trained.
        teacher: The teacher, if there is one.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    models = (student,) if teacher is None else (student, teacher)
    check_rules("training", Stage.MODELS, config, *models)
    check_rules("training", Stage.ARCHITECTURE, config, student)
    if teacher is not None:
        try:
            check_rules("teacher", Stage.ARCHITECTURE, config, teacher)
        except UserError as error:
            raise UserError(f"--teacher-load {config.teacher_load}: {error}") from None


def validate_inference(config: Config, world_size: int, model: ModelSizes) -> None:
    """Check the rules for a model that is only loaded: to generate, or to be converted.

    `GenerationConfig` checks what depends on how the model decodes.

    Args:
        config: The configuration, with the defaults of training options.
        world_size: Number of processes.
        model: Sizes of the model.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    for stage in (Stage.VALUES, Stage.COMBINATIONS):
        check_rules("inference", stage, config)
    check_rules("inference", Stage.LAYOUT, config, world_size)
    for stage in (Stage.MODELS, Stage.ARCHITECTURE):
        check_rules("inference", stage, config, model)
