"""Records that several ranks tokenise together are those that one process reads by itself."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data import token_shards
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset, read_examples, read_prompts
from megatron_dlm.data.token_shards import (
    ALONE,
    Ranks,
    TokenFiles,
    read_shared_examples,
    read_shared_prompts,
)
from megatron_dlm.data.tokenizing import ExampleReader, PromptReader
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.refusal import refusal
from tests.tiny import TOKENIZER

CHAT = [
    {"role": "user", "content": "Tom has"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "He buys 1."},
    {"role": "assistant", "content": "3"},
]
LINES = [{"prompt": "5" * (i % 7 + 1), "response": str(i), "id": i} for i in range(9)]
LINES[4] = {"messages": CHAT, "id": 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "p.jsonl", LINES)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "RECORDS_PER_SHARD", 2)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def files(folder: Path, ranks: Ranks = ALONE) -> TokenFiles:
    return TokenFiles(folder / "tokenized", "--save", TOKENIZER, ranks)


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "tokenized").glob("*/*"))


class World:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._meet = threading.Barrier(size, timeout=60)
        self._errors: list[UserError | None] = [None] * size
        self._decided: Any = None

    def ranks(self, rank: int) -> Ranks:
        @contextmanager
        def errors_on_all() -> Iterator[None]:
            try:
                yield
            except UserError as error:
                self._errors[rank] = error
            self._meet.wait()
            first = next((error for error in self._errors if error is not None), None)
            if first is not None:
                raise UserError(str(first))

        def from_first(decide: Callable[[], Any]) -> Any:
            if rank == 0:
                self._decided = decide()
            self._meet.wait()
            return self._decided

        return Ranks(rank, self.size, errors_on_all, from_first)

    def run(self, read: Callable[[Ranks], Any]) -> list[Any]:
        """What each rank reads, or the text of its error."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                found[rank] = read(self.ranks(rank))
            except UserError as error:
                found[rank] = str(error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def check_same(
    data: PromptDataset | ExampleDataset, expected: PromptDataset | ExampleDataset
) -> None:
    assert (len(data), data.num_dropped) == (len(expected), expected.num_dropped)
    assert data.file.fingerprint == expected.file.fingerprint
    names = ["prompt_ids", "response_ids"] if isinstance(data, ExampleDataset) else ["token_ids"]
    for sample, other in zip(data, expected, strict=True):
        assert sample.record == other.record
        for name in names:
            assert getattr(sample, name).tolist() == getattr(other, name).tolist()
    if isinstance(data, PromptDataset):
        assert isinstance(expected, PromptDataset)
        assert data.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_that_read_together_have_what_one_reads(
    size: int,
    path: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
) -> None:
    """With more ranks than shards too; prompts that are dropped leave holes."""
    prompts = write(tmp_path / "q.jsonl", [{"prompt": line.get("prompt", "1")} for line in LINES])
    reader = PromptReader(tokenizer, special_tokens, 5, long_prompts="drop")
    expected = read_prompts(prompts, tokenizer, special_tokens, 5, long_prompts="drop")
    assert expected.num_dropped == 2

    def read(ranks: Ranks) -> PromptDataset:
        file = open_records(prompts, "--prompts")
        return read_shared_prompts(file, reader, files(tmp_path, ranks))

    for data in World(size).run(read):
        check_same(data, expected)
    assert len(stored(tmp_path)) == 5
    examples = ExampleReader(tokenizer, special_tokens, 100, train_on="all")

    def read_pairs(ranks: Ranks) -> ExampleDataset:
        file = open_records(path, "--train-data")
        return read_shared_examples(file, examples, files(tmp_path, ranks))

    for data in World(size).run(read_pairs):
        check_same(data, read_examples(path, tokenizer, special_tokens, 100, train_on="all"))
        assert data.record_index(5) == 4  # of the chat's second answer


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), shard=st.integers(1, 5))
def test_without_a_folder_it_is_the_same(
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    lengths: list[int],
    shard: int,
) -> None:
    records = [{"prompt": "7" * length} for length in lengths]
    file = RecordsInMemory(records, "p.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "RECORDS_PER_SHARD", shard)
        data = read_shared_prompts(file, PromptReader(tokenizer, special_tokens, 9), None)
    assert [tokenizer.decode(prompt.token_ids) for prompt in data] == [r["prompt"] for r in records]
    assert [prompt.sample_index for prompt in data[1:3]] == [1, 2][: len(records) - 1]


def test_a_second_start_tokenises_only_what_is_missing_or_damaged(
    path: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, place = ExampleReader(tokenizer, special_tokens, 100), files(tmp_path)
    read = reader.read
    sizes: list[int] = []

    def counted(self: ExampleReader, file: Any) -> Any:
        sizes.append(len(file))
        return read(file)

    monkeypatch.setattr(ExampleReader, "read", counted)

    def again() -> ExampleDataset:
        sizes.clear()
        return read_shared_examples(open_records(path, "--train-data"), reader, place)

    again()
    assert sizes == [2, 2, 2, 2, 1]
    expected = read_examples(path, tokenizer, special_tokens, 100)
    check_same(again(), expected)
    assert sizes == []
    shards = stored(tmp_path)
    content = shards[1].read_bytes()
    at = len(content) - 3
    shards[1].write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])  # one bit
    shards[2].write_bytes(shards[2].read_bytes()[:-4])
    shards[3].write_bytes(b"")
    shards[4].unlink()
    check_same(again(), expected)
    assert sizes == [2, 2, 2, 1]


