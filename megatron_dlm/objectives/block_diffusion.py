"""Training documents of block diffusion: a clean stream x_0 and noisy streams x_t.

Noisy block b sees clean blocks < b and itself (`models.attention_layout`), so one forward computes
every block's denoising loss given its clean prefix (BD3-LM, Arriola et al. 2025).

P, L: prompt and response tokens; F: all tokens of the trajectory, tail included; B: block size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dlm.models.attention_layout import CLEAN
from megatron_dlm.objectives.base import Document
from megatron_dlm.rollout.trajectory import Trajectory


def sequence_with_tail(trajectory: Trajectory) -> Tensor:
    """The sequence as the rollout left it, in whole blocks: prompt, response, tail; [F] int64."""
    return torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))


def supervised_positions(trajectory: Trajectory, supervise_eos: bool) -> Tensor:
    """Where a loss may fall, [F] bool: response tokens up to and including the first EOS."""
    prompt, response = len(trajectory.prompt_ids), len(trajectory.response_ids)
    end = prompt + response
    if trajectory.finish_reason == "eos" and not supervise_eos:
        end -= 1
    positions = torch.arange(prompt + response + len(trajectory.tail_ids))
    return (positions >= prompt) & (positions < end)


def block_diffusion_document(
    trajectory: Trajectory,
    states: Sequence[Tensor],
    supervised: Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    weights: Tensor | None = None,
) -> Document:
    """Lay out states of a trajectory: one clean stream, and a noisy stream for each state.

    A noisy stream holds only blocks with a supervised MASK, the clean stream only the blocks that
    those can see; neither omission changes a value.

    Args:
        trajectory: The terminal sequence.
        states: For each state, [F] bool, where x_t holds MASK.
        supervised: [F] bool, where a loss may fall.
        block_size: B.
        mask_token_id: Id of MASK.
        weights: [F] loss weights, default 1.
    """
    tokens = sequence_with_tail(trajectory)
    position = torch.arange(len(tokens))
    block = position // block_size
    num_blocks = int(block[-1]) + 1
    masked = torch.stack(list(states))
    target = masked & supervised
    trained = torch.zeros(len(states), num_blocks, dtype=torch.bool)
    state_of_target, where = target.nonzero(as_tuple=True)
    trained[state_of_target, block[where]] = True
    state, noisy = trained[:, block].nonzero(as_tuple=True)  # state by state, in order of position
    clean_length = int(block[noisy].max()) * block_size if len(noisy) else 0
    noisy_masked = masked[state, noisy]
    noisy_target = target[state, noisy].nonzero()[:, 0]
    target_position = noisy[noisy_target]
    teacher_hidden = None
    if trajectory.teacher_hidden is not None:
        rows = target_position - len(trajectory.prompt_ids)
        teacher_hidden = trajectory.teacher_hidden[rows.to(trajectory.teacher_hidden.device)]
    positions = torch.cat((position[:clean_length], noisy))
    clean = torch.full((clean_length,), CLEAN)
    return Document(
        token_ids=torch.cat(
            (tokens[:clean_length], tokens[noisy].masked_fill(noisy_masked, mask_token_id))
        ),
        block=positions // block_size,
        stream=torch.cat((clean, state + CLEAN + 1)),
        position=positions,
        supervised=clean_length + noisy_target,
        labels=tokens[target_position],
        weights=torch.ones(len(target_position)) if weights is None else weights[target_position],
        teacher_hidden=teacher_hidden,
    )
