"""A model's fingerprint is that of its weights, wherever they lie and in either kind of folder."""

import shutil
from pathlib import Path

import pytest

from megatron_dlm.config import Config
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.training.checkpointing import save_checkpoint
from megatron_dlm.training.initialize import initialized
from megatron_dlm.training.model_source import open_model_source
from tests.tiny import save_random_model


def save(folder: Path, kind: str, seed: int) -> Path:
    """The model drawn with a seed, always in files of the same names and sizes."""
    hf = folder if kind == "hf" else folder.with_name(f"{folder.name}_hf")
    save_random_model(hf, seed=seed)
    if kind == "hf":
        return folder
    config, source = Config.from_dict({"device": "cpu"}), open_model_source(str(hf), "--load")
    with initialized(config):
        model = build_model(source.architecture, config)
        source.load_into(model)
        save_checkpoint(folder, model, hf_config=source.architecture.hf_config, tokenizer_folder=hf)
    return folder


def fingerprint(folder: Path) -> str:
    return open_model_source(str(folder), "--load").fingerprint()


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_it_follows_the_weights(tmp_path: Path, kind: str) -> None:
    model = save(tmp_path / "model", kind, seed=0)
    first = fingerprint(model)
    copied = shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(copied) == first
    if kind == "megatron":
        assert fingerprint(model / "iter_0000000") == first
    save(model, kind, seed=1)
    assert fingerprint(model) != first
    config = next(copied.rglob("config.json"))
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert fingerprint(copied) != first
