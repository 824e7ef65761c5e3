"""Tokenised records of a run, computed once and mapped into the memory of all its processes.

    <key>/00000000.safetensors  samples of the records from 0 on
    <key>/00008192.safetensors  and so on, 8,192 records each

The key is a hash of everything that tokens depend on. Each process checks a share of the shards by
their checksums and computes those that are missing or damaged; then all map all of them. A shard
gets its name when it is complete, so what an interrupted start has done is kept.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.data.prompt_checks import check_some_left
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.record_source import KnownRecords, RecordSource
from megatron_dlm.data.token_table import MappedTokens
from megatron_dlm.data.tokenizing import ExampleReader, PromptReader
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import write_file, writing
from megatron_dlm.terminal import format_duration, is_live, say, show_status

RECORDS_PER_SHARD = 8192

LINE_SECONDS = 15.0
"""Between two lines of progress where there is no terminal, and before the first."""

_CHECKSUM, _DROPPED = "sha256", "num_dropped"

_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that read together; by default this one alone.

    Attributes:
        rank: Of this process.
        size: Of all.
        errors_on_all: Raises the first error of any of them on all; see `parallel`.
        from_first: What a function returns on the first of them; see `parallel`.
        highest: The largest number that one of them has.
    """

    rank: int = 0
    size: int = 1
    errors_on_all: Callable[[], AbstractContextManager[None]] = nullcontext
    from_first: Callable[[Callable[[], Any]], Any] = lambda decide: decide()
    highest: Callable[[int], int] = int


ALONE = Ranks()
"""One process."""


class TokenFiles(NamedTuple):
    """Where the tokenised records of a run are.

    Attributes:
        folder: Of all its data sets.
        field: The flag that named it, for error messages.
        tokenizer_folder: Its files decide the tokens.
        ranks: Who reads together.
    """

    folder: Path
    field: str
    tokenizer_folder: Path
    ranks: Ranks = ALONE


def read_shared_prompts(
    file: RecordSource, reader: PromptReader, files: TokenFiles | None
) -> PromptDataset:
    """Tokenise prompts together with the other processes, or map what is there.

    Collective over `files.ranks`. Without `files`, this process keeps all tokens in memory.

    Raises:
        UserError: The first record that cannot be used, on all processes; or the folder cannot be
            written.
    """
    file, shards = _read(file, reader, files)
    records = _records(file, shards, reader)
    tokens, num_dropped = _joined(shards, "prompts"), sum(shard.num_dropped for shard in shards)
    return PromptDataset(file.select(records), tokens, reader.domains, num_dropped)


def read_shared_examples(
    file: RecordSource, reader: ExampleReader, files: TokenFiles | None
) -> ExampleDataset:
    """The same for examples; see `read_shared_prompts`."""
    file, shards = _read(file, reader, files)
    return ExampleDataset(
        file,
        _joined(shards, "prompts"),
        _joined(shards, "responses"),
        reader.special_tokens,
        _records(file, shards, reader),
        sum(shard.num_dropped for shard in shards),
    )


class _Shard(NamedTuple):
    """Samples of some records.

    Attributes:
        records: Index of the record of each.
        tokens: Of `prompts`, and of examples of `responses`: what a slice of is token ids, and
            where sequences end (`TokenTable`).
        num_dropped: Samples that were left out.
    """

    records: NDArray[np.int64]
    tokens: dict[str, tuple[Any, NDArray[np.int64]]]
    num_dropped: int


def _records(
    file: RecordSource, shards: Sequence[_Shard], reader: PromptReader
) -> NDArray[np.int64]:
    records = np.concatenate([shard.records for shard in shards])
    check_some_left(file, len(records), reader.max_prompt_length)
    return records


def _joined(shards: Sequence[_Shard], name: str) -> MappedTokens:
    return MappedTokens([shard.tokens[name] for shard in shards])


def _read(
    file: RecordSource, reader: PromptReader, files: TokenFiles | None
) -> tuple[RecordSource, list[_Shard]]:
    starts = range(0, len(file), RECORDS_PER_SHARD)
    if files is None:
        return file, [_tokenized(file, reader, start) for start in _with_progress(file, starts)]
    ranks = files.ranks
    key, fingerprint, num_records = ranks.from_first(lambda: _identity(file, reader, files))
    folder, known = files.folder / key, KnownRecords(file, fingerprint)
    # Neighbouring shards: of errors on several processes the first is that of the first record.
    bounds = [len(starts) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)]
    own = starts[slice(*bounds)]
    with ranks.errors_on_all():
        if len(file) != num_records:
            problem = f"has {len(file)} records on rank {ranks.rank} and {num_records} on rank 0"
            raise bad_value("data", file.path, problem, "give all processes the same data")
        with writing(folder, files.field):
            folder.mkdir(parents=True, exist_ok=True)
        missing = [start for start in own if not _is_intact(_path(folder, start))]
        for start in _with_progress(file, missing):
            _write(_path(folder, start), _tokenized(file, reader, start), files.field)
    with ranks.errors_on_all():
        return known, [_opened(_path(folder, start), files.field) for start in starts]


