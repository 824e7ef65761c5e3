"""Visited states against a replay of the rollout, step by step."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.rollout.visited_states import final_canvas, states_before_last_block
from megatron_dlm.types.trajectory import Trajectory

MASK = 99


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Trajectory, int, list[list[int]], list[list[int]]]:
    """A rollout, and for each of its denoising steps the canvas and the block's masked positions.

    Decoded here: block by block, at every step a random non-empty part of what is masked.
    """
    block_size = draw(st.integers(1, 4))
    prompt = draw(st.integers(0, 6))
    blocks = draw(st.integers(1, 4))
    first = prompt // block_size
    end = (first + blocks) * block_size
    later = draw(st.integers(0, 5))
    canvas = [draw(st.integers(0, 9)) for _ in range(prompt)] + [MASK] * (end + later - prompt)
    steps = [0] * end
    seen, current = [], []
    for block in range(first, first + blocks):
        step = 0
        while masked := [
            i for i in range(block * block_size, (block + 1) * block_size) if canvas[i] == MASK
        ]:
            step += 1
            seen.append(list(canvas))
            current.append(masked)
            kept = draw(st.sets(st.sampled_from(masked), min_size=1))
            for i in kept:
                canvas[i] = draw(st.integers(0, 9))
                steps[i] = step
        if block < first + blocks - 1:
            last_before = len(seen)
    tail = draw(st.integers(0, min(block_size, end - prompt) - 1))
    trajectory = Trajectory(
        sample_index=0,
        prompt_ids=torch.tensor(canvas[:prompt], dtype=torch.int64),
        response_ids=torch.tensor(canvas[prompt : end - tail]),
        unmask_step=torch.tensor(steps[prompt : end - tail]),
        tail_ids=torch.tensor(canvas[end - tail : end], dtype=torch.int64),
        tail_unmask_step=torch.tensor(steps[end - tail :], dtype=torch.int64),
        canvas_length=end + later if later else None,
    )
    count = last_before if blocks > 1 else 0
    return trajectory, block_size, seen[:count], current[:count]


@given(rollouts())
def test_states_are_those_of_the_rollout(
    rollout: tuple[Trajectory, int, list[list[int]], list[list[int]]],
) -> None:
    trajectory, block_size, seen, current = rollout
    states = states_before_last_block(trajectory, block_size)
    canvas = final_canvas(trajectory, MASK)
    assert len(states) == len(seen)
    assert canvas.expand_as(states.masked).masked_fill(states.masked, MASK).tolist() == seen
    assert [row.nonzero()[:, 0].tolist() for row in states.current] == current
    for row, positions in zip(states.later, current, strict=True):
        end = (positions[0] // block_size + 1) * block_size
        assert row.nonzero()[:, 0].tolist() == list(range(end, len(canvas)))
    known = len(trajectory.token_ids) + len(trajectory.tail_ids)
    assert states.written.tolist() == [i < known for i in range(len(canvas))]
