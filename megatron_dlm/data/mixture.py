"""A mixture of sources, described by a YAML file.

```yaml
seed: 1234
sources:
  - path: math.parquet          # relative to this file; a pattern or hf://datasets/... too
    domain: math
    max_samples: 10000          # a random choice of so many
    weight: 2                   # each of them twice an epoch; 0.5: a random half of them
    fields: {question: problem, answer: reward_model.ground_truth}
  - hub: owner/name
    subset: all
    split: train
    revision: 0a1b2c3
    domain: code
    only_prompts: true          # chats end before the assistant's last message
    streaming: true             # take max_samples from a stream instead of downloading all
    max_samples: 5000
```
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_dlm.config import DataConfig
from megatron_dlm.data.sampler import shuffled_order
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.yaml_file import read_yaml_mapping

_REMEDY = "write `sources:`, a list of `path:` or `hub:` each (docs/data-formats.md)"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SourceEntry(_Strict):
    """One source of a mixture.

    Attributes:
        path: File, pattern, folder of `save_to_disk` or ``hf://datasets/...``.
        hub: ``owner/name`` of a data set of the Hugging Face hub, instead of a path.
        subset: Its configuration.
        split: Its split (default: train).
        revision: Its commit, tag or branch.
        domain: Domain of all its records.
        only_prompts: Leave out responses: the assistant's last message, and `response`.
        fields: Stored fields to keep, by the names that they get; None keeps all.
        max_samples: Records of it, chosen at random; None for all.
        weight: How often each of these is seen in an epoch.
        streaming: Take `max_samples` from a stream (`streamed`).
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    domain: str | None = None
    only_prompts: bool = False
    fields: dict[str, str] | None = Field(default=None, min_length=1)
    max_samples: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    streaming: bool = False

    @model_validator(mode="after")
    def _names_one_source(self) -> "SourceEntry":
        if (self.path is None) == (self.hub is None):
            raise ValueError("names both or neither of path and hub")
        if self.hub is None and (self.subset or self.revision):
            raise ValueError("has subset or revision, which are for hub")
        if self.streaming and self.max_samples is None:
            raise ValueError("is streaming without max_samples, the records to take")
        return self

    def choices(self) -> dict[str, Any]:
        """What decides which records there are, and how they read, but for where they are."""
        return self.model_dump(
            include={"domain", "only_prompts", "fields", "max_samples", "weight"}
        )


class _File(_Strict):
    """The YAML file."""

    seed: int = Field(default=DataConfig.seed, ge=0)
    sources: list[SourceEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Mixture:
    """Sources, and the seed of their random choices."""

    sources: tuple[SourceEntry, ...]
    seed: int


def read_mixture(path: Path, field: str) -> Mixture:
    """Read a mixture's file.

    Args:
        path: The YAML file.
        field: The flag that it came from, for error messages.

    Raises:
        UserError: It cannot be read, or an entry cannot be understood.
    """
    values, _ = read_yaml_mapping(str(path), field, _REMEDY)
    try:
        file = _File.model_validate(values)
    except ValidationError as error:
        raise _refusal(path, error) from error
    return Mixture(tuple(file.sources), file.seed)


def _refusal(path: Path, error: ValidationError) -> UserError:
    """The first problem as one line."""
    first = error.errors()[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = SourceEntry if "[" in place else _File
        return bad_value(
            f"{path}: {place}",
            first["input"],
            "is no key of a mixture",
            f"use {', '.join(known.model_fields)}",
        )
    return bad_value(f"{path}: {place}", first["input"], problem[:1].lower() + problem[1:], _REMEDY)


def kept_indices(num_records: int, entry: SourceEntry, seed: int, source: int) -> NDArray[np.int64]:
    """Which records of a source are in an epoch, in the order of the source.

    Args:
        num_records: N of the source.
        entry: Its `max_samples` and `weight`.
        seed: Of the mixture.
        source: The source's place in the mixture.

    Returns:
        Indices, one of which may be there several times.
    """
    order = shuffled_order(num_records, seed, source)[: entry.max_samples]
    whole = int(entry.weight)
    rest = order[: round((entry.weight - whole) * len(order))]
    return np.sort(np.concatenate([np.tile(order, whole), rest]), kind="stable")
