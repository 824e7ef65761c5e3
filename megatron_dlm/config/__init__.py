"""Configuration: options classes, command line and YAML, rules across fields."""

from megatron_dlm.config.groups import (
    DataConfig,
    DecodingConfig,
    DistillationConfig,
    LoRAConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RolloutConfig,
    SelfDistillationConfig,
)
from megatron_dlm.config.parsing import format_config, format_length, parse_arguments, parse_config
from megatron_dlm.config.schema import Config
from megatron_dlm.config.training_groups import (
    LoggingConfig,
    OptimizerConfig,
    ParameterGroup,
    TrainingConfig,
)
from megatron_dlm.config.validation import (
    validate,
    validate_architecture,
    validate_inference,
    validate_length,
)

__all__ = [
    "Config",
    "DataConfig",
    "DecodingConfig",
    "DistillationConfig",
    "LoRAConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroup",
    "RolloutConfig",
    "SelfDistillationConfig",
    "TrainingConfig",
    "format_config",
    "format_length",
    "parse_arguments",
    "parse_config",
    "validate",
    "validate_architecture",
    "validate_inference",
    "validate_length",
]
