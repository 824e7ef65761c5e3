"""The page: summary, notes, charts, differences of configuration, samples, history, versions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

import megatron_dlm
from megatron_dlm.config import Config
from megatron_dlm.output_file import write_file
from megatron_dlm.report.charts import charts, colors, decodings, figure_of
from megatron_dlm.report.figures import compact
from megatron_dlm.report.run_record import Record, RunRecord, number, read_runs

REPORT = "report.html"

_LONGEST_VALUE = 300
"""Characters of an option's value."""

_LONGEST_TEXT = 4000
"""Characters of a prompt or a response; of what is longer, the middle is left out."""

_ABSENT = "-"


def write_report(folders: Sequence[str | Path], output: str | Path, field: str) -> list[str]:
    """Compare runs on a page.

    Args:
        folders: Of the runs, at least one.
        output: The HTML file.
        field: What the user named it with, for error messages.

    Returns:
        Notes on what is missing or cannot be read, with the run's name.

    Raises:
        UserError: A folder is that of no run, or the file cannot be written.
    """
    runs = read_runs(folders)
    write_file(output, page(runs), field)
    return [f"{run.name}: {note}" for run in runs for note in run.notes]


def page(runs: Sequence[RunRecord]) -> str:
    """The page as HTML, with everything that it shows inside."""
    html = _template().render(
        title=", ".join(run.name for run in runs),
        version=megatron_dlm.__version__,
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        runs=runs,
        colors=colors(len(runs)),
        summary=_summary(runs),
        charts=charts(runs),
        differences=_differences(runs),
        samples=[_samples(run.samples, "rollout") for run in runs],
        answers=[_samples(run.evaluation_samples, "step") for run in runs],
        history=[[_event(event) for event in run.history] for run in runs],
        versions=_versions(runs),
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a character


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))


