"""Requests of /generate, and the trajectories that their answers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.errors import UserError
from megatron_dlm.rollout.external.client import RolloutServer, finish_reason
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory


def request(
    prompt: Prompt,
    limit: int,
    generation: GenerationConfig,
    special_tokens: SpecialTokens,
    seed: int,
) -> dict[str, Any]:
    """The body of a request for one response.

    Args:
        prompt: What to decode.
        limit: Longest response in tokens.
        generation: Of the run.
        special_tokens: Of the run.
        seed: Of the run's draws.
    """
    params: dict[str, Any] = {
        "max_new_tokens": limit,
        "temperature": generation.temperature,
        "stop_token_ids": list(special_tokens.eos_token_ids),
    }
    if generation.temperature > 0:
        params |= {
            "top_p": generation.top_p,
            "top_k": generation.top_k or -1,
            # As the draws of a rollout inside the run are keyed.
            "sampling_seed": seed,
            "custom_params": {"sample_index": prompt.sample_index},
        }
    return {"input_ids": prompt.token_ids.tolist(), "sampling_params": params, "stream": False}


def trajectory_of(
    server: RolloutServer,
    answer: dict[str, Any],
    prompt: Prompt,
    limit: int,
    special_tokens: SpecialTokens,
    weight_version: int,
) -> Trajectory:
    """The trajectory of an answer, checked.

    Args:
        server: That gave it.
        answer: The whole of it.
        prompt: What was decoded.
        limit: Longest response in tokens.
        special_tokens: Of the run.
        weight_version: Of the weights that were sent before.

    Returns:
        The trajectory. Where the server does not say at which step a token was kept, steps are
        zero and there is no tail: `Trajectory.is_rollout` is false.

    Raises:
        UserError: It is no response to this prompt by these weights.
    """
    meta = answer.get("meta_info", {})
    version = meta.get("weight_version")
    if version != str(weight_version):
        problem = f"a response is of the weights {version!r}, and {weight_version} were sent"
        raise server.refuse(problem, "let no other run send weights to it")
    ids = _ids(server, answer.get("output_ids"), special_tokens)
    ends = torch.isin(ids, torch.tensor(special_tokens.eos_token_ids)).nonzero()
    has_ended = len(ends) > 0
    if has_ended and int(ends[0]) + 1 != len(ids):
        raise _wrong(server, f"goes on after its end ({len(ids)} tokens)")
    if not has_ended and len(ids) < limit:
        reason = finish_reason(answer)
        problem = f"ends after {len(ids)} of {limit} tokens without EOS ({reason})"
        raise _wrong(server, problem, "start the server with a longer --context-length")
    if not 0 < len(ids) <= limit:
        raise _wrong(server, f"has {len(ids)} tokens, and at most {limit} were asked for")
    denoising = meta.get("denoising")
    nothing = torch.empty(0, dtype=torch.int64)
    if denoising is None:
        steps, tail, tail_steps = torch.zeros_like(ids), nothing, nothing
    else:
        steps, tail, tail_steps = (
            torch.tensor(denoising[name], dtype=torch.int64)
            for name in ("unmask_step", "tail_ids", "tail_unmask_step")
        )
        if len(steps) != len(ids) or len(tail) != len(tail_steps):
            raise _wrong(server, "has another number of steps than of tokens")
    return Trajectory(
        sample_index=prompt.sample_index,
        prompt_ids=prompt.token_ids,
        response_ids=ids,
        unmask_step=steps,
        tail_ids=tail,
        tail_unmask_step=tail_steps,
        finish_reason="eos" if has_ended else "length",
        denoising_forwards=0 if denoising is None else denoising["denoising_forwards"],
        total_forwards=0 if denoising is None else denoising["total_forwards"],
        weight_version=weight_version,
        record=prompt.record,
    )


def _ids(server: RolloutServer, given: Any, special_tokens: SpecialTokens) -> Tensor:
    is_list = isinstance(given, list) and all(type(token) is int for token in given)
    if not is_list:
        raise _wrong(server, "has no output_ids", "name an SGLang or rollout server")
    for token in given:
        if not 0 <= token < special_tokens.vocab_size or token == special_tokens.mask_token_id:
            raise _wrong(server, f"has the token {token}, MASK or not in the vocabulary")
    return torch.tensor(given, dtype=torch.int64)


def _wrong(
    server: RolloutServer, problem: str, remedy: str = "see that it serves the run's model"
) -> UserError:
    return server.refuse(f"a response {problem}", remedy)
