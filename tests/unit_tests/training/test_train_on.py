"""Runs on all turns of chats: counted, held out and resumed by example, not by record."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.errors import UserError
from megatron_dlm.training.inputs import read_inputs
from tests.tiny import run_config, run_training, save_random_model, write_data

RECORDS, TURNS = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_on")
    write_data(folder, 8)
    save_random_model(folder / "model")
    chats = [
        [
            {"role": role, "content": f"{record} + {turn}" * (1 + turn * (role == "assistant"))}
            for turn in range(TURNS)
            for role in ("user", "assistant")
        ]
        for record in range(RECORDS)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


def options(folder: Path, **more: Any) -> dict[str, Any]:
    chats = str(folder / "chats.jsonl")
    return {"objective": "sft", "train_data": chats, "global_batch_size": 2, **more}


def test_examples_are_counted(folder: Path) -> None:
    for train_on, count in (("all", RECORDS * TURNS), ("last", RECORDS)):
        own = options(folder, train_on=train_on, valid_data=str(folder / "chats.jsonl"))
        config = run_config(folder, folder / "model", **own, eval_iters=count // 2)
        inputs = read_inputs(config)
        assert len(inputs.data) == count
        assert len(inputs.held_out or ()) == count
        config = run_config(folder, folder / "model", **own, eval_iters=count // 2 + 1)
        with pytest.raises(UserError, match=f"has {count} samples"):
            read_inputs(config)


def test_a_resumed_run_goes_on_with_the_next_example(folder: Path, tmp_path: Path) -> None:
    def run(save: str, load: str | Path, iters: int, **more: Any) -> list[dict[str, Any]]:
        own = options(
            folder, **{"train_on": "all", "train_iters": iters, "lr_decay_iters": 3, **more}
        )
        return run_training(
            run_config(folder, Path(load), save=str(tmp_path / save), shuffle=False, **own)
        )

    whole = run("whole", folder / "model", 3)
    data = read_inputs(run_config(folder, folder / "model", **options(folder, train_on="all"))).data
    tokens = [len(data.sample(index, index).response_ids) for index in range(RECORDS * TURNS)]
    assert [line["response_tokens_total"] for line in whole] == [
        sum(tokens[:seen]) for seen in (2, 4, 6)
    ]
    run("halves", folder / "model", 1)
    resumed = run("halves", tmp_path / "halves", 3)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    for name, value, started in (
        ("train_on", "last", "'all'"),
        ("chat_template_kwargs", {"enable_thinking": False}, r"\{\}"),
    ):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=rf"{flag} \(then {started}, now"):
            run("halves", tmp_path / "halves", 3, **{name: value})
