"""Requests for a teacher's responses: their fields, checked."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from megatron_dlm.serving.api_error import ApiError, bad_field
from megatron_dlm.teacher.wire import Drawing, TeacherPrompt

Token = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class PromptBody(BaseModel):
    """One prompt; see `TeacherPrompt`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sample_index: Annotated[int, Field(ge=0, lt=2**63)]
    token_ids: Annotated[list[Token], Field(min_length=1)]
    max_response_length: Annotated[int, Field(ge=1)]


class DrawingBody(BaseModel):
    """How responses are drawn; see `Drawing`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_k: Annotated[int, Field(ge=0, lt=2**31)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: Seed
    eos_token_ids: Annotated[list[Token], Field(min_length=1)]
    pad_token_id: Token
    mask_token_id: Token
    vocab_size: Annotated[int, Field(ge=1)]


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: Annotated[list[PromptBody], Field(min_length=1)]
    drawing: DrawingBody

    def read(
        self, vocab_size: int, positions: int, cache_tokens: int | None
    ) -> tuple[list[TeacherPrompt], Drawing]:
        """What is asked for.

        Args:
            vocab_size: Of the teacher.
            positions: That it has.
            cache_tokens: That its cache has room for (`most_tokens`); None: for any.

        Raises:
            ApiError: It cannot be decoded.
        """
        own = self.drawing
        drawing = Drawing(**{**dict(own), "eos_token_ids": tuple(own.eos_token_ids)})
        if drawing.vocab_size > vocab_size:
            problem = f"{drawing.vocab_size} is more than the teacher's {vocab_size}"
            raise bad_field("drawing.vocab_size", problem)
        for name, tokens in (
            ("eos_token_ids", drawing.eos_token_ids),
            ("pad_token_id", (drawing.pad_token_id,)),
            ("mask_token_id", (drawing.mask_token_id,)),
        ):
            if max(tokens) >= drawing.vocab_size:
                problem = f"{max(tokens)} is outside the vocabulary of {drawing.vocab_size}"
                raise bad_field(f"drawing.{name}", problem)
        prompts = []
        for number, body in enumerate(self.prompts):
            ids = torch.tensor(body.token_ids)
            if int(ids.max()) >= vocab_size:
                problem = f"an id is outside the vocabulary of {vocab_size}"
                raise bad_field(f"prompts.{number}.token_ids", problem)
            prompt = TeacherPrompt(body.sample_index, ids, body.max_response_length)
            if prompt.num_tokens > positions:
                problem = f"prompt and response of {prompt.num_tokens} tokens are longer than the "
                raise ApiError(400, f"{problem}teacher's {positions} positions", param="prompts")
            if cache_tokens is not None and prompt.num_tokens > cache_tokens:
                problem = f"prompt and response of {prompt.num_tokens} tokens do not fit into the "
                problem += f"cache of {cache_tokens}, the server's --max-total-tokens"
                raise ApiError(400, problem, param="prompts")
            prompts.append(prompt)
        return prompts, drawing
