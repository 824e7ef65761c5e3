"""metrics.jsonl survives starts and resumes."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm import entry
from megatron_dlm.training.metrics import (
    LengthHistogram,
    MetricsLogger,
    PhaseTimes,
    StepMetrics,
    Throughput,
)


@pytest.fixture(autouse=True)
def warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_warned", set())


def _logger(folder: Path, first_step: int = 0) -> MetricsLogger:
    return MetricsLogger(
        str(folder), enabled=True, total_steps=9, first_step=first_step, log_interval=100
    )


def _step(step: int, loss: float = 1.0) -> StepMetrics:
    values: dict[str, Any] = {field.name: 0 for field in fields(StepMetrics)}
    values |= {"step": step, "loss": loss, "lr": {"default": 1e-3}, "time": PhaseTimes()}
    unknown = (
        "tokens_per_forward",
        "accuracy",
        "student_entropy",
        "response_lengths",
        "throughput",
    )
    return StepMetrics(**{**values, **dict.fromkeys(unknown)})


def _lines(file: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def _run(folder: Path, steps: list[int], first_step: int = 0, loss: float = 1.0) -> None:
    logger = _logger(folder, first_step)
    for step in steps:
        logger.step(_step(step, loss))
    logger.close()


def test_a_start_that_makes_no_step_changes_nothing(tmp_path: Path) -> None:
    _run(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    _logger(tmp_path).close()
    _logger(tmp_path, first_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "metrics_superseded.jsonl").exists()


def test_repeated_steps_are_set_aside_and_nothing_is_lost(tmp_path: Path) -> None:
    _run(tmp_path, [1, 2, 3])
    _run(tmp_path, [2, 3, 4], first_step=1, loss=2.0)
    assert _lines(tmp_path / "metrics.jsonl") == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert _lines(tmp_path / "metrics_superseded.jsonl") == [(2, 1.0), (3, 1.0)]


def test_tensorboard_agrees_with_the_file_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(tmp_path, [1, 2, 3])
    _run(tmp_path, [2, 3, 4], first_step=1, loss=2.0)
    _run(tmp_path, [1, 2], first_step=0, loss=3.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == _lines(tmp_path / "metrics.jsonl") == [(1, 3.0), (2, 3.0)]


def test_throughput_is_in_every_report(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    speed = Throughput(2.0, None, 3.0, 0.25, 40.0, 20.0, 0.5, 1.5, 0.125)
    logger = _logger(tmp_path)
    logger.step(replace(_step(1), throughput=speed))
    logger.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())["throughput"]
    assert record == asdict(speed)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in record.items():
        tag = f"throughput/{name}"
        assert (tag in events.Tags()["scalars"]) == (value is not None)
        if value is not None:
            assert [event.value for event in events.Scalars(tag)] == [value]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[1]", "{}", '{"step": null}', "\x00\x00"])
def test_an_unreadable_line_is_named_and_kept_aside(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, [1])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + line + "\n")
    _run(tmp_path, [2], first_step=1)
    assert _lines(file) == [(1, 1.0), (2, 1.0)]
    assert (tmp_path / "metrics_superseded.jsonl").read_text() == line + "\n"
    assert f"{file}:2 cannot be read" in capsys.readouterr().err


def test_lengths_are_a_histogram_of_each_rollout(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lengths = LengthHistogram(4, [1, 0, 2])
    logger = _logger(tmp_path)
    for step, rollout in ((1, 1), (2, 1), (3, 2)):
        values = replace(_step(step), rollout=rollout, response_lengths=lengths)
        logger.step(replace(values, tokens_by_step=[1.5, 2.0]))
    logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["response_lengths"] == {"bin_width": 4, "counts": [1, 0, 2]}
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    shown = events.Histograms("response_lengths")
    assert [event.step for event in shown] == [1, 3]
    assert shown[0].histogram_value.bucket_limit == [4, 8, 12]
    assert shown[0].histogram_value.bucket == [1, 0, 2]
    assert events.Scalars("tokens_by_step/2")[0].value == 2
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("response_lengths")]
