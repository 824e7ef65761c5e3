"""What is in a data set: lengths in tokens, domains, duplicates, and every record that is no good.

A run stops at the first bad record; a survey goes on and lists all of them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.chat import text_of
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.record_source import Record, RecordSource
from megatron_dlm.errors import UserError
from megatron_dlm.types.trajectory import Trajectory

NO_DOMAIN = "(none)"
PERCENTILES = (0, 10, 50, 90, 99, 100)

_CHUNK = 256

Tokenize = Callable[[RecordSource], "PromptDataset | ExampleDataset"]
"""Reads records as a run does, but for the limit of the prompt's length."""


class Problem(NamedTuple):
    """Something to know about one record.

    Attributes:
        kind: ``bad`` (a run would refuse it), ``too_long``, ``empty`` or ``duplicate``.
        where: Its place.
        text: What is wrong, in one line.
    """

    kind: str
    where: str
    text: str


@dataclass
class Lengths:
    """Lengths in tokens of one domain's prompts and responses."""

    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)


@dataclass
class Survey:
    """The result.

    Attributes:
        num_records: Of the data set.
        problems: In the order of the records.
        domains: Lengths by domain.
        good: Indices of the records without any problem.
    """

    num_records: int
    problems: list[Problem] = field(default_factory=list)
    domains: dict[str, Lengths] = field(default_factory=dict)
    good: list[int] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Number of problems of a kind."""
        return sum(problem.kind == kind for problem in self.problems)


def survey(
    records: RecordSource, tokenize: Tokenize, max_prompt_length: int, domain_field: str
) -> Survey:
    """Read all records.

    Args:
        records: In our format.
        tokenize: How a run would read them.
        max_prompt_length: In tokens; longer prompts are a problem.
        domain_field: Field that names the domain.
    """
    found = Survey(len(records))
    seen: dict[bytes, str] = {}
    for index, samples in _tokenized(records, tokenize, found.problems):
        where, record = records.where(index), samples[0].record
        lengths = found.domains.setdefault(_domain(record, domain_field), Lengths())
        problems = []
        if is_blank(record):
            problems.append(Problem("empty", where, "the prompt has no text"))
        digest = hashlib.blake2b(digest_size=16)
        for sample in samples:
            prompt, response = _token_ids(sample)
            lengths.prompts.append(len(prompt))
            if response is not None:
                lengths.responses.append(len(response))
            if len(prompt) > max_prompt_length:
                text = f"the prompt has {len(prompt)} tokens, over {max_prompt_length}"
                problems.append(Problem("too_long", where, text))
            for token_ids in (prompt, response if response is not None else prompt[:0]):
                digest.update(len(token_ids).to_bytes(8, "little") + token_ids.tobytes())
        key = digest.digest()
        if key in seen:
            problems.append(Problem("duplicate", where, f"the same tokens as {seen[key]}"))
        seen.setdefault(key, where)
        found.problems += problems
        if not problems:
            found.good.append(index)
    return found


def _tokenized(
    records: RecordSource, tokenize: Tokenize, problems: list[Problem]
) -> Iterator[tuple[int, list[Any]]]:
    """(index, samples) of each record that can be used; adds the others to `problems`."""
    for start in range(0, len(records), _CHUNK):
        indices = range(start, min(start + _CHUNK, len(records)))
        try:
            yield from _grouped(tokenize(records.select(indices)), start)
            continue
        except UserError:  # of one record or more: each for itself
            pass
        for index in indices:
            try:
                data = tokenize(records.select([index]))
            except UserError as error:
                where = records.where(index)
                text = str(error).removeprefix(where).lstrip(": ")
                problems.append(Problem("bad", where, text))
            else:
                yield from _grouped(data, index)


def _grouped(data: "PromptDataset | ExampleDataset", start: int) -> Iterator[tuple[int, list[Any]]]:
    """Samples of each record; an example of every turn makes several of one."""
    groups: dict[int, list[Any]] = {}
    for i, sample in enumerate(data):
        record = data.record_index(i) if isinstance(data, ExampleDataset) else i
        groups.setdefault(record, []).append(sample)
    for record, samples in groups.items():
        yield start + record, samples


def _token_ids(sample: Any) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    if isinstance(sample, Trajectory):
        return sample.prompt_ids.numpy(), sample.response_ids.numpy()
    return sample.token_ids.numpy(), None


def _domain(record: Record, domain_field: str) -> str:
    domain = record.get(domain_field)
    return domain if isinstance(domain, str) else NO_DOMAIN


def is_blank(record: Record) -> bool:
    """Whether a record's prompt, or its last message of a user, is only whitespace."""
    if isinstance(record.get("prompt"), str):
        return not record["prompt"].strip()
    users = [message for message in record["messages"] if message["role"] == "user"]
    return bool(users) and not text_of(users[-1].get("content")).strip()


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """`PERCENTILES` of lengths, as lengths that occur."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist()
    names = [f"p{p}" if 0 < p < 100 else ("min", "max")[p > 0] for p in PERCENTILES]
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, count) of classes that double: 1, 2 to 3, 4 to 7 and so on."""
    classes = np.bincount([int(length).bit_length() for length in lengths])
    filled = np.flatnonzero(classes)
    return [
        (1 << (bits - 1) if bits else 0, (1 << bits) - 1, int(classes[bits]))
        for bits in range(int(filled[0]), int(filled[-1]) + 1)
    ]
