"""Tokenised prompts and training examples from JSONL files.

A whole file is validated and tokenised before any work starts, so that a bad line is found in
seconds and not during a run. Tokens are held in one flat array; `Prompt` and `Trajectory`
objects are made when they are asked for.

Shapes: N records, P prompt tokens, L response tokens.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_dlm.config.groups import LongPrompts, TrainOn
from megatron_dlm.data.chat_template import ChatTemplate, check_one_block
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompt_checks import (
    check_limits,
    check_prompt,
    check_response,
    check_some_left,
    fitted,
)
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.records import (
    ExampleSource,
    PromptSource,
    example_sources,
    open_prompt_source,
)
from megatron_dlm.errors import bad_value
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

T = TypeVar("T")

NO_DOMAINS = Domains()
_CHUNK = 1024  # Texts tokenised at once, to bound memory.


class TokenTable:
    """N token sequences of different lengths in one flat array."""

    def __init__(self) -> None:
        """Start without sequences."""
        self._tokens = array("i")
        self._ends = array("q", [0])

    def append(self, token_ids: Sequence[int]) -> None:
        """Add a sequence."""
        self._tokens.extend(token_ids)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def length(self, index: int) -> int:
        """Tokens of sequence `index`."""
        return self._ends[index + 1] - self._ends[index]

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """SHA-256 of some sequences, by default of all.

        Raises:
            IndexError: There is no such sequence.
        """
        digest = hashlib.sha256()
        for index in range(len(self)) if indices is None else indices:
            digest.update(self.length(index).to_bytes(8, "little"))
            digest.update(self._tokens[self._ends[index] : self._ends[index + 1]])
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence `index` as a new int64 tensor."""
        tokens = self._tokens[self._ends[index] : self._ends[index + 1]]
        return torch.from_numpy(np.array(tokens, dtype=np.int64))


class PromptDataset(Sequence[Prompt]):
    """Tokenised prompts of a file; `sample_index` of an element is its index in the file."""

    def __init__(
        self,
        file: RecordSource,
        token_ids: TokenTable,
        domains: Domains = NO_DOMAINS,
        num_dropped: int = 0,
    ) -> None:
        """Combine N records with their N token sequences.

        Args:
            file: The records.
            token_ids: Of their prompts.
            domains: Limits of their responses.
            num_dropped: Records that were left out because their prompts are too long.
        """
        self.file = file
        self.num_dropped = num_dropped
        self._token_ids = token_ids
        self._domains = domains

    def __len__(self) -> int:
        return len(self.file)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Return one prompt or the list of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.sample(index, range(len(self))[index])

    def sample(self, index: int, sample_index: int) -> Prompt:
        """Return record `index` as global sample `sample_index` of a run."""
        index = range(len(self))[index]
        record = self.file.record(index)
        limit = self._domains.response_limit(record, self.file.where(index))
        return Prompt(sample_index, self._token_ids[index], record, limit)

    def fingerprint(self) -> str:
        """SHA-256 of the token ids, which depend on file, tokenizer and chat template."""
        return self._token_ids.fingerprint()

    def limits_fingerprint(self) -> str | None:
        """SHA-256 of the limits of the responses; None without limits by domain."""
        if not self._domains.max_response_length:
            return None
        limits = [
            self._domains.response_limit(record, where) for where, record in self.file.records()
        ]
        return hashlib.sha256(repr(limits).encode()).hexdigest()

    def with_responses(
        self, responses: TokenTable, special_tokens: SpecialTokens
    ) -> "ExampleDataset":
        """The same records with responses; a record with an empty response must not be sampled."""
        return ExampleDataset(self.file, self._token_ids, responses, special_tokens)


