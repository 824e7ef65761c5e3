"""Convert checkpoints: Hugging Face to Megatron, Megatron to Hugging Face.

megatron-dlm convert --load qwen3/ --save qwen3-megatron/ --target-format megatron
megatron-dlm convert --load runs/mine --save hf/ --target-format sdar
megatron-dlm convert --load runs/lora --save base/ --without-adapters
megatron-dlm convert --load runs/lora --save adapter/ --target-format peft \
    --base-model base/
torchrun --nproc-per-node 8 -m megatron_dlm convert --load runs/mine --save hf/ \
    --pipeline-model-parallel-size 8

The format of `--load` is detected. One process is enough for whatever fits its memory; a
parallel layout spreads the model, and Megatron checkpoints can be loaded at any other layout later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_dlm.commands import parse_command
from megatron_dlm.config import CheckpointOptions, ParallelConfig
from megatron_dlm.entry import rank
from megatron_dlm.models.families import exported_as
from megatron_dlm.rollout.strategies.low_confidence_dynamic import DEFAULT_THRESHOLD
from megatron_dlm.terminal import say
from megatron_dlm.training.model_source import StatedAttention

if TYPE_CHECKING:
    TargetFormat = str
else:
    TargetFormat = Literal[
        "megatron",
        "sdar",
        *exported_as("a2d"),
        *exported_as("two-mode"),
        "rnd1",
        "autoregressive",
        "peft",
    ]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ConversionConfig(CheckpointOptions):
    """Conversion: source, target and format."""

    save: str | None = None
    """Folder to write; it must not exist, unless --overwrite is given."""

    target_format: TargetFormat | None = None
    """megatron (distributed checkpoint), sdar (block diffusion of Qwen3 for SGLang, lmdeploy and
    transformers; sdar_moe for mixtures of experts), a2d-FAMILY (dllm's: dense, full or block-causal
    attention), two-mode-FAMILY (with a causal context), rnd1 (full attention, shifted,
    mixture of experts), autoregressive (also MoE) or peft (a LoRA run's adapters alone). Default:
    sdar, or a2d-FAMILY for networks that code for sdar does not compute, or two-mode-FAMILY."""

    block_size: int | None = None
    """Block size the model was trained with, or should be decoded with under full attention
    (default: block_size of its config.json)."""

    attention_pattern: StatedAttention | None = None
    """Attention of the model, where its config.json does not say: a2d folders of dllm hold
    models of full and of block_causal attention."""

    dynamic_threshold: float = DEFAULT_THRESHOLD
    """Confidence threshold recommended to engines that serve an sdar folder."""

    base_model: str | None = None
    """Hugging Face folder that a peft folder's adapters belong on; it has to hold the weights under
    them (default: what the run was started from)."""

    without_adapters: bool = False
    """Write the weights under a LoRA run's adapters, without them: the base model of peft."""

    scores: str | None = None
    """Files that megatron-dlm evaluate wrote (--output), separated by commas, whose scores the
    model card shows."""

    dtype: DType = "auto"
    """Type of the stored weights; auto keeps the type that config.json states."""

    max_shard_size_mb: int = 5000
    """Megabytes of one safetensors file."""

    overwrite: bool = False
    """Replace an existing Hugging Face folder."""


@dataclass(frozen=True)
class Arguments:
    """Convert a checkpoint."""

    conversion: ConversionConfig = field(default_factory=ConversionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, convert, say what was written."""
    arguments = parse_command("convert", Arguments, argv)
    from megatron_dlm.commands.conversion import run_conversion  # loads PyTorch and Megatron-Core

    target, target_format, dtype = run_conversion(arguments.conversion, arguments.parallel)
    if rank() == 0:
        say(f"wrote {target} ({target_format}, {dtype})")
    return 0
