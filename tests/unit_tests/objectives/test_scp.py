"""The SCP loss against transformers in float64: one forward a document under a dense mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.data.packing import TrainingBatch, pack
from megatron_dlm.models.attention_layout import pair_draws
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.attention_annealing import anneal_attention
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.objectives.dense_reference import MASK, VOCABULARY, Models, corpus_window

pytestmark = pytest.mark.usefixtures("single_process")


def window(lengths: list[int], seed: int = 0) -> Trajectory:
    ids = torch.randint(0, 500, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return corpus_window(ids, lengths)


def objective(name: str = "scp", **options: object):
    config = Config.from_dict({"device": "cpu", "objective": name, **options})
    return OBJECTIVES[name](config, MASK, VOCABULARY)


def dense_loss(
    model: Qwen3ForCausalLM, lengths: list[int], x_0, x_t, t_of_document, weighting, seen
):
    """Equation 2 of the paper, a document at a time; `seen`: [query][key] over the window."""
    total, start = 0.0, 0
    for length, t in zip(lengths, t_of_document, strict=True):
        clean, noisy = x_0[start : start + length], x_t[start : start + length]
        own = seen[start : start + length, start : start + length]
        bias = torch.zeros(1, 1, length, length, dtype=torch.float64)
        bias.masked_fill_(~own, -torch.inf)
        with torch.no_grad():
            log_p = model(noisy[None], attention_mask=bias).logits[0].log_softmax(-1)
        for i in range(length - 1):
            if noisy[i + 1] == MASK:
                weight = 1 / t if weighting == "inverse_t" else 1.0
                total -= float(weight * log_p[i, clean[i + 1]])
        start += length
    return total


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(max_examples=25)
@given(
    windows=st.lists(LENGTHS, min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    weighting=st.sampled_from(["inverse_t", "none"]),
    row_mean=st.booleans(),
    attention=st.sampled_from(["full", "causal", "annealed"]),
)
def test_loss_equals_one_dense_forward_per_document(
    models: Models,
    windows: list[list[int]],
    seed: int,
    weighting: str,
    row_mean: bool,
    attention: str,
) -> None:
    options: dict[str, object] = {"loss_weighting": weighting}
    if attention == "annealed":
        options["attention_annealing_iters"] = 10
    else:
        options["attention_pattern"] = attention
    scp = objective(**options)
    trajectories = [window(lengths, seed + i) for i, lengths in enumerate(windows)]
    documents, expected, count = [], 0.0, 0
    for lengths, trajectory in zip(windows, trajectories, strict=True):
        document = scp.document(trajectory, torch.Generator().manual_seed(seed))
        seen = torch.ones(sum(lengths), sum(lengths), dtype=torch.bool)
        if attention == "causal":
            seen = seen.tril()
        if attention == "annealed":
            document = anneal_attention(document, scp.config, seed, iteration=2)
            assert document.annealing is not None
            keys, thresholds = document.annealing
            assert set(thresholds.tolist()) == {round(0.3 * 2**24)}  # the third of ten updates
            seen = seen.tril() | (pair_draws(keys[:, None], keys) < thresholds)
        documents.append(document)
        # The draws as the docstring states them: t of each document, then the masks.
        generator = torch.Generator().manual_seed(seed)
        t = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
        draws = torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
        x_0, starts = trajectory.token_ids, [sum(lengths[:i]) for i in range(len(lengths))]
        x_t = x_0.clone()
        for start, length, level in zip(starts, lengths, t, strict=True):
            for i in range(start + 1, start + length):
                if draws[i] < level:
                    x_t[i] = MASK
        assert torch.equal(document.token_ids, x_t)
        loss = dense_loss(models.hf_student, lengths, x_0, x_t, t.tolist(), weighting, seen)
        predicted = sum(lengths) - len(lengths)
        expected += loss / max(predicted, 1) if row_mean else loss
        count += predicted > 0 if row_mean else predicted
    batch = pack(documents, pad_multiple=4, row_mean=row_mean)
    assert batch.loss_count == count
    assert models.loss(scp, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_annealing_is_keyed_by_sample_and_update_and_ends_in_full_attention() -> None:
    scp = objective(attention_annealing_iters=4)
    document = scp.document(window([40]), torch.Generator().manual_seed(0))

    def keys(sample: int, iteration: int) -> list[int]:
        annealed = anneal_attention(document, scp.config, sample, iteration).annealing
        assert annealed is not None
        return annealed[0].tolist()

    assert keys(3, 1) == keys(3, 1)
    assert keys(3, 1) != keys(3, 2)
    assert keys(3, 1) != keys(4, 1)
    for iteration in (3, 4, 100):  # the fourth update is the first that sees everything
        assert anneal_attention(document, scp.config, 3, iteration) is document


def test_packed_rows_equal_single_windows(models: Models) -> None:
    scp = objective()
    generator = torch.Generator().manual_seed(5)
    lengths = ([7, 9], [12], [1, 1, 5])
    documents = [scp.document(window(own, 3), generator) for own in lengths]
    alone: list[TrainingBatch] = [pack([document]) for document in documents]
    together = pack(documents, pad_multiple=8)
    expected = sum(models.loss(scp, batch) for batch in alone)
    assert models.loss(scp, together) == pytest.approx(expected, rel=1e-5)
    assert together.loss_count == sum(batch.loss_count for batch in alone)


def test_the_first_token_always_shows_and_the_weighted_masks_average_to_one() -> None:
    """E[1(masked) / t] = 1 for every other token: the divided loss estimates the bound unbiased."""
    scp = objective()
    lengths = [3, 1, 6]
    trajectory = window(lengths)
    sums = torch.zeros(sum(lengths), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    repetitions = 4000
    for _ in range(repetitions):
        document = scp.document(trajectory, generator)
        # Cut off the rare huge weights, whose share of the mean is known: P(t < c) = c for 1/t.
        weights = document.weights.double()
        sums[document.supervised + 1] += torch.where(weights > 100, 0.0, weights)
    mean = sums / repetitions
    assert mean[[0, 3, 4]].tolist() == [0, 0, 0]
    others = torch.tensor([1, 2, 5, 6, 7, 8, 9])
    assert torch.allclose(mean[others], torch.full((7,), 0.99, dtype=torch.float64), atol=0.15)
    assert document.loss_count == 7


def test_a_whole_window_is_one_document_without_boundaries(models: Models) -> None:
    trajectory = window([10])
    bare = Trajectory(0, trajectory.prompt_ids, trajectory.response_ids, trajectory.unmask_step)
    scp = objective()
    with_lengths, without = (
        scp.document(t, torch.Generator().manual_seed(1)) for t in (trajectory, bare)
    )
    assert torch.equal(with_lengths.token_ids, without.token_ids)
    assert torch.equal(with_lengths.document_ids, without.document_ids)
