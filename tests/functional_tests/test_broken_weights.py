"""Weights that are not finite or do not fit the model: every tool names tensor and file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.errors import UserError
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpoint_saving import save_checkpoint
from megatron_dlm.training.model_source import open_model_source
from megatron_dlm.training.run import build_run
from tests.functional_tests.entry_points import (
    CONVERT,
    EVALUATE,
    GENERATE,
    PRETRAIN,
    Call,
    Outcome,
)
from tests.tiny import run_config, run_training, save_random_model, started_inputs, write_data

NAME = "model.layers.1.self_attn.k_proj.weight"
LENGTH = ("--max-response-length", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    write_data(folder, 8)
    return folder


def use(call: Call, script: Path, files: Path, load: Path, out: Path) -> Outcome:
    """Run a tool with a checkpoint."""
    if script == CONVERT:
        return call(script, "--load", load, "--save", out, "--target-format", "autoregressive")
    if script == PRETRAIN:
        run = ("--objective", "sft", "--train-iters", 1, "--global-batch-size", 4, "--finetune")
        length = ("--max-response-length", 40, "--device", "cpu")
        return call(script, *run, "--load", load, "--train-data", files / "examples.jsonl", *length)
    data = "--prompts" if script == GENERATE else "--data"
    return call(script, "--load", load, data, files / "examples.jsonl", *LENGTH)


def with_value(value: float) -> Callable[[dict[str, Any]], None]:
    def damage(tensors: dict[str, Any]) -> None:
        tensors[NAME][3, 5] = value

    return damage


def quantised(dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    def damage(tensors: dict[str, Any]) -> None:
        tensors[NAME] = (tensors[NAME] * 20).to(dtype)

    return damage


def block_scaled(tensors: dict[str, Any]) -> None:
    quantised(torch.float8_e4m3fn)(tensors)
    tensors[f"{NAME}_scale_inv"] = torch.ones(1, 1)


def in_bf16(tensors: dict[str, Any]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].bfloat16()
    tensors[NAME][0, 0] = float("nan")


def beyond_float32(tensors: dict[str, Any]) -> None:
    tensors[NAME] = tensors[NAME].double()
    tensors[NAME][0, 0] = 1e300


TOOLS = pytest.mark.parametrize(
    "script", [PRETRAIN, GENERATE, EVALUATE, CONVERT], ids=lambda path: path.stem
)


def check_damaged(
    files: Path,
    call: Call,
    folder: Path,
    script: Path,
    damage: Callable[[dict[str, Any]], None],
    problem: str,
) -> None:
    """Check that a tool refuses a model with damaged tensors, naming tensor and file."""
    file = save_random_model(folder / "model") / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    outcome = use(call, script, files, folder / "model", folder / "out")
    outcome.check_error(f"--load = '{file}'", f"tensor {NAME}", problem)


@TOOLS
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (with_value(float("nan")), "holds NaN or infinite values"),
        (quantised(torch.int8), "is stored as I8"),
        (block_scaled, "is stored as F8_E4M3"),
    ],
    ids=["nan", "int8", "block_scaled"],
)
def test_every_tool_names_the_tensor_and_its_file(
    files: Path,
    call: Call,
    tmp_path: Path,
    script: Path,
    damage: Callable[[dict[str, Any]], None],
    problem: str,
) -> None:
    check_damaged(files, call, tmp_path, script, damage, problem)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (with_value(float("inf")), "holds NaN"),
        (with_value(float("-inf")), "holds NaN"),
        (in_bf16, "holds NaN"),
        (beyond_float32, "holds NaN or infinite values, read as float32"),
        (quantised(torch.uint8), "is stored as U8"),
        (quantised(torch.int64), "is stored as I64"),
        (quantised(torch.float8_e5m2), "is stored as F8_E5M2"),
    ],
)
def test_other_broken_weights(
    files: Path,
    call: Call,
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], None],
    problem: str,
) -> None:
    check_damaged(files, call, tmp_path, CONVERT, damage, problem)


def test_quantisation_that_only_config_json_states(files: Path, call: Call, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (model / "config.json").write_text(json.dumps(config | quantization))
    use(call, EVALUATE, files, model, tmp_path / "out").check_error(
        f"{model / 'config.json'}: quantization_config", "(fp8)"
    )


@pytest.fixture(scope="module")
def broken_megatron(files: Path) -> Path:
    """A Megatron checkpoint with a NaN, which training may have left there."""
    source = open_model_source(str(save_random_model(files / "sound")), "--load")
    config = run_config(files, source.path)
    with initialized(config):
        model = build_model(source.architecture, config)
        source.load_into(model)
        model.decoder.layers[1].mlp.linear_fc1.weight.data[0, 0] = float("nan")
        save_checkpoint(
            files / "megatron",
            model,
            hf_config=source.architecture.hf_config,
            tokenizer_folder=source.path,
        )
        # Nor does the library write such a model.
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj\.weight.* would hold NaN"):
            export_hf(model, source.architecture, files / "exported", format="autoregressive")
        assert not (files / "exported").exists()
    return files / "megatron"


@TOOLS
def test_megatron_checkpoints(
    files: Path, call: Call, tmp_path: Path, broken_megatron: Path, script: Path
) -> None:
    use(call, script, files, broken_megatron, tmp_path / "out").check_error(
        f"--load = '{broken_megatron / 'iter_0000000'}'",
        "tensor decoder.layers.1.mlp.linear_fc1.weight holds NaN",
    )


def test_a_run_does_not_go_on_from_weights_that_are_no_numbers(files: Path, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model")
    save = str(tmp_path / "run")
    options: dict[str, Any] = {"objective": "sft", "save": save, "lr_decay_iters": 2}
    run_training(run_config(files, model, train_iters=1, **options))
    resumed = run_config(files, Path(save), train_iters=2, **options)
    with initialized(resumed):
        run = build_run(*started_inputs(resumed))
        next(run.student.model.parameters()).data[0, 0] = float("nan")
        run.save()
        run.finish_saving()
    with pytest.raises(UserError, match=r"tensor embedding\.word_embeddings\.weight holds NaN"):
        run_training(resumed)
