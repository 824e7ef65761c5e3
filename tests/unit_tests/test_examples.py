"""Shipped recipes fit the models and the numbers of GPUs that they are for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.real_shapes import REAL_SHAPES
from megatron_dlm.config import Config, parse_config, validate, validate_architecture
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.training.curriculum import response_length
from tests.refusal import refusal

EXAMPLES = Path(__file__).parents[2] / "examples"

MODELS = {name: shape for name, shape in REAL_SHAPES.items() if (EXAMPLES / name).is_dir()}

LAYOUTS: list[tuple[str, int, dict[str, int]]] = [
    ("qwen3_0.6b", 8, {}),
    ("qwen3_1.7b", 8, {}),
    ("qwen3_8b", 8, {}),
    ("qwen3_8b", 16, {}),
    ("qwen3_8b", 16, {"tensor_model_parallel_size": 4}),
    ("qwen3_30b_a3b", 8, {}),
    ("qwen3_30b_a3b", 16, {"pipeline_model_parallel_size": 2}),
]


def recipe(name: str, **changes: object) -> Config:
    config = parse_config(["--config", str(EXAMPLES / name / "opdlm.yaml")])
    return Config.from_dict({**config.to_dict(), **changes})


def test_every_recipe_is_covered() -> None:
    assert {file.parent.name for file in EXAMPLES.glob("qwen3*/*.yaml")} == set(MODELS)


@pytest.mark.parametrize(("name", "world_size", "changes"), LAYOUTS)
def test_recipe_fits_its_model_and_gpus(
    name: str, world_size: int, changes: dict[str, int], tmp_path: Path
) -> None:
    config = recipe(name, save=str(tmp_path / "run"), **changes)
    assert refusal(validate, config, world_size) is None
    assert refusal(validate_architecture, config, architecture_from_hf(MODELS[name])) is None


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_the_papers(name: str) -> None:
    config = recipe(name)
    assert config.updates_per_rollout == 16
    assert config.optimizer.lr_warmup_iters == 5 * config.updates_per_rollout
    assert config.train_iters == config.lr_decay_iters == 61_816 // 128 * 16
    lengths = [response_length(config, rollout) for rollout in (0, 50, 99, 100, 481)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-2], lengths[-1]) == (100, 4000, 4000)


def test_scp_recipe_is_rnd1s(tmp_path: Path) -> None:
    config = parse_config(["--config", str(EXAMPLES / "qwen3_30b_a3b" / "scp.yaml")])
    config = Config.from_dict({**config.to_dict(), "save": str(tmp_path / "run")})
    validate(config, 64)
    validate_architecture(config, architecture_from_hf(MODELS["qwen3_30b_a3b"]))
    batch_tokens = config.training.global_batch_size * config.data.seq_length
    assert batch_tokens == pytest.approx(33.5e6, rel=0.01)
    assert batch_tokens * config.train_iters == pytest.approx(500e9, rel=0.001)
    assert config.lr_warmup_iters == round(0.02 * config.train_iters)
    assert [(g.pattern, g.lr, g.weight_decay) for g in config.param_groups] == [
        ("attention", 3e-4, 0.1),
        ("default", 1e-8, 0.1),
    ]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("tiny/*.yaml")), ids=lambda path: path.stem)
def test_tiny_recipe_works_on_its_processes(file: Path, tmp_path: Path) -> None:
    config = parse_config(["--config", str(file)])
    processes = 2 if "--nproc-per-node 2" in file.read_text() else 1
    fresh = Config.from_dict({**config.to_dict(), "save": str(tmp_path / "run")})
    assert refusal(validate, fresh, processes) is None


def launch(name: str, tmp_path: Path, recipe: str = "", **environment: str) -> list[str]:
    """Arguments with which the example's script (or launch.sh with a recipe) starts torchrun.

    `echo` stands in torchrun's place.
    """
    script = [str(EXAMPLES / name / "train.sh")]
    if recipe:
        script = [str(EXAMPLES / "launch.sh"), str(EXAMPLES / name / recipe)]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").symlink_to(str(shutil.which("echo")))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *script, "--seed", "7"],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_script_passes_environment_and_flags_on(tmp_path: Path) -> None:
    environment = {"MODEL": "weights", "PROMPTS": "p.jsonl", "SAVE": str(tmp_path), "NNODES": "2"}
    arguments = launch("qwen3_8b", tmp_path, **environment)
    entry = next(i for i, word in enumerate(arguments) if word.endswith("pretrain_opdlm.py"))
    assert arguments[:2] == ["--nnodes", "2"]
    config = parse_config(arguments[entry + 1 :])
    assert config.model.load == config.distillation.teacher_load == "weights"
    assert config.data.prompts == "p.jsonl"
    assert config.data.seed == 7
    assert config.logging.save == str(tmp_path)


def test_script_resumes_a_run_with_its_teacher(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("16\n")
    arguments = launch("qwen3_0.6b", tmp_path, MODEL="weights", SAVE=str(tmp_path))
    entry = next(i for i, word in enumerate(arguments) if word.endswith("pretrain_opdlm.py"))
    config = parse_config(arguments[entry + 1 :])
    assert config.model.load == str(tmp_path)
    assert config.distillation.teacher_load == "weights"


def test_script_gives_scp_no_teacher(tmp_path: Path) -> None:
    environment = {"MODEL": "weights", "DATA_PATH": "c", "VALID_DATA_PATH": "v"}
    arguments = launch("qwen3_30b_a3b", tmp_path, "scp.yaml", **environment)
    entry = next(i for i, word in enumerate(arguments) if word.endswith("pretrain_opdlm.py"))
    config = parse_config(arguments[entry + 1 :])
    assert (config.model.load, config.distillation.teacher_load) == ("weights", None)
    assert (config.data.data_path, config.data.valid_data_path) == ("c", "v")


def test_script_leaves_paths_to_the_configuration(tmp_path: Path) -> None:
    arguments = launch("qwen3_30b_a3b", tmp_path)
    entry = next(i for i, word in enumerate(arguments) if word.endswith("pretrain_opdlm.py"))
    config = parse_config(arguments[entry + 1 :])
    file = parse_config(["--config", str(EXAMPLES / "qwen3_30b_a3b" / "opdlm.yaml")])
    assert config.model == file.model
    assert config.logging == file.logging


def test_self_distillation_recipe_is_the_papers(tmp_path: Path) -> None:
    file = EXAMPLES / "qwen3_8b" / "d_opsd.yaml"
    config = parse_config(["--config", str(file), "--save", str(tmp_path / "run")])
    validate(config, world_size=8)
    validate_architecture(config, architecture_from_hf(MODELS["qwen3_8b"]))
    assert config.teaches_itself
    assert (config.model.block_size, config.rollout.denoising_steps_per_block) == (32, 16)
    assert (config.lora.lora_rank, config.lora.lora_alpha) == (128, 64)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (5e-6, 0.1, 0.2)
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, 0.99)


def test_tiny_self_distillation_starts_where_the_conversion_ends(tmp_path: Path) -> None:
    file, conversion = EXAMPLES / "tiny" / "d_opsd.yaml", EXAMPLES / "tiny" / "opdlm.yaml"
    config = parse_config(["--config", str(file), "--save", str(tmp_path / "run")])
    validate(config, world_size=2)
    before = parse_config(["--config", str(conversion)])
    assert config.model.load == before.logging.save
    assert config.model.block_size == before.model.block_size