class ExampleDataset(Sequence[Trajectory]):
    """Tokenised prompt and response pairs of a file; `unmask_step` is zero everywhere."""

    def __init__(
        self,
        file: RecordSource,
        prompts: TokenTable,
        responses: TokenTable,
        special_tokens: SpecialTokens,
        records: Sequence[int] | None = None,
        num_dropped: int = 0,
    ) -> None:
        """Combine N prompts with their N responses; a response without EOS counts as cut.

        Args:
            file: What they were read from.
            prompts: N token sequences.
            responses: N token sequences.
            special_tokens: Which tokens end a response.
            records: Index of the record of each; None if each record is one example.
            num_dropped: Examples that were left out because their prompts are too long.
        """
        self.file = file
        self.num_dropped = num_dropped
        self._prompts = prompts
        self._responses = responses
        self._eos_token_ids = special_tokens.eos_token_ids
        self._records = range(len(file)) if records is None else records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        """Return one example or the list of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.sample(index, range(len(self))[index])

    def record_index(self, index: int) -> int:
        """Index of the record that example `index` is of."""
        return self._records[index]

    def sample(self, index: int, sample_index: int) -> Trajectory:
        """Return example `index` as global sample `sample_index` of a run."""
        index = range(len(self))[index]
        response_ids = self._responses[index]
        return Trajectory(
            sample_index=sample_index,
            prompt_ids=self._prompts[index],
            response_ids=response_ids,
            unmask_step=torch.zeros_like(response_ids),
            finish_reason="eos" if int(response_ids[-1]) in self._eos_token_ids else "length",
            record=self.file.record(self._records[index]),
        )


def read_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    field: str = "--prompts",
    *,
    domains: Domains = NO_DOMAINS,
    long_prompts: LongPrompts = "error",
) -> PromptDataset:
    """Read prompts: a JSON object a line with `messages` (chat) or `prompt` (plain text).

    Args:
        path: The JSONL file; other fields of a record are kept in `Prompt.record`.
        tokenizer: Its chat template renders `messages`, with the generation prompt.
        special_tokens: Needed to refuse prompts that contain MASK.
        max_prompt_length: In tokens, chat template included.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``; a
            record's override them.
        field: The flag that the path came from, for error messages.
        domains: Settings by the domain of a record.
        long_prompts: What to do with prompts over `max_prompt_length`.

    Raises:
        UserError: The file or one of its lines is unusable; names file, line, problem and remedy.
    """
    file = open_records(path, field, domains.name)
    return tokenize_prompts(
        file,
        tokenizer,
        special_tokens,
        max_prompt_length,
        chat_template_kwargs,
        domains=domains,
        long_prompts=long_prompts,
    )


def tokenize_prompts(
    file: RecordSource,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    domains: Domains = NO_DOMAINS,
    long_prompts: LongPrompts = "error",
) -> PromptDataset:
    """Tokenise the prompts of a file already read; see `read_prompts`.

    Raises:
        UserError: A line is unusable.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    table, kept = TokenTable(), array("q")
    for chunk in _chunks(enumerate(file.records())):
        texts = [
            _prompt_text(
                domains.with_suffix(open_prompt_source(record, where), record, where),
                template,
                where,
            )
            for _, (where, record) in chunk
        ]
        for (index, (where, record)), token_ids in zip(
            chunk, _encode(tokenizer, texts), strict=True
        ):
            domains.response_limit(record, where)
            within = fitted(token_ids, where, max_prompt_length, long_prompts)
            if within is not None:
                check_prompt(within, where, special_tokens, tokenizer)
                table.append(within)
                kept.append(index)
    check_some_left(file, len(kept), max_prompt_length)
    return PromptDataset(file.select(kept), table, domains, len(file) - len(kept))


