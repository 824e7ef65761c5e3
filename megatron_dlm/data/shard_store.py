"""A folder of shards over the prompts of a file, computed once and completed as runs need more.

    header.json      what the shards were computed for
    <content>_<i>.*  a shard, computed together for some prompts, of which prompt i is the first

Each shard appears under its name only when it is complete, so whatever an interrupted run leaves is
kept. What a later run lacks is computed then, under any parallel layout.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from megatron_dlm.errors import UserError, bad_value


class Header(Protocol):
    """A dataclass of plain values that decide the content; a folder holds that of one header.

    A field with `compare=False` decides nothing: it is written for people to read.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


class ShardStore(ABC):
    """Which prompts have something stored; a subclass says what.

    Args:
        folder: Created by `create`.
        header: What the shards have to be for.
        field: The flag that the folder came from, for error messages.

    Attributes:
        content: What the shards hold, as the names of their files begin.
        suffix: How these names end.

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
        """Write the header, if there is none yet; one process calls this."""
        if self._header_file.is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.header), indent=2) + "\n"
        publish(self._header_file, lambda temporary: temporary.write_text(text))

    def shards(self) -> list[Path]:
        """The files of all shards, in the order of their first prompts."""
        return sorted(self.folder.glob(f"{self.content}_*{self.suffix}"))

    def file(self, prompts: Sequence[int]) -> Path:
        """Where a shard of these prompts is or will be: no other shard begins with the first."""
        return self.folder / f"{self.content}_{prompts[0]:08d}{self.suffix}"

    @abstractmethod
    def prompts(self, shard: Path) -> list[int]:
        """Indices of the prompts in a shard, ascending.

        Raises:
            UserError: It is not what was written.
        """

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted prompts that nothing is stored for.

        Raises:
            UserError: A shard is not what was written.
        """
        stored = {index for shard in self.shards() for index in self.prompts(shard)}
        return [index for index in wanted if index not in stored]

    def damaged(self, shard: Path) -> UserError:
        """The error for a shard that is not what was written."""
        return bad_value(
            self._field, str(shard), "is damaged", "delete it to have it computed again"
        )


def publish(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under a temporary name and rename it: it is there completely or not."""
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    temporary.replace(file)
