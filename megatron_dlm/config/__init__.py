"""Configuration: options classes, command line and YAML, rules across fields."""

from megatron_dlm.config.groups import (
    CheckpointOptions,
    DataConfig,
    DecodingConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    TemplateConfig,
)
from megatron_dlm.config.parsing import format_config, format_length, parse_arguments, parse_config
from megatron_dlm.config.schema import Config
from megatron_dlm.config.training_groups import (
    ParameterGroup,
)
from megatron_dlm.config.validation import (
    validate,
    validate_architecture,
    validate_inference,
    validate_length,
)

__all__ = [
    "CheckpointOptions",
    "Config",
    "DataConfig",
    "DecodingConfig",
    "ModelConfig",
    "ParallelConfig",
    "ParameterGroup",
    "RolloutConfig",
    "TemplateConfig",
    "format_config",
    "format_length",
    "parse_arguments",
    "parse_config",
    "validate",
    "validate_architecture",
    "validate_inference",
    "validate_length",
]
