"""RND1's grafting in two runs: a causal diffusion model first, then full attention."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config import ParallelConfig
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.options import (
    GreedyDecodingConfig,
    InferenceArguments,
    InferenceConfig,
    InferenceSetup,
    resolve_inference,
)
from megatron_dlm.training.checkpointing import find_checkpoint
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.model_source import open_model_source
from tests.tiny import run_config, run_training, save_random_model, write_data

SCP: dict[str, Any] = {"objective": "scp", "train_iters": 4}
FROM_SCP: dict[str, Any] = {**SCP, "finetune": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grafting")
    write_data(folder)
    save_random_model(folder / "ar")
    options = {**SCP, "attention_pattern": "causal"}
    run_training(run_config(folder, folder / "ar", save=str(folder / "causal"), **options))
    return folder


def stated(run: Path) -> dict[str, Any]:
    config = open_model_source(str(run), "--load").architecture.hf_config
    return {key: config.get(key) for key in ("attention_pattern", "shifted", "block_size")}


def test_the_second_run_takes_the_weights_and_starts_afresh(folder: Path) -> None:
    assert stated(folder / "causal") == {
        "attention_pattern": "causal",
        "shifted": True,
        "block_size": None,
    }
    first = str(folder / "causal")
    grafted = run_config(folder, folder / "causal", save=str(folder / "grafted"), **FROM_SCP)
    lines = run_training(grafted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert find_checkpoint(str(folder / "grafted")).name == find_checkpoint(first).name
    assert stated(folder / "grafted")["attention_pattern"] == "full"
    # The same data from the start: the weights and the attention are all that differs.
    before = json.loads((folder / "causal" / "metrics.jsonl").read_text().splitlines()[0])
    assert lines[0]["supervised_tokens"] == before["supervised_tokens"]
    assert lines[0]["loss"] != pytest.approx(before["loss"], rel=1e-3)


def test_attention_does_not_change_within_a_run(folder: Path) -> None:
    config = run_config(folder, folder / "causal", save=str(folder / "causal"), **SCP)
    with pytest.raises(
        UserError, match=r"--attention-pattern \(then 'causal', now 'full'\).*--fine"
    ):
        run_training(config)


def setup(folder: Path, **options: Any) -> InferenceSetup:
    arguments = InferenceArguments(
        InferenceConfig(load=str(folder / "causal"), **options),
        GreedyDecodingConfig(),
        ParallelConfig(device="cpu"),
    )
    return resolve_inference(arguments, 1)


def test_a_causal_diffusion_model_decodes_from_left_to_right_only(folder: Path) -> None:
    assert list(setup(folder).settings()) == ["autoregressive"]
    assert list(setup(folder).settings(["autoregressive"])) == ["autoregressive"]
    for refused in (
        lambda: setup(folder).settings(["static"]),
        lambda: setup(folder, decoding="diffusion").settings(),
        lambda: setup(folder, block_size=4),
    ):
        with pytest.raises(UserError, match=r"states causal attention, which"):
            refused()


def test_what_needs_another_model_refuses_it(folder: Path) -> None:
    """No teacher, and no view of later tokens."""
    opdlm = run_config(folder, folder / "ar", teacher_load=str(folder / "causal"))
    with pytest.raises(UserError, match=r"--teacher-load .* is a diffusion model"):
        read_inputs(opdlm)
    d_opsd = run_config(folder, folder / "causal", objective="d_opsd", lora_rank=2)
    with pytest.raises(UserError, match=r"--load .* attends causally"):
        read_inputs(d_opsd)
