"""Configuration: options classes, command line and YAML, rules across fields."""

from megatron_dlm.config.groups import CheckpointOptions as CheckpointOptions
from megatron_dlm.config.groups import DataConfig as DataConfig
from megatron_dlm.config.groups import DecodingConfig as DecodingConfig
from megatron_dlm.config.groups import ModelConfig as ModelConfig
from megatron_dlm.config.groups import ParallelConfig as ParallelConfig
from megatron_dlm.config.groups import RolloutConfig as RolloutConfig
from megatron_dlm.config.groups import TemplateConfig as TemplateConfig
from megatron_dlm.config.parameter_groups import ParameterGroup as ParameterGroup
from megatron_dlm.config.parsing import parse_arguments as parse_arguments
from megatron_dlm.config.parsing import parse_config as parse_config
from megatron_dlm.config.schema import Config as Config
from megatron_dlm.config.validation import validate as validate
from megatron_dlm.config.validation import validate_architecture as validate_architecture
from megatron_dlm.config.validation import validate_inference as validate_inference
from megatron_dlm.config.validation import validate_layout as validate_layout
from megatron_dlm.config.validation import validate_length as validate_length
from megatron_dlm.config.validation import validate_teacher as validate_teacher
