"""Tokenised prompts and training examples from JSONL files.

A whole file is validated and tokenised before any work starts, so that a bad line is found in
seconds and not in the middle of a run. Tokens are held in one flat array; `Prompt` and `Trajectory`
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

from megatron_dlm.config.groups import TrainOn
from megatron_dlm.data.chat_template import ChatTemplate, check_one_block
from megatron_dlm.data.records import (
    ExampleSource,
    PromptSource,
    RecordFile,
    example_sources,
    open_prompt_source,
)
from megatron_dlm.data.tokenizer import SpecialTokens, check_token_ids
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.rollout.trajectory import Prompt, Trajectory

T = TypeVar("T")

_CHUNK = 1024  # Texts tokenised at once: bounds the memory for them.


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

    def __init__(self, file: RecordFile, token_ids: TokenTable) -> None:
        """Combine N records with their N token sequences."""
        self.file = file
        self._token_ids = token_ids

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
        return Prompt(sample_index, self._token_ids[index], self.file.record(index))

    def fingerprint(self) -> str:
        """SHA-256 of the token ids, which depend on file, tokenizer and chat template."""
        return self._token_ids.fingerprint()

    def with_responses(
        self, responses: TokenTable, special_tokens: SpecialTokens
    ) -> "ExampleDataset":
        """The same records with their responses; one with an empty response cannot be sampled."""
        return ExampleDataset(self.file, self._token_ids, responses, special_tokens)


class ExampleDataset(Sequence[Trajectory]):
    """Tokenised prompt and response pairs of a file; `unmask_step` is zero everywhere."""

    def __init__(
        self,
        file: RecordFile,
        prompts: TokenTable,
        responses: TokenTable,
        special_tokens: SpecialTokens,
        records: Sequence[int] | None = None,
    ) -> None:
        """Combine N prompts with their N responses; one without EOS was cut.

        Args:
            file: What they were read from.
            prompts: N token sequences.
            responses: N token sequences.
            special_tokens: Which tokens end a response.
            records: Index of the record of each; None if each record is one example.
        """
        self.file = file
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
) -> PromptDataset:
    """Read prompts: a JSON object a line with `messages` (chat) or `prompt` (plain text).

    Args:
        path: The JSONL file; other fields of a record are kept in `Prompt.record`.
        tokenizer: Its chat template renders `messages`, with the generation prompt.
        special_tokens: Needed to refuse prompts that contain MASK.
        max_prompt_length: In tokens, chat template included.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``; those of
            a record win.
        field: The flag that the path came from, for error messages.

    Raises:
        UserError: The file or one of its lines is unusable; names file, line, problem and remedy.
    """
    file = RecordFile.read(path, field)
    return tokenize_prompts(
        file, tokenizer, special_tokens, max_prompt_length, chat_template_kwargs
    )


def tokenize_prompts(
    file: RecordFile,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptDataset:
    """Tokenise the prompts of a file already read; see `read_prompts`.

    Raises:
        UserError: A line is unusable.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    table = TokenTable()
    for chunk in _chunks(file.records()):
        texts = [
            _prompt_text(open_prompt_source(record, where), template, where)
            for where, record in chunk
        ]
        for (where, _), token_ids in zip(chunk, _encode(tokenizer, texts), strict=True):
            _check_prompt(token_ids, where, max_prompt_length, special_tokens, tokenizer)
            table.append(token_ids)
    return PromptDataset(file, table)


