"""Tokenise a text corpus into Megatron's indexed dataset, which `--data-path` reads.

megatron-dlm preprocess --input corpus.jsonl --tokenizer models/Qwen3-8B \
    --output-prefix data/corpus --workers 16

The input is JSONL with one document a line, its text under `text`, or the other files that
--prompts of a run takes (Parquet, Arrow, a pattern, the Hugging Face hub). Writes
`data/corpus.bin` (token ids) and `data/corpus.idx` (where documents begin); with several
`--json-keys` a pair for each key, `data/corpus_<key>`. Documents keep their order, whatever the
number of workers. Files appear under their names when they are complete.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_dlm.commands import parse_command
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import check_output_file, sync_file, sync_folder, writing
from megatron_dlm.ranges import AT_LEAST_ONE
from megatron_dlm.terminal import say

if TYPE_CHECKING:
    from megatron_dlm.data.document_encoder import DocumentEncoder

LINES_PER_TASK = 64
LINES_PER_WORKER = 16 * LINES_PER_TASK
SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class InputConfig:
    """Input: documents and tokenizer."""

    input: str | None = None
    """JSONL in UTF-8, one document a line, blank lines skipped; or Parquet, Arrow, a pattern or
    hf://datasets/owner/name."""

    json_keys: tuple[str, ...] = ("text",)
    """Fields that hold text, separated by commas; each becomes a dataset of its own."""

    tokenizer: str | None = None
    """Folder with tokenizer.json or a SentencePiece tokenizer.model (a model folder: its
    config.json then says which id is EOS)."""

    append_eod: bool = True
    """End every document with EOS."""


@dataclass(frozen=True)
class OutputConfig:
    """Output: files and speed."""

    output_prefix: str | None = None
    """Path of the files to write, without .bin and .idx; they must not exist."""

    workers: Annotated[int, AT_LEAST_ONE] = 1
    """Processes that tokenise."""


@dataclass(frozen=True)
class Arguments:
    """Tokenise a corpus."""

    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


_encoder: DocumentEncoder | None = None
"""The encoder of this process, inherited by forked workers."""


def _encode(document: tuple[str, bytes]) -> tuple[int, dict[str, list[int]]]:
    assert _encoder is not None
    return len(document[1]), _encoder.encode(*document)


def placed_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """(place, JSON object as text) of a file's documents, one at a time.

    Raises:
        UserError: It cannot be read.
    """
    from megatron_dlm.data.open_records import is_one_file_of_lines, open_stored

    if not is_one_file_of_lines(path):
        records = open_stored(path, "--input")
        yield from ((where, json.dumps(record).encode()) for where, record in records.records())
        return
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise bad_value(
            "--input", path, f"cannot be read ({reason})", "name a JSONL file of documents"
        ) from error


def check_arguments(arguments: Arguments) -> dict[str, Path]:
    """The prefix to write for each key.

    Raises:
        UserError: Something is missing, or a file to write exists.
    """
    source, output = arguments.input, arguments.output
    for name, value, remedy in (
        ("--input", source.input, "name a JSONL file of documents"),
        ("--tokenizer", source.tokenizer, "name a folder with tokenizer.json or tokenizer.model"),
        ("--output-prefix", output.output_prefix, "name the files to write, without .bin"),
    ):
        if value is None:
            raise bad_value(name, None, "is missing", remedy)
    keys = source.json_keys
    if not keys or len(set(keys)) < len(keys):
        raise bad_value("--json-keys", list(keys), "names no key, or one twice", "name each once")
    prefix = str(output.output_prefix)
    prefixes = {key: Path(prefix if len(keys) == 1 else f"{prefix}_{key}") for key in keys}
    for target in prefixes.values():
        for suffix in (".bin", ".idx"):
            if Path(f"{target}{suffix}").exists():
                raise bad_value(
                    "--output-prefix",
                    prefix,
                    f"{target}{suffix} already exists",
                    "name others, or remove them",
                )
        check_output_file(f"{target}.bin", "--output-prefix")
    return prefixes


