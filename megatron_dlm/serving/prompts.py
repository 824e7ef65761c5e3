"""From requests to prompts: the same records, chat template and checks as those of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.data.prompt_checks import check_prompt
from megatron_dlm.data.prompts import tokenize_prompts
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.serving.api_error import ApiError, bad_field
from megatron_dlm.serving.requests import ChatRequest, CompletionRequest
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt

_SOURCE = "request"


@dataclass(frozen=True)
class Limits:
    """How long prompts and responses may be, in tokens.

    Attributes:
        positions: Of prompt and response together, in whole blocks.
        max_prompt_length: Longest prompt.
        max_response_length: Longest response.
        default_response_length: Longest response to a request that names no limit.
    """

    positions: int
    max_prompt_length: int
    max_response_length: int
    default_response_length: int

    @classmethod
    def of(cls, setup: InferenceSetup) -> Limits:
        """The limits that the options and the model set."""
        block_size = setup.config.model.block_size
        positions = setup.source.architecture.max_position_embeddings // block_size * block_size
        given = setup.options.max_response_length
        longest = positions - 1 if given is None else min(given, positions - 1)
        return cls(
            positions=positions,
            max_prompt_length=min(setup.config.data.max_prompt_length, positions - 1),
            max_response_length=longest,
            default_response_length=min(setup.config.longest_response, longest),
        )


class PromptReader:
    """Tokenises requests.

    Args:
        template_kwargs: Variables for the chat template; those of a request override them.
        tokenizer: Of the model.
        special_tokens: MASK is refused in prompts.
        limits: Of prompts and responses.
    """

    def __init__(
        self,
        template_kwargs: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        special_tokens: SpecialTokens,
        limits: Limits,
    ) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._template_kwargs = template_kwargs
        # Of the longest token; in a vocabulary of bytes, a character stands for one of them.
        longest = max(map(len, tokenizer.get_vocab()))
        self._max_characters = limits.max_prompt_length * longest

    def check_size(self, request: ChatRequest | CompletionRequest) -> None:
        """Refuse a prompt that cannot fit, before anything is tokenised.

        Raises:
            ApiError: There is one.
        """
        if isinstance(request, ChatRequest):
            contents = (message.get("content") for message in request.messages)
            texts: list[Any] = ["".join(text for text in contents if isinstance(text, str))]
        else:
            texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
            texts = texts if any(isinstance(part, str | list) for part in texts) else [texts]
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        for text in texts:
            if isinstance(text, list):
                self._check_length(field, len(text))
            elif len(text) > self._max_characters:
                problem = f"{len(text)} characters cannot be the {self.limits.max_prompt_length}"
                problem = f"{problem} tokens that this server takes; shorten it"
                raise bad_field(field, problem, "context_length_exceeded")

    def _check_length(self, field: str, tokens: int) -> None:
        longest = self.limits.max_prompt_length
        if tokens > longest:
            problem = f"{tokens} tokens are more than the {longest} that this server takes"
            raise bad_field(field, f"{problem}; shorten it", "context_length_exceeded")

    def read(self, request: ChatRequest | CompletionRequest) -> list[Prompt]:
        """The prompts of a request, each with the limit of its response.

        Raises:
            ApiError: One is unusable.
        """
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        _check_values(request)
        try:
            prompts = self._prompts(request)
        except UserError as error:
            text = str(error).removeprefix(f"{_SOURCE}:1: ")
            wrong = "chat_template_kwargs" if "chat_template_kwargs" in text else field
            raise ApiError(400, text, param=wrong) from error
        name, length = request.limit()
        return [self._limited(prompt, field, name, length) for prompt in prompts]

    def _prompts(self, request: ChatRequest | CompletionRequest) -> list[Prompt]:
        if isinstance(request, ChatRequest):
            if request.messages and request.messages[-1].get("role") == "assistant":
                raise UserError("messages: the last one is the assistant's; end with a user's")
            record: dict[str, Any] = {"messages": request.messages}
            if request.chat_template_kwargs:
                record["chat_template_kwargs"] = request.chat_template_kwargs
            return self._tokenized([record])
        given = request.prompt
        if not given or not all(part or part == 0 for part in given):
            kind = "text" if isinstance(given, str) else "list, or a part of it,"
            raise UserError(f"prompt: the {kind} is empty; write a text or token ids")
        if isinstance(given, str):
            return self._tokenized([{"prompt": given}])
        if isinstance(given[0], str):
            return self._tokenized([{"prompt": text} for text in given])
        lists = [given] if isinstance(given[0], int) else given
        return [self._of_ids(index, token_ids) for index, token_ids in enumerate(lists)]

    def _tokenized(self, records: list[dict[str, Any]]) -> list[Prompt]:
        found = tokenize_prompts(
            RecordsInMemory(records, _SOURCE),
            self._tokenizer,
            self._special_tokens,
            # Checked here, to say what a client can do about it.
            max_prompt_length=1 << 62,
            chat_template_kwargs=self._template_kwargs,
        )
        return list(found)

    def _of_ids(self, index: int, token_ids: Any) -> Prompt:
        if any(token_id < 0 for token_id in token_ids):
            raise UserError("a token id is negative; use the tokenizer of the model")
        check_prompt(token_ids, f"prompt[{index}]", self._special_tokens, self._tokenizer)
        return Prompt(index, torch.tensor(token_ids, dtype=torch.int64))

    def _limited(self, prompt: Prompt, field: str, name: str, length: int | None) -> Prompt:
        """The prompt with the limit of its response.

        Raises:
            ApiError: They do not fit.
        """
        limits, tokens = self.limits, len(prompt.token_ids)
        self._check_length(field, tokens)
        room = limits.positions - tokens
        if length is None:
            length = min(limits.default_response_length, room)
        elif length > limits.max_response_length:
            raise bad_field(
                name, f"{length} is over the server's limit of {limits.max_response_length} tokens"
            )
        elif length > room:
            raise bad_field(
                name,
                f"{length} after a prompt of {tokens} tokens exceeds the model's"
                f" {limits.positions} positions; choose {room} or less",
                "context_length_exceeded",
            )
        return replace(prompt, max_response_length=length)


def _check_values(request: ChatRequest | CompletionRequest) -> None:
    """Refuse values that cannot be written as JSON in UTF-8.

    Raises:
        ApiError: One holds half of a character, or lists within lists without end.
    """
    for name, value in (*request.__dict__.items(), *(request.model_extra or {}).items()):
        try:
            json.dumps(value, ensure_ascii=False, default=vars).encode()
        except UnicodeEncodeError as error:
            raise bad_field(name, "half of a surrogate pair is no text; repair it") from error
        except RecursionError as error:
            raise bad_field(name, "is nested too deeply; make it flatter") from error
