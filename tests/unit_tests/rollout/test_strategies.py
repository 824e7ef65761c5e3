import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.errors import UserError
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.strategies import STRATEGIES, DenoisedBlocks
from megatron_dlm.rollout.strategies.blocks import in_order

BLOCK_SIZE = 8
CONFIG = GenerationConfig(
    block_size=BLOCK_SIZE,
    remasking_strategy="low_confidence_static",
    dynamic_threshold=0.5,
    denoising_steps_per_block=4,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_running_requests=1,
    entropy_bound=0.4,
    draft_steps=2,
    context_attention="causal",
)


def commit_positions(blocks, config):
    return config.strategy.commit(blocks, config.strategy_value)


def slow_commit(
    strategy: str,
    masked: list[bool],
    confidence: list[float],
    entropy: list[float],
    step: int,
    masked_at_start: int,
) -> set[int]:
    """One block, in plain Python, from the definitions."""
    candidates = [position for position in range(BLOCK_SIZE) if masked[position]]
    confident = sorted(candidates, key=lambda position: (-confidence[position], position))
    if strategy == "low_confidence_static":
        return set(confident[: BLOCK_SIZE // CONFIG.denoising_steps_per_block])
    if strategy == "low_confidence_dynamic":
        passing = {p for p in candidates if confidence[p] > CONFIG.dynamic_threshold}
        return passing or set(confident[:1])
    if strategy == "entropy":
        steps = CONFIG.denoising_steps_per_block
        keep = masked_at_start * max(steps - step, 0) // steps
        certain = sorted(candidates, key=lambda position: (entropy[position], position))
        return set(certain[: max(len(candidates) - keep, 1)])
    if strategy == "speculative":
        return set(candidates[: max(-(-masked_at_start // CONFIG.draft_steps), 1)])
    accepted: list[int] = []
    for position in confident:
        values = [entropy[p] for p in [*accepted, position]]
        if accepted and sum(values) - max(values) > CONFIG.entropy_bound:
            break
        accepted.append(position)
    return set(accepted)


# Few distinct values, exact in binary, so that ties are the rule and thresholds are hit exactly.
SCORES = st.lists(
    st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]), min_size=BLOCK_SIZE, max_size=BLOCK_SIZE
)
BLOCKS = st.lists(
    st.tuples(
        st.lists(st.booleans(), min_size=BLOCK_SIZE, max_size=BLOCK_SIZE),
        SCORES,
        SCORES,
        st.integers(1, 6),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=150, deadline=None)
@given(blocks=BLOCKS)
def test_commits_what_the_definition_says(strategy: str, blocks: list[tuple]) -> None:
    masked, confidence, entropy, steps, unmasked_before = zip(*blocks, strict=True)
    at_start = [
        min(BLOCK_SIZE, sum(m) + extra) for m, extra in zip(masked, unmasked_before, strict=True)
    ]
    committed = commit_positions(
        DenoisedBlocks(
            masked=torch.tensor(masked),
            confidence=torch.tensor(confidence),
            entropy=torch.tensor(entropy),
            step=torch.tensor(steps),
            masked_at_start=torch.tensor(at_start),
        ),
        dataclasses.replace(CONFIG, remasking_strategy=strategy),
    )
    for row, block in enumerate(blocks):
        expected = slow_commit(strategy, *block[:4], at_start[row]) if any(block[0]) else set()
        assert set(committed[row].nonzero()[:, 0].tolist()) == expected


def test_masked_positions_come_first_whatever_their_scores() -> None:
    scores = torch.tensor([[0.5, -torch.inf, 0.7, -torch.inf, 0.7]])
    masked = torch.tensor([[False, True, True, True, True]])
    assert in_order(scores, masked).tolist() == [[2, 4, 1, 3, 0]]


def test_a_block_with_every_position_masked_takes_the_given_steps() -> None:
    for strategy in ("low_confidence_static", "entropy"):
        config = dataclasses.replace(CONFIG, remasking_strategy=strategy)
        masked = torch.ones(1, BLOCK_SIZE, dtype=torch.bool)
        scores = torch.rand(1, BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
        for step in range(1, config.denoising_steps_per_block + 1):
            assert masked.any()
            masked &= ~commit_positions(
                DenoisedBlocks(
                    masked, scores, scores, torch.tensor([step]), torch.tensor([BLOCK_SIZE])
                ),
                config,
            )
        assert not masked.any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("denoising_steps_per_block", 3, "does not divide the block size 8"),
        ("remasking_strategy", "random", "is unknown"),
        ("denoising_steps_per_block", 10**30, r"is outside \[1, 1048576\]"),
        ("temperature", -1.0, r"is outside \[0, 100\]"),
        ("temperature", float("inf"), r"is outside \[0, 100\]"),
        ("top_p", 0.0, r"is outside \(0, 1\]"),
        ("max_running_requests", 0, "is less than 1"),
    ],
)
def test_settings_that_cannot_work(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(CONFIG, **{field: value})
    assert "--" + field.replace("_", "-") in str(caught.value)
