"""A folder of shards over the prompts of a file, computed once and completed after interruptions.

    header.json      what the shards were computed for
    <content>_<i>.*  the shard that begins at prompt i

Each shard appears under its name only when it is complete, so whatever an interrupted run leaves is
kept and the rest is computed later, under any parallel layout.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from megatron_dlm.errors import UserError, bad_value

_SHARD_SIZE = "prompts_per_shard"


class Header(Protocol):
    """A dataclass of plain values that decide the content; a folder holds that of one header.

    A field with `compare=False` decides nothing: it is written for people to read.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    @property
    def num_prompts(self) -> int:
        """Prompts in the file."""


class ShardStore:
    """Which shards there are; a subclass says what is in one.

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
            saved = json.loads(self._header_file.read_text())
            int(saved[_SHARD_SIZE])
        except (ValueError, KeyError, TypeError):
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

    def create(self, prompts_per_shard: int) -> None:
        """Write the header, if there is none yet; one process calls this."""
        if self._header_file.is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = dataclasses.asdict(self.header) | {_SHARD_SIZE: prompts_per_shard}
        text = json.dumps(header, indent=2) + "\n"
        publish(self._header_file, lambda temporary: temporary.write_text(text))

    def shards(self) -> list[range]:
        """Prompt indices of all shards; `create` was called."""
        size = json.loads(self._header_file.read_text())[_SHARD_SIZE]
        total = self.header.num_prompts
        return [range(start, min(start + size, total)) for start in range(0, total, size)]

    def file(self, shard: range) -> Path:
        """Where a shard is or will be."""
        return self.folder / f"{self.content}_{shard.start:08d}{self.suffix}"

    def missing(self) -> list[range]:
        """Prompt indices of the shards that are not there yet."""
        return [shard for shard in self.shards() if not self.file(shard).is_file()]

    def damaged(self, shard: range) -> UserError:
        """The error for a shard that is not what was written."""
        return bad_value(
            self._field,
            str(self.file(shard)),
            "is damaged",
            "delete it to have it computed again",
        )


def publish(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under a temporary name and rename it: it is there completely or not."""
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    temporary.replace(file)
