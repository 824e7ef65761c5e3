"""A sample of a data set that is too large to download: read as a stream, once, and kept.

The stream is shuffled as far as a stream can be (the order of its files, and a buffer of records).
What is taken from it is a file in the cache of `datasets` (`HF_HOME`). All ranks of a node share
that file, and a run that goes on reads the same records, even if the data set has changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from filelock import FileLock

from megatron_dlm.data.json_records import JsonLines
from megatron_dlm.data.tables import no_row, opened, plain_row, selected
from megatron_dlm.entry import rank
from megatron_dlm.extras import check_installed
from megatron_dlm.output_file import replaced_file, writing
from megatron_dlm.terminal import is_live, say, show_status

if TYPE_CHECKING:
    from datasets import IterableDataset

BUFFER = 10_000
"""Records that the next one is drawn from."""

_SHOWN = 256  # records between two looks of a terminal's line


class StreamedRecords(JsonLines):
    """The records that were taken from a stream, named by the data set in errors."""

    def __init__(self, file: Path, name: str, field: str) -> None:
        """Open the file that they are kept in."""
        super().__init__(file, field)
        self._name = name

    def where(self, index: int) -> str:
        """Return ``name: streamed record 3``, from 0."""
        return f"{self._name}: streamed record {range(len(self))[index]}"


def open_streamed(
    source: Mapping[str, Any],
    columns: Sequence[str] | None,
    name: str,
    field: str,
    count: int,
    seed: int,
) -> StreamedRecords:
    """Take records from a stream, or open those that were taken before.

    Args:
        source: Arguments of `datasets.load_dataset`.
        columns: Those to keep; None for all.
        name: What the user named.
        field: The flag or key that named it, for error messages.
        count: Records to take; of a shorter stream all.
        seed: Of its order.

    Raises:
        UserError: It cannot be read or has no record, or the package is not installed.
    """
    check_installed("datasets", field, name)
    import datasets

    key = json.dumps([dict(source), columns, count, seed], sort_keys=True)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "megatron_dlm_streamed"
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
    with writing(folder, field):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            stream = opened(name, field, lambda: datasets.load_dataset(**source, streaming=True))
            stream = selected(stream, columns, name, field)
            stream = stream.decode(False).shuffle(seed=seed, buffer_size=BUFFER).take(count)
            opened(name, field, lambda: _take(stream, file, name, field, count))
    return StreamedRecords(file, name, field)


def _take(stream: "IterableDataset", file: Path, name: str, field: str, count: int) -> None:
    shows, number = rank() == 0, 0
    if shows and not is_live():
        say(f"streaming {count:,} records of {name} into {file}")
    with replaced_file(file, field) as temporary, temporary.open("wb") as lines:
        for number, row in enumerate(stream, start=1):
            lines.write(orjson.dumps(plain_row(row)) + b"\n")
            if shows and number % _SHOWN == 0:
                show_status(f"streaming {name}: {number:,} of {count:,} records")
        if not number:
            raise no_row(field, name)
    if shows:
        show_status("")
