"""Tiny random checkpoints of every family, made and run by transformers, the oracle."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.families import random_family_model
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE

# Each size differs from the others, so that no two dimensions can be confused.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
MOE_SIZES = SIZES | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    # So that token choices are clear of ties between experts.
    "initializer_range": 0.3,
}


def random_hf_model(
    *, moe: bool = False, family: str = "qwen3", tied: bool = False, seed: int = 0, **sizes: int
) -> PreTrainedModel:
    """A model whose parameters are all random, norms included."""
    family, defaults = ("qwen3_moe", MOE_SIZES) if moe else (family, SIZES)
    sizes = {**defaults, **sizes, "tie_word_embeddings": tied}
    model: PreTrainedModel = random_family_model(family, seed, sizes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save_hf_model(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Save as a published checkpoint looks; sharded if it is larger than a shard."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = json.loads((folder / "config.json").read_text())
    if "num_local_experts" in config:  # transformers 5 renames it when it saves
        config["num_experts"] = config.pop("num_local_experts")
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def hf_logits(model: PreTrainedModel, tokens: torch.Tensor, **arguments) -> torch.Tensor:
    return model(input_ids=tokens[None], **arguments).logits[0]


def two_mode_logits(
    model: PreTrainedModel, tokens: torch.Tensor, noisy: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Logits of causal attention, but for tokens that are being denoised (`noisy`, [S] bool).

    These see their block and all before it.
    """
    position = torch.arange(len(tokens))
    block = position // block_size
    visible = position[:, None] >= position
    visible |= noisy[:, None] & (block[:, None] >= block)
    bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    return hf_logits(model, tokens, attention_mask=bias[None, None])
