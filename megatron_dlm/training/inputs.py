"""What a run reads before it builds a model: checked first, so that bad input costs seconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config import Config, validate_architecture
from megatron_dlm.data.prompts import (
    ExampleDataset,
    PromptDataset,
    read_examples,
    read_prompts,
)
from megatron_dlm.data.tokenizer import SpecialTokens, load_tokenizer, resolve_special_tokens
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import (
    Architecture,
    is_block_diffusion,
    read_architecture,
)
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.training.model_source import ModelSource, open_model_source


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        source: The student's weights; None for random ones.
        teacher_source: The teacher's weights; None for objectives without a teacher.
        architecture: The student's.
        tokenizer: Shared by student and teacher.
        tokenizer_folder: Where it was read from.
        special_tokens: EOS, padding and MASK, resolved once.
        data: Prompts for on-policy objectives, else prompt + response examples.
    """

    source: ModelSource | None
    teacher_source: ModelSource | None
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    special_tokens: SpecialTokens
    data: PromptDataset | ExampleDataset

    def hf_config(self, config: Config) -> dict[str, Any]:
        """config.json of the trained model: a block-diffusion one names its grid and its MASK."""
        hf_config = dict(self.architecture.hf_config)
        if config.objective.objective != "next_token":
            hf_config["block_size"] = config.model.block_size
            hf_config["mask_token_id"] = self.special_tokens.mask_token_id
        return hf_config


def _check_teacher(student: Architecture, teacher: ModelSource) -> None:
    if is_block_diffusion(teacher.architecture.hf_config):
        raise bad_value(
            teacher.field,
            str(teacher.path),
            "is a block-diffusion model; the teacher has to be autoregressive",
            "name the autoregressive model's folder with --teacher-load",
        )
    if teacher.architecture.vocab_size != student.vocab_size:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            f"has a vocabulary of {teacher.architecture.vocab_size}, "
            f"the student one of {student.vocab_size}",
            "choose a teacher with the student's tokenizer",
        )


def read_inputs(config: Config) -> RunInputs:
    """Read and check checkpoints' descriptions, tokenizer and data; loads no weights.

    Raises:
        UserError: Anything that could not work.
    """
    objective = OBJECTIVES[config.objective.objective]
    source = teacher_source = None
    if config.model.load is not None:
        source = open_model_source(config.model.load, "--load")
        architecture = source.architecture
    elif config.model.model_config is not None:
        architecture = read_architecture(config.model.model_config, "--model-config")
    else:
        raise bad_value(
            "--load", None, "nothing to train", "name a model folder, or give --model-config"
        )
    validate_architecture(config, architecture)
    if objective.uses_teacher:
        path = config.distillation.teacher_load or config.model.load
        assert path is not None
        field = "--teacher-load" if config.distillation.teacher_load else "--load"
        teacher_source = open_model_source(path, field)
        _check_teacher(architecture, teacher_source)
        validate_architecture(config, teacher_source.architecture)
    if config.model.tokenizer is not None:
        tokenizer_folder = Path(config.model.tokenizer)
    elif source is not None:
        tokenizer_folder = source.hf_folder
    else:
        raise bad_value("--tokenizer", None, "no tokenizer to read", "name its folder")
    tokenizer = load_tokenizer(tokenizer_folder)
    special_tokens = resolve_special_tokens(
        tokenizer, architecture.hf_config, str(tokenizer_folder)
    )
    data: PromptDataset | ExampleDataset
    if objective.on_policy:
        assert config.data.prompts is not None
        data = read_prompts(
            config.data.prompts,
            tokenizer,
            special_tokens,
            config.data.max_prompt_length,
            config.data.chat_template_kwargs,
        )
    else:
        assert config.data.train_data is not None
        data = read_examples(
            config.data.train_data,
            tokenizer,
            special_tokens,
            config.data.max_prompt_length,
            config.rollout.max_response_length,
            config.data.chat_template_kwargs,
        )
    return RunInputs(
        source, teacher_source, architecture, tokenizer, tokenizer_folder, special_tokens, data
    )
