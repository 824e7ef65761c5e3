"""What `benchmarks/gpu.sh` measures runs on a CPU too, tiny: `--dry`."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts


@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "run_tests", lambda: {"tests": 0, "failed": []})  # pytest in pytest
    assert gpu.main(["--dry", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert list(written) == ["tests", "attention", "divergence", "models tiny"]
    results = {part: value["results"] for part, value in written.items()}
    assert list(results["attention"]["lengths"]) == ["1", "119", "128", "129"]
    assert results["attention"]["recompilations"] == results["models tiny"]["recompilations"] == 0
    training, rollout = (results["models tiny"][part] for part in ("training", "rollout"))
    achieved = training["useful_flops"] / training["update_seconds"]
    assert training["share_of_rate"] == pytest.approx(achieved / training["measured_rate"])
    assert rollout["tokens"] == 4 * 8


def test_a_part_that_fails_says_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu_parts, "TOLERANCE", dict.fromkeys(gpu_parts.TOLERANCE, -1.0))
    assert gpu.main(["--dry", "attention", "divergence", "--output", str(output)]) == 1
    written = json.loads(output.read_text())
    assert "flex differs from sdpa at 1 tokens" in written["attention"]["results"]["failed"]
    assert "failed" not in written["divergence"]["results"]


def test_the_marked_tests_are_found() -> None:
    assert "test_golden.py" in {file.name for file in gpu.marked_files()}
