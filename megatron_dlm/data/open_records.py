"""Open what a data option names: files of several formats, the hub, or a mixture of all."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.config import TemplateConfig
from megatron_dlm.data.joined_records import JoinedRecords
from megatron_dlm.data.json_records import JsonLines, JsonList, is_json_list
from megatron_dlm.data.mixture import SourceEntry, kept_indices, read_mixture
from megatron_dlm.data.record_formats import StandardRecords
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.streamed import open_streamed
from megatron_dlm.data.tables import (
    BUILDERS,
    HUB,
    open_arrow,
    open_hub,
    open_hub_files,
    open_parquet,
    open_saved,
)
from megatron_dlm.errors import bad_value
from megatron_dlm.regular_file import is_regular

TABLES = {".parquet": open_parquet, ".arrow": open_arrow}


def open_records(
    path: str | Path, field: str, domain_field: str = TemplateConfig.domain_field
) -> RecordSource:
    """Open records; they are read one at a time, when they are asked for.

    Args:
        path: A file: JSONL, .json with one list of objects, .parquet, .arrow, or a .yaml with a
            mixture; a pattern such as ``data/*.parquet``; a folder of `save_to_disk`;
            ``hf://datasets/owner/name``, of which it is the split `train`, or files of it; both may
            have ``@revision`` after the name.
        field: The flag that the path came from, for error messages.
        domain_field: Field that the domain of a mixture's source goes to.

    Raises:
        UserError: It does not exist, cannot be read or has no record.
    """
    if Path(path).suffix in (".yaml", ".yml"):
        return _open_mixture(Path(path), field, domain_field)
    return StandardRecords(open_stored(str(path), field))


def _open_mixture(path: Path, field: str, domain_field: str) -> RecordSource:
    mixture = read_mixture(path, field)
    chosen = [
        _open_entry(entry, f"{path}: sources[{i}]", path.parent, domain_field, (mixture.seed, i))
        for i, entry in enumerate(mixture.sources)
    ]
    if not any(map(len, chosen)):
        raise bad_value(field, str(path), "keeps no record", "raise a weight or max_samples")
    description = {"seed": mixture.seed, "domain_field": domain_field}
    return JoinedRecords(
        chosen, str(path), [description, *(entry.choices() for entry in mixture.sources)]
    )


def _open_entry(
    entry: SourceEntry, place: str, folder: Path, domain_field: str, key: tuple[int, int]
) -> RecordSource:
    """The records of a mixture's source that it keeps, in our format."""
    columns = None
    if entry.fields is not None:
        columns = sorted({source.split(".")[0] for source in entry.fields.values()})
    records: RecordSource
    if entry.streaming:
        records = _open_stream(entry, place, folder, columns, key)
    elif entry.hub is not None:
        records = open_hub(
            entry.hub,
            f"{place}.hub",
            subset=entry.subset,
            split=entry.split or "train",
            revision=entry.revision,
            columns=columns,
        )
    else:
        records = open_stored(_path(entry, folder), f"{place}.path", entry.split, columns)
    constants: Mapping[str, Any] = {} if entry.domain is None else {domain_field: entry.domain}
    records = records.select(kept_indices(len(records), entry, *key))
    return StandardRecords(records, entry.fields, constants, only_prompts=entry.only_prompts)


def _path(entry: SourceEntry, folder: Path) -> str:
    assert entry.path is not None
    return entry.path if entry.path.startswith(HUB) else str(folder / entry.path)


def _open_stream(
    entry: SourceEntry,
    place: str,
    folder: Path,
    columns: Sequence[str] | None,
    key: tuple[int, int],
) -> RecordSource:
    """Records that a source's stream begins with."""
    assert entry.max_samples is not None
    if entry.hub is not None:
        field, name = f"{place}.hub", f"{HUB}{entry.hub}"
        source: dict[str, Any] = {"path": entry.hub, "name": entry.subset}
        source |= {"split": entry.split or "train", "revision": entry.revision}
    else:
        field, name = f"{place}.path", _path(entry, folder)
        _refuse_split(entry.split, field)
        builder = BUILDERS.get(Path(name).suffix)
        if builder is None:
            problem, remedy = "is no format that is streamed", f"name {', '.join(BUILDERS)}"
            raise bad_value(field, name, problem, remedy)
        source = {"path": builder, "data_files": name, "split": "train"}
    seed = key[0] + (key[1] << 32)  # of the mixture, and the source's place in it
    return open_streamed(source, columns, name, field, entry.max_samples, seed)


def is_one_file_of_lines(path: str) -> bool:
    """Whether a path names one file of JSONL, or nothing that there is."""
    file = Path(path)
    others = path.startswith(HUB) or _is_saved(file) or is_json_list(file)
    return not (others or file.suffix in TABLES or (glob.has_magic(path) and not is_regular(path)))


def open_stored(
    path: str, field: str, split: str | None = None, columns: Sequence[str] | None = None
) -> RecordSource:
    """Open the records of a path, but a mixture, as they are stored; see `open_records`."""
    if path.startswith(HUB):
        if path.removeprefix(HUB).count("/") > 1:
            _refuse_split(split, field)
            return open_hub_files(path, field, columns)
        name, _, revision = path.removeprefix(HUB).partition("@")
        return open_hub(
            name, field, split=split or "train", revision=revision or None, columns=columns
        )
    folder = Path(path)
    if _is_saved(folder):
        return open_saved(path, field, split, columns)
    _refuse_split(split, field)
    files = [path]
    if glob.has_magic(path) and not is_regular(path):
        # Path.glob has no absolute patterns.
        files = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        if not files:
            raise bad_value(field, path, "matches no file", "name files that exist")
    suffixes = {Path(file).suffix for file in files}
    tables = suffixes & set(TABLES)
    if tables and len(suffixes) == 1:
        # A file that is not there is told as one of JSONL is.
        missing = next((file for file in files if not is_regular(file)), None)
        if missing is not None:
            return JsonLines(missing, field)
        return TABLES[suffixes.pop()](files, path, field, columns)
    if tables:
        raise bad_value(field, path, "matches files of different formats", "name those of one")
    parts = [
        JsonList(file, field) if is_json_list(file) else JsonLines(file, field) for file in files
    ]
    return parts[0] if len(parts) == 1 else JoinedRecords(parts, path)


def _refuse_split(split: str | None, field: str) -> None:
    if split is not None:
        raise bad_value(f"{field}: split", split, "files have no splits", "leave it out")


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any(is_regular(folder / name) for name in ("state.json", "dataset_dict.json"))
