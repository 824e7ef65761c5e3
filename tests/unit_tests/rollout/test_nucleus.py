"""What top-p keeps of a large vocabulary, against a search over all digits of all logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.rollout import nucleus as module
from megatron_dlm.rollout.block_draws import (
    block_statistics,
    chunks_of,
    draw_from_logits,
    filtered_masses,
)
from megatron_dlm.rollout.nucleus import LEAST_COLUMNS, nucleus
from megatron_dlm.rollout.top_p_search import DigitSearch, only_rank, top_p_threshold

BLOCKS, ROWS = 40, 6
COLUMNS = BLOCKS * 128


def shaped(kind: str, generator: torch.Generator) -> Tensor:
    """Logits [ROWS, COLUMNS] of one kind."""
    logits = torch.randn(ROWS, COLUMNS, generator=generator)
    if kind == "peaked":
        logits[:, torch.randint(COLUMNS, (10,), generator=generator)] += 14.0
    elif kind == "one and a tail":  # no block but one says anything about the end
        logits[:, 777] = 9.0
    elif kind == "wide":
        logits *= 30.0
    elif kind == "many equal":
        logits = (logits * 4).round() / 4
    elif kind == "all equal":
        logits = torch.zeros_like(logits)
    elif kind == "columns looked at":  # which are like none of the others
        logits[:, ::16] += 5.0
    elif kind == "first columns":  # of every block
        logits.unflatten(1, (BLOCKS, -1))[:, :, :8] += 5.0
    logits[:, -200:] = torch.finfo(torch.bfloat16).min
    return logits


def found(
    logits: Tensor, temperature: float, top_p: float, floor: Tensor | None
) -> tuple[Tensor, Tensor]:
    statistics = block_statistics(chunks_of(logits), temperature)
    maximum = statistics.maximum
    shift = (maximum - maximum.amax(dim=-1, keepdim=True)).double() / temperature
    totals = (statistics.tempered * shift.exp()).sum(dim=-1) if floor is None else None
    return nucleus(logits, maximum, totals, temperature, top_p, floor)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(
        [
            "flat",
            "peaked",
            "one and a tail",
            "wide",
            "many equal",
            "all equal",
            "columns looked at",
            "first columns",
        ]
    ),
    temperature=st.sampled_from([0.3, 1.0, 2.0, 50.0]),
    top_p=st.sampled_from([1e-6, 0.3, 0.95, 0.9999, 1 - 1e-7, 1 - 1e-12]),
    cut=st.sampled_from([0, 3, 900]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_same_end_and_the_same_masses(
    seed: int, kind: str, temperature: float, top_p: float, cut: int, dtype: torch.dtype
) -> None:
    """In whichever way it is found; in a row alone every bit is the same."""
    logits = shaped(kind, torch.Generator().manual_seed(seed)).to(dtype)
    floor = logits.float().topk(cut, dim=-1).values[:, -1] if cut else None
    thresholds, masses = found(logits, temperature, top_p, floor)
    top = logits.amax(dim=-1).float()
    expected = top_p_threshold(logits, top, temperature, top_p, floor, only_rank)
    # A sum of other order may say that one token more or less is needed.
    weights = ((logits.double() - top[:, None].double()) / temperature).exp()
    if floor is not None:
        weights[logits.float() < floor[:, None]] = 0.0
    total = weights.sum(dim=-1)
    for row in (thresholds != expected).nonzero()[:, 0].tolist():
        low, high = sorted((float(thresholds[row]), float(expected[row])))
        between = (logits[row].double() >= low) & (logits[row].double() < high)
        above = weights[row, logits[row].double() >= high].sum() / total[row]
        assert abs(above - top_p) < 1e-6
        assert weights[row, between].sum() / total[row] < 2e-6 + weights[row].max() / total[row]
    maximum = block_statistics(chunks_of(logits), 1.0).maximum
    same = filtered_masses(chunks_of(logits), maximum, temperature, thresholds)
    torch.testing.assert_close(masses, same, rtol=2e-5, atol=1e-30)
    alone = found(logits[3:4], temperature, top_p, None if floor is None else floor[3:4])
    assert torch.equal(alone[0], thresholds[3:4])
    assert torch.equal(alone[1], masses[3:4])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 50.0])
@pytest.mark.parametrize("top_p", [1 - 1e-7, 1 - 1e-12, 1 - 2.0**-53])
@pytest.mark.parametrize("columns", [5 * 128, LEAST_COLUMNS + 128])
def test_almost_all_tokens_are_drawn_from(columns: int, top_p: float, temperature: float) -> None:
    """Rounded sums differ by more than what p leaves out; dense float64 says what is drawn."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, columns, generator=generator)
    logits[20:, 77] += 200.0 if temperature > 1.0 else 8.0  # a peak
    fractions = torch.rand(40, generator=generator, dtype=torch.float64)
    tokens = draw_from_logits(logits, fractions, temperature=temperature, top_k=0, top_p=top_p)[0]
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    reached = probabilities.cumsum(dim=-1).gather(1, tokens.long()[:, None])[:, 0]
    before = reached - probabilities.gather(1, tokens.long()[:, None])[:, 0]
    assert (before - 1e-6 < fractions).all()
    assert (fractions < reached + 1e-6).all()


def test_a_digit_is_found_where_a_later_sum_is_less() -> None:
    """Sums of float32, or of other order, need not be those that the first pass had."""
    search = DigitSearch(2, torch.device("cpu"), 1 - 1e-12, only_rank)
    sums = torch.zeros(2, 256, dtype=torch.float64)
    sums[:, 200], sums[1, 100] = 1.0, 1.0
    assert search.advance(sums)[:, 0].tolist() == [200, 100]
    sums = torch.zeros(2, 256, dtype=torch.float64)
    sums[:, 30] = 1 - 1e-7
    assert search.advance(sums)[:, 0].tolist() == [30, 30]


@pytest.mark.parametrize("kind", ["flat", "one and a tail", "peaked", "first columns"])
def test_few_sums_are_enough(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four passes over a row, or none where few blocks hold what is kept."""
    logits = shaped(kind, torch.Generator().manual_seed(1))
    sums, counts = module._RowSearch._sums, []

    def counted(search: module._RowSearch, weight: float) -> tuple[Tensor, float]:
        counts.append(weight)
        return sums(search, weight)

    monkeypatch.setattr(module._RowSearch, "_sums", counted)
    found(logits, 1.0, 0.95, None)
    assert len(counts) <= (0 if kind == "peaked" else 5 * ROWS)


def test_rows_without_a_finite_sum_have_no_masses() -> None:
    logits = shaped("flat", torch.Generator().manual_seed(2))
    logits[0, 900], logits[2, 17], logits[3] = math.nan, math.inf, math.nan
    for floor in (None, torch.full((ROWS,), -1.0)):
        _, masses = found(logits, 1.0, 0.9, floor)
        assert masses.isnan().any(dim=-1).tolist() == [True, False, True, True, False, False]
