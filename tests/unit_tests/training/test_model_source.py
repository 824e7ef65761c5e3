"""A model's fingerprint is that of its weights, wherever they lie and in either kind of folder."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_dlm.config import Config
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpoint_saving import save_checkpoint
from megatron_dlm.training.manifest import MANIFEST
from megatron_dlm.training.model_source import open_model_source
from tests.refusal import refusal
from tests.tiny import declare_diffusion_kind, save_random_model


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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("block_size: 8\nthreshold: 0.9\n", r"dllm_config.yaml: block_size = 8: but .* says 4"),
        ("block_size: 4\n", None),
        ("threshold: 0.9\n", None),
        ("[", "is no YAML file"),
        ("\x00", "is no YAML file"),
        ("[" * 5000, "is no YAML file"),
    ],
)
def test_the_block_size_that_engines_are_told(
    tmp_path: Path, text: str, problem: str | None
) -> None:
    model = save_random_model(tmp_path / "model")
    declare_diffusion_kind(model, "block_causal", shifted=False)
    (model / "dllm_config.yaml").write_text(text)
    message = refusal(open_model_source, str(model), "--load")
    assert message is None if problem is None else re.search(problem, message or "")


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
    for manifest in copied.rglob(MANIFEST):
        manifest.unlink()
    config = next(copied.rglob("config.json"))
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert fingerprint(copied) != first
