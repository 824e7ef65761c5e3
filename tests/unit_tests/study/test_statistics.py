"""Means, spreads and verdicts of the study."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.claims import (
    BEGINNING,
    END,
    MIDDLE,
    drop,
    rise,
    rollout_speed,
    speed_gain,
)
from benchmarks.study.plots import to_extremes
from benchmarks.study.statistics import (
    Sample,
    Verdict,
    pooled_std,
    rate,
    sample,
    verdict_close,
    verdict_greater,
    verdict_within,
)

seeds = st.lists(st.integers(0, 100).map(float), min_size=2, max_size=5)


@given(seeds, seeds)
def test_mean_and_spread_are_numpys(a: list[float], b: list[float]) -> None:
    first, second = Sample(tuple(a)), Sample(tuple(b))
    assert first.mean == pytest.approx(np.mean(a))
    assert first.std == pytest.approx(np.std(a, ddof=1))
    weights = [len(a) - 1, len(b) - 1]
    variance = np.average([np.var(a, ddof=1), np.var(b, ddof=1)], weights=weights)
    assert pooled_std(first, second) == pytest.approx(np.sqrt(variance))


@given(seeds, seeds)
def test_what_supports_one_direction_refutes_the_other(a: list[float], b: list[float]) -> None:
    opposite: dict[Verdict, Verdict] = {
        "supported": "not supported",
        "not supported": "supported",
        "not distinguishable": "not distinguishable",
    }
    first, second = Sample(tuple(a)), Sample(tuple(b))
    assert verdict_greater(first, second) == opposite[verdict_greater(second, first)]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((90, 92), (80, 82), "supported"),
        ((80, 82), (90, 92), "not supported"),
        ((80, 90), (79, 89), "not distinguishable"),
        ((90, 92), (80,), "supported"),  # one side's spread is known
        ((90,), (80,), "not distinguishable"),  # no spread at all
        ((90, 90), (90, 90), "not distinguishable"),
        ((91, 91), (90, 90), "supported"),  # every seed agrees
    ],
)
def test_greater(a: tuple[float, ...], b: tuple[float, ...], expected: Verdict) -> None:
    assert verdict_greater(Sample(a), Sample(b)) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((90, 91), (92, 93), "supported"),
        ((92, 93), (90, 91), "supported"),
        ((90, 91), (95, 96), "not supported"),
        ((80, 95), (90, 99), "not distinguishable"),
        ((90,), (95,), "not distinguishable"),
        ((1, 98), (49, 50), "not distinguishable"),
        ((90,), (91,), "supported"),
    ],
)
def test_close(a: tuple[float, ...], b: tuple[float, ...], expected: Verdict) -> None:
    assert verdict_close(Sample(a), Sample(b), tolerance=3) == expected


@pytest.mark.parametrize(
    ("reached", "expected"),
    [(96.9, "not supported"), (97.0, "supported"), (101.0, "supported")],
)
def test_within(reached: float, expected: Verdict) -> None:
    assert verdict_within(Sample((reached,)), Sample((100.0,)), tolerance=3) == expected


def result(seed: int, static: float, dynamic: float) -> dict[str, object]:
    settings = {"static": {"accuracy": static}, "dynamic_0.9": {"accuracy": dynamic}}
    return {"recipe": "opdlm", "seed": seed, "evaluations": {"block_4": settings}}


def test_samples_are_of_one_recipe_and_of_what_was_measured() -> None:
    results = [result(2, 0.9, 0.8), result(1, 0.7, 0.7), {**result(1, 0.1, 0.1), "recipe": "sft"}]
    assert sample(results, "opdlm", rate("block_4", "static", "accuracy")) == Sample((0.7, 0.9))
    assert sample(results, "opdlm", rate("block_8", "static", "accuracy")) is None
    assert sample(results, "opdlm_off", rate("block_4", "static", "accuracy")) is None


def test_a_loss_is_taken_within_each_seed() -> None:
    lost = sample(
        [result(1, 0.7, 0.7), result(2, 0.9, 0.8)],
        "opdlm",
        drop("block_4", "static", "dynamic_0.9"),
    )
    assert lost is not None
    assert lost.values == pytest.approx((0.0, 10.0))


def test_a_rise_is_above_the_minimum_and_not_the_beginning() -> None:
    def ending(curve: list[float]) -> dict[str, object]:
        return {"training": {"curves": {"validation_loss": curve}}}

    assert rise("validation_loss")(ending([3.0, 1.25, 1.5, 1.75])) == 0.5
    assert rise("validation_loss")(ending([3.0, 2.0, 1.0])) == 0
    assert rise("validation_loss")({"evaluations": {}}) is None
    assert rise("loss")(ending([1.0, 2.0])) is None


def test_gains_of_speed_over_training() -> None:
    curve = [1.0] * 10 + [2.0] * 30 + [2.5] * 80
    trained = {"training": {"curves": {"tokens_per_forward": curve}}}
    assert rollout_speed(0.75, 1)(trained) == pytest.approx(2.5)
    assert speed_gain(BEGINNING, MIDDLE)(trained) == pytest.approx(1.5)
    assert speed_gain(MIDDLE, END)(trained) == pytest.approx(0)
    assert speed_gain(BEGINNING, MIDDLE)({"evaluations": {}}) is None


def test_error_bars_end_at_the_outermost_seeds() -> None:
    samples = [Sample((0.0, 100.0, 98.0)), Sample((7.0,))]
    below, above = to_extremes(samples)
    means = np.array([each.mean for each in samples])
    assert (means - below).tolist() == pytest.approx([0, 7])
    assert (means + above).tolist() == pytest.approx([100, 7])
