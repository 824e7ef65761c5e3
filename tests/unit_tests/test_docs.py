"""The documentation agrees with the code: generated pages are current, links are valid."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from lm_eval._cli import HarnessCLI

import megatron_dlm
from megatron_dlm.commands import COMMANDS
from megatron_dlm.config import Config
from megatron_dlm.config.fields import flag_of, option_fields

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
SCRIPTS = {
    "pretrain_opdlm.py": "train",
    "tools/evaluate.py": "evaluate",
    "tools/harness.py": "lm-eval",
    "tools/generate.py": "generate",
    "tools/chat.py": "chat",
    "tools/show_trajectories.py": "trajectory",
    "tools/serve.py": "serve",
    "tools/rollout_server.py": "rollout-server",
    "tools/serve_teacher.py": "serve-teacher",
    "tools/convert_checkpoint.py": "convert",
    "tools/plan_run.py": "plan",
    "tools/report_runs.py": "report",
    "tools/verify_checkpoint.py": "verify",
    "tools/preprocess_data.py": "preprocess",
    "tools/data.py": "data",
    "tools/critical_batch_size.py": "critical-batch-size",
}
"""The command that each script of the checkout runs."""
PAGE_IDS = [str(page.relative_to(REPOSITORY)) for page in PAGES]


def load_script(name: str) -> ModuleType:
    path = REPOSITORY / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_current() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    current = load_script("docs/generate_configuration.py").configuration_page()
    assert written == current, "run docs/generate_configuration.py"


def test_plans_are_current() -> None:
    """Of all recipes one is planned again: the README's."""
    written = (REPOSITORY / "docs" / "plans.md").read_text(encoding="utf-8")
    module = load_script("docs/generate_plans.py")
    assert re.findall("^## (.*)", written, flags=re.MULTILINE) == module.recipes()
    current = module.section("qwen3_30b_a3b/opdlm")
    assert current in written, "run docs/generate_plans.py"
    assert current.partition("\n\n")[2].strip() in (REPOSITORY / "README.md").read_text()


def test_configuration_page_has_every_option() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    for option in option_fields(Config).values():
        assert f"| `{option.name}` |" in written


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_relative_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    inside = r"(?<![\w/.])((?:megatron_dlm|examples|tools|docs|docker)/[\w./-]+)(?![\w./*-])"
    named = re.findall(inside, text)
    for name in named:
        assert (REPOSITORY / name.rstrip(".")).exists(), name


def known_flags(command: str) -> set[str]:
    if command == "lm-eval":  # has the harness's own
        parser = HarnessCLI()._subparsers.choices["run"]
        return {flag for action in parser._actions for flag in action.option_strings}
    module = importlib.import_module(f"megatron_dlm.commands.{command.replace('-', '_')}")
    options = Config if command == "train" else module.Arguments
    return {flag_of(name) for name in option_fields(options)}


def test_each_command_has_a_script() -> None:
    assert sorted(SCRIPTS.values()) == sorted(COMMANDS)
    assert {*REPOSITORY.glob("tools/*.py")} | {REPOSITORY / "pretrain_opdlm.py"} == {
        REPOSITORY / script for script in SCRIPTS
    }
    for script, command in SCRIPTS.items():
        assert f'command_line("{command}")' in (REPOSITORY / script).read_text()


def test_flags_in_commands_exist() -> None:
    known = {}
    for script, name in SCRIPTS.items():
        known[script] = known[f"-m megatron_dlm {name} "] = known_flags(name)
        known[f"megatron-dlm {name} "] = known_flags(name)
    commands = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for command in block.replace("\\\n", " ").splitlines():
                for script, flags in known.items():
                    _, entry, arguments = command.partition(script)
                    if entry:
                        commands += 1
                        given = re.findall(r"--[\w-]+", arguments)
                        assert set(given) <= flags, command
    assert commands >= len(SCRIPTS)


def test_figures_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as another matplotlib draws them alike: what is coloured where, not every byte."""
    module = load_script("docs/draw_figures.py")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    module.main()
    for drawn in sorted(tmp_path.iterdir()):
        committed = REPOSITORY / "docs" / "figures" / drawn.name
        assert fills(drawn) == fills(committed), "run docs/draw_figures.py"
        assert f"docs/figures/{drawn.name}" in (REPOSITORY / "README.md").read_text()


def fills(figure: Path) -> list[str]:
    return re.findall(r"fill: #\w+", figure.read_text(encoding="utf-8"))


def test_mask_figure_is_that_of_the_paper() -> None:
    """The cells by the three parts of BD3-LM's mask, written out."""
    drawn = fills(REPOSITORY / "docs" / "figures" / "mask.svg")
    clean, noisy = ["prompt", 1, 2], [1, 2]
    rows = [("clean", block) for block in clean] + [("noisy", block) for block in noisy]
    order = {"prompt": 0, 1: 1, 2: 2}
    seen = []
    for query_stream, query in rows:
        for key_stream, key in rows:
            if key_stream == "noisy":
                seen.append(query_stream == "noisy" and query == key)
            elif query_stream == "clean":
                seen.append(order[key] <= order[query])
            else:
                seen.append(order[key] < order[query])
    num_seen = sum(color in ("fill: #3b78c4", "fill: #d9822b") for color in drawn)
    assert num_seen == 16 * sum(seen)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    built = subprocess.run(
        f"{sys.executable} -m sphinx -q -W -c docs -d {tmp_path}/read . {tmp_path}/site".split(),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        assert (tmp_path / "site" / page.relative_to(REPOSITORY)).with_suffix(".html").exists()
    documented = (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    for name in megatron_dlm.__all__:
        assert name == "__version__" or f'id="megatron_dlm.api.{name}"' in documented
    found = (tmp_path / "site" / "searchindex.js").read_text(encoding="utf-8")
    assert "tensorboard" in found


@pytest.mark.slow
def test_python_example_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- python-example -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", found[1]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    response, loss = done.stdout.rsplit("\n", 2)[:2]
    assert response == "2 - 1 = 1\n1 + 9 = 10\n#### 10 eos 1.0"
    assert 0 < float(loss.removesuffix(" nats per token")) < 0.1
    assert (tmp_path / "hf" / "tiny" / "model.safetensors").is_file()