def _tokenized(file: RecordSource, reader: PromptReader, start: int) -> _Shard:
    """The samples of the records of one shard."""
    stop = min(start + RECORDS_PER_SHARD, len(file))
    read = reader.read(file.select(range(start, stop)))
    tables = {"prompts": read.prompts}
    if read.responses is not None:
        tables["responses"] = read.responses
    records = np.array(read.records, dtype=np.int64) + start
    tokens = {name: (table.tokens, table.ends) for name, table in tables.items()}
    return _Shard(records, tokens, read.num_dropped)


def _path(folder: Path, start: int) -> Path:
    return folder / f"{start:08d}.safetensors"


def _write(path: Path, shard: _Shard, field: str) -> None:
    arrays: dict[str, NDArray[Any]] = {"records": shard.records}
    for name, (tokens, ends) in shard.tokens.items():
        arrays |= {name: tokens, f"{name}_ends": ends}
    metadata = {_DROPPED: str(shard.num_dropped)}
    metadata[_CHECKSUM] = _checksum(arrays, metadata[_DROPPED])
    write_file(path, save(arrays, metadata), field)


def _checksum(arrays: dict[str, NDArray[Any]], num_dropped: str) -> str:
    digest = hashlib.sha256(num_dropped.encode())
    for name in sorted(arrays):
        digest.update(f" {name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _is_intact(path: Path) -> bool:
    """Whether a shard is there and holds what was written."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return metadata.get(_CHECKSUM) == _checksum(arrays, metadata.get(_DROPPED, ""))


def _opened(path: Path, field: str) -> _Shard:
    """A shard that was found intact, with its tokens left in the file."""
    try:
        file = safe_open(path, framework="np")
        names = [name for name in ("prompts", "responses") if name in file.keys()]  # noqa: SIM118
        tokens = {n: (file.get_slice(n), file.get_tensor(f"{n}_ends")) for n in names}
        return _Shard(file.get_tensor("records"), tokens, int(file.metadata()[_DROPPED]))
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read on every process ({type(error).__name__})"
        remedy = "name a folder that all of them share"
        raise bad_value(field, str(path), problem, remedy) from error


def _identity(file: RecordSource, reader: PromptReader, files: TokenFiles) -> tuple[str, str, int]:
    """Hash of all that the tokens depend on, the records' fingerprint and their number."""
    content = {
        "code": _code(),
        "versions": {name: version(name) for name in ("jinja2", "tokenizers", "transformers")},
        "tokenizer": _tokenizer(files.tokenizer_folder),
        "records": file.fingerprint,
        "num_records": len(file),
        "records_per_shard": RECORDS_PER_SHARD,
        **reader.settings(),
    }
    text = json.dumps(content, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:32], file.fingerprint, len(file)


def _code() -> str:
    """SHA-256 of this package's source: another version may render a chat otherwise."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _tokenizer(folder: Path) -> str:
    """SHA-256 of a tokenizer's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _TOKENIZER_SUFFIXES and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _with_progress(file: RecordSource, starts: Sequence[int]) -> Iterator[int]:
    """The shards to tokenise; the first process says how far it has come with its own."""
    shows = rank() == 0 and len(starts) > 1
    num_records = sum(min(RECORDS_PER_SHARD, len(file) - start) for start in starts)
    begun = told = time.monotonic()
    if shows and not is_live():
        of_process = f" on each of {world_size()} processes" if world_size() > 1 else ""
        say(f"tokenising {file.path}: {num_records:,} records{of_process}")
    for number, start in enumerate(starts, start=1):
        yield start
        ACTIVITY.step()
        now, done = time.monotonic(), min(number * RECORDS_PER_SHARD, num_records)
        rate = done / max(now - begun, 1e-9)
        text = (
            f"tokenising {file.path}: {done:,} of {num_records:,} records, {rate:,.0f}/s, "
            f"about {format_duration((num_records - done) / rate)} left"
        )
        if shows and is_live():
            show_status(text if number < len(starts) else "")
        elif shows and now - told >= LINE_SECONDS:
            say(text)
            told = now
