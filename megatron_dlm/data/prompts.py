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
from typing import Any, overload

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_dlm.data.records import Message, RecordFile, example_source, open_prompt_source
from megatron_dlm.data.tokenizer import SpecialTokens, check_token_ids, require_chat_template
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.rollout.trajectory import Prompt, Trajectory

_CHUNK = 1024  # Records tokenised at once: bounds the memory for their text.


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
    ) -> None:
        """Combine N records with their N prompts and N responses; one without EOS was cut."""
        self.file = file
        self._prompts = prompts
        self._responses = responses
        self._eos_token_ids = special_tokens.eos_token_ids

    def __len__(self) -> int:
        return len(self.file)

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
        """Return record `index` as global sample `sample_index` of a run."""
        index = range(len(self))[index]
        response_ids = self._responses[index]
        return Trajectory(
            sample_index=sample_index,
            prompt_ids=self._prompts[index],
            response_ids=response_ids,
            unmask_step=torch.zeros_like(response_ids),
            finish_reason="eos" if int(response_ids[-1]) in self._eos_token_ids else "length",
            record=self.file.record(index),
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
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``.
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
    renderer = _Renderer(tokenizer, chat_template_kwargs or {})
    sources = [(where, open_prompt_source(record, where)) for where, record in file.records()]
    table = TokenTable()
    for where, token_ids in renderer.tokenize_prompts(iter(sources)):
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
) -> ExampleDataset:
    """Read training examples: a prompt record with `response`, or a chat that ends in an answer.

    Args:
        path: The JSONL file.
        tokenizer: Its chat template renders the prompt, with the generation prompt.
        special_tokens: EOS is appended to every response that no token of `eos_token_ids` ends.
        max_prompt_length: In tokens, chat template included.
        max_response_length: In tokens, EOS included; None for no limit.
        chat_template_kwargs: Variables for the chat template.
        field: The flag that the path came from, for error messages.
        max_position_embeddings: The model's, in tokens of prompt and response; None for no limit.

    Raises:
        UserError: The file or one of its lines is unusable; names file, line, problem and remedy.
    """
    file = RecordFile.read(path, field)
    renderer = _Renderer(tokenizer, chat_template_kwargs or {})
    pairs = [(where, *example_source(record, where)) for where, record in file.records()]
    prompts, responses = TokenTable(), TokenTable()
    for where, token_ids in renderer.tokenize_prompts((w, source) for w, source, _ in pairs):
        _check_prompt(token_ids, where, max_prompt_length, special_tokens, tokenizer)
        prompts.append(token_ids)
    for where, token_ids in renderer.tokenize_texts((w, response) for w, _, response in pairs):
        if not token_ids or token_ids[-1] not in special_tokens.eos_token_ids:
            token_ids = [*token_ids, special_tokens.eos_token_id]
        _check_response(token_ids, where, max_response_length, special_tokens, tokenizer)
        length = prompts.length(len(responses)) + len(token_ids)
        if max_position_embeddings is not None and length > max_position_embeddings:
            raise bad_value(
                f"{where}: length of prompt and response",
                length,
                f"exceeds the model's {max_position_embeddings} positions",
                "shorten the example or remove the line",
            )
        responses.append(token_ids)
    return ExampleDataset(file, prompts, responses, special_tokens)


class _Renderer:
    """From prompt sources to token ids, many at a time."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template_kwargs = chat_template_kwargs

    def tokenize_prompts(
        self, sources: Iterator[tuple[str, str | list[Message]]]
    ) -> Iterator[tuple[str, list[int]]]:
        """Yield (``file:line``, token ids) of prompt sources."""
        while chunk := list(islice(sources, _CHUNK)):
            # The template writes all special tokens itself; plain text gets what the tokenizer
            # puts around text (a BOS where the model has one).
            by_id = {
                add_special_tokens: self._encode(
                    [
                        source if isinstance(source, str) else self._render(source, where)
                        for where, source in chunk
                        if isinstance(source, str) == add_special_tokens
                    ],
                    add_special_tokens,
                )
                for add_special_tokens in (True, False)
            }
            for where, source in chunk:
                yield where, next(by_id[isinstance(source, str)])

    def tokenize_texts(self, texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[int]]]:
        """Yield (``file:line``, token ids) of texts that continue a prompt."""
        while chunk := list(islice(texts, _CHUNK)):
            encoded = self._encode([text for _, text in chunk], add_special_tokens=False)
            yield from zip((where for where, _ in chunk), encoded, strict=True)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> Iterator[list[int]]:
        if not texts:
            return iter(())
        # verbose=False: the length check is ours, not a warning about the model's maximum.
        encoded = self._tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
        return iter(encoded["input_ids"])

    def _render(self, messages: list[Message], where: str) -> str:
        require_chat_template(self._tokenizer, where)
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self._chat_template_kwargs
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f'{where}: the chat template refuses "messages" ({error});'
                " change their roles or order"
            ) from error
        return str(text)


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
