"""Targets of all kinds are indexed, joined and moved alike."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.types.teacher_targets import (
    HiddenTargets,
    StateTargets,
    TeacherTargets,
    TopKTargets,
)


def hidden(n: int) -> HiddenTargets:
    return HiddenTargets(torch.randn(n, 3))


def top_k(n: int) -> TopKTargets:
    return TopKTargets(torch.randint(9, (n, 2)).int(), torch.randn(n, 2), torch.randn(n))


def top_k_alone(n: int) -> TopKTargets:
    return TopKTargets(torch.randint(9, (n, 2)).int(), torch.randn(n, 2))


def of_states(n: int) -> StateTargets:
    places = dict(state=torch.arange(n), position=torch.randint(9, (n,)))
    return StateTargets(torch.randint(9, (n, 2)).int(), torch.randn(n, 2), **places)


KINDS = (hidden, top_k, top_k_alone, of_states)


def rows_of(targets: TeacherTargets) -> list[list[object]]:
    """Each prediction with all that is known of it."""
    values = [getattr(targets, field.name) for field in fields(targets)]
    return [
        [None if value is None else value[i].tolist() for value in values]
        for i in range(len(targets))
    ]


@given(make=st.sampled_from(KINDS), lengths=st.lists(st.integers(0, 5), min_size=1), data=st.data())
def test_rows_of_joined_targets_are_those_of_the_parts(
    make: Callable[[int], TeacherTargets], lengths: list[int], data: st.DataObject
) -> None:
    parts = [make(length) for length in lengths]
    joined = TeacherTargets.cat(parts)
    rows = [row for part in parts for row in rows_of(part)]
    assert type(joined) is type(parts[0])
    assert len(joined) == sum(lengths)
    assert rows_of(joined) == rows
    mask = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    chosen = [i for i, kept in enumerate(mask) if kept]
    wanted = [rows[i] for i in chosen]
    assert rows_of(joined[torch.tensor(mask, dtype=torch.bool)]) == wanted
    assert rows_of(joined[torch.tensor(chosen, dtype=torch.int64)]) == wanted
    assert rows_of(joined[1:3]) == rows[1:3]


def test_what_one_part_lacks_the_whole_lacks() -> None:
    joined = TeacherTargets.cat([top_k(2), top_k_alone(1)])
    assert joined.log_rest is None
    assert len(joined) == 3


@pytest.mark.parametrize("make", KINDS)
def test_every_tensor_moves(make: Callable[[int], TeacherTargets]) -> None:
    moved = make(2).to(torch.device("meta"))
    tensors = [getattr(moved, field.name) for field in fields(moved)]
    assert {t.device.type for t in tensors if t is not None} == {"meta"}


def test_states_give_their_distributions() -> None:
    targets = of_states(4)
    assert type(targets.top_k) is TopKTargets
    assert torch.equal(targets.top_k.log_probs, targets.log_probs)
