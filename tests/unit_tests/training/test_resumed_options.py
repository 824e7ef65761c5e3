"""Which options of a resumed run are compared with those that it was started with."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.training import run
from megatron_dlm.training.inputs import RunInputs

INPUTS = cast(RunInputs, SimpleNamespace(data=SimpleNamespace(file=SimpleNamespace(fingerprint=1))))
COMMON = {"objective": "next_token", "load": "run", "train_iters": 4}


def check(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], **before: Any) -> None:
    config = Config.from_dict({**COMMON, **options})
    monkeypatch.setattr(
        run, "saved_config", lambda load: run._resumable_config(config, INPUTS) | before
    )
    run._check_resumable(config, INPUTS, "run")


def test_the_length_of_windows_is_fixed_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(monkeypatch, {"train_data": "t.jsonl"}, seq_length=64)
    check(monkeypatch, {"data_path": "corpus", "seq_length": 64}, seq_length=64)
    with pytest.raises(UserError, match=r"--seq-length = 2048: .*started with 64"):
        check(monkeypatch, {"data_path": "corpus"}, seq_length=64)
    with pytest.raises(UserError, match=r"--seed = 1234: .*started with 7"):
        check(monkeypatch, {"train_data": "t.jsonl"}, seed=7)


def test_what_a_run_has_no_use_for_may_have_been_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named again, it would be refused."""
    check(monkeypatch, {"train_data": "t.jsonl"}, block_size=32, rollout_batch_size=7)
    with pytest.raises(UserError, match=r"--block-size = 4: .*started with 32"):
        check(monkeypatch, {"objective": "sft", "train_data": "t.jsonl"}, block_size=32)
