"""Rollout lengths against the paper's formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.config import Config
from megatron_dlm.rollout.curriculum import dynamic_threshold, response_length


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


@pytest.mark.parametrize("length", [{"num_rollouts": 483}, {"num_epochs": 1}])
def test_the_published_threshold_schedule(length: dict[str, int]) -> None:
    """OPDLM's 4B and 8B scripts: 0.9 for 150 rollouts, then a quarter cosine to 0.7 at the end."""
    options = dict(
        dynamic_threshold=0.9,
        final_dynamic_threshold=0.7,
        dynamic_threshold_schedule="cosine",
        dynamic_threshold_hold_rollouts=150,
    )
    config = Config.from_dict({**options, **length}).of_data(61_816)
    assert [dynamic_threshold(config, i) for i in (0, 75, 149)] == [0.9] * 3
    assert dynamic_threshold(config, 482) == pytest.approx(0.7)
    # Rollout i of that code, from 1, is step i - 1 here.
    for i in (151, 200, 317, 400):
        expected = 0.9 - 0.2 * (1 - math.cos(math.pi / 2 * (i - 150) / 333))
        assert dynamic_threshold(config, i - 1) == pytest.approx(expected)
    linear = {**options, **length, "dynamic_threshold_schedule": "linear"}
    soon = Config.from_dict({**linear, "dynamic_threshold_rollouts": 4}).of_data(61_816)
    values = [dynamic_threshold(soon, i) for i in (149, 150, 151, 152, 153, 154, 400)]
    assert values == pytest.approx([0.9, 0.85, 0.8, 0.75, 0.7, 0.7, 0.7])
