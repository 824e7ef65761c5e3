"""The charts of the page: one for each figure of `metrics.jsonl` that a run has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.report.figures import COLORS, Line, line_chart
from megatron_dlm.report.run_record import RunRecord, number


@dataclass(frozen=True)
class Chart:
    """A figure with its heading.

    Attributes:
        heading: What it shows.
        svg: The figure.
    """

    heading: str
    svg: str


@dataclass(frozen=True)
class _Kind:
    """How a figure of `metrics.jsonl` is shown: `path` names it, with `/` between keys."""

    path: str
    heading: str
    unit: str
    factor: float = 1.0
    may_be_logarithmic: bool = False


_KINDS = (
    _Kind("loss", "Training loss", "nats", may_be_logarithmic=True),
    _Kind("causal_loss", "Loss of the autoregressive mode", "nats", may_be_logarithmic=True),
    _Kind("validation_loss", "Held-out loss", "nats", may_be_logarithmic=True),
    _Kind("accuracy", "Right at the first try", "%", 100),
    _Kind("solved_rate", "Right within the tries", "%", 100),
    _Kind("tokens_per_forward", "Decoding speed of rollouts", "tokens per forward"),
    _Kind("response_length", "Length of responses", "tokens, mean"),
    _Kind("eos_rate", "Responses that end in EOS", "%", 100),
    _Kind("student_entropy", "Entropy of the student at masks", "nats"),
    _Kind("grad_norm", "Gradient norm before clipping", "norm", may_be_logarithmic=True),
    _Kind("lr/default", "Learning rate", "rate"),
    _Kind("throughput/rollout_tokens_per_second", "Rollout speed", "response tokens/s"),
    _Kind("throughput/student_tflops", "Student speed a process", "TFLOP/s"),
    _Kind("throughput/mfu", "Model FLOPs utilisation", "%", 100),
    _Kind("throughput/peak_memory_gb", "Peak memory of rank 0", "GB"),
    _Kind("throughput/padding_share", "Padding in rows", "%", 100),
    _Kind("throughput/rollout_stage_idle", "Idle pipeline stages in rollouts", "%", 100),
    _Kind("throughput/student_stage_idle", "Idle pipeline stages in updates", "%", 100),
    _Kind("skipped_updates", "Updates that diverged and were left out", "updates"),
)

_SECONDS = ("rollout", "teacher", "student", "optimizer", "validation", "evaluation")
"""Parts of `time`."""


def figure_of(record: Mapping[str, Any], path: str) -> float | None:
    """A figure of a line of `metrics.jsonl`; None where it is missing or no number."""
    value: Any = record
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return number(value)


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """All charts that have something in them."""
    return [
        *_over_updates(runs, _KINDS),
        *_over_updates(runs, _evaluation_kinds(runs)),
        *_time_over_updates(runs),
        *_profiles(runs),
    ]


def decodings(runs: Sequence[RunRecord]) -> list[str]:
    """Decoding settings under which runs answered held-out prompts, in their order."""
    found = (record.get("evaluation") for run in runs for record in run.metrics)
    return list(
        dict.fromkeys(str(name) for rates in found if isinstance(rates, dict) for name in rates)
    )


def _evaluation_kinds(runs: Sequence[RunRecord]) -> Iterator[_Kind]:
    for name in decodings(runs):
        path = f"evaluation/{name}"
        yield _Kind(f"{path}/accuracy", f"Held-out prompts, {name}: right", "%", 100)
        heading = f"Held-out prompts, {name}: decoding speed"
        yield _Kind(f"{path}/tokens_per_forward", heading, "tokens per forward")


def _over_updates(runs: Sequence[RunRecord], kinds: Iterable[_Kind]) -> Iterator[Chart]:
    for kind in kinds:

        def value(record: Mapping[str, Any], kind: _Kind = kind) -> float | None:
            figure = figure_of(record, kind.path)
            return None if figure is None else kind.factor * figure

        lines = _lines(runs, value)
        if kind.path == "skipped_updates" and not any(y for line in lines for _, y in line.points):
            continue
        if lines:
            svg = line_chart(lines, "update", kind.unit, may_be_logarithmic=kind.may_be_logarithmic)
            yield Chart(kind.heading, svg)


def _time_over_updates(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """Hours since the first update, all phases together."""
    lines = []
    for run, color in zip(runs, colors(len(runs)), strict=True):
        seconds, points = 0.0, []
        for record in run.metrics:
            seconds += sum(figure_of(record, f"time/{part}") or 0.0 for part in _SECONDS)
            points.append((record["step"], seconds / 60))
        if seconds:
            lines.append(Line(run.name, color, points))
    if lines:
        yield Chart("Time in all phases", line_chart(lines, "update", "minutes"))


def _profiles(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """What the last update that has them tells by place, by denoising step and by length."""
    kinds: tuple[tuple[str, str, str, _Profile], ...] = (
        ("Loss by place in the block, last", "part of the block", "nats", _by_place),
        ("Tokens by denoising step, last", "forward of a block", "tokens", _by_step),
        ("Lengths of responses, last rollout", "tokens, up to", "% of responses", _by_length),
    )
    for heading, x_label, unit, profile in kinds:
        lines = []
        for run, color in zip(runs, colors(len(runs)), strict=True):
            found = (profile(record) for record in reversed(run.metrics))
            points = next((points for points in found if points), None)
            if points:
                lines.append(Line(run.name, color, points))
        if lines:
            yield Chart(heading, line_chart(lines, x_label, unit))


def _by_place(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    return _numbered(record.get("loss_by_position"))


def _by_step(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    return _numbered(record.get("tokens_by_step"))


def _by_length(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    lengths = record.get("response_lengths")
    if not isinstance(lengths, dict):
        return []
    width, counts = number(lengths.get("bin_width")), _numbered(lengths.get("counts"))
    total = sum(count for _, count in counts)
    if not width or total < 1 or any(count < 0 for _, count in counts):
        return []
    return [(width * i, 100 * count / total) for i, count in counts]


def _numbered(values: Any) -> list[tuple[float, float]]:
    """Numbers of a list by their place, from 1."""
    known = enumerate(map(number, values), start=1) if isinstance(values, list) else ()
    return [(float(i), value) for i, value in known if value is not None]


_Profile = Callable[[Mapping[str, Any]], list[tuple[float, float]]]


def _lines(
    runs: Sequence[RunRecord], value: Callable[[Mapping[str, Any]], float | None]
) -> list[Line]:
    lines = []
    for run, color in zip(runs, colors(len(runs)), strict=True):
        known = [(record["step"], value(record)) for record in run.metrics]
        points = [(x, y) for x, y in known if y is not None]
        if points:
            lines.append(Line(run.name, color, points))
    return lines


def colors(count: int) -> list[str]:
    """A color for each run."""
    return [COLORS[i % len(COLORS)] for i in range(count)]
