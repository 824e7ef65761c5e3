"""Which denoising states of a trajectory the student is trained on (OPDLM section 4, BD3-LM).

A state is given by the set of positions that hold MASK. Visited states are those of the rollout:
steps count per block from 1; a position is masked in the state before step k if it was committed at
step k or later. Random states need no rollout.

F: prompt, response and tail tokens of a trajectory (whole blocks).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dlm.config.groups import EmptyMask, ObjectiveConfig
from megatron_dlm.types.trajectory import Trajectory

Selector = Callable[[Tensor, Tensor, Tensor, torch.Generator], list[Tensor]]


def unmask_steps(trajectory: Trajectory) -> Tensor:
    """The step at which each of F positions was committed; 0 for the prompt, [F] int64."""
    return torch.cat(
        (
            torch.zeros_like(trajectory.prompt_ids),
            trajectory.unmask_step,
            trajectory.tail_unmask_step,
        )
    )


def _uniform_integers(upper: Tensor, generator: torch.Generator) -> Tensor:
    """Independent draws from 1 .. upper, elementwise."""
    draws = torch.rand(len(upper), generator=generator, dtype=torch.float64)
    return (draws * upper).long().clamp(max=upper - 1) + 1


def per_block(
    steps: Tensor, block: Tensor, last_step: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """For each block independently, a step drawn uniformly from its realised steps.

    Block-causal factorisation makes the product of these states exact: a noisy block sees only
    clean earlier blocks.

    Args:
        steps: [F] unmask steps.
        block: [F] block ids.
        last_step: [blocks] the last step at which a supervised token was committed; 0 in blocks
            without one.
        generator: Source of the draws.

    Returns:
        The selected states, each [F] bool, true where it holds MASK; here one.
    """
    chosen = torch.zeros_like(last_step)
    supervised = last_step > 0
    chosen[supervised] = _uniform_integers(last_step[supervised], generator)
    return [(steps > 0) & supervised[block] & (steps >= chosen[block])]


def global_(
    steps: Tensor, block: Tensor, last_step: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """One step drawn uniformly from the whole trajectory; arguments and result as `per_block`.

    Blocks before the block of that step are finished, later ones are all MASK.
    """
    ends = last_step.cumsum(0)
    step = _uniform_integers(ends[-1:], generator)
    current = int(torch.searchsorted(ends, step))
    within = step - (ends[current] - last_step[current])
    masked = (block > current) | ((block == current) & (steps >= within))
    return [masked & (steps > 0)]


def all_(
    steps: Tensor, block: Tensor, last_step: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """Every realised state of every block; arguments and result as `per_block`.

    The k-th state shows each block before its step k, while a supervised token is still masked.
    """
    return [(steps >= k) & (last_step[block] >= k) for k in range(1, int(last_step.max()) + 1)]


def random_state(
    maskable: Tensor,
    supervised: Tensor,
    block: Tensor,
    generator: torch.Generator,
    empty_mask: EmptyMask = ObjectiveConfig.empty_mask,
) -> tuple[Tensor, Tensor]:
    """For each block t ~ U(0, 1), and each of its positions masked with probability t.

    A block without a masked supervised token has no loss. With `redraw`, t and the mask are drawn
    again until there is one. Of n supervised tokens, k = 1 .. n are then masked with equal
    probability, and the weighted sum has a mean: E[1(i masked) / t] = (n + 1) / n. With `mask_one`
    one of the supervised tokens is masked instead, as OPDLM's code does: k = 1 has the probability
    2 / (n + 1), the others 1 / (n + 1), and the weighted sum has no mean, since t can be near 0.

    Args:
        maskable: [F] bool, all but the prompt.
        supervised: [F] bool, tokens that may be supervised; part of `maskable`.
        block: [F] block ids.
        generator: Source of the draws.
        empty_mask: What to do with a block in which no supervised token was masked.

    Returns:
        The state, [F] bool, true where it holds MASK, nowhere in blocks without a supervised token;
        and t of the block of each position, [F] float64 in (0, 1), 1 where no block is masked.
    """
    num_blocks = int(block[-1]) + 1
    has_target = torch.zeros(num_blocks, dtype=torch.bool)
    has_target[block[supervised]] = True
    open_ = has_target[block]
    masked = torch.zeros_like(supervised)
    t = torch.ones(len(block), dtype=torch.float64)
    while open_.any():
        draw_t = torch.rand(num_blocks, generator=generator, dtype=torch.float64)[block]
        draw = torch.rand(len(block), generator=generator, dtype=torch.float64) < draw_t
        t = torch.where(open_, draw_t, t)
        masked = torch.where(open_, draw & maskable, masked)
        done = torch.zeros(num_blocks, dtype=torch.bool)
        done[block[masked & supervised]] = True
        open_ = (has_target & ~done)[block]
        if empty_mask == "mask_one":
            masked = masked | _one_of_each_block(supervised & open_, block, generator)
            break
    return masked, t


def _one_of_each_block(candidates: Tensor, block: Tensor, generator: torch.Generator) -> Tensor:
    """One of the candidates [F] of each block that has any, with equal probability; [F] bool."""
    draw = torch.rand(len(block), generator=generator, dtype=torch.float64)
    draw = draw.masked_fill(~candidates, -1.0)
    largest = torch.full((int(block[-1]) + 1,), -1.0, dtype=torch.float64)
    largest.scatter_reduce_(0, block, draw, "amax")
    return candidates & (draw == largest[block])


SELECTORS: dict[str, Selector] = {"per_block": per_block, "global": global_, "all": all_}
