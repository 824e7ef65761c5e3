"""The kind of diffusion model, from keys of config.json or from the model type."""

from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import (
    active_parameters,
    architecture_from_hf,
    read_diffusion_kind,
)
from megatron_dlm.types.diffusion_kind import DiffusionKind
from tests.tiny import DENSE, MOE

BLOCKS = DiffusionKind("block_causal", shifted=False)
UNSHIFTED = DiffusionKind("full", shifted=False)
SHIFTED = DiffusionKind("full", shifted=True)
CAUSAL = DiffusionKind("causal", shifted=True)
TWO_MODES = DiffusionKind("block_causal", shifted=False, context_attention="causal")


@pytest.mark.parametrize(
    ("model_type", "stated", "expected"),
    [
        ("qwen3", {}, None),
        ("qwen3", {"block_size": 4}, BLOCKS),
        ("qwen3", {"attention_pattern": "full"}, UNSHIFTED),
        ("qwen3", {"attention_pattern": "full", "block_size": 4}, UNSHIFTED),
        ("qwen3", {"attention_pattern": "full", "shifted": True}, SHIFTED),
        ("qwen3", {"attention_pattern": "causal", "shifted": True}, CAUSAL),
        ("sdar", {}, BLOCKS),
        ("sdar", {"attention_pattern": "full"}, UNSHIFTED),
        ("a2d-qwen3", {"attention_pattern": "full"}, UNSHIFTED),
        ("a2d-qwen3", {"attention_pattern": "full", "shifted": True}, SHIFTED),
        ("rnd1", {}, SHIFTED),
        ("rnd1", {"attention_pattern": "full"}, SHIFTED),
        ("rnd1", {"shifted": False}, UNSHIFTED),
        ("rnd1", {"attention_pattern": "block_causal", "shifted": False}, BLOCKS),
        ("qwen3", {"block_size": 4, "context_attention": "block_causal"}, BLOCKS),
        ("qwen3", {"block_size": 4, "context_attention": "causal"}, TWO_MODES),
        ("two-mode-qwen3", {}, TWO_MODES),
        ("two-mode-qwen3_moe", {}, TWO_MODES),
        ("two-mode-qwen3", {"context_attention": "block_causal"}, BLOCKS),
        ("two-mode-qwen3", {"attention_pattern": "full"}, UNSHIFTED),
        ("two-mode-qwen3", {"attention_pattern": "full", "shifted": True}, SHIFTED),
    ],
)
def test_what_is_left_out_is_the_model_types(
    model_type: str, stated: dict[str, Any], expected: DiffusionKind | None
) -> None:
    assert read_diffusion_kind({"model_type": model_type, **stated}) == expected


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"shifted": True}, "here: attention_pattern = None"),
        ({"shifted": False}, "here: attention_pattern = None"),
        ({"attention_pattern": "causal"}, "here: attention_pattern = 'causal'"),
        ({"attention_pattern": "full", "shifted": "no"}, "here: shifted = 'no'"),
        ({"block_size": 4, "shifted": 1}, "here: shifted = 1"),
        ({"context_attention": "causal"}, "here: attention_pattern = None"),
        ({"block_size": 4, "context_attention": "full"}, "here: context_attention = 'full'"),
        (
            {"attention_pattern": "full", "context_attention": "causal"},
            "here: context_attention = 'causal': a model of full attention has no blocks",
        ),
        (
            {"block_size": 4, "shifted": True, "context_attention": "causal"},
            "here: context_attention = 'causal': blocks are decoded from unshifted logits",
        ),
        ({"model_type": "a2d-qwen3"}, "here: model_type = 'a2d-qwen3' does not say"),
    ],
)
def test_what_says_too_little_is_refused(stated: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_diffusion_kind({"model_type": "qwen3", **stated}, "here")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chosen", [None, 1, 3])
def test_active_parameters_are_those_that_a_token_meets(tied: bool, chosen: int | None) -> None:
    """Transformers' count of the whole model, less the experts that the router leaves out."""
    sizes: dict[str, Any] = {**DENSE, "tie_word_embeddings": tied}
    if chosen is None:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    else:
        sizes = {**MOE, "tie_word_embeddings": tied, "num_experts_per_tok": chosen}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    expected = model.num_parameters()
    if chosen is not None:
        expert = 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"]
        expected -= sizes["num_hidden_layers"] * (sizes["num_experts"] - chosen) * expert
    assert active_parameters(architecture_from_hf(model.config.to_dict())) == expected
