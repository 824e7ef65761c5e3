"""Records of JSON files: JSONL, read a line at a time, and one list of objects."""

import codecs
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.chat import json_type
from megatron_dlm.data.exact_json import UnreadableNumber, parse_json
from megatron_dlm.data.record_source import Record, RecordSource
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.regular_file import check_regular, is_regular, read_regular

FORMAT = 'one JSON object a line, with "messages" or "prompt"'

_CHUNK = 4 << 20  # bytes
_WHITESPACE = np.frombuffer(b" \t\n\r\x0b\x0c", dtype=np.uint8)


class JsonLines(RecordSource):
    """The lines of a JSONL file that are not blank.

    Only where they are is kept in memory. A line is read from the file when it is asked for, and
    not mapped: a file that somebody shortens would otherwise end the process.
    """

    def __init__(self, path: str | Path, field: str) -> None:
        """Find the lines and the SHA-256 of a file.

        Args:
            path: The file.
            field: The flag that the path came from, for error messages.

        Raises:
            UserError: It does not exist, cannot be read or has no record.
        """
        self.path = str(path)
        self._field = field
        try:
            check_regular(path)
            self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (kept open)
            starts, ends, self._fingerprint = _lines(self._file)
            self._version = self._state()
            self._numbers = _not_blank(self._file, starts, ends)
        except OSError as error:
            raise _unreadable(field, path, error) from error
        if not len(self._numbers):
            raise bad_value(field, str(path), "is empty", f"write {FORMAT}")
        self._starts, self._ends = starts[self._numbers], ends[self._numbers]

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the content."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        """Return ``file:line``."""
        return f"{self.path}:{self._numbers[index] + 1}"

    def record(self, index: int) -> Record:
        """Parse one line.

        Raises:
            UserError: It is no JSON object, or the file is not what it was.
        """
        self._check_unchanged()
        start, end = int(self._starts[index]), int(self._ends[index])
        return parse_object(os.pread(self._file.fileno(), end - start, start), self.where(index))

    def _check_unchanged(self) -> None:
        state = self._state()
        if state == self._version:
            return
        self._file.seek(0)
        if _lines(self._file)[2] != self._fingerprint:
            raise bad_value(self._field, self.path, "was changed while it is read", "start again")
        self._version = state  # copied over itself, for one

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


class JsonList(RecordSource):
    """The objects of a file that holds one JSON list."""

    def __init__(self, path: str | Path, field: str) -> None:
        """Read a file.

        Raises:
            UserError: It cannot be read, is no JSON list or is empty.
        """
        self.path = str(path)
        try:
            content = read_regular(path)
        except OSError as error:
            raise _unreadable(field, path, error) from error
        self._fingerprint = hashlib.sha256(content).hexdigest()
        self._items = _parse(content, str(path), "write one list of objects, or JSONL")
        if not isinstance(self._items, list) or not self._items:
            raise bad_value(field, str(path), "is an empty list", "write objects into it")

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the content."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._items)

    def where(self, index: int) -> str:
        """Return ``file: item 3``, from 0."""
        return f"{self.path}: item {range(len(self))[index]}"

    def record(self, index: int) -> Record:
        """Return one object.

        Raises:
            UserError: It is none.
        """
        return dict(_object(self._items[index], self.where(index), "item"))


class RecordsInMemory(RecordSource):
    """Records of a list."""

    def __init__(self, records: Sequence[Record], source: str) -> None:
        """Wrap a list; `source` stands for the file in error messages.

        Raises:
            UserError: There are none, or one cannot be written as JSON.
        """
        if not records:
            raise bad_value(source, records, "is empty", "give one or more")
        lines = []
        for number, record in enumerate(records, start=1):
            try:
                lines.append(json.dumps(record).encode())
            except TypeError as error:
                problem = f"cannot be written as JSON ({error})"
                raise bad_value(f"{source}:{number}", record, problem, "repair it") from error
        self.path = source
        self._fingerprint = hashlib.sha256(b"\n".join(lines)).hexdigest()
        self._lines = lines

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the content."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        """Return ``source:number``, from 1."""
        return f"{self.path}:{range(1, len(self) + 1)[index]}"

    def record(self, index: int) -> Record:
        """Return a copy of one record, as JSON has it."""
        return parse_object(self._lines[index], self.where(index))


def is_json_list(path: str | Path) -> bool:
    """Whether a file named .json begins with a list."""
    file = Path(path)
    if file.suffix != ".json" or not is_regular(file):
        return False
    try:
        with file.open("rb") as content:
            return content.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError:
        return False  # its reader says why


def parse_object(line: bytes, where: str) -> Record:
    """Parse one line of JSONL.

    Raises:
        UserError: It is no JSON object.
    """
    return _object(_parse(line, where, f"write {FORMAT}"), where, "line")


def _parse(content: bytes, where: str, remedy: str) -> Any:
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        if not _is_utf8(content):
            raise UserError(
                f"{where}: is no text in UTF-8; unpack it or save it as UTF-8"
            ) from error
        raise UserError(
            f"{where}: broken JSON ({error.msg} at column {error.colno}); {remedy}"
        ) from error
    except UnreadableNumber as error:
        raise UserError(
            f"{where}: the number {error} cannot be read; write it as a string"
        ) from error


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _object(value: Any, where: str, name: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: the {name} is {json_type(value)}, not an object; write {FORMAT}")
    return value


def _unreadable(field: str, path: str | Path, error: OSError) -> UserError:
    reason = (error.strerror or type(error).__name__).lower()
    return bad_value(field, str(path), f"cannot be read ({reason})", f"name a file of {FORMAT}")


def _lines(file: BinaryIO) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Where each line begins and ends, without its line break, and SHA-256 of the file."""
    digest, breaks, size = hashlib.sha256(), [], 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        breaks.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + size)
        size += len(chunk)
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    return starts, ends, digest.hexdigest()


def _not_blank(
    file: BinaryIO, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Numbers, from 0, of the lines that hold more than whitespace."""
    blank = starts >= ends
    descriptor, position = file.fileno(), 0
    # The first byte decides, but for lines that begin with whitespace.
    size = int(ends[-1]) if len(ends) else 0
    doubtful: list[int] = []
    while position < size:
        chunk = np.frombuffer(os.pread(descriptor, _CHUNK, position), dtype=np.uint8)
        if not len(chunk):
            break
        low, high = np.searchsorted(starts, [position, position + len(chunk)])
        here = np.arange(low, high)[~blank[low:high]]
        spaced = np.isin(chunk[starts[here] - position], _WHITESPACE)
        doubtful += here[spaced].tolist()
        position += len(chunk)
    for line in doubtful:
        start, end = int(starts[line]), int(ends[line])
        blank[line] = not os.pread(descriptor, end - start, start).strip()
    return np.flatnonzero(~blank)
