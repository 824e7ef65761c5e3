"""Training documents of block diffusion: a clean stream x_0 and a noisy stream x_t.

Noisy block b sees clean blocks < b and itself (`models.attention_layout`), so one forward computes
every block's denoising loss given its clean prefix (BD3-LM, Arriola et al. 2025).

P, L: prompt and response tokens; F: all tokens of the trajectory, tail included; B: block size.
"""

import torch
from torch import Tensor

from megatron_dlm.models.attention_layout import CLEAN, NOISY
from megatron_dlm.objectives.base import Document
from megatron_dlm.rollout.trajectory import Trajectory


def sequence_with_tail(trajectory: Trajectory) -> Tensor:
    """Prompt, response and tail, [F] int64: the sequence as the rollout left it, in whole blocks."""
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
    masked: Tensor,
    supervised: Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    weights: Tensor | None = None,
) -> Document:
    """Lay out one state of a trajectory for the student.

    The noisy stream holds only blocks with a supervised MASK, the clean stream only the blocks that
    those can see; neither omission changes a value.

    Args:
        trajectory: The terminal sequence.
        masked: [F] bool, where x_t holds MASK.
        supervised: [F] bool, where a loss may fall.
        block_size: B.
        mask_token_id: Id of MASK.
        weights: [F] loss weights, default 1.
    """
    tokens = sequence_with_tail(trajectory)
    position = torch.arange(len(tokens))
    block = position // block_size
    target = masked & supervised
    num_blocks = int(block[-1]) + 1
    trained = torch.zeros(num_blocks, dtype=torch.bool).index_put((block[target],), torch.tensor(True))
    noisy = trained[block].nonzero()[:, 0]
    clean_length = int(block[noisy[-1]]) * block_size if len(noisy) else 0
    noisy_tokens = tokens[noisy].masked_fill(masked[noisy], mask_token_id)
    where = target[noisy].nonzero()[:, 0]
    target_position = noisy[where]
    teacher_hidden = None
    if trajectory.teacher_hidden is not None:
        rows = target_position - len(trajectory.prompt_ids)
        teacher_hidden = trajectory.teacher_hidden[rows.to(trajectory.teacher_hidden.device)]
    positions = torch.cat((position[:clean_length], noisy))
    stream = torch.full_like(positions, CLEAN)
    stream[clean_length:] = NOISY
    return Document(
        token_ids=torch.cat((tokens[:clean_length], noisy_tokens)),
        block=positions // block_size,
        stream=stream,
        position=positions,
        supervised=clean_length + where,
        labels=tokens[target_position],
        weights=torch.ones(len(where)) if weights is None else weights[target_position],
        teacher_hidden=teacher_hidden,
    )
