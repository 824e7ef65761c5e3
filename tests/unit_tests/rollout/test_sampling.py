import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.rollout import block_draws, row_draws
from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens
from megatron_dlm.rollout.uniforms import counter_uniforms

# Three blocks, the last one cut short.
MASK_TOKEN_ID, VOCAB_SIZE, PADDED = 3, 290, 300
FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 4},
    {"top_p": 0.8},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
]


def draw(logits: Tensor, uniforms: Tensor | None = None, **overrides: object) -> SampledTokens:
    """Draws from logits [n, v]: these as hidden states, the identity as the head."""
    n, columns = logits.shape
    rows = torch.arange(n)
    if uniforms is None:
        uniforms = counter_uniforms(7, rows, rows * 0 + 5, rows * 0 + 1)
    arguments: dict = dict(
        vocab_start=0,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_TOKEN_ID,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    head = torch.eye(columns, dtype=logits.dtype)
    return SampledTokens.unpack(sample_tokens(logits, head, uniforms, **{**arguments, **overrides}))


def reference_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Plain float64 filters by sorting; no ties expected."""
    logits = logits.double().clone()
    logits[VOCAB_SIZE:] = -math.inf
    logits[MASK_TOKEN_ID] = -math.inf
    order = (logits / temperature).argsort(descending=True)
    kept = order[:top_k] if top_k else order
    probabilities = (logits / temperature)[kept].softmax(-1)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        kept, probabilities = kept[before < top_p], probabilities[before < top_p]
    result = torch.zeros_like(logits)
    result[kept] = probabilities / probabilities.sum()
    return result


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def quantile(degrees: int) -> float:
    """Wilson-Hilferty: the 99.99 % quantile of chi-square with these degrees of freedom."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.fixture(params=["rows", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How draws without filters from a vocabulary of this size are made."""
    if request.param == "blocks":
        monkeypatch.setattr(row_draws, "MOST_COLUMNS", 0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.usefixtures("way")
def test_draws_follow_the_filtered_softmax(filters: dict) -> None:
    logits = torch.randn(PADDED, generator=torch.Generator().manual_seed(1)) * 2.5
    expected = reference_distribution(logits, **filters)
    n = 10_000
    drawn = draw(logits.expand(n, -1), **filters).token_ids
    counts = torch.bincount(drawn, minlength=PADDED).double()
    assert counts[expected == 0].sum() == 0
    # Rare tokens together, as chi-square wants at least a few draws of each.
    common = n * expected >= 10
    counts = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = n * torch.cat((expected[common], expected[~common].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert chi_square(counts, expected) < quantile(len(counts) - 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 150, VOCAB_SIZE, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    is_large=st.booleans(),
    by_rows=st.booleans(),
)
def test_the_inverse_of_the_distribution_function_with_confidence_and_entropy(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    spread: float,
    is_large: bool,
    by_rows: bool,
) -> None:
    """Against float64 over the whole vocabulary; only numbers at a border may go either way."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(20, PADDED, generator=generator)
    logits[:, MASK_TOKEN_ID] += 10.0 * spread  # what must not be drawn is what the model wants most
    logits[:, VOCAB_SIZE] += 10.0 * spread
    uniforms = torch.rand(20, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1.0 - 2.0**-53])
    before = logits.clone()
    with (
        patch.object(block_draws, "LEAST_COLUMNS", 0 if is_large else 1 << 15),
        patch.object(row_draws, "MOST_COLUMNS", PADDED if by_rows else 0),
    ):
        sampled = draw(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(logits, before)
    for row, token in enumerate(sampled.token_ids.tolist()):
        plain = reference_distribution(logits[row])
        if temperature == 0.0:
            assert token == int(plain.argmax())
        else:
            expected = reference_distribution(logits[row], temperature, top_k, top_p)
            assert expected[token] > 0
            reached = expected.cumsum(0)
            assert reached[token] > uniforms[row] - 1e-6
            assert reached[token] - expected[token] <= uniforms[row] + 1e-6
        entropy = -torch.special.xlogy(plain, plain).sum()
        confidence = sampled.confidence[row].double()
        torch.testing.assert_close(confidence, plain[token], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sampled.entropy[row].double(), entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counter", range(3), ids=["sample_index", "position", "denoising_step"])
def test_every_counter_gives_independent_uniform_numbers(counter: int) -> None:
    """Numbers along each counter are uniform, and so are pairs of neighbours."""
    n, bins = 20_001, 10
    counters = [torch.full((n,), 2) for _ in range(3)]
    counters[counter] = torch.arange(n)
    numbers = counter_uniforms(-1, *counters)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    ideal = (torch.arange(n) + 0.5) / n
    assert (numbers.sort().values - ideal).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov, 99.9 %
    drawn = (numbers * bins).long()
    pairs = torch.bincount(drawn[:-1] * bins + drawn[1:], minlength=bins * bins).double()
    statistic = chi_square(pairs, torch.full_like(pairs, (n - 1) / bins**2))
    assert abs(statistic - (bins**2 - 1)) < 4 * math.sqrt(2 * (bins**2 - 1))
    fine = torch.frac(numbers * 2.0**40)  # the low bits
    assert (fine.sort().values - ideal).abs().max() < 1.95 / math.sqrt(n)
    seeds = [counter_uniforms(seed, *counters) for seed in (0, 1, 1 << 63)]
    assert not torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def uniform_by_definition(counters: tuple[int, ...]) -> float:
    """In whole numbers: SplitMix64's step and finaliser for each counter after the seed."""
    key, *rest = counters
    for counter in rest:
        key = ((key ^ counter) % 2**64 + 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    return (key >> 11) * 2.0**-53


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(rows=st.lists(st.tuples(INT64, INT64, INT64, INT64), max_size=5))
def test_arrays_and_tensors_have_the_same_numbers(rows: list[tuple[int, ...]]) -> None:
    arrays = np.array(rows, dtype=np.int64).reshape(-1, 4).T.copy()
    tensors = torch.from_numpy(arrays.copy())
    expected = [uniform_by_definition(counters) for counters in rows]
    numbers = counter_uniforms(*arrays)
    assert numbers.dtype == np.float64
    assert numbers.tolist() == counter_uniforms(*tensors).tolist() == expected
    assert arrays.T.tolist() == tensors.T.tolist() == [list(row) for row in rows]  # as they were
    for row in rows[:1]:  # one seed for all
        assert counter_uniforms(row[0], *arrays[1:])[0] == expected[0]
        assert counter_uniforms(row[0] % 2**64, *tensors[1:])[0] == expected[0]


@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 0.0}], ids=str)
@pytest.mark.usefixtures("way")
def test_draws_do_not_depend_on_batch_and_chunks(
    filters: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(20, PADDED, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = draw(logits, uniforms, **filters)
    order = torch.tensor([5, 2, 19, 7])
    monkeypatch.setattr("megatron_dlm.rollout.sampling.MAX_LOGITS", 900)
    monkeypatch.setattr(row_draws, "MOST_LOGITS", 900)
    monkeypatch.setattr(block_draws, "CHUNK_COLUMNS", 128)
    apart = draw(logits[order], uniforms[order], **filters)
    for name in ("token_ids", "confidence", "entropy"):
        assert torch.equal(getattr(apart, name), getattr(together, name)[order])


def test_top_p_keeps_exactly_the_smallest_sufficient_set() -> None:
    probabilities = torch.zeros(PADDED)
    probabilities[[0, 150, 280]] = torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().clamp(min=-1e30).expand(4000, -1)
    for top_p, kept in ((0.4, {0}), (0.51, {0, 150}), (0.79, {0, 150}), (0.81, {0, 150, 280})):
        assert set(draw(logits, top_p=top_p).token_ids.tolist()) == kept


@pytest.mark.usefixtures("way")
def test_equal_logits_stay_together_and_the_most_likely_is_the_lowest_id() -> None:
    logits = torch.zeros(2, PADDED)
    logits[1, [6, 9, 200]] = 1.0
    assert draw(logits, temperature=0.0).token_ids.tolist() == [0, 6]
    rows = logits[1:].expand(500, -1)
    for filters in ({"top_k": 1}, {"top_k": 3}, {"top_p": 1e-6}):
        assert set(draw(rows, **filters).token_ids.tolist()) == {6, 9, 200}
    signed = torch.full((500, PADDED), -9.0)
    signed[:, [5, 250]] = torch.tensor([0.0, -0.0])  # equal, with different bits
    assert set(draw(signed, top_p=0.3).token_ids.tolist()) == {5, 250}


@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 0.0}], ids=str)
def test_infinite_logits_and_rows_of_nan_give_tokens_that_may_be_drawn(filters: dict) -> None:
    logits = torch.zeros(4, PADDED)
    logits[0] = math.nan
    logits[1, 200] = math.inf
    logits[2, 130] = math.nan
    logits[3, 1:] = -1e38
    logits = torch.nn.functional.pad(logits, (0, 84), value=torch.finfo(torch.float32).min)
    uniforms = torch.full((4,), 0.5, dtype=torch.float64)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    found = [block_draws.draw_from_logits(logits, uniforms, **settings)]
    if not filters.keys() & {"top_k", "top_p"}:
        found.append(row_draws.draw_from_rows(logits, uniforms, settings["temperature"]))
    for packed in found:
        tokens = packed[0].long().tolist()
        assert tokens[1] == 200
        assert tokens[3] == 0
        assert all(0 <= token < PADDED for token in tokens)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_bfloat16_and_no_rows(filters: dict) -> None:
    logits = torch.randn(50, PADDED, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampled, expected = draw(logits, **filters), draw(logits.float(), **filters)
    assert torch.equal(sampled.token_ids, expected.token_ids)
    torch.testing.assert_close(sampled.confidence, expected.confidence)
    assert sampled.confidence.dtype == sampled.entropy.dtype == torch.float32
    nothing = draw(logits[:0], **filters)
    assert nothing.token_ids.shape == nothing.confidence.shape == nothing.entropy.shape == (0,)
    assert nothing.token_ids.dtype == torch.int64
