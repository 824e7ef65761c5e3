"""The trajectory of a sequence that has been decoded.

n: tokens decoded after the prompt.
"""

import torch
from torch import Tensor

from megatron_dlm.types.trajectory import Prompt, Trajectory, VerificationRound


def finished_trajectory(
    prompt: Prompt,
    *,
    tokens: Tensor,
    unmask_step: Tensor,
    confidence: Tensor | None,
    limit: int,
    eos_token_ids: Tensor,
    has_states: bool,
    canvas_length: int | None,
    denoising_forwards: int,
    total_forwards: int,
    drafted_tokens: int,
    accepted_tokens: int,
    rounds: tuple[VerificationRound, ...],
) -> Trajectory:
    """Cut a response after its first EOS, or after `limit` tokens.

    Args:
        prompt: What was decoded.
        tokens: [n] int64.
        unmask_step: [n] int64.
        confidence: [n] float32, if it is kept.
        limit: Longest response.
        eos_token_ids: Each ends a response.
        has_states: Whether denoising states were visited, which training may go back to. A response
            of the autoregressive mode has none, and no tail.
        canvas_length: See `Trajectory`, as all others.
        denoising_forwards: Likewise, of this rollout.
        total_forwards: Likewise, of this rollout.
        drafted_tokens: Likewise.
        accepted_tokens: Likewise.
        rounds: Likewise.
    """
    length = min(limit, len(tokens))
    eos = torch.isin(tokens[:length], eos_token_ids).nonzero()
    if len(eos):
        length = int(eos[0]) + 1
    if not has_states:
        tokens, unmask_step = tokens[:length], torch.zeros_like(unmask_step[:length])
        confidence = None if confidence is None else confidence[:length]
    before = prompt.beginning
    return Trajectory(
        sample_index=prompt.sample_index,
        prompt_ids=prompt.token_ids,
        response_ids=tokens[:length],
        unmask_step=unmask_step[:length],
        tail_ids=tokens[length:],
        tail_unmask_step=unmask_step[length:],
        finish_reason="eos" if len(eos) else "length",
        canvas_length=canvas_length,
        denoising_forwards=denoising_forwards + (before.denoising_forwards if before else 0),
        total_forwards=total_forwards + (before.total_forwards if before else 0),
        drafted_tokens=drafted_tokens,
        accepted_tokens=accepted_tokens,
        confidence=confidence,
        rounds=rounds,
        rollouts=1 + (before.rollouts if before else 0),
        record=prompt.record,
    )
