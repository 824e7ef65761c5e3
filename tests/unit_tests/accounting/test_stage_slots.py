"""Idle slots of pipeline stages, of hand-made orders and of real rollouts."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dlm.accounting.stage_slots import rounds, stage_slots
from tests.unit_tests.rollout.tiny_models import (
    MASK,
    SPECIAL_TOKENS,
    make_engine,
    make_prompts,
    tiny_model,
)

STEPS = 8


def round_robin(groups: int) -> list[int]:
    return list(range(groups)) * STEPS


@pytest.mark.parametrize("stages", [2, 4])
def test_only_filling_and_draining_is_idle_with_as_many_groups_as_stages(stages: int) -> None:
    for groups in (stages, 2 * stages):
        for chunks in (1, 2):
            slots = stage_slots(round_robin(groups), stages, chunks)
            assert slots.busy == stages * chunks * groups * STEPS
            assert slots.idle == stages * (stages - 1)


@pytest.mark.parametrize("stages", [2, 4])
def test_with_one_group_all_stages_but_one_are_idle(stages: int) -> None:
    for chunks in (1, 2):
        slots = stage_slots(round_robin(1), stages, chunks)
        assert slots.idle == (stages - 1) * slots.busy
        assert slots.idle_share == (stages - 1) / stages


def test_some_groups_too_few_leave_a_share_idle() -> None:
    # Two of four stages at any time, when the pipeline is full.
    slots = stage_slots(round_robin(2), 4)
    assert slots.busy == 64
    assert slots.idle == 4 * (STEPS * 4 + 1) - 64


def test_rounds_hold_one_forward_a_stage() -> None:
    assert rounds([0, 1, 2, 0, 1, 2, 1, 0], 2) == [[0, 1], [2], [0, 1], [2], [1], [0]]
    assert stage_slots([], 2).idle_share == 0.0


def test_a_rollout_takes_turns_that_leave_no_stage_idle(tmp_path: Path) -> None:
    """With responses of equal length: the order is that of the engine, whatever the layout."""
    static = dict(remasking_strategy="low_confidence_static", max_running_requests=8)
    endless = replace(SPECIAL_TOKENS, eos_token_id=MASK, eos_token_ids=())  # never drawn
    idle = {}
    with tiny_model(tmp_path) as model:
        for groups in (1, 2, 4, 8):
            engine = make_engine(model, special_tokens=endless, **static, decoding_groups=groups)
            engine.generate(make_prompts([4] * 8), 12)
            turns = engine.work.take().groups
            assert turns == list(range(groups)) * (len(turns) // groups)
            idle[groups] = stage_slots(turns, 4).idle
            steps = len(turns) // groups
    assert idle == {1: 3 * 4 * steps, 2: 4 * (steps * 4 + 1) - 8 * steps, 4: 12, 8: 12}
