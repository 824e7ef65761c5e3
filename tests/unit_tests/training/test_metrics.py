"""metrics.jsonl survives starts and resumes."""

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
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
        "evaluation",
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


RATES = {
    name: {"accuracy": accuracy, "tokens_per_forward": 2.5}
    for name, accuracy in (("static", 0.25), ("dynamic_0.9", 0.5))
}
SAMPLES: list[dict[str, Any]] = [
    {
        "decoding": name,
        "sample": i,
        "prompt": f"<b>{i}</b>\n+ 1?",
        "response": "five",
        "reference": str(i + 1) if i else None,
        "response_tokens": 5,
        "finish_reason": "eos",
        "tokens_per_forward": 2.5 if i else None,
        "reward": float(i),
        "correct": bool(i),
    }
    for name in RATES
    for i in range(2)
]


def _evaluate(folder: Path, **options: Any) -> None:
    """Three steps, with evaluations at the second and, by a later start, at the third."""
    logger = MetricsLogger(str(folder), enabled=True, total_steps=3, **options)
    for step in (1, 2, 3):
        evaluation, times = (RATES, PhaseTimes(evaluation=2.0)) if step == 2 else (None, None)
        if step == 2:
            logger.evaluation_samples(step, SAMPLES)
        logger.step(replace(_step(step), evaluation=evaluation, time=times or PhaseTimes()))
    logger.close()
    logger = MetricsLogger(str(folder), enabled=True, total_steps=3, first_step=3, **options)
    logger.evaluation_samples(3, SAMPLES)
    logger.late_evaluation(3, RATES, 2.0)
    logger.close()


def test_an_evaluation_is_in_every_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _evaluate(tmp_path)
    first, *others = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "evaluation" not in {**first, **first["time"]}
    for step, line in enumerate(others, start=2):
        assert (line["step"], line["evaluation"]) == (step, RATES)
        assert line["time"]["evaluation"] == 2.0
        assert line.keys() == {*first, "evaluation"}
    assert capsys.readouterr().out.count("held out dynamic_0.9 50.0% tok/fwd 2.50") == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    for name, rates in RATES.items():
        for key, value in rates.items():
            shown = events.Scalars(f"evaluation/{name}/{key}")
            assert [(event.step, event.value) for event in shown] == [(2, value), (3, value)]
        texts = events.Tensors(f"evaluation/{name}/text_summary")
        assert [event.step for event in texts] == [2, 3]
        text = texts[0].tensor_proto.string_val[0].decode()
        assert "    <b>1</b>\n    + 1?" in text  # a block of code, no mark-up
        assert "**prompt 0, wrong, 5 tokens, eos**" in text
        assert "**prompt 1, right, 5 tokens, eos, 2.50 tokens a forward**" in text
        assert text.count("reference:\n\n    2") == 1


class _Recorded:
    """Has the part of Weights & Biases that is used, and keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], bool]] = []

    def init(self, **options: Any) -> "_Recorded":
        assert options["resume"] == "allow"
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any], commit: bool = True) -> None:
        self.logged.append((values, commit))

    def finish(self) -> None:
        pass

    @staticmethod
    def Table(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> Any:
        assert all(len(row) == len(columns) for row in data)
        return SimpleNamespace(columns=columns, data=data)


def test_an_evaluation_is_a_table_in_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = _Recorded()
    monkeypatch.setitem(sys.modules, "wandb", recorded)  # type: ignore[arg-type]
    _evaluate(tmp_path, wandb_project="study", tensorboard=False)
    tables = [
        (values["step"], values["evaluation/samples"], commit)
        for values, commit in recorded.logged
        if "evaluation/samples" in values
    ]
    assert [(step, commit) for step, _, commit in tables] == [(2, False), (3, False)]
    for step, table, _ in tables:
        assert table.columns == ["step", *SAMPLES[0]]
        assert table.data == [[step, *sample.values()] for sample in SAMPLES]
    accuracies = [
        (values["step"], values["evaluation/dynamic_0.9/accuracy"])
        for values, commit in recorded.logged
        if commit and "evaluation/dynamic_0.9/accuracy" in values
    ]
    assert accuracies == [(2, 0.5), (3, 0.5)]


def _wandb_records(file: Path) -> Iterator[Any]:
    """Records of an offline run's file: LevelDB's log format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    assert content[:4] == b":W&B"
    place, block, parts = 7, 1 << 15, b""
    while len(content) - place >= 7:
        left = block - place % block
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if left < 7 or not kind:  # the rest of a block
            place += left
            continue
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_weights_and_biases_itself_has_one_run_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package, offline: two starts of a run have one id, and one table of answers each."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _evaluate(tmp_path, wandb_project="study", tensorboard=False)
    wandb.teardown()  # its process writes the end of a file after `finish`; wait for it
    files = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/evaluation/*.table.json"))
    tables = [json.loads(file.read_text()) for file in files]
    assert sorted(table["data"][0][0] for table in tables) == [2, 3]
    for table in tables:
        assert table["columns"] == ["step", *SAMPLES[0]]
        assert [row[1:] for row in table["data"]] == [list(s.values()) for s in SAMPLES]
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    starts = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.stem for file in starts] == [f"run-{run_id}"] * 2
    accuracies = []
    for file in starts:
        records = list(_wandb_records(file))
        assert {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"} == {run_id}
        for record in records:
            values = {
                "/".join(item.nested_key) or item.key: item.value_json
                for item in record.history.item
            }
            if "loss" in values or "evaluation/static/accuracy" in values:
                accuracy = json.loads(values.get("evaluation/static/accuracy", "null"))
                accuracies.append((json.loads(values["step"]), accuracy))
    assert accuracies == [(1, None), (2, 0.25), (3, None), (3, 0.25)]
