"""How records become tokens: the prompt, and the response of a training example.

Every record is checked and tokenised before any work starts, so that a bad one is found in seconds
and not during a run.

Shapes: N samples, P prompt tokens, L response tokens.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config.groups import DataConfig, LongPrompts, TrainOn
from megatron_dlm.data.chat_template import ChatTemplate, check_one_block
from megatron_dlm.data.domains import NO_DOMAINS, Domains
from megatron_dlm.data.prompt_checks import check_limits, check_prompt, check_response, fitted
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.records import (
    ExampleSource,
    PromptSource,
    example_sources,
    open_prompt_source,
)
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.errors import bad_value
from megatron_dlm.types.special_tokens import SpecialTokens

T = TypeVar("T")

_CHUNK = 1024  # Texts tokenised at once, to bound memory.


class Tokenized(NamedTuple):
    """Samples of some records.

    Attributes:
        records: Index of the record of each, [N].
        prompts: Their token ids.
        responses: Of examples.
        num_dropped: Samples that were left out because their prompts are too long.
    """

    records: "array[int]"
    prompts: TokenTable
    responses: TokenTable | None
    num_dropped: int


@dataclass(frozen=True)
class PromptReader:
    """Tokenises prompts.

    Attributes:
        tokenizer: Its chat template renders `messages`, with the generation prompt.
        special_tokens: Needed to refuse prompts that contain MASK.
        max_prompt_length: In tokens, chat template included.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``; a
            record's override them.
        domains: Settings by the domain of a record.
        long_prompts: What to do with prompts over `max_prompt_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    special_tokens: SpecialTokens
    max_prompt_length: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    domains: Domains = NO_DOMAINS
    long_prompts: LongPrompts = DataConfig.long_prompts

    def settings(self) -> dict[str, Any]:
        """All that the tokens depend on but records and tokenizer."""
        names = [field.name for field in fields(self) if field.name != "tokenizer"]
        return {"reader": type(self).__name__} | {name: getattr(self, name) for name in names}

    def read(self, file: RecordSource) -> Tokenized:
        """Tokenise all records of a file.

        Raises:
            UserError: One is unusable; names file, line, problem and remedy.
        """
        template = ChatTemplate(self.tokenizer, self.chat_template_kwargs)
        result = Tokenized(array("q"), TokenTable(), None, 0)
        for chunk in _chunks(enumerate(file.records())):
            texts = [
                _prompt_text(
                    self.domains.with_suffix(open_prompt_source(record, where), record, where),
                    template,
                    where,
                )
                for _, (where, record) in chunk
            ]
            for (index, (where, record)), token_ids in zip(
                chunk, _encode(self.tokenizer, texts), strict=True
            ):
                self.domains.response_limit(record, where)
                within = self._fitted(token_ids, where)
                if within is not None:
                    result.prompts.append(within)
                    result.records.append(index)
        return result._replace(num_dropped=len(file) - len(result.records))

    def _fitted(self, token_ids: list[int], where: str) -> list[int] | None:
        """The checked prompt, cut if it has to be; None if it is left out."""
        within = fitted(token_ids, where, self.max_prompt_length, self.long_prompts)
        if within is not None:
            check_prompt(within, where, self.special_tokens, self.tokenizer)
        return within


@dataclass(frozen=True)
class ExampleReader(PromptReader):
    """Tokenises examples: a prompt record with `response`, or a chat that ends in an answer.

    A `response` is the text that follows the prompt. An answer in a chat is rendered by the
    template, with EOS, thinking and tool calls as generation would write them. EOS is appended to
    every response that no token of `eos_token_ids` ends.

    Attributes:
        max_response_length: In tokens, EOS included; None for no limit.
        max_position_embeddings: The model's, in tokens of prompt and response; None for no limit.
        train_on: Which answers of a chat are examples.
    """

    max_response_length: int | None = None
    max_position_embeddings: int | None = None
    train_on: TrainOn = DataConfig.train_on

    def read(self, file: RecordSource) -> Tokenized:
        """See `PromptReader.read`."""
        template = ChatTemplate(self.tokenizer, self.chat_template_kwargs)
        sources = (
            (
                index,
                source._replace(prompt=self.domains.with_suffix(source.prompt, record, where)),
                self.domains.response_limit(record, where),
            )
            for index, (where, record) in enumerate(file.records())
            for source in example_sources(record, where, self.train_on)
        )
        prompts, responses, records = TokenTable(), TokenTable(), array("q")
        num_dropped = 0
        for chunk in _chunks(sources):
            texts = [_example_texts(source, template) for _, source, _ in chunk]
            prompts_of_chunk = _encode(self.tokenizer, [prompt for prompt, _ in texts])
            responses_of_chunk = _encode(self.tokenizer, [response for _, response in texts])
            for (index, source, limit), prompt_ids, response_ids in zip(
                chunk, prompts_of_chunk, responses_of_chunk, strict=True
            ):
                within = self._fitted(prompt_ids, source.where)
                if within is None:
                    num_dropped += 1
                    continue
                prompts.append(within)
                responses.append(self._response(response_ids, source, limit, len(within)))
                records.append(index)
        return Tokenized(records, prompts, responses, num_dropped)

    def _response(
        self, response_ids: list[int], source: ExampleSource, limit: int | None, prompt_length: int
    ) -> list[int]:
        """The checked response with the EOS that ends it."""
        special_tokens, where = self.special_tokens, source.where
        if source.response is None:
            response_ids = _turn(response_ids, special_tokens, self.tokenizer)
        if not response_ids or response_ids[-1] not in special_tokens.eos_token_ids:
            response_ids = [*response_ids, special_tokens.eos_token_id]
        check_limits(response_ids, where, self.max_response_length, limit)
        check_response(response_ids, where, special_tokens, self.tokenizer)
        length, positions = prompt_length + len(response_ids), self.max_position_embeddings
        if positions is not None and length > positions:
            raise bad_value(
                f"{where}: length of prompt and response",
                length,
                f"exceeds the model's {positions} positions",
                "shorten the example or remove the line",
            )
        return response_ids


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
