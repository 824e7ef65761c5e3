import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.rollout.gumbel_noise import gumbel_noise
from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens

MASK_TOKEN_ID, VOCAB_SIZE, PADDED = 3, 11, 16


def draw(logits: Tensor, **overrides: object) -> SampledTokens:
    n = len(logits)
    arguments: dict = dict(
        vocab_start=0,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_TOKEN_ID,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=7,
        sample_index=torch.arange(n),
        position=torch.full((n,), 5),
        denoising_step=torch.full((n,), 1),
    )
    return sample_tokens(logits, **{**arguments, **overrides})


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


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 4},
        {"top_p": 0.8},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_softmax(settings_: dict) -> None:
    logits = torch.randn(PADDED, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = reference_distribution(logits, **settings_)
    n = 40_000
    drawn = draw(logits.expand(n, -1), **settings_).token_ids
    counts = torch.bincount(drawn, minlength=PADDED).double()
    support = expected > 0
    assert counts[~support].sum() == 0
    degrees = int(support.sum()) - 1
    # Wilson-Hilferty: the 99.99 % quantile of chi-square with these degrees of freedom.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square(counts[support], n * expected[support]) < bound


@pytest.mark.parametrize("counter", ["sample_index", "position", "denoising_step"])
def test_every_counter_gives_independent_draws(counter: str) -> None:
    """Draws along each counter are uniform over the vocabulary, and so are pairs of neighbours."""
    n, allowed = 20_001, VOCAB_SIZE - 1
    counters = {
        name: torch.full((n,), 2) for name in ("sample_index", "position", "denoising_step")
    }
    counters[counter] = torch.arange(n)
    drawn = draw(torch.zeros(n, PADDED), **counters).token_ids
    pairs = torch.bincount(drawn[:-1] * PADDED + drawn[1:], minlength=PADDED * PADDED).double()
    pairs = pairs[pairs > 0]
    assert len(pairs) == allowed**2
    degrees = allowed**2 - 1
    statistic = chi_square(pairs, torch.full_like(pairs, (n - 1) / allowed**2))
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_noise_is_standard_gumbel() -> None:
    rows = torch.arange(1000)
    noise = gumbel_noise(-1, rows, rows * 0, rows * 0, torch.arange(1000)).double().flatten()
    quantiles = torch.exp(-torch.exp(-noise)).sort().values  # uniform if the noise is Gumbel
    ideal = (torch.arange(len(noise)) + 0.5) / len(noise)
    assert (quantiles - ideal).abs().max() < 1.95 / math.sqrt(len(noise))  # Kolmogorov, 99.9 %
    assert noise.isfinite().all()
    seeds = [gumbel_noise(seed, rows[:1], rows[:1], rows[:1], rows) for seed in (0, 1, 1 << 63)]
    assert not torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_a_draw_depends_on_its_counters_only() -> None:
    logits = torch.randn(8, PADDED, generator=torch.Generator().manual_seed(0))
    index = torch.arange(8)
    torch.manual_seed(1)
    together = draw(logits, sample_index=index)
    torch.manual_seed(2)
    order = torch.tensor([5, 2, 7])
    apart = draw(logits[order], sample_index=index[order])
    assert torch.equal(apart.token_ids, together.token_ids[order])
    assert torch.equal(apart.confidence, together.confidence[order])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, PADDED),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
)
def test_support_confidence_and_entropy(
    seed: int, temperature: float, top_k: int, top_p: float, spread: float
) -> None:
    logits = spread * torch.randn(20, PADDED, generator=torch.Generator().manual_seed(seed))
    logits[:, MASK_TOKEN_ID] += 10.0 * spread  # what must not be drawn is what the model wants most
    logits[:, VOCAB_SIZE] += 10.0 * spread
    before = logits.clone()
    sampled = draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert torch.equal(logits, before)
    for row, token in enumerate(sampled.token_ids.tolist()):
        plain = reference_distribution(logits[row])
        if temperature == 0.0:
            assert token == int(plain.argmax())
        else:
            assert reference_distribution(logits[row], temperature, top_k, top_p)[token] > 0
        entropy = -torch.special.xlogy(plain, plain).sum()
        torch.testing.assert_close(
            sampled.confidence[row].double(), plain[token], rtol=2e-5, atol=1e-7
        )
        torch.testing.assert_close(sampled.entropy[row].double(), entropy, rtol=2e-5, atol=1e-6)


def test_top_p_keeps_exactly_the_smallest_sufficient_set() -> None:
    probabilities = torch.zeros(PADDED)
    probabilities[:3] = torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().expand(4000, -1)
    for top_p, kept in ((0.4, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2})):
        assert set(draw(logits, top_p=top_p).token_ids.tolist()) == kept


def test_equal_scores_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, PADDED)
    logits[1, [6, 9]] = 1.0
    assert draw(logits, temperature=0.0).token_ids.tolist() == [0, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_types_and_no_rows(dtype: torch.dtype) -> None:
    logits = torch.randn(5, PADDED, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampled, expected = draw(logits), draw(logits.float())
    assert torch.equal(sampled.token_ids, expected.token_ids)
    assert sampled.confidence.dtype == sampled.entropy.dtype == torch.float32
    nothing = draw(logits[:0])
    assert nothing.token_ids.shape == nothing.confidence.shape == nothing.entropy.shape == (0,)
    assert nothing.token_ids.dtype == torch.int64
