"""Tokenised prompts and training examples; their tokens are in memory, or mapped into it.

`Prompt` and `Trajectory` objects are made when they are asked for.

Shapes: N records, P prompt tokens, L response tokens.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megatron_dlm.config.groups import DataConfig, LongPrompts, TrainOn
from megatron_dlm.data.domains import NO_DOMAINS, Domains
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompt_checks import check_some_left
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.token_table import TokenSequences
from megatron_dlm.data.tokenizing import ExampleReader, PromptReader
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

Sample = TypeVar("Sample", Prompt, Trajectory)


class _Samples(Sequence[Sample]):
    """Elements that are made when they are asked for, as samples of a run."""

    @abstractmethod
    def sample(self, index: int, sample_index: int) -> Sample:
        """Return element `index` as global sample `sample_index` of a run."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Return one element or the list of a slice; `sample_index` is its index."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.sample(index, range(len(self))[index])


class PromptDataset(_Samples[Prompt]):
    """Tokenised prompts of a file; `sample_index` of an element is its index in the file."""

    def __init__(
        self,
        file: RecordSource,
        token_ids: TokenSequences,
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
        self, responses: TokenSequences, special_tokens: SpecialTokens
    ) -> "ExampleDataset":
        """The same records with responses; a record with an empty response must not be sampled."""
        return ExampleDataset(self.file, self._token_ids, responses, special_tokens)


class ExampleDataset(_Samples[Trajectory]):
    """Tokenised prompt and response pairs of a file; `unmask_step` is zero everywhere."""

    def __init__(
        self,
        file: RecordSource,
        prompts: TokenSequences,
        responses: TokenSequences,
        special_tokens: SpecialTokens,
        records: Sequence[int] | NDArray[np.int64] | None = None,
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

    def record_index(self, index: int) -> int:
        """Index of the record that example `index` is of."""
        return int(self._records[index])

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
            record=self.file.record(self.record_index(index)),
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
    long_prompts: LongPrompts = DataConfig.long_prompts,
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
    long_prompts: LongPrompts = DataConfig.long_prompts,
) -> PromptDataset:
    """Tokenise the prompts of a file already read; see `read_prompts`.

    Raises:
        UserError: A line is unusable.
    """
    reader = PromptReader(
        tokenizer,
        special_tokens,
        max_prompt_length,
        chat_template_kwargs or {},
        domains,
        long_prompts,
    )
    records, prompts, _, num_dropped = reader.read(file)
    check_some_left(file, len(records), max_prompt_length)
    return PromptDataset(file.select(records), prompts, domains, num_dropped)


def read_examples(
    path: str | Path | RecordSource,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    max_prompt_length: int,
    max_response_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    field: str = "--train-data",
    max_position_embeddings: int | None = None,
    train_on: TrainOn = DataConfig.train_on,
    *,
    domains: Domains = NO_DOMAINS,
    long_prompts: LongPrompts = DataConfig.long_prompts,
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
    reader = ExampleReader(
        tokenizer,
        special_tokens,
        max_prompt_length,
        chat_template_kwargs or {},
        domains,
        long_prompts,
        max_response_length,
        max_position_embeddings,
        train_on,
    )
    records, prompts, responses, num_dropped = reader.read(file)
    assert responses is not None
    check_some_left(file, len(records), max_prompt_length)
    return ExampleDataset(file, prompts, responses, special_tokens, records, num_dropped)