def test_whatever_decides_the_tokens_has_its_own_folder(
    path: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    reader = ExampleReader(tokenizer, special_tokens, 100)
    readers = [
        reader,
        replace(reader, max_prompt_length=99),
        replace(reader, long_prompts="truncate"),
        replace(reader, chat_template_kwargs={"enable_thinking": False}),
        replace(reader, domains=Domains(prompt_suffix={"default": "!"})),
        replace(reader, special_tokens=replace(special_tokens, eos_token_ids=(1,))),
        replace(reader, max_response_length=90),
        replace(reader, max_position_embeddings=300),
        replace(reader, train_on="all"),
    ]
    folders = set()
    for number, each in enumerate(readers, start=1):
        read_shared_examples(open_records(path, "--train-data"), each, files(tmp_path))
        folders = set((tmp_path / "tokenized").iterdir())
        assert len(folders) == number
    moved = path.rename(tmp_path / "moved.jsonl")
    read_shared_examples(open_records(moved, "--train-data"), reader, files(tmp_path))
    assert set((tmp_path / "tokenized").iterdir()) == folders
    changed = tmp_path / "tokenizer"
    changed.mkdir()
    for file in TOKENIZER.iterdir():
        if file.suffix in (".json", ".jinja"):
            (changed / file.name).write_bytes(file.read_bytes() + b"\n")
    place = files(tmp_path)._replace(tokenizer_folder=changed)
    read_shared_examples(open_records(moved, "--train-data"), reader, place)
    write(moved, [*LINES, {"prompt": "5", "response": "5"}])
    read_shared_examples(open_records(moved, "--train-data"), reader, files(tmp_path))
    assert len(set((tmp_path / "tokenized").iterdir())) == len(folders) + 2


def test_all_ranks_refuse_the_first_bad_record(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    """Although ranks meet bad ones at the same time; what was good is kept."""
    records: list[dict[str, Any]] = [{"prompt": "1"}] * 9
    records[3] = records[8] = {"prompt": 1}
    path = write(tmp_path / "bad.jsonl", records)
    reader = PromptReader(tokenizer, special_tokens, 9)

    def read(ranks: Ranks) -> PromptDataset:
        file = open_records(path, "--prompts")
        return read_shared_prompts(file, reader, files(tmp_path, ranks))

    found = World(3).run(read)
    assert found == [refusal(read_prompts, path, tokenizer, special_tokens, 9)] * 3
    assert "bad.jsonl:4" in found[0]
    assert [file.name for file in stored(tmp_path)] == [
        "00000000.safetensors",
        "00000006.safetensors",
    ]


def test_ranks_with_other_data_and_folders_that_cannot_be_written_are_refused(
    path: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    other = write(tmp_path / "other.jsonl", LINES[:4])
    reader = ExampleReader(tokenizer, special_tokens, 100)

    def read(ranks: Ranks) -> ExampleDataset:
        file = open_records(other if ranks.rank else path, "--train-data")
        return read_shared_examples(file, reader, files(tmp_path, ranks))

    error, same = World(2).run(read)
    assert error == same
    assert "has 4 records on rank 1 and 9 on rank 0; give all processes the same data" in error
    place = files(path)  # a file
    error = refusal(read_shared_examples, open_records(path, "--train-data"), reader, place)
    assert error is not None
    assert error.startswith(f"--save = '{path}/tokenized/")
    assert "cannot be written" in error


def test_progress_is_told_at_once_and_now_and_then(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(token_shards, "LINE_SECONDS", 0.0)
    file = open_records(path, "--train-data")
    read_shared_examples(file, ExampleReader(tokenizer, special_tokens, 100), None)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"tokenising {path}: 9 records"
    for line, done in zip(lines, [2, 4, 6, 8, 9], strict=True):
        start = f"tokenising {path}: {done} of 9 records, "
        assert re.fullmatch(re.escape(start) + r"[\d,]+/s, about 0:0\d left", line)
    file = open_records(path, "--train-data").first(2)
    read_shared_examples(file, ExampleReader(tokenizer, special_tokens, 100), None)
    assert capsys.readouterr().out == ""
