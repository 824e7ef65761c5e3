"""Records of tables, read with `datasets`: Parquet, Arrow, `save_to_disk` and the Hugging Face hub.

A table is an Arrow file that is mapped into memory; Parquet and data sets of the hub are written as
one, once, into the cache of `datasets` (`HF_HOME`). All ranks of a node share it.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_dlm.data.record_source import Record, RecordSource, SelectedRecords
from megatron_dlm.entry import rank
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.extras import check_installed

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

HUB = "hf://datasets/"

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
"""Formats of `datasets` by suffix."""

_ROWS = 256  # read at once where records are read one after the other


class TableRecords(RecordSource):
    """The rows of a table.

    A value that is null is left out, as a table cannot; bytes (of images, for one) are too. Dates
    and decimal numbers become text.
    """

    def __init__(
        self, dataset: "Dataset", path: str, field: str, files: Mapping[str, int] | None = None
    ) -> None:
        """Wrap a table.

        Args:
            dataset: The table.
            path: What the user named.
            field: The flag that the path came from, for error messages.
            files: Rows of each of the files that it is made of, in their order.

        Raises:
            UserError: It has no row.
        """
        if not len(dataset):
            raise no_row(field, path)
        self.path = path
        self._table = dataset.with_format("arrow")
        self._files = list(files or {path: len(dataset)})
        counts = list((files or {path: len(dataset)}).values())
        self._ends = np.cumsum(counts)
        self._start, self._read_rows = 0, list[Record]()

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        """Return ``file: row 3``, from 0 as `datasets` counts."""
        index = range(len(self))[index]
        file = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[file - 1]) if file else 0
        return f"{self._files[file]}: row {index - before}"

    def record(self, index: int) -> Record:
        """Return one row."""
        index = range(len(self))[index]
        offset = index - self._start
        if not 0 <= offset < len(self._read_rows):
            # Reading on is fast in batches, and reading here and there is not.
            reads_on = offset == len(self._read_rows)
            self._start, offset = index, 0
            self._read_rows = self._rows(index, index + (_ROWS if reads_on else 1))
        return dict(self._read_rows[offset])

    def _rows(self, start: int, stop: int) -> list[Record]:
        rows: list[Record] = self._table[start : min(stop, len(self))].to_pylist()
        return [plain_row(row) for row in rows]

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the rows, whatever the file and the version that wrote it."""
        return _fingerprint(record for _, record in self.records())

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "SelectedRows":
        """Return some of the rows."""
        return SelectedRows(self, indices)


class SelectedRows(SelectedRecords):
    """Some rows of a table: the fingerprint is theirs, since a table of the hub may be huge."""

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the rows that there are, each once."""
        rows = np.unique(self._indices).tolist()
        return _fingerprint(self._records.record(row) for row in rows)


def _fingerprint(rows: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(orjson.dumps(row, option=orjson.OPT_SORT_KEYS) + b"\n")
    return digest.hexdigest()


def plain_row(row: Mapping[str, Any]) -> Record:
    """A row of values of JSON's types, without those that are null."""
    return {name: _plain(value) for name, value in row.items() if value is not None}


def _plain(value: Any) -> Any:
    """A value of JSON's types."""
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, bytes):
        return None
    return str(value)


def open_parquet(
    files: Sequence[str], path: str, field: str, columns: Sequence[str] | None = None
) -> TableRecords:
    """Open Parquet files as one table.

    Args:
        files: In their order.
        path: What the user named.
        field: The flag that it came from, for error messages.
        columns: Those to read; None for all.

    Raises:
        UserError: A file cannot be read, or the package is not installed.
    """
    check_installed("datasets", field, path)

    def rows(file: str) -> int:
        import pyarrow.parquet as parquet

        return int(parquet.read_metadata(file).num_rows)

    def read() -> "Dataset":
        import datasets

        known = None if columns is None else list(columns)
        return datasets.Dataset.from_parquet(list(files), columns=known)

    counts = {file: opened(file, field, rows, file) for file in files}
    if not any(counts.values()):
        raise no_row(field, path)
    return TableRecords(opened(path, field, read), path, field, counts)


def open_arrow(
    files: Sequence[str], path: str, field: str, columns: Sequence[str] | None = None
) -> TableRecords:
    """Open Arrow files as one table; see `open_parquet`."""
    check_installed("datasets", field, path)

    def read(file: str) -> "Dataset":
        import datasets

        return datasets.Dataset.from_file(file)

    parts = {file: opened(file, field, read, file) for file in files}

    def joined() -> "Dataset":
        import datasets

        return datasets.concatenate_datasets(list(parts.values()))

    table = selected(opened(path, field, joined), columns, path, field)
    return TableRecords(table, path, field, {file: len(part) for file, part in parts.items()})


