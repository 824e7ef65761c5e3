"""Sizes of products in 8-bit floats, which Transformer Engine wants to be whole tiles.

Megatron-Core does the rest: it runs the layers in Transformer Engine's context for the recipe.
"""

from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer import TransformerConfig

from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import Architecture


def fp8_multiple(config: TransformerConfig) -> int:
    """The rows of a product are a multiple of this; 1 without FP8."""
    return int(get_fp8_align_size(config.fp8_recipe)) if config.fp8 else 1


def check_fp8_sizes(architecture: Architecture, config: Config) -> None:
    """Check that each process's part of every weight has whole tiles.

    Raises:
        UserError: One has not.
    """
    a, tp = architecture, config.parallel.tensor_model_parallel_size
    multiple = int(get_fp8_align_size(config.model.fp8_recipe))
    inner = (
        {"feed-forward units": a.ffn_hidden_size // tp}
        if a.moe_ffn_hidden_size is None
        else {"units of an expert": a.moe_ffn_hidden_size // config.expert_tensor_parallel_size}
    )
    widths = {
        "hidden size": a.hidden_size,
        "queries": a.num_attention_heads // tp * a.kv_channels,
        "keys": a.num_query_groups // tp * a.kv_channels,
        **inner,
    }
    for name, width in widths.items():
        if width % multiple:
            raise bad_value(
                "--fp8-format",
                config.model.fp8_format,
                f"--fp8-recipe {config.model.fp8_recipe} multiplies tiles of {multiple}, and a "
                f"process has {name} of {width}",
                "split the model over fewer processes, or leave --fp8-format out",
            )
