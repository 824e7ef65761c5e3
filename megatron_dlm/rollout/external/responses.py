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
    meta = answer.get("meta_info")
    if not isinstance(meta, dict):
        raise _wrong(server, "has no meta_info", "name an SGLang or rollout server")
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
    denoising = _denoising(server, meta.get("denoising"), len(ids), special_tokens)
    return Trajectory(
        sample_index=prompt.sample_index,
        prompt_ids=prompt.token_ids,
        response_ids=ids,
        finish_reason="eos" if has_ended else "length",
        **denoising,
        weight_version=weight_version,
        record=prompt.record,
    )


def _ids(
    server: RolloutServer,
    given: Any,
    special_tokens: SpecialTokens,
    name: str = "output_ids",
    remedy: str = "name an SGLang or rollout server",
) -> Tensor:
    """Tokens of a field of an answer, [n] int64."""
    if not _is_counts(given):
        raise _wrong(server, f"has no {name}", remedy)
    for token in given:
        if token >= special_tokens.vocab_size or token == special_tokens.mask_token_id:
            where = "" if name == "output_ids" else f" in {name}"
            raise _wrong(server, f"has the token {token}{where}, MASK or not in the vocabulary")
    return torch.tensor(given, dtype=torch.int64)


def _is_counts(value: Any) -> bool:
    """Whether a value is a list of integers from 0 on."""
    return isinstance(value, list) and all(type(entry) is int and entry >= 0 for entry in value)


_OTHER_VERSION = "let the server and the run be of one version of megatron-dlm"


def _denoising(
    server: RolloutServer, given: Any, length: int, special_tokens: SpecialTokens
) -> dict[str, Any]:
    """What a response of so many tokens says of its steps, as `Trajectory` has it.

    Raises:
        UserError: A field of it is missing or cannot be right.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    if given is None:
        return {
            "unmask_step": torch.zeros(length, dtype=torch.int64),
            "tail_ids": nothing,
            "tail_unmask_step": nothing,
            "denoising_forwards": 0,
            "total_forwards": 0,
        }
    if not isinstance(given, dict):
        problem = f"has a meta_info.denoising that is no object ({given!r:.40})"
        raise _wrong(server, problem, _OTHER_VERSION)
    found: dict[str, Any] = {}
    for name in ("denoising_forwards", "total_forwards"):
        if not _is_counts([given.get(name)]):
            problem = f"has meta_info.denoising.{name} = {given.get(name)!r:.40}, no number"
            raise _wrong(server, problem, _OTHER_VERSION)
        found[name] = given[name]
    tail = "meta_info.denoising.tail_ids"
    found["tail_ids"] = _ids(server, given.get("tail_ids"), special_tokens, tail, _OTHER_VERSION)
    for name, count in (("unmask_step", length), ("tail_unmask_step", len(found["tail_ids"]))):
        steps = given.get(name)
        if not _is_counts(steps) or len(steps or ()) != count:
            problem = f"has meta_info.denoising.{name} that is no list of {count} steps"
            raise _wrong(server, problem, _OTHER_VERSION)
        found[name] = torch.tensor(steps, dtype=torch.int64)
    return found


def _wrong(
    server: RolloutServer, problem: str, remedy: str = "see that it serves the run's model"
) -> UserError:
    return server.refuse(f"a response {problem}", remedy)