def open_saved(
    folder: str, field: str, split: str | None = None, columns: Sequence[str] | None = None
) -> TableRecords:
    """Open what `save_to_disk` of `datasets` wrote; `split` chooses one of several.

    Raises:
        UserError: It cannot be read, has no such split, or the package is not installed.
    """
    check_installed("datasets", field, folder)

    def read() -> "Dataset | DatasetDict":
        import datasets

        return datasets.load_from_disk(folder)

    stored = opened(folder, field, read)
    if isinstance(stored, dict):
        name = split or "train"
        if name not in stored:
            raise bad_value(field, folder, f"has no split {name!r}", f"choose {', '.join(stored)}")
        stored = stored[name]
    elif split is not None:
        raise bad_value(field, folder, f"has no splits, so no {split!r}", "leave the split out")
    return TableRecords(selected(stored, columns, folder, field), folder, field)


def open_hub(
    name: str,
    field: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Sequence[str] | None = None,
) -> TableRecords:
    """Open a data set of the Hugging Face hub; it is downloaded once.

    Args:
        name: ``owner/name``.
        field: The flag or key that named it, for error messages.
        subset: One of its configurations.
        split: One of its splits.
        revision: Commit, tag or branch.
        columns: Those to keep; None for all.

    Raises:
        UserError: It cannot be loaded, or the package is not installed.
    """
    check_installed("datasets", field, name)

    def read() -> "Dataset":
        import datasets

        return datasets.load_dataset(name, subset, split=split, revision=revision)

    table = opened(name, field, read)
    _check_commit(table, name, revision or "main", field)
    return TableRecords(selected(table, columns, name, field), f"{HUB}{name}", field)


def _check_commit(table: "Dataset", name: str, revision: str, field: str) -> None:
    """Refuse what `datasets` takes from its cache instead, where the hub is not reached.

    That is what was read last under the name, whatever revision it was of.
    """
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    try:
        wanted = (repository / "refs" / revision).read_text().strip()
    except OSError:  # a commit, or a data set that this user has never asked the hub for
        wanted = revision
    # Its folder in the cache is named by its commit.
    folders = {Path(file["filename"]).parent.name for file in table.cache_files}
    found = {folder for folder in folders if re.fullmatch("[0-9a-f]{40}", folder)}
    if found and re.fullmatch("[0-9a-f]{40}", wanted) and wanted not in found:
        raise bad_value(
            field,
            f"{name}@{revision}",
            f"is not reached, and what was read last of it is commit {min(found)[:12]}, not "
            f"{wanted[:12]}",
            "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or name a local copy",
        )


def open_hub_files(url: str, field: str, columns: Sequence[str] | None = None) -> TableRecords:
    """Open files of a repository on the hub as one table; they are downloaded once.

    Args:
        url: ``hf://datasets/owner/name@revision/file.parquet``, JSON or JSONL too; a pattern.
        field: The flag that it came from, for error messages.
        columns: Those to keep; None for all.

    Raises:
        UserError: They cannot be loaded, or the package is not installed.
    """
    check_installed("datasets", field, url)
    builder = BUILDERS.get(Path(url).suffix)
    if builder is None:
        raise bad_value(field, url, "is no format that is read", f"name {', '.join(BUILDERS)}")

    def read() -> "Dataset":
        import datasets

        return datasets.load_dataset(builder, data_files=url, split="train")

    return TableRecords(selected(opened(url, field, read), columns, url, field), url, field)


def selected(
    dataset: "Dataset | IterableDataset", columns: Sequence[str] | None, path: str, field: str
) -> "Dataset | IterableDataset":
    """A data set with some of its columns, or all.

    Raises:
        UserError: It has no such column.
    """
    known = dataset.column_names  # of a stream None, where no record has been read
    if columns is None:
        return dataset
    missing = [name for name in columns if known is not None and name not in known]
    if missing:
        problem = f"has no column {missing[0]!r}"
        raise bad_value(field, path, problem, f"it has {', '.join(known)}")
    return dataset.select_columns(list(columns))


def no_row(field: str, path: str) -> UserError:
    """The error for a data set without records."""
    return bad_value(field, path, "has no row", "name another")


def opened(path: str, field: str, read: Callable[..., Any], *arguments: str) -> Any:
    """What a function of `datasets` returns.

    Raises:
        UserError: Its error as one line.
    """
    import datasets

    if rank():
        datasets.disable_progress_bars()
    try:
        return read(*arguments)
    except UserError:
        raise
    except Exception as error:  # of files, Arrow, the network and the hub: no common class
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [""]
        remedy = "check its name and format"
        if isinstance(error, ConnectionError | TimeoutError):
            remedy = "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or name a local copy"
        raise bad_value(
            field, path, f"cannot be loaded ({type(cause).__name__}: {reason[0]})", remedy
        ) from error