def read_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    max_prompt_length: int,
    max_response_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    field: str = "--train-data",
    max_position_embeddings: int | None = None,
    train_on: TrainOn = "last",
) -> ExampleDataset:
    """Read training examples: a prompt record with `response`, or a chat that ends in an answer.

    A `response` is the text that follows the prompt. An answer in a chat is what the template
    renders for it: that has EOS, thinking and tool calls as generation would write them.

    Args:
        path: The JSONL file.
        tokenizer: Its chat template renders the prompt, with the generation prompt.
        special_tokens: EOS is appended to every response that no token of `eos_token_ids` ends.
        max_prompt_length: In tokens, chat template included.
        max_response_length: In tokens, EOS included; None for no limit.
        chat_template_kwargs: Variables for the chat template.
        field: The flag that the path came from, for error messages.
        max_position_embeddings: The model's, in tokens of prompt and response; None for no limit.
        train_on: Which answers of a chat are examples.

    Raises:
        UserError: The file or one of its lines is unusable; names file, line, problem and remedy.
    """
    file = RecordFile.read(path, field)
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    sources = (
        (index, source)
        for index, (where, record) in enumerate(file.records())
        for source in example_sources(record, where, train_on)
    )
    prompts, responses, records = TokenTable(), TokenTable(), array("q")
    for chunk in _chunks(sources):
        texts = [_example_texts(source, template) for _, source in chunk]
        prompts_of_chunk = _encode(tokenizer, [prompt for prompt, _ in texts])
        responses_of_chunk = _encode(tokenizer, [response for _, response in texts])
        for (index, source), prompt_ids, response_ids in zip(
            chunk, prompts_of_chunk, responses_of_chunk, strict=True
        ):
            where = source.where
            _check_prompt(prompt_ids, where, max_prompt_length, special_tokens, tokenizer)
            if source.response is None:
                response_ids = _turn(response_ids, special_tokens, tokenizer)
            if not response_ids or response_ids[-1] not in special_tokens.eos_token_ids:
                response_ids = [*response_ids, special_tokens.eos_token_id]
            _check_response(response_ids, where, max_response_length, special_tokens, tokenizer)
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
    return ExampleDataset(file, prompts, responses, special_tokens, records)


class _Text(NamedTuple):
    """A text to tokenise."""

    text: str
    is_bare: bool
    """Whether it gets what the tokenizer puts around text (a BOS where the model has one); a chat
    template writes all special tokens itself."""


def _prompt_text(source: PromptSource, template: ChatTemplate, where: str) -> _Text:
    if isinstance(source, str):
        return _Text(source, is_bare=True)
    return _Text(template.prompt(source, where), is_bare=False)


def _example_texts(source: ExampleSource, template: ChatTemplate) -> tuple[_Text, _Text]:
    """What an example's prompt and its response are tokenised from."""
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
    """A rendered turn up to its EOS: templates go on with a line break or other special tokens."""
    ends = (i for i, token_id in enumerate(token_ids) if token_id in special_tokens.eos_token_ids)
    end = next(ends, None)
    if end is None or tokenizer.decode(token_ids[end + 1 :], skip_special_tokens=True).strip():
        return token_ids
    return token_ids[: end + 1]


def _check_prompt(
    token_ids: list[int],
    where: str,
    max_prompt_length: int,
    special_tokens: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if len(token_ids) > max_prompt_length:
        raise bad_value(
            f"{where}: prompt length",
            len(token_ids),
            f"is over --max-prompt-length {max_prompt_length}",
            "shorten the prompt or raise --max-prompt-length",
        )
    if not token_ids:
        raise UserError(f"{where}: the prompt has no tokens; write a text or remove the line")
    _check_ids(token_ids, f"{where}: the prompt", special_tokens, tokenizer)


def _check_response(
    token_ids: list[int],
    where: str,
    max_response_length: int | None,
    special_tokens: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if max_response_length is not None and len(token_ids) > max_response_length:
        raise bad_value(
            f"{where}: response length",
            len(token_ids),
            f"is over --max-response-length {max_response_length}",
            "shorten the response or raise --max-response-length",
        )
    ends = (token_id for token_id in token_ids[:-1] if token_id in special_tokens.eos_token_ids)
    if (end := next(ends, None)) is not None:
        raise UserError(
            f"{where}: the response goes on behind the EOS token (id {end}); end it there"
        )
    _check_ids(token_ids, f"{where}: the response", special_tokens, tokenizer)


def _check_ids(
    token_ids: list[int],
    what: str,
    special_tokens: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    check_token_ids(
        token_ids,
        what,
        tokenizer,
        mask_token_id=special_tokens.mask_token_id,
        vocab_size=special_tokens.vocab_size,
    )
