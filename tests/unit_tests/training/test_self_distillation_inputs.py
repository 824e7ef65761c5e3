"""Models for d_opsd are checked before any weight is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_diffusion_kind
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, RND1
from tests.tiny import declare_diffusion_kind, run_config, save_random_model, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder)
    for name in ("ar", "block_causal", "full"):
        save_random_model(folder / name)
    declare_diffusion_kind(folder / "block_causal", "block_causal", shifted=False)
    declare_diffusion_kind(folder / "full", "full", shifted=True)
    for name, stated in (
        ("other_blocks", {"block_size": 8}),
        ("other_mask", {"mask_token_id": 400}),
    ):
        file = shutil.copytree(folder / "block_causal", folder / name) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    return folder


def _read(folder: Path, model: str, **options: Any) -> Any:
    config = run_config(folder, folder / model, objective="d_opsd", lora_rank=2, **options)
    return config, read_inputs(config)


def test_the_students_diffusion_kind_is_kept(folder: Path) -> None:
    config, inputs = _read(folder, "block_causal")
    assert inputs.teacher is None
    assert inputs.diffusion_kind == BLOCK_DIFFUSION
    config, inputs = _read(folder, "full", block_size=8, teacher_load=str(folder / "full"))
    assert inputs.teacher is not None
    assert inputs.diffusion_kind == RND1
    written = inputs.hf_config(config)
    assert (written["attention_pattern"], written["shifted"]) == ("full", True)
    assert written["block_size"] == 8  # which its rollouts had


def test_what_becomes_autoregressive_no_longer_says_diffusion(folder: Path) -> None:
    config = run_config(folder, folder / "full", objective="next_token", data_path=None)
    written = read_inputs(config).hf_config(config)
    assert read_diffusion_kind(written) is None


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("ar", {}, r"--load = .*autoregressive.*opdlm"),
        ("block_causal", {"block_size": 8}, r"--block-size = 8: .*blocks of 4; choose 4"),
        ("block_causal", {"teacher_load": "full"}, r"--teacher-load = .*block_causal"),
        ("block_causal", {"teacher_load": "ar"}, r"--teacher-load = .*no diffusion model"),
        (
            "block_causal",
            {"teacher_load": "other_blocks"},
            r"other_blocks/config.json: block_size = 8: but .*block_causal/config.json says 4",
        ),
        (
            "block_causal",
            {"teacher_load": "other_mask"},
            r"other_mask/config.json: mask_token_id = 400: but .*/config.json says 511",
        ),
    ],
)
def test_what_cannot_teach_itself_is_refused(
    folder: Path, model: str, options: dict[str, Any], message: str
) -> None:
    if "teacher_load" in options:
        options = {"teacher_load": str(folder / options["teacher_load"])}
    with pytest.raises(UserError, match=message):
        _read(folder, model, **options)


@pytest.mark.parametrize("options", [{}, {"teacher_load": "full"}])
def test_a_model_of_full_attention_keeps_its_blocks(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    shutil.copytree(folder / "full", tmp_path / "full")
    file = tmp_path / "full" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_size": 16}))
    options = {name: str(folder / value) for name, value in options.items()}
    with pytest.raises(UserError, match=r"--block-size = 8: .*blocks of 16; choose 16"):
        _read(folder, "full", load=str(tmp_path / "full"), block_size=8, **options)
    config, inputs = _read(folder, "full", load=str(tmp_path / "full"), block_size=16, **options)
    assert inputs.hf_config(config)["block_size"] == 16


def test_prompts_without_answers_are_refused(folder: Path) -> None:
    bare = folder / "bare.jsonl"
    bare.write_text('{"prompt": "2 + 2?"}\n')
    with pytest.raises(UserError, match=r'bare.jsonl:1: "answer" = None'):
        _read(folder, "block_causal", prompts=str(bare))
