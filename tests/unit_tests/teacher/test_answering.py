"""Answers of a teacher that others ask: decoded by the options of its server."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout import engine as rollout_engine
from megatron_dlm.rollout.generation_config import _OF_EVERY_DECODING
from megatron_dlm.rollout.traced_forwards import TracedForwards
from megatron_dlm.teacher import answering
from megatron_dlm.teacher.wire import Drawing, TeacherPrompt
from tests.unit_tests.rollout.tiny_models import (
    EOS,
    MASK,
    PAD,
    VOCAB_SIZE,
    make_prompts,
    tiny_model,
)

OWN = {
    "max_running_requests": 2,
    "max_total_tokens": 640,
    "chunked_prefill_size": 96,
    "decoding_groups": 2,
    "rollout_graphs": "on",
}


def test_options_of_decoding_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = []
    recorded = []

    class Engine(rollout_engine.RolloutEngine):
        def __init__(self, *values: Any, **options: Any) -> None:
            settings.append(options["generation"])
            super().__init__(*values, **options)

    def forward(self: TracedForwards, *values: Any) -> Any:
        recorded.append(self)
        return replay(self, *values)

    replay = TracedForwards.__call__
    monkeypatch.setattr(TracedForwards, "__call__", forward)
    monkeypatch.setattr(answering, "RolloutEngine", Engine)
    default = Config(parallel=ParallelConfig(device="cpu"))
    drawing = Drawing(
        seed=3,
        temperature=1.0,
        top_k=9,
        top_p=0.8,
        eos_token_ids=(EOS,),
        pad_token_id=PAD,
        mask_token_id=MASK,
        vocab_size=VOCAB_SIZE,
    )
    prompts = [TeacherPrompt(p.sample_index, p.token_ids, 6) for p in make_prompts([5, 9, 3])]
    answers = []
    with tiny_model(tmp_path) as model:
        for changes in (dict.fromkeys(["rollout_graphs"], "off"), OWN):
            config = dataclasses.replace(
                default, rollout=dataclasses.replace(default.rollout, **changes)
            )
            recorded.clear()
            teacher = answering.TextTeacher(
                model, config, ParallelGroups.from_parallel_state(), None
            )
            answers.append(teacher.responses(prompts, drawing))
            assert bool(recorded) == (changes["rollout_graphs"] == "on")
    assert answers[0] == answers[1]
    assert {name: getattr(settings[1], name) for name in OWN} == OWN
    drawn = {name: getattr(settings[1], name) for name in ("temperature", "top_k", "top_p")}
    assert drawn == {"temperature": 1.0, "top_k": 9, "top_p": 0.8}
    # None of what every decoding reads was forgotten.
    assert {*_OF_EVERY_DECODING} == {*OWN, *drawn}
