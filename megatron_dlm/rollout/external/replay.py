"""Recovers the order in which a server settled the tokens of its responses.

SGLang returns tokens only. Without randomness, and by the same weights, that order follows from the
tokens: every block is decoded again by the training processes, given the server's tokens before it.
So all blocks of all responses are independent of each other and go through the engine side by side;
what they have in common, the prefix, is computed once (`rollout.pages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_dlm.entry import warn
from megatron_dlm.errors import bad_value
from megatron_dlm.parallel import of_all_replicas
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.types.trajectory import Prompt, Trajectory

MOST_DIFFERENT = 0.05
"""Share of blocks that may come out with other tokens than the server's, of rounding."""


@dataclass(frozen=True)
class _Block:
    """A block of a response.

    Attributes:
        trajectory: Number of the response.
        start: Of its tokens in the response.
        end: After its last one.
    """

    trajectory: int
    start: int
    end: int


class Replay:
    """Decodes blocks again with the student's weights; all ranks call it.

    Args:
        engine: Of the run, with its settings; temperature 0.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        assert engine.generation.temperature == 0
        self._engine = engine

    def settled(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories of this replica, with steps and tail.

        Where rounding makes a block come out with other tokens, the response keeps the server's,
        and the order is that in which these weights settle the block's positions.

        Args:
            trajectories: The server's, the same on all ranks of the replica.

        Raises:
            UserError: On all ranks: so many blocks differ that the server decodes otherwise.
            StopRequested: On all ranks.
        """
        size = self._engine.generation.block_size
        assert size is not None
        blocks = [
            block for number, t in enumerate(trajectories) for block in _blocks(number, t, size)
        ]
        prompts = [
            _prompt(trajectories[block.trajectory], block, i) for i, block in enumerate(blocks)
        ]
        with self._engine.settled():
            again = self._engine.generate(prompts, size)
        steps = [[torch.zeros(0, dtype=torch.int64)] for _ in trajectories]
        tails: list[Trajectory | None] = [None] * len(trajectories)
        forwards = [0] * len(trajectories)
        different = 0
        for block, decoded in zip(blocks, again, strict=True):
            number, length = block.trajectory, block.end - block.start
            tokens = torch.cat((decoded.response_ids, decoded.tail_ids))
            own_steps = torch.cat((decoded.unmask_step, decoded.tail_unmask_step))
            expected = trajectories[number].response_ids[block.start : block.end]
            different += not torch.equal(tokens[:length], expected)
            steps[number].append(own_steps[:length])
            tails[number] = replace(
                decoded, tail_ids=tokens[length:], tail_unmask_step=own_steps[length:]
            )
            forwards[number] += decoded.denoising_forwards
        self._check(different, len(blocks))
        return [
            _completed(t, torch.cat(steps[number]), tails[number], forwards[number])
            for number, t in enumerate(trajectories)
        ]

    def _check(self, different: int, blocks: int) -> None:
        counts = of_all_replicas([(different, blocks)], self._engine.groups)
        different, blocks = (sum(values) for values in zip(*counts, strict=True))
        if different > MOST_DIFFERENT * blocks:
            raise bad_value(
                "--rollout-engine-urls",
                f"{different} of {blocks} blocks",
                "come out with other tokens than the training processes decode by the same weights",
                "compare the server's block size, threshold and precision with the run's, or take "
                "megatron-dlm rollout-server",
            )
        if different and torch.distributed.get_rank() == 0:
            warn(f"{different} of {blocks} blocks of a server's responses differ by rounding")


def _blocks(number: int, trajectory: Trajectory, size: int) -> list[_Block]:
    """The blocks of a response, on the grid from the prompt's first token."""
    prompt, length = len(trajectory.prompt_ids), len(trajectory.response_ids)
    first = min(size - prompt % size, length)
    starts = [0, *range(first, length, size)]
    return [
        _Block(number, start, end)
        for start, end in zip(starts, [*starts[1:], length], strict=True)
        if end > start
    ]


def _prompt(trajectory: Trajectory, block: _Block, index: int) -> Prompt:
    known = torch.cat((trajectory.prompt_ids, trajectory.response_ids[: block.start]))
    return Prompt(index, known, max_response_length=block.end - block.start)


def _completed(
    trajectory: Trajectory, steps: torch.Tensor, last: Trajectory | None, forwards: int
) -> Trajectory:
    assert last is not None, "a response has at least one token"
    return replace(
        trajectory,
        unmask_step=steps,
        tail_ids=last.tail_ids,
        tail_unmask_step=last.tail_unmask_step,
        denoising_forwards=forwards,
        total_forwards=forwards,
    )
