"""Scaled rotary embeddings: transformers' frequencies and factors, or a refusal in one line."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_dlm.errors import UserError
from megatron_dlm.models.rope_scaling import read_rotary_embedding
from megatron_dlm.models.rotary import attention_factor, scaled_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


NEEDED = dict(
    rope_theta=st.floats(2.0, 1e7),
    factor=st.floats(0.5, 64.0),
    original_max_position_embeddings=st.integers(4, 100_000),
)
SCALINGS = st.one_of(
    st.fixed_dictionaries(
        dict(
            NEEDED,
            rope_type=st.just("llama3"),
            low_freq_factor=st.floats(0.1, 2.0),
            high_freq_factor=st.floats(2.5, 32.0),
        )
    ),
    st.fixed_dictionaries(
        dict(NEEDED, rope_type=st.just("yarn")),
        optional=dict(
            attention_factor=maybe(st.floats(0.5, 2.0)),
            beta_fast=maybe(st.floats(20.0, 64.0)),
            beta_slow=maybe(st.floats(0.1, 8.0)),
            mscale=maybe(st.floats(0.0, 2.0)),
            mscale_all_dim=maybe(st.floats(0.0, 2.0)),
            truncate=maybe(st.booleans()),
        ),
    ),
)


@given(
    SCALINGS,
    st.sampled_from([2, 8, 64, 128]),
    st.sampled_from(["rope_scaling", "rope_parameters"]),
    maybe(st.integers(4, 1000)),
)
def test_frequencies_and_factor_are_those_of_transformers(
    scaling: dict[str, Any], head_size: int, key: str, beside: int | None
) -> None:
    stated: dict[str, Any] = {key: scaling, "head_dim": head_size, "max_position_embeddings": 4096}
    if beside is not None:
        stated["original_max_position_embeddings"] = beside
    base, ours = read_rotary_embedding(stated, "config.json")
    assert ours is not None
    # A copy: transformers writes into the dictionary.
    config = Qwen3Config(**{**stated, key: dict(scaling)})
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(
        scaled_frequencies(ours, base, head_size), expected, rtol=1e-5, atol=0
    )
    assert attention_factor(ours) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("missing", [*LLAMA3][1:])
def test_a_missing_key_of_llama3_is_named(missing: str) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != missing}
    with pytest.raises(UserError, match=rf"^here: rope_scaling: {missing} = None: .* llama3 needs"):
        read_rotary_embedding({"rope_theta": 5e5, "rope_scaling": scaling}, "here")


@pytest.mark.parametrize("missing", [*YARN][1:])
def test_a_missing_key_of_yarn_is_named(missing: str) -> None:
    scaling = {key: value for key, value in YARN.items() if key != missing}
    with pytest.raises(UserError, match=rf"^here: rope_parameters: {missing} = None: .* yarn need"):
        read_rotary_embedding({"rope_theta": 5e5, "rope_parameters": scaling}, "here")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor = 1.0: is not ab"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast = 0.5: is not above beta_slow ="),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling: factor = '4'"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate = 'no'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear': is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta = 1.0"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        read_rotary_embedding({"rope_theta": 5e5} | changes, "here")
    assert str(error.value).startswith("here: ")
    assert named in str(error.value)
