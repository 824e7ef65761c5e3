"""The shapes of real Qwen3 models."""

import json
from typing import Any

from benchmarks.environment import REPOSITORY


def qwen3(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, *, tied: bool, **moe: int
) -> dict[str, Any]:
    """The config.json of a Qwen3 model, with the special tokens of the tiny tokenizer."""
    return {
        "model_type": "qwen3_moe" if moe else "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": 151_936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "eos_token_id": 510,
        "pad_token_id": 508,
        **moe,
    }


REAL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_0.6b": qwen3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3_1.7b": qwen3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3_4b": qwen3(36, 2560, 32, 8, 9728, tied=True),
    "qwen3_8b": qwen3(36, 4096, 32, 8, 12288, tied=False),
    "qwen3_30b_a3b": qwen3(
        *(48, 2048, 32, 4, 6144),
        tied=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
}
SHAPES = {
    "tiny": json.loads((REPOSITORY / "examples/tiny/qwen3/config.json").read_text()),
    **REAL_SHAPES,
}