class Progress:
    """Counts documents and tokens, and prints progress to standard error every few seconds."""

    def __init__(self) -> None:
        self._started = self._reported = time.perf_counter()
        self.documents = self.empty = self.bytes = self.tokens = 0

    def add(self, num_bytes: int, tokens: int) -> None:
        """Count one document."""
        self.documents += 1
        self.empty += tokens == 0
        self.bytes += num_bytes
        self.tokens += tokens
        now = time.perf_counter()
        if now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self._reported = now
            rate = self.bytes / 1e6 / (now - self._started)
            say(
                f"{self.documents:,} documents | {self.tokens:,} tokens | {rate:.1f} MB/s",
                error=True,
            )


def encoded_documents(
    arguments: Arguments, encoder: DocumentEncoder
) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """(bytes of the line, token ids by key) of all documents in their order."""
    global _encoder
    _encoder = encoder
    assert arguments.input.input is not None
    lines, workers = placed_lines(arguments.input.input), arguments.output.workers
    if workers == 1:
        yield from map(_encode, lines)
        return
    # Forked workers have the tokenizer already; its own threads must not have started before.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        # A part at a time: `map` would read the whole corpus before the workers finish.
        while part := list(islice(lines, LINES_PER_WORKER * workers)):
            yield from pool.map(_encode, part, chunksize=LINES_PER_TASK)


def write_datasets(arguments: Arguments, prefixes: dict[str, Path]) -> Progress:
    """Tokenise the input and write all datasets, under temporary names until they are complete.

    Raises:
        UserError: The input or the tokenizer is unusable, or no document has a token.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_dlm.data.document_encoder import DocumentEncoder

    options = arguments.input
    assert options.input is not None
    assert options.tokenizer is not None
    encoder = DocumentEncoder(options.json_keys, options.tokenizer, options.append_eod)
    dtype = np.uint16 if encoder.largest_id < 2**16 else np.int32
    temporary = {key: f"{prefix}.tmp" for key, prefix in prefixes.items()}
    builders = {
        key: IndexedDatasetBuilder(f"{name}.bin", dtype=dtype) for key, name in temporary.items()
    }
    progress = Progress()
    try:
        for num_bytes, documents in encoded_documents(arguments, encoder):
            for key, token_ids in documents.items():
                if token_ids:
                    with writing(prefixes[key], "--output-prefix"):
                        builders[key].add_document(token_ids, [len(token_ids)])
            progress.add(num_bytes, sum(map(len, documents.values())))
        if not progress.tokens:
            raise bad_value("--input", options.input, "holds no text", "name another file")
        for key, name in temporary.items():
            with writing(prefixes[key], "--output-prefix"):
                builders[key].finalize(f"{name}.idx")
                for suffix in (".bin", ".idx"):
                    sync_file(Path(name + suffix))
        for key, name in temporary.items():
            for suffix in (".bin", ".idx"):
                Path(name + suffix).rename(f"{prefixes[key]}{suffix}")
            sync_folder(prefixes[key].parent)
    finally:
        for key, name in temporary.items():
            with contextlib.suppress(OSError):  # of a full disk, once more
                builders[key].data_file.close()
            for suffix in (".bin", ".idx"):
                Path(name + suffix).unlink(missing_ok=True)
    return progress


def main(argv: Sequence[str]) -> int:
    """Parse, check, tokenise, write."""
    arguments = parse_command("preprocess", Arguments, argv)
    prefixes = check_arguments(arguments)
    progress = write_datasets(arguments, prefixes)
    say(
        f"wrote {', '.join(f'{prefix}.bin' for prefix in prefixes.values())}: "
        f"{progress.documents:,} documents ({progress.empty:,} empty ones left out), "
        f"{progress.tokens:,} tokens"
    )
    return 0
