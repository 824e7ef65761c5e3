"""Requests of SGLang's native API that the rollout server answers: their fields, checked.

Names, types and defaults are those of SGLang's `GenerateReqInput`, `SamplingParams` and
`UpdateWeight...ReqInput`. A field that would change the response and is not offered is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_dlm.errors import UserError
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.serving.api_error import ApiError, bad_field
from megatron_dlm.types.special_tokens import SpecialTokens

TokenIds = list[Annotated[int, Field(ge=0)]]


class SamplingParams(BaseModel):
    """How one response is drawn.

    `sampling_seed` and `custom_params.sample_index` key its draws, as a run's seed and the sample's
    index do in a rollout inside the run. The penalties and `min_p` are accepted at the values that
    ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    max_new_tokens: Annotated[int, Field(ge=1)] | None = 128
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = -1
    stop_token_ids: TokenIds | None = None
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    custom_params: dict[str, Any] | None = None
    n: Literal[1] | None = 1
    min_p: Literal[0] | None = 0
    min_new_tokens: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    repetition_penalty: Literal[1] | None = 1
    ignore_eos: Literal[False] | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    no_stop_trim: bool | None = False


class GenerateRequest(BaseModel):
    """POST /generate: one prompt of token ids, or several."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_ids: TokenIds | list[TokenIds]
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    rid: str | list[str] | None = None
    stream: Literal[False] | None = False
    return_logprob: Literal[False] | None = False
    log_metrics: bool | None = True
    no_logs: bool | None = False

    def prompts(self) -> tuple[bool, list[list[int]]]:
        """Whether there is a list of prompts, and the prompts.

        Raises:
            ApiError: There is none, or one is empty.
        """
        ids: list[Any] = self.input_ids
        is_list = bool(ids) and isinstance(ids[0], list)
        prompts = ids if is_list else [ids]
        if not all(prompts):
            raise bad_field("input_ids", "is empty; send at least one token")
        return is_list, prompts

    def of_each(self, count: int) -> tuple[list[SamplingParams], list[str | None]]:
        """Sampling parameters and names of so many prompts.

        Raises:
            ApiError: Another number of them is given.
        """
        sampling = self.sampling_params or SamplingParams()
        params = sampling if isinstance(sampling, list) else [sampling] * count
        names: list[str | None]
        if isinstance(self.rid, str):
            several = count > 1
            names = [f"{self.rid}_{i}" if several else self.rid for i in range(count)]
        else:
            names = [None] * count if self.rid is None else list(self.rid)
        for field, values in (("sampling_params", params), ("rid", names)):
            if len(values) != count:
                raise bad_field(field, f"has {len(values)} entries for {count} prompts")
        return params, names


@dataclass(frozen=True)
class Draws:
    """How the tokens of a response are decoded.

    Attributes:
        generation: Settings.
        sample_index: Key of the draws; None: the server numbers its responses.
        seed: Of the draws; None: the server's.
    """

    generation: GenerationConfig
    sample_index: int | None
    seed: int | None


CUSTOM_PARAMS = ("sample_index",)


def read_draws(
    params: SamplingParams, default: GenerationConfig, special_tokens: SpecialTokens
) -> Draws:
    """The decoding settings of a request.

    Args:
        params: Of the request.
        default: The server's; strategy and block size are these.
        special_tokens: Of the model.

    Raises:
        ApiError: A value is out of range, or a token shall end responses that the model's do not
            end with.
    """
    other = set(params.stop_token_ids or ()) - set(special_tokens.eos_token_ids)
    if other:
        known = ", ".join(map(str, special_tokens.eos_token_ids))
        raise bad_field("stop_token_ids", f"{min(other)} is not among the model's ({known})")
    custom = params.custom_params or {}
    for name in custom.keys() - {*CUSTOM_PARAMS}:
        raise bad_field(f"custom_params.{name}", "is unknown; drop it", "unknown_parameter")
    index = custom.get("sample_index")
    if index is not None and not (type(index) is int and 0 <= index < 1 << 63):
        raise bad_field("custom_params.sample_index", "is no whole number from 0")
    top_k = params.top_k or 0
    given: dict[str, Any] = {
        "temperature": 1.0 if params.temperature is None else params.temperature,
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "top_k": top_k if 0 < top_k < special_tokens.vocab_size else 0,
    }
    try:
        generation = replace(default, **given)
    except UserError as error:
        raise ApiError(400, str(error).replace("--", "").replace("-", "_", 1)) from error
    return Draws(generation, index, params.sampling_seed)


class _Update(BaseModel):
    """Fields that all updates of weights have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    torch_empty_cache: bool = False


class UpdateFromDisk(_Update):
    """POST /update_weights_from_disk."""

    model_path: str
    load_format: Literal["auto", "safetensors"] | None = None
    is_async: Literal[False] = False
    keep_pause: Literal[False] = False
    recapture_cuda_graph: bool = False
    token_step: int = 0
    manifest: None = None


class BeginWeightUpdate(BaseModel):
    """POST /begin_weight_update."""

    model_config = ConfigDict(extra="forbid", strict=True)

    selector: Literal["target", "all"] = "all"


class EndWeightUpdate(BaseModel):
    """POST /end_weight_update."""

    model_config = ConfigDict(extra="forbid", strict=True)


class UpdateFromDistributed(_Update):
    """POST /update_weights_from_distributed."""

    names: Annotated[list[str], Field(min_length=1)]
    dtypes: list[str]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    group_name: str = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = None
    selector: Literal["target", "all"] = "all"


class InitWeightsUpdateGroup(BaseModel):
    """POST /init_weights_update_group."""

    model_config = ConfigDict(extra="forbid", strict=True)

    master_address: str
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=2)]
    group_name: str = "weight_update_group"
    backend: Literal["nccl", "gloo"] = "nccl"


class DestroyWeightsUpdateGroup(BaseModel):
    """POST /destroy_weights_update_group."""

    model_config = ConfigDict(extra="forbid", strict=True)

    group_name: str = "weight_update_group"


class UpdateWeightVersion(BaseModel):
    """POST /update_weight_version."""

    model_config = ConfigDict(extra="forbid", strict=True)

    new_version: str
    abort_all_requests: bool = True


class PauseGeneration(BaseModel):
    """POST /pause_generation; what is in decoding is given up."""

    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["abort"] = "abort"


class ContinueGeneration(BaseModel):
    """POST /continue_generation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    torch_empty_cache: bool = True


class AbortRequest(BaseModel):
    """POST /abort_request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    rid: str = ""
    abort_all: bool = False
