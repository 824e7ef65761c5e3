"""Stored targets: read back response by response, completed later, never for others."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.data.prompts import TokenTable
from megatron_dlm.data.top_k_store import TopKHeader, TopKStore
from megatron_dlm.distillation.top_k_targets import TopKTargets
from megatron_dlm.errors import UserError

HEADER = TopKHeader(
    prompt_tokens="a" * 64,
    responses="b" * 64,
    num_prompts=5,
    teacher="teacher",
    teacher_weights="d" * 64,
    bf16=False,
    k=2,
)
LENGTHS = [3, 1, 4, 2, 5]


def targets_of(lengths: list[int], k: int = 2) -> list[TopKTargets]:
    generator = torch.Generator().manual_seed(0)
    return [
        TopKTargets(
            torch.randint(512, (length, k), generator=generator, dtype=torch.int32),
            torch.randn(length, k, generator=generator),
            torch.randn(length, generator=generator),
        )
        for length in lengths
    ]


def open_store(folder: Path, lengths: list[int] = LENGTHS, **changes: object) -> TopKStore:
    responses = TokenTable()
    for length in lengths:
        responses.append([7] * length)
    header = dataclasses.replace(HEADER, **{"num_prompts": len(lengths), **changes})
    return TopKStore(folder, header, "--teacher-responses", responses)


def fill(store: TopKStore, targets: list[TopKTargets]) -> None:
    for shard in store.missing():
        store.write(shard, TopKTargets.cat([targets[index] for index in shard]))


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=9),
    per_shard=st.integers(1, 9),
    k=st.integers(1, 3),
)
def test_what_is_written_is_read_response_by_response(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int, k: int
) -> None:
    store = open_store(tmp_path_factory.mktemp("store") / "new", lengths, k=k)
    store.create(per_shard)
    expected = targets_of(lengths, k)
    fill(store, expected)
    assert store.missing() == []
    table = store.read()
    assert len(table) == len(lengths)
    for index in reversed(range(len(lengths))):
        for name in ("token_ids", "log_probs", "log_rest"):
            actual = getattr(table[index], name)
            assert actual.dtype == getattr(expected[index], name).dtype
            assert torch.equal(actual, getattr(expected[index], name))


def test_what_exists_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create(2)
    targets = targets_of(LENGTHS)
    store.write(range(2, 4), TopKTargets.cat(targets[2:4]))
    (tmp_path / "top_k_00000000.safetensors.tmp").write_bytes(b"cut off")
    again = open_store(tmp_path)
    again.create(3)  # another run's wish: shards stay as they are
    assert again.missing() == [range(2), range(4, 5)]
    fill(again, targets)
    assert torch.equal(again.read()[2].log_probs, targets[2].log_probs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_tokens", "c" * 64),
        ("responses", "c" * 64),
        ("teacher_weights", "c" * 64),
        ("bf16", True),
        ("k", 3),
    ],
)
def test_targets_of_another_header_are_refused(tmp_path: Path, name: str, value: object) -> None:
    open_store(tmp_path).create(2)
    with pytest.raises(UserError, match=rf"--teacher-responses = .*top_k computed with {name} = "):
        open_store(tmp_path, **{name: value})


@pytest.mark.parametrize("damage", ["missing", "cut", "no safetensors", "other responses"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    store.create(3)
    targets = targets_of(LENGTHS)
    fill(store, targets)
    file = tmp_path / "top_k_00000003.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "no safetensors":
        file.write_bytes(b"")
    else:
        (tmp_path / "top_k_00000000.safetensors").replace(file)
        fill(store, targets)
    with pytest.raises(UserError, match=r"top_k_00000003\.safetensors.*is damaged; delete"):
        store.read()
