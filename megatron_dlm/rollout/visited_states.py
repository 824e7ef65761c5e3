"""The denoising states that a rollout passed through, as its network saw them.

A state is given by the block in decoding and the step that came next: earlier blocks are final;
tokens of the block that were kept at this step or later are MASK, and so is everything after the
block. Steps count from 1 in each block.

F: tokens of a trajectory: prompt, response and tail. C: positions of the canvas that a forward
sees, at least F.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.types.trajectory import Trajectory


def final_canvas(trajectory: Trajectory, mask_token_id: int) -> Tensor:
    """Prompt, response and tail, and MASK on what is left of the canvas; [C] int64."""
    tokens = torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))
    masked = max((trajectory.canvas_length or 0) - len(tokens), 0)
    return torch.cat((tokens, tokens.new_full((masked,), mask_token_id)))


@dataclass(frozen=True)
class VisitedStates:
    """m states of one trajectory, in the order in which they were visited.

    Attributes:
        step: [m] int64, the step that came next.
        current: [m, C] bool, the masked positions of the block in decoding.
        later: [m, C] bool, the positions of later blocks, all of them masked.
        written: [C] bool, positions of the prompt and of tokens that the rollout wrote.
    """

    step: Tensor
    current: Tensor
    later: Tensor
    written: Tensor

    def __len__(self) -> int:
        return len(self.step)

    @property
    def masked(self) -> Tensor:
        """[m, C] bool, positions at which the state holds MASK."""
        return self.current | self.later


def states_before_last_block(trajectory: Trajectory, block_size: int) -> VisitedStates:
    """Every visited state of every block but the last; none for a response of one block.

    Args:
        trajectory: From a rollout by block diffusion.
        block_size: Tokens of a block, counted from the first prompt token.
    """
    steps = torch.cat(
        (
            torch.zeros_like(trajectory.prompt_ids),
            trajectory.unmask_step,
            trajectory.tail_unmask_step,
        )
    )
    written = len(steps)
    canvas = torch.arange(max(written, trajectory.canvas_length or 0))
    steps = torch.cat((steps, steps.new_zeros(len(canvas) - written)))
    block_of = canvas // block_size
    realised = torch.zeros((written - 1) // block_size, dtype=torch.int64)
    before_last = block_of < len(realised)
    realised.scatter_reduce_(0, block_of[before_last], steps[before_last], "amax")
    block = torch.repeat_interleave(realised)
    first = torch.repeat_interleave(realised.cumsum(0) - realised, realised)
    step = torch.arange(len(block)) - first + 1
    return VisitedStates(
        step=step,
        current=(block_of == block[:, None]) & (steps >= step[:, None]),
        later=block_of > block[:, None],
        written=canvas < written,
    )
