"""The scripts start the runs of the recipes, and the tiny recipes fit their processes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_dlm.config import Config, parse_config, validate
from tests.refusal import refusal

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("tiny/*.yaml")), ids=lambda path: path.stem)
def test_tiny_recipe_works_on_its_processes(file: Path, tmp_path: Path) -> None:
    config = parse_config(["--config", str(file)])
    assert config.logging.save is not None
    processes = 2 if "--nproc-per-node 2" in file.read_text() else 1
    fresh = Config.from_dict({**config.to_dict(), "save": str(tmp_path / "run")})
    assert refusal(validate, fresh, processes) is None


def launch(name: str, tmp_path: Path, **environment: str) -> list[str]:
    """Arguments with which the example's script starts torchrun; `echo` stands in its place."""
    script = [str(EXAMPLES / name / "train.sh")]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").symlink_to(str(shutil.which("echo")))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *script, "--seed", "7"],
        env={"PATH": path, "NPROC_PER_NODE": "8", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def started(arguments: list[str]) -> Config:
    """The configuration of a run with these arguments of torchrun."""
    entry = next(i for i, word in enumerate(arguments) if word.endswith("pretrain_opdlm.py"))
    return parse_config(arguments[entry + 1 :])


def launched(name: str, tmp_path: Path, **environment: str) -> Config:
    return started(launch(name, tmp_path, **environment))


def test_script_passes_environment_and_flags_on(tmp_path: Path) -> None:
    environment = {"MODEL": "weights", "PROMPTS": "p.jsonl", "SAVE": str(tmp_path)}
    config = launched("qwen3_8b", tmp_path, **environment)
    assert config.model.load == config.teacher_load == "weights"
    assert config.data.prompts == "p.jsonl"
    assert config.data.seed == 7
    assert config.logging.save == str(tmp_path)


def test_script_starts_and_resumes_with_the_same_arguments(tmp_path: Path) -> None:
    """Whether there is a run is found out where it is decided."""
    environment = {"MODEL": "weights", "SAVE": str(tmp_path)}
    before = launch("qwen3_0.6b", tmp_path, **environment)
    shutil.rmtree(tmp_path / "bin")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("16\n")
    assert launch("qwen3_0.6b", tmp_path, **environment) == before
    assert "--no-finetune" not in before


@pytest.mark.parametrize("save", ["save: runs/mine # of this week", "save: 'runs/mine'", ""])
def test_script_reads_no_configuration(tmp_path: Path, save: str) -> None:
    """Comments, quotes and missing keys mean what they mean in YAML."""
    recipe = EXAMPLES / "qwen3_0.6b" / "opdlm.yaml"
    lines = recipe.read_text().splitlines()
    changed = [save if line.startswith("save: ") else line for line in lines]
    (tmp_path / "mine.yaml").write_text("\n".join(changed))
    config = launched(
        "qwen3_0.6b", tmp_path, RECIPE=os.path.relpath(tmp_path / "mine.yaml", recipe.parent)
    )
    assert config.logging.save == ("runs/mine" if save else None)
    assert config.teacher_load == "models/Qwen3-0.6B"


def test_script_gives_scp_no_teacher(tmp_path: Path) -> None:
    environment = {"MODEL": "weights", "DATA_PATH": "c", "VALID_DATA_PATH": "v"}
    config = launched("qwen3_30b_a3b", tmp_path, RECIPE="scp.yaml", **environment)
    assert (config.model.load, config.needs_teacher) == ("weights", False)
    assert (config.data.data_path, config.held_out.valid_data_path) == ("c", "v")


def test_script_leaves_paths_to_the_configuration(tmp_path: Path) -> None:
    config = launched("qwen3_30b_a3b", tmp_path)
    file = parse_config(["--config", str(EXAMPLES / "qwen3_30b_a3b" / "opdlm.yaml")])
    assert config.model == file.model
    assert config.logging == file.logging


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("qwen3_*")))
def test_scripts_of_a_size_start_its_own_recipe(name: str, tmp_path: Path) -> None:
    assert launched(name, tmp_path).logging.save == f"runs/{name}/opdlm"


def test_script_takes_another_recipe_and_what_its_base_says(tmp_path: Path) -> None:
    """Of a recipe that changes another one: run folder, teacher and length are found in both."""
    environment = {"RECIPE": "opdlm_block8.yaml", "MODEL": "weights", "NUM_ROLLOUTS": "3"}
    config = launched("qwen3_4b", tmp_path, **environment)
    assert config.model.block_size == 8
    assert config.logging.save == "runs/qwen3_4b/opdlm_block8"
    assert config.model.load == config.teacher_load == "weights"
    assert (config.rollout.num_rollouts, config.training.num_epochs) == (3, None)


def test_script_keeps_a_teacher_that_is_not_the_students_model(tmp_path: Path) -> None:
    environment = {"RECIPE": "opdlm_teacher_4b.yaml", "MODEL": "weights"}
    config = launched("qwen3_0.6b", tmp_path, **environment)
    assert config.model.load == "weights"
    assert config.distillation.teacher_load == "models/Qwen3-4B"


def test_script_takes_a_teacher_by_name(tmp_path: Path) -> None:
    environment = {"RECIPE": "opdlm_teacher_4b.yaml", "MODEL": "weights", "TEACHER": "other"}
    config = launched("qwen3_0.6b", tmp_path, **environment)
    assert config.distillation.teacher_load == "other"


def test_tiny_self_distillation_starts_where_the_conversion_ends(tmp_path: Path) -> None:
    file, conversion = EXAMPLES / "tiny" / "d_opsd.yaml", EXAMPLES / "tiny" / "opdlm.yaml"
    config = parse_config(["--config", str(file), "--save", str(tmp_path / "run")])
    validate(config, world_size=2)
    before = parse_config(["--config", str(conversion)])
    assert config.model.load == before.logging.save
    assert config.model.block_size == before.model.block_size
