"""A folder of shards for the prompts of a file, computed once and completed when runs need more.

    header.json      what the shards depend on
    <content>_<i>.*  a shard, computed together for some prompts, of which prompt i is the first

A shard gets its name only when it is complete, so the shards of an interrupted run are usable. A
later run computes what is missing, under any parallel layout.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.output_file import write_file, writing


class Header(Protocol):
    """A dataclass of plain values that the content depends on; a folder belongs to one header.

    A field with `compare=False` is for people to read and is not compared.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


class ShardStore(ABC):
    """Base of stores; a subclass defines what is stored for a prompt.

    Args:
        folder: Created by `create`.
        header: What the shards have to depend on.
        field: The flag that the folder came from, for error messages.

    Attributes:
        content: Beginning of the names of shards, such as `responses`.
        suffix: End of these names.

    Raises:
        UserError: The folder holds the shards of another header.
    """

    content: ClassVar[str]
    suffix: ClassVar[str]

    def __init__(self, folder: str | Path, header: Header, field: str) -> None:
        self.folder = Path(folder)
        self.header = header
        self._field = field
        self._check_header()

    @property
    def _header_file(self) -> Path:
        return self.folder / "header.json"

    def _check_header(self) -> None:
        if not self._header_file.is_file():
            return
        try:
            saved = dict(json.loads(self._header_file.read_text()))
        except (ValueError, TypeError):
            saved = {}
        for field in dataclasses.fields(self.header):
            name, value = field.name, getattr(self.header, field.name)
            if field.compare and saved.get(name) != value:
                raise bad_value(
                    self._field,
                    str(self.folder),
                    f"holds {self.content} computed with {name} = {saved.get(name)!r}, "
                    f"this run has {value!r}",
                    "name another folder, or the options that they were computed with",
                )

    def create(self) -> None:
        """Write the header, if there is none yet; one process calls this.

        Raises:
            UserError: The folder cannot be written.
        """
        if self._header_file.is_file():
            return
        with writing(self.folder, self._field):
            self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.header), indent=2) + "\n"
        write_file(self._header_file, text, self._field)

    def shards(self) -> list[Path]:
        """The files of all shards, in the order of their first prompts."""
        return sorted(self.folder.glob(f"{self.content}_*{self.suffix}"))

    def file(self, prompts: Sequence[int]) -> Path:
        """Path of the shard of these prompts; no other shard begins with the first of them."""
        return self.folder / f"{self.content}_{prompts[0]:08d}{self.suffix}"

    @abstractmethod
    def prompts(self, shard: Path) -> list[int]:
        """Indices of the prompts in a shard, ascending.

        Raises:
            UserError: It is damaged.
        """

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """The wanted prompts without a stored entry.

        Raises:
            UserError: A shard is damaged.
        """
        stored = {index for shard in self.shards() for index in self.prompts(shard)}
        return [index for index in wanted if index not in stored]

    def damaged(self, shard: Path) -> UserError:
        """The error for a damaged shard."""
        return bad_value(
            self._field, str(shard), "is damaged", "delete it to have it computed again"
        )