def _summary(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Rows of the first table: a name, and what each run has."""

    def last(path: str, pattern: str = "{}", factor: float = 1.0) -> list[str]:
        values = [_known(run, path) for run in runs]
        return [pattern.format(compact(factor * v[-1])) if v else _ABSENT for v in values]

    def typical(path: str, pattern: str = "{}", factor: float = 1.0) -> list[str]:
        values = [_known(run, path) for run in runs]
        return [
            pattern.format(compact(factor * statistics.median(v))) if v else _ABSENT for v in values
        ]

    def best_held_out(run: RunRecord) -> str:
        known = _known(run, "validation_loss")
        return f"{compact(known[-1])} (best {compact(min(known))})" if known else _ABSENT

    def held_out_accuracy(run: RunRecord, name: str) -> str:
        known = [100 * value for value in _known(run, f"evaluation/{name}/accuracy")]
        return f"{compact(known[-1])} % (best {compact(max(known))} %)" if known else _ABSENT

    def of_config(name: str) -> list[str]:
        return [_ABSENT if name not in run.config else str(run.config[name]) for run in runs]

    rows = [
        ("state", [run.state for run in runs]),
        ("objective", of_config("objective")),
        ("updates", last("step")),
        ("checkpoints after update", [_checkpoints(run) for run in runs]),
        ("training loss, last", last("loss")),
        ("held-out loss, last", [best_held_out(run) for run in runs]),
        *(
            (f"held-out prompts, {name}, last", [held_out_accuracy(run, name) for run in runs])
            for name in decodings(runs)
        ),
        ("right at the first try, last", last("accuracy", "{} %", 100)),
        ("tokens per forward, last", last("tokens_per_forward")),
        ("response tokens", last("response_tokens_total")),
        ("training FLOPs", last("flops_total")),
        ("minutes in all phases", [_minutes(run) for run in runs]),
        ("rollout, median", typical("throughput/rollout_tokens_per_second", "{} tokens/s")),
        ("student, median", typical("throughput/student_tflops", "{} TFLOP/s a process")),
        ("MFU, median", typical("throughput/mfu", "{} %", 100)),
        ("peak memory of rank 0", last("throughput/peak_memory_gb", "{} GB")),
    ]
    return [(name, cells) for name, cells in rows if set(cells) != {_ABSENT}]


def _known(run: RunRecord, path: str) -> list[float]:
    found = (figure_of(record, path) for record in run.metrics)
    return [value for value in found if value is not None]


def _checkpoints(run: RunRecord) -> str:
    shown = [str(iteration) for iteration in run.checkpoints]
    if len(shown) > 4:
        shown = [shown[0], "…", *shown[-2:]]
    return ", ".join(shown) or "none"


def _minutes(run: RunRecord) -> str:
    seconds = [number(v) for record in run.metrics for v in _values(record.get("time"))]
    known = [value for value in seconds if value is not None]
    return compact(sum(known) / 60) if known else _ABSENT


def _values(entry: Any) -> list[Any]:
    return list(entry.values()) if isinstance(entry, dict) else []


def _differences(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Options that differ between runs; of one run, those that differ from their defaults."""
    configs = [run.config for run in runs]
    heading = "Options that differ"
    names = [run.name for run in runs]
    if len(runs) == 1:
        heading = "Options that differ from their defaults"
        names, configs = ["default", *names], [Config().to_dict(), *configs]
    if not all(configs):
        missing = ", ".join(run.name for run in runs if not run.config)
        note = f"No configuration to compare of {missing}."
        return {"heading": heading, "names": names, "rows": [], "note": note}
    options = dict.fromkeys(name for config in configs for name in config)
    rows = [
        (name, [_shown(config, name) for config in configs])
        for name in options
        if any(config.get(name) != configs[0].get(name) for config in configs)
    ]
    note = "" if rows else "None."
    return {"heading": heading, "names": names, "rows": rows, "note": note}


def _shown(config: Record, name: str) -> str:
    if name not in config:  # of another version
        return _ABSENT
    value = config[name]
    text = {None: "none", True: "yes", False: "no"}.get(value) if _is_switch(value) else str(value)
    return _shortened(str(text), _LONGEST_VALUE)


def _is_switch(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} … {text[-longest // 2 :]}"


def _samples(records: Sequence[Record], key: str) -> list[dict[str, str]]:
    """Responses of the run, those of the latest rollout or update first."""

    def text(record: Record, name: str) -> str:
        value = record.get(name)
        return _shortened(_ABSENT if value is None else str(value), _LONGEST_TEXT)

    return [
        {
            "number": compact(record[key]),
            "decoding": text(record, "decoding"),
            "facts": _facts(record),
            **{name: text(record, name) for name in ("prompt", "response", "reference")},
        }
        for record in reversed(records)
    ]


def _facts(record: Record) -> str:
    tokens, speed = number(record.get("response_tokens")), number(record.get("tokens_per_forward"))
    correct = record.get("correct")
    facts = [
        "" if tokens is None else f"{compact(tokens)} tokens",
        {"eos": "ended in EOS", "length": "cut at the limit"}.get(
            str(record.get("finish_reason")), ""
        ),
        "" if speed is None else f"{speed:.2f} tokens per forward",
        "" if not isinstance(correct, bool) else ("right" if correct else "wrong"),
    ]
    return ", ".join(fact for fact in facts if fact)


def _event(event: Record) -> dict[str, str]:
    """A line of the history, for a person."""
    about = [
        f"{key.replace('_', ' ')}: {event[key]}"
        for key in ("reason", "error", "what", "checkpoint", "load", "command")
        if event.get(key)
    ]
    changes = event.get("changes")
    if isinstance(changes, dict):
        for option, change in changes.items():
            then, now = change if isinstance(change, list) and len(change) == 2 else ("?", change)
            about.append(f"{option}: {then} → {now}")
    return {
        "time": str(event.get("time", _ABSENT)).replace("T", " "),
        "event": str(event["event"]).replace("_", " "),
        "iteration": _ABSENT if event.get("iteration") is None else str(event["iteration"]),
        "about": _shortened("\n".join(about), _LONGEST_TEXT),
    }


def _versions(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Of the newest start of each run: this package, what it runs on, and where."""
    newest = [_newest_start(run) for run in runs]
    names = dict.fromkeys(name for start in newest for name in start)
    rows = [(name, [str(start.get(name, _ABSENT)) for start in newest]) for name in names]
    return [(name, cells) for name, cells in rows if set(cells) != {_ABSENT}]


def _newest_start(run: RunRecord) -> Record:
    starts = [event for event in run.history if event["event"] in ("started", "resumed")]
    if not starts:
        return {}
    start = starts[-1]
    commit, changed = start.get("commit"), start.get("uncommitted_changes")
    if commit:
        commit = f"{str(commit)[:12]}{' with uncommitted changes' if changed else ''}"
    environment = start.get("environment")
    shown = {"megatron-dlm": start.get("version"), "commit": commit}
    shown |= environment if isinstance(environment, dict) else {}
    return {name.replace("_", " "): value for name, value in shown.items() if value is not None}
