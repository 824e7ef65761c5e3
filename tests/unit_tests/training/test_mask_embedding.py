"""The initial MASK row of a converted autoregressive model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpointing import find_checkpoint
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.run import build_run
from tests.distributed_tests.spawn import run_distributed
from tests.tiny import (
    TOKENIZER,
    declare_diffusion_kind,
    run_config,
    run_training,
    save_random_model,
    started_inputs,
    write_data,
)

MASK = 511


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mask")
    write_data(folder, 8)
    save_random_model(folder / "tied")
    save_random_model(folder / "untied", tie_word_embeddings=False)
    return folder


def tables(rank: int, folder: Path, model: str, **options: Any) -> dict[str, torch.Tensor]:
    """This rank's parts of the embedding and the output layer when training starts."""
    config = run_config(folder, folder / model, objective="scp", save=None, **options)
    with initialized(config):
        parameters = dict(build_run(config, read_inputs(config)).student.model.named_parameters())
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: parameters[name].detach().clone() for name in names if name in parameters}


def original(folder: Path, model: str, name: str = "model.embed_tokens.weight") -> torch.Tensor:
    return load_file(folder / model / "model.safetensors")[name]


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize(
    "options", [{"param_group_preset": "rnd1"}, {"mask_embedding_init": "mean"}, {"lora_rank": 2}]
)
def test_mean_of_all_other_rows(folder: Path, model: str, options: dict[str, Any]) -> None:
    found = tables(0, folder, model, **options)
    before = original(folder, model)
    expected = before.clone()
    expected[MASK] = before[torch.arange(512) != MASK].mean(0)
    assert torch.allclose(found["embedding.word_embeddings.weight"], expected, atol=1e-6)
    assert not torch.allclose(expected[MASK], before[MASK], atol=1e-2)
    if model == "untied":
        head = original(folder, model, "lm_head.weight")
        assert torch.equal(found["output_layer.weight"], head)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"param_group_preset": "rnd1", "mask_embedding_init": "keep"},
        {"lora_rank": 2, "mask_embedding_init": "keep"},
    ],
)
def test_kept(folder: Path, options: dict[str, Any]) -> None:
    found = tables(0, folder, "tied", **options)
    assert torch.equal(found["embedding.word_embeddings.weight"], original(folder, "tied"))


def _tables(rank: int, folder: Path, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    return tables(rank, folder, "tied", mask_embedding_init="mean", **layout)


@pytest.mark.slow
def test_the_same_row_under_tp_and_on_both_pipeline_stages(folder: Path) -> None:
    whole = tables(0, folder, "tied", mask_embedding_init="mean")[
        "embedding.word_embeddings.weight"
    ]
    parts = run_distributed(_tables, 2, folder, {"tensor_model_parallel_size": 2})
    shards = [part["embedding.word_embeddings.weight"] for part in parts]
    assert torch.allclose(torch.cat(shards), whole, atol=1e-6)
    first, last = run_distributed(_tables, 2, folder, {"pipeline_model_parallel_size": 2})
    assert torch.equal(first["embedding.word_embeddings.weight"], whole)
    assert torch.equal(last["output_layer.weight"], whole)


def test_a_diffusion_model_keeps_its_row(folder: Path, tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    run_training(run_config(folder, folder / "tied", objective="scp", save=save, train_iters=1))
    hf_config = json.loads((find_checkpoint(save) / "hf" / "config.json").read_text())
    assert (hf_config["attention_pattern"], hf_config["shifted"]) == ("full", True)
    assert "block_size" not in hf_config
    config = run_config(folder, Path(save), objective="scp", save=None, finetune=True)
    trained, *again = (
        _embedding(config.to_dict() | options)
        for options in ({}, {"param_group_preset": "rnd1"}, {"lora_rank": 2})
    )
    assert all(torch.equal(trained, other) for other in again)
    assert not torch.equal(trained, original(folder, "tied"))
    for init in ("keep", "mean"):
        stated = Config.from_dict(config.to_dict() | {"mask_embedding_init": init})
        with pytest.raises(UserError, match=rf"--mask-embedding-init = '{init}': .*{save}"):
            read_inputs(stated)
        # The run itself goes on with the options that it was started with.
        started_inputs(Config.from_dict(stated.to_dict() | {"finetune": False}))


def test_self_distillation_keeps_the_row(folder: Path, tmp_path: Path) -> None:
    save_random_model(tmp_path / "model")
    declare_diffusion_kind(tmp_path / "model", "block_causal", shifted=False)
    config = run_config(
        folder, tmp_path / "model", objective="d_opsd", save=None, lora_rank=2, num_rollouts=1
    )
    assert torch.equal(_embedding(config.to_dict()), original(tmp_path, "model"))


def test_random_weights_have_no_row_to_start_from(folder: Path) -> None:
    options = dict(model_config=str(folder / "tied" / "config.json"), tokenizer=str(TOKENIZER))
    config = run_config(folder, folder / "tied", objective="scp", load=None, **options)
    read_inputs(config)
    with pytest.raises(UserError, match="--mask-embedding-init = 'mean': random weights"):
        read_inputs(Config.from_dict(config.to_dict() | {"mask_embedding_init": "mean"}))


def _embedding(options: dict[str, Any]) -> torch.Tensor:
    config = Config.from_dict(options)
    with initialized(config):
        model = build_run(config, read_inputs(config)).student.model
    return model.embedding.word_embeddings.weight.detach().clone()
