"""Stored targets: read back response by response, completed later, never for others."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.data.top_k_store import TopKHeader, TopKStore
from megatron_dlm.errors import UserError
from megatron_dlm.types.teacher_targets import TeacherTargets, TopKTargets

HEADER = TopKHeader(
    prompt_tokens="a" * 64,
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
    return TopKStore(folder, header, "--teacher-responses", responses, vocab_size=512)


def fill(store: TopKStore, targets: list[TopKTargets]) -> None:
    write(store, store.missing(range(len(targets))), targets)


def write(store: TopKStore, prompts: list[int], targets: list[TopKTargets]) -> None:
    if prompts:
        store.write(prompts, TeacherTargets.cat([targets[index] for index in prompts]))


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=9),
    k=st.integers(1, 3),
    data=st.data(),
)
def test_what_is_written_is_read_response_by_response(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], k: int, data: st.DataObject
) -> None:
    store = open_store(tmp_path_factory.mktemp("store") / "new", lengths, k=k)
    store.create()
    expected = targets_of(lengths, k)
    shard_of = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    for shard in range(3):
        write(store, [index for index, own in enumerate(shard_of) if own == shard], expected)
    assert store.missing(range(len(lengths))) == []
    table = store.read()
    for index in reversed(range(len(lengths))):
        for name in ("token_ids", "log_probs", "log_rest"):
            actual = getattr(table[index], name)
            assert actual.dtype == getattr(expected[index], name).dtype
            assert torch.equal(actual, getattr(expected[index], name))


def test_what_exists_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create()
    targets = targets_of(LENGTHS)
    write(store, [1, 3], targets)
    (tmp_path / "top_k_00000000.safetensors.tmp").write_bytes(b"cut off")
    again = open_store(tmp_path)
    again.create()
    assert again.missing([0, 1, 2]) == [0, 2]
    fill(again, targets)
    table = again.read()
    for index in range(len(LENGTHS)):
        assert torch.equal(table[index].log_probs, targets[index].log_probs)


def test_responses_that_came_later_change_nothing(tmp_path: Path) -> None:
    targets = targets_of(LENGTHS)
    store = open_store(tmp_path, [3, 0, 4, 0, 0])  # two have been answered
    store.create()
    write(store, [0, 2], targets)
    later = open_store(tmp_path)
    assert later.missing(range(5)) == [1, 3, 4]
    assert torch.equal(later.read()[2].log_probs, targets[2].log_probs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_tokens", "c" * 64),
        ("teacher_weights", "c" * 64),
        ("bf16", True),
        ("k", 3),
    ],
)
def test_targets_of_another_header_are_refused(tmp_path: Path, name: str, value: object) -> None:
    open_store(tmp_path).create()
    with pytest.raises(UserError, match=rf"--teacher-responses = .*top_k computed with {name} = "):
        open_store(tmp_path, **{name: value})


@pytest.mark.parametrize("damage", ["cut", "no safetensors", "other prompts"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    store.create()
    targets = targets_of(LENGTHS)
    write(store, [0, 1, 2], targets)
    write(store, [3, 4], targets)
    file = tmp_path / "top_k_00000003.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "no safetensors":
        file.write_bytes(b"")
    else:
        (tmp_path / "top_k_00000000.safetensors").replace(file)
    with pytest.raises(UserError, match=r"top_k_00000003\.safetensors.*is damaged; delete"):
        store.read()


def test_targets_of_other_responses_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create()
    fill(store, targets_of(LENGTHS))
    # The same number of tokens, cut into responses at another place.
    with pytest.raises(UserError, match=r"top_k_00000000\.safetensors.*for other responses"):
        open_store(tmp_path, [1, 3, 4, 2, 5]).read()


@pytest.mark.parametrize("token_id", [512, -1])
def test_ids_outside_the_vocabulary_are_named(tmp_path: Path, token_id: int) -> None:
    store, targets = open_store(tmp_path), targets_of(LENGTHS)
    store.create()
    targets[3].token_ids[1, 0] = token_id
    write(store, [0, 1, 2, 3, 4], targets)
    with pytest.raises(UserError, match=rf"top_k_00000000.*: token_ids = {token_id}: is no token"):
        store.missing(())
