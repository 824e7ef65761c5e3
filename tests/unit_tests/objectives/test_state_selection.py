"""Selected states are states that the rollout visited."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.config.groups import EmptyMask
from megatron_dlm.objectives.state_selection import (
    all_,
    global_,
    per_block,
    random_state,
    unmask_steps,
)
from megatron_dlm.types.trajectory import Trajectory


@st.composite
def step_tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unmask steps of prompt (0) and response, block ids, last step of each block."""
    block_size = draw(st.integers(1, 4))
    prompt = draw(st.integers(0, 6))
    blocks = draw(st.integers(prompt // block_size + 1, prompt // block_size + 4))
    steps = torch.zeros(blocks * block_size, dtype=torch.long)
    block = torch.arange(len(steps)) // block_size
    for b in range(blocks):
        where = [i for i in range(b * block_size, (b + 1) * block_size) if i >= prompt]
        count = draw(st.integers(1, max(len(where), 1)))
        for n, i in enumerate(draw(st.permutations(where))):
            steps[i] = min(n, count - 1) + 1
    last = torch.stack([steps[block == b].max() for b in range(blocks)])
    return steps, block, last


@given(step_tables(), st.integers(0, 1000))
def test_per_block_masks_what_was_committed_at_its_step_or_later(table, seed: int) -> None:
    steps, block, last = table
    (masked,) = per_block(steps, block, last, torch.Generator().manual_seed(seed))
    assert not masked[steps == 0].any()
    for b in range(len(last)):
        here = block == b
        if last[b] == 0:
            assert not masked[here].any()
            continue
        visited = [((steps >= k) & (steps > 0) & here) for k in range(1, int(last[b]) + 1)]
        assert any(torch.equal(masked & here, state) for state in visited)


@given(step_tables(), st.integers(0, 1000))
def test_global_is_one_state_of_the_whole_trajectory(table, seed: int) -> None:
    steps, block, last = table
    (masked,) = global_(steps, block, last, torch.Generator().manual_seed(seed))
    visited = [
        (((block == b) & (steps >= k)) | (block > b)) & (steps > 0)
        for b in range(len(last))
        for k in range(1, int(last[b]) + 1)
    ]
    assert any(torch.equal(masked, state) for state in visited)


@given(step_tables())
def test_all_is_every_visited_state_of_every_block_once(table) -> None:
    steps, block, last = table
    states = all_(steps, block, last, torch.Generator())
    for b in range(len(last)):
        here = block == b
        shown = [tuple(state[here].tolist()) for state in states if state[here].any()]
        visited = [
            tuple(((steps >= k) & (steps > 0))[here].tolist()) for k in range(1, int(last[b]) + 1)
        ]
        assert shown == visited


def test_steps_are_drawn_uniformly() -> None:
    steps = torch.tensor([0, 1, 2, 3, 1, 1, 2, 2])
    block = torch.arange(8) // 4
    last = torch.tensor([3, 2])
    generator = torch.Generator().manual_seed(0)
    draws = 6000
    blocks = block.repeat(draws) + 2 * torch.arange(draws).repeat_interleave(8)
    (masked,) = per_block(steps.repeat(draws), blocks, last.repeat(draws), generator)
    for count in Counter(masked.view(draws, 2, 4)[:, 0].sum(-1).tolist()).values():
        assert abs(count / draws - 1 / 3) < 0.03
    # Global: five states, each with its own number of masks: 7, 6, 5 (block 0), 4, 2 (block 1).
    draws = 3000
    whole = Counter(int(global_(steps, block, last, generator)[0].sum()) for _ in range(draws))
    assert set(whole) == {7, 6, 5, 4, 2}
    for count in whole.values():
        assert abs(count / draws - 1 / 5) < 0.03


def test_the_tail_belongs_to_the_state() -> None:
    trajectory = Trajectory(
        sample_index=0,
        prompt_ids=torch.tensor([5, 6]),
        response_ids=torch.tensor([7]),
        unmask_step=torch.tensor([1]),
        tail_ids=torch.tensor([8]),
        tail_unmask_step=torch.tensor([2]),
    )
    assert unmask_steps(trajectory).tolist() == [0, 0, 1, 2]


def random_states(
    draws: int, positions: int, ends: tuple[int, int], empty_mask: EmptyMask = "redraw"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of many copies of a sequence of blocks of 4, all in one call.

    Args:
        draws: Copies.
        positions: Of each.
        ends: Of the prompt and of the supervised tokens.
        empty_mask: See `random_state`.

    Returns:
        The masks, those of supervised tokens among them, and t; each [draws, blocks, 4].
    """
    position = torch.arange(positions)
    prompt, end = ends
    maskable, supervised = position >= prompt, (position >= prompt) & (position < end)
    blocks = torch.arange(draws * positions) // 4
    masked, t = random_state(
        maskable.repeat(draws),
        supervised.repeat(draws),
        blocks,
        torch.Generator().manual_seed(0),
        empty_mask,
    )
    assert not masked[~maskable.repeat(draws)].any()
    shape = (draws, positions // 4, 4)
    return masked.view(shape), (masked & supervised.repeat(draws)).view(shape), t.view(shape)


def test_random_states_are_masked_with_probability_t() -> None:
    # A prompt of 2; blocks of 2, 4, 4 and 4 positions after it; the last has one real token.
    draws = 4000
    masked, of_supervised, t = random_states(draws, 16, (2, 13))
    assert ((t > 0) & (t < 1)).all()
    assert torch.equal(t, t[:, :, :1].expand_as(t))
    numbers = of_supervised.sum(-1)
    for b, real in enumerate((2, 4, 4, 1)):
        # Of n, k = 1 .. n are masked with equal probability; t is then Beta(k + 1, n - k + 1).
        assert set(numbers[:, b].tolist()) == set(range(1, real + 1))
        for number in range(1, real + 1):
            chosen = numbers[:, b] == number
            assert abs(float(chosen.float().mean()) - 1 / real) < 0.03
            assert abs(float(t[chosen, b, 0].mean()) - (number + 1) / (real + 2)) < 0.03
    # What 1/t is for: every token counts the same, (n + 1) / n, on average.
    inverse = (of_supervised / t.clamp(min=1e-2)).mean(0)
    for b, (first, end, real) in enumerate(((2, 4, 2), (0, 4, 4), (0, 4, 4), (0, 1, 1))):
        assert (inverse[b, first:end] - (real + 1) / real).abs().max() < 0.15
    assert abs(float(masked[:, 3, 1:].float().mean() - t[:, 3, 0].mean())) < 0.02


def test_one_token_is_masked_where_none_was_drawn() -> None:
    # Blocks of 4 real positions, of 2 after a prompt, and of 1 before a tail.
    draws = 6000
    masked, of_supervised, t = random_states(draws, 12, (2, 9), "mask_one")
    numbers = of_supervised.sum(-1)
    for b, real in enumerate((2, 4, 1)):
        # Of n, k = 0 .. n are drawn with equal probability, and 0 becomes 1.
        assert set(numbers[:, b].tolist()) == set(range(1, real + 1))
        for number in range(1, real + 1):
            share = float((numbers[:, b] == number).float().mean())
            assert abs(share - (1 + (number == 1)) / (real + 1)) < 0.02
    # Only where t is small does every block of four have one MASK, and each place has its share.
    forced = masked[t[:, 1, 0] < 0.01, 1]
    assert len(forced) > 20
    assert int(forced.sum()) < 1.2 * len(forced)
    assert forced.any(dim=0).all()


@given(step_tables(), st.integers(0, 1000), st.sampled_from(["redraw", "mask_one"]))
def test_random_masks_a_supervised_token_of_every_block_that_has_one(
    table, seed: int, empty_mask
) -> None:
    steps, block, _ = table
    maskable = steps > 0
    supervised = maskable & (torch.arange(len(steps)) < len(steps) - 1)
    generator = torch.Generator().manual_seed(seed)
    masked, t = random_state(maskable, supervised, block, generator, empty_mask)
    for b in range(int(block[-1]) + 1):
        here = block == b
        assert bool((masked & supervised)[here].any()) == bool(supervised[here].any())
        if not supervised[here].any():
            assert not masked[here].any()
    assert not masked[~maskable].any()
    assert len(t) == len(steps)
