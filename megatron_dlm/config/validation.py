"""Every rule across the fields of a configuration, in the order in which they are checked.

Nothing here needs process groups or weights: `validate` runs before torch.distributed starts, so
that a run that cannot work ends within seconds. What depends on the model's sizes is in
`architecture_rules`.
"""

from megatron_dlm.config import (
    architecture_rules,
    layout_rules,
    objective_rules,
    self_distillation_rules,
    usage_rules,
    value_rules,
)
from megatron_dlm.config.schema import Config


def validate(config: Config, world_size: int) -> None:
    """Check every rule that needs no model.

    Args:
        config: The configuration.
        world_size: Number of processes of the run.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    value_rules.check_ranges(config)
    value_rules.check_divergence(config)
    objective_rules.check_objective_inputs(config)
    objective_rules.check_response_source(config)
    objective_rules.check_validation(config)
    objective_rules.check_state_selection(config)
    usage_rules.check_nothing_is_ignored(config)
    # From here on, only what is used is looked at.
    objective_rules.check_attention_annealing(config)
    value_rules.check_limits_by_domain(config)
    value_rules.check_strategy_option(config)
    value_rules.check_response_length_schedule(config)
    value_rules.check_dynamic_threshold_schedule(config)
    value_rules.check_learning_rates(config)
    value_rules.check_parameter_groups(config)
    value_rules.check_sequence_parallel(config)
    value_rules.check_attention_backend(config)
    value_rules.check_optional_packages(config)
    self_distillation_rules.check_lora(config)
    self_distillation_rules.check_self_distillation(config)
    self_distillation_rules.check_something_to_learn(config)
    objective_rules.check_empty_mask(config)
    objective_rules.check_teacher_responses(config)
    objective_rules.check_cache_teacher_targets(config)
    objective_rules.check_offloading(config)
    value_rules.check_save(config)
    layout_rules.check_world_size(config, world_size)
    layout_rules.check_expert_layout(config, world_size)
    layout_rules.check_rollout_batch(config, world_size)
    layout_rules.check_global_batch(config, world_size)
    value_rules.check_schedule_length(config)


def validate_length(config: Config) -> None:
    """Check the rules that need the number of records, of a configuration `of_data`.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    objective_rules.check_attention_annealing(config)
    value_rules.check_dynamic_threshold_schedule(config)
    value_rules.check_schedule_length(config)


def validate_inference(
    config: Config, world_size: int, architecture: architecture_rules.ArchitectureSizes
) -> None:
    """Check the rules that concern a model which only generates.

    `GenerationConfig` checks what depends on how the model decodes.

    Args:
        config: The configuration; what belongs to training has its defaults.
        world_size: Number of processes.
        architecture: Sizes of the model.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    value_rules.check_ranges(config)
    value_rules.check_limits_by_domain(config)
    value_rules.check_sequence_parallel(config)
    layout_rules.check_world_size(config, world_size)
    layout_rules.check_expert_layout(config, world_size)
    architecture_rules.check_tensor_parallel(config, architecture)
    architecture_rules.check_pipeline_parallel(config, architecture)
    architecture_rules.check_experts_exist(config, architecture)
    architecture_rules.check_expert_parallel(config, architecture)
    architecture_rules.check_expert_tensor_parallel(config, architecture)
