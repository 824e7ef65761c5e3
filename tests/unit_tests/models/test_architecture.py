"""What config.json says of attention and prediction, and what it leaves to the model type."""

from typing import Any

import pytest

from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import DiffusionConvention, diffusion_convention

BLOCKS = DiffusionConvention("block_causal", shifted=False)
UNSHIFTED = DiffusionConvention("full", shifted=False)
SHIFTED = DiffusionConvention("full", shifted=True)
CAUSAL = DiffusionConvention("causal", shifted=True)


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
        ("a2d-qwen3", {}, UNSHIFTED),
        ("a2d-qwen3", {"shifted": True}, SHIFTED),
        ("rnd1", {}, SHIFTED),
        ("rnd1", {"attention_pattern": "full"}, SHIFTED),
        ("rnd1", {"shifted": False}, UNSHIFTED),
        ("rnd1", {"attention_pattern": "block_causal", "shifted": False}, BLOCKS),
    ],
)
def test_what_is_left_out_is_the_model_types(
    model_type: str, stated: dict[str, Any], expected: DiffusionConvention | None
) -> None:
    assert diffusion_convention({"model_type": model_type, **stated}) == expected


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"shifted": True}, "here: attention_pattern = None"),
        ({"shifted": False}, "here: attention_pattern = None"),
        ({"attention_pattern": "causal"}, "here: attention_pattern = 'causal'"),
        ({"attention_pattern": "full", "shifted": "no"}, "here: shifted = 'no'"),
        ({"block_size": 4, "shifted": 1}, "here: shifted = 1"),
    ],
)
def test_what_says_too_little_is_refused(stated: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        diffusion_convention({"model_type": "qwen3", **stated}, "here")