def read_examples(
    path: str | Path | RecordSource,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    max_prompt_length: int,
    max_response_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    field: str = "--train-data",
    max_position_embeddings: int | None = None,
    train_on: TrainOn = "last",
    *,
    domains: Domains = NO_DOMAINS,
    long_prompts: LongPrompts = "error",
) -> ExampleDataset:
    """Read training examples: a prompt record with `response`, or a chat that ends in an answer.

    A `response` is the text that follows the prompt. An answer in a chat is rendered by the
    template, with EOS, thinking and tool calls as generation would write them.

    Args:
        path: The JSONL file, or its records.
        tokenizer: Its chat template renders the prompt, with the generation prompt.
        special_tokens: EOS is appended to every response that no token of `eos_token_ids` ends.
        max_prompt_length: In tokens, chat template included.
        max_response_length: In tokens, EOS included; None for no limit.
        chat_template_kwargs: Variables for the chat template.
        field: The flag that the path came from, for error messages.
        max_position_embeddings: The model's, in tokens of prompt and response; None for no limit.
        train_on: Which answers of a chat are examples.
        domains: Settings by the domain of a record.
        long_prompts: What to do with prompts over `max_prompt_length`.

    Raises:
        UserError: The file or one of its lines is unusable; names file, line, problem and remedy.
    """
    file = path if isinstance(path, RecordSource) else open_records(path, field, domains.name)
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    sources = (
        (
            index,
            source._replace(prompt=domains.with_suffix(source.prompt, record, where)),
            domains.response_limit(record, where),
        )
        for index, (where, record) in enumerate(file.records())
        for source in example_sources(record, where, train_on)
    )
    prompts, responses, records = TokenTable(), TokenTable(), array("q")
    num_dropped = 0
    for chunk in _chunks(sources):
        texts = [_example_texts(source, template) for _, source, _ in chunk]
        prompts_of_chunk = _encode(tokenizer, [prompt for prompt, _ in texts])
        responses_of_chunk = _encode(tokenizer, [response for _, response in texts])
        for (index, source, limit), prompt_ids, response_ids in zip(
            chunk, prompts_of_chunk, responses_of_chunk, strict=True
        ):
            where = source.where
            within = fitted(prompt_ids, where, max_prompt_length, long_prompts)
            if within is None:
                num_dropped += 1
                continue
            prompt_ids = within
            check_prompt(prompt_ids, where, special_tokens, tokenizer)
            if source.response is None:
                response_ids = _turn(response_ids, special_tokens, tokenizer)
            if not response_ids or response_ids[-1] not in special_tokens.eos_token_ids:
                response_ids = [*response_ids, special_tokens.eos_token_id]
            check_limits(response_ids, where, max_response_length, limit)
            check_response(response_ids, where, special_tokens, tokenizer)
            length = len(prompt_ids) + len(response_ids)
            if max_position_embeddings is not None and length > max_position_embeddings:
                raise bad_value(
                    f"{where}: length of prompt and response",
                    length,
                    f"exceeds the model's {max_position_embeddings} positions",
                    "shorten the example or remove the line",
                )
            prompts.append(prompt_ids)
            responses.append(response_ids)
            records.append(index)
    check_some_left(file, len(records), max_prompt_length)
    return ExampleDataset(file, prompts, responses, special_tokens, records, num_dropped)


class _Text(NamedTuple):
    """A text to tokenise."""

    text: str
    is_bare: bool
    """Whether the tokenizer adds its special tokens (a BOS if the model has one); a chat template
    writes all special tokens itself."""


def _prompt_text(source: PromptSource, template: ChatTemplate, where: str) -> _Text:
    if isinstance(source, str):
        return _Text(source, is_bare=True)
    return _Text(template.prompt(source, where), is_bare=False)


def _example_texts(source: ExampleSource, template: ChatTemplate) -> tuple[_Text, _Text]:
    """The texts of an example's prompt and response."""
    if source.response is None:
        assert not isinstance(source.prompt, str)
        prompt, response = template.example(source.prompt, source.where)
        return _Text(prompt, is_bare=False), _Text(response, is_bare=False)
    text = _prompt_text(source.prompt, template, source.where)
    if not text.is_bare:
        check_one_block(text.text, source.response, source.where)
    return text, _Text(source.response, is_bare=False)


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[_Text]) -> Iterator[list[int]]:
    """Token ids of each text."""
    encoded: dict[bool, Iterator[list[int]]] = {}
    for is_bare in (True, False):
        batch = [text.text for text in texts if text.is_bare == is_bare]
        # verbose=False: the length check is ours, not a warning about the model's maximum.
        ids = tokenizer(batch, add_special_tokens=is_bare, verbose=False) if batch else {}
        encoded[is_bare] = iter(ids.get("input_ids", ()))
    return (next(encoded[text.is_bare]) for text in texts)


def _turn(
    token_ids: list[int], special_tokens: SpecialTokens, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """A rendered turn up to its EOS; templates add line breaks or special tokens after it."""
    ends = (i for i, token_id in enumerate(token_ids) if token_id in special_tokens.eos_token_ids)
    end = next(ends, None)
    if end is None or tokenizer.decode(token_ids[end + 1 :], skip_special_tokens=True).strip():
        return token_ids
    return token_ids[: end + 1]
