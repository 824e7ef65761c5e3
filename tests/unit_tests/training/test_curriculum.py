"""Rollout lengths against the paper's formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.config import Config
from megatron_dlm.training.curriculum import response_length


@given(
    st.integers(1, 400), st.integers(0, 4000), st.integers(1, 120), st.integers(0, 200),
    st.sampled_from(["linear", "cosine"]),
)  # fmt: skip
def test_schedules(shortest: int, extra: int, warmup: int, rollout: int, schedule: str) -> None:
    config = Config.from_dict(
        dict(
            min_response_length=shortest,
            max_response_length=shortest + extra,
            response_length_schedule=schedule,
            response_length_warmup_rollouts=warmup,
            block_size=4,
        )
    )
    if schedule == "linear":
        expected = min(shortest + extra, shortest + math.floor(rollout / warmup * extra))
    else:
        angle = math.pi / 2 * min(rollout / warmup, 1)
        expected = math.floor(shortest + extra * (1 - math.cos(angle)))
    length = response_length(config, rollout)
    assert expected <= length < expected + 4 + 1
    assert length % 4 == 0 or length == shortest + extra
    if rollout >= warmup:
        assert length == shortest + extra


@pytest.mark.parametrize("rollout", [0, 7])
def test_constant(rollout: int) -> None:
    config = Config.from_dict(dict(min_response_length=8, max_response_length=30))
    assert response_length(config, rollout) == 30
