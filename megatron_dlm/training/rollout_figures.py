"""Figures about the trajectories of a rollout batch: lengths, and tokens by denoising step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dlm.training.metrics import LengthHistogram
from megatron_dlm.types.trajectory import Trajectory

LENGTH_BINS = 16

STEPS = 32
"""Denoising steps of a block that are counted; later ones are left out."""


class RolloutFigures:
    """Counts that add up over ranks.

    Args:
        longest: Tokens of the longest response.
        block_size: Tokens of a block; None: the response is decoded as a whole.
    """

    SIZE = LENGTH_BINS + 2 * STEPS
    """Numbers that `counts` returns."""

    def __init__(self, longest: int, block_size: int | None) -> None:
        self._bin_width = -(-longest // LENGTH_BINS)
        self._block_size = block_size

    def counts(self, trajectories: Sequence[Trajectory]) -> list[int]:
        """Responses by length; tokens, then forwards, by step."""
        lengths = torch.tensor([len(t.response_ids) for t in trajectories], dtype=torch.int64)
        bins = ((lengths - 1) // self._bin_width).clamp(0, LENGTH_BINS - 1)
        tokens = torch.zeros(STEPS + 1, dtype=torch.int64)
        forwards = torch.zeros_like(tokens)
        for trajectory in trajectories:
            steps, blocks = self._steps(trajectory)
            tokens += torch.bincount(steps, minlength=STEPS + 1)
            # Each forward of a block commits a token or more.
            distinct = torch.stack((blocks, steps)).unique(dim=1)[1]
            forwards += torch.bincount(distinct, minlength=STEPS + 1)
        by_length = torch.bincount(bins, minlength=LENGTH_BINS)
        return torch.cat((by_length, tokens[1:], forwards[1:])).tolist()

    def _steps(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Step of each token that a rollout committed, 0 of the others, and its block."""
        steps = torch.cat((trajectory.unmask_step, trajectory.tail_unmask_step)).cpu()
        position = torch.arange(len(steps)) + len(trajectory.prompt_ids)
        size = self._block_size or int(position[-1]) + 1 if len(steps) else 1
        return steps.masked_fill(steps > STEPS, 0), position // size

    def lengths(self, sums: Sequence[float]) -> LengthHistogram:
        """The histogram, of the sum of all ranks' counts."""
        return LengthHistogram(self._bin_width, [int(count) for count in sums[:LENGTH_BINS]])

    @staticmethod
    def tokens_by_step(sums: Sequence[float]) -> list[float] | None:
        """Mean tokens that the first, second, ... forward of a block commits; None without any."""
        tokens, forwards = sums[LENGTH_BINS:-STEPS], sums[-STEPS:]
        means = [t / f for t, f in zip(tokens, forwards, strict=True) if f]
        return means or None
