"""What a run folder tells about its run; files that are missing or broken become notes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.errors import bad_value
from megatron_dlm.regular_file import read_regular
from megatron_dlm.training.run_folder import saved_iterations
from megatron_dlm.training.run_history import HISTORY

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.yaml", "samples.jsonl"
EVALUATION_SAMPLES = "evaluation_samples.jsonl"

Record = dict[str, Any]


@dataclass
class RunRecord:
    """A run, as its folder shows it.

    Attributes:
        name: Short name, unlike that of every other run of the page.
        folder: The run folder.
        metrics: Lines of `metrics.jsonl`, a dictionary an update, in the order of updates.
        config: `config.yaml`, options by name; empty where it is missing.
        history: Lines of `history.jsonl`, the oldest first.
        samples: Lines of `samples.jsonl`, responses of rollouts, the oldest first.
        evaluation_samples: Lines of `evaluation_samples.jsonl`, answers to held-out prompts, the
            oldest first.
        checkpoints: Updates after which there is a checkpoint.
        notes: What is missing or cannot be read.
    """

    name: str
    folder: Path
    metrics: list[Record] = field(default_factory=list)
    config: Record = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    evaluation_samples: list[Record] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The last event of the history, "running, or killed" where it is a start."""
        last = self.history[-1]["event"] if self.history else None
        if last in ("started", "resumed"):
            return "running, or killed"
        return "not known" if last is None else str(last).replace("_", " ")


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read run folders.

    Args:
        folders: At least one; a folder that is named twice is read once.

    Raises:
        UserError: One is no run folder.
    """
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    names = _names([path.resolve() for path in paths])
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # links to one folder


def _read_run(folder: Path, name: str) -> RunRecord:
    remedy = "name the --save of a training run"
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "there is no such folder"
        raise bad_value("run", str(folder), problem, remedy)
    if not any((folder / file).exists() for file in (METRICS, CONFIG, HISTORY)):
        problem = f"holds none of {METRICS}, {CONFIG} and {HISTORY}"
        raise bad_value("run", str(folder), problem, remedy)
    run = RunRecord(name, folder)
    run.metrics = _in_order(_lines(run, METRICS, "step"))
    run.config = _config(run)
    run.history = _lines(run, HISTORY, "event")
    run.samples = _samples(run, SAMPLES, "rollout")
    run.evaluation_samples = _samples(run, EVALUATION_SAMPLES, "step")
    run.checkpoints = saved_iterations(folder)
    for file in sorted(folder.glob("diverged_update_*.jsonl")):
        run.notes.append(f"{file.name} has the samples of an update that diverged")
    return run


def _content(run: RunRecord, name: str) -> str | None:
    """The text of a file of the run; None, with a note, where it cannot be read."""
    try:
        return read_regular(run.folder / name).decode("utf-8", errors="replace")
    except FileNotFoundError:
        run.notes.append(f"{name} is missing")
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror or type(error).__name__})")
    return None


def _lines(run: RunRecord, name: str, key: str) -> list[Record]:
    """The objects of a JSON Lines file that have a key."""
    found, odd = [], 0
    # splitlines() would also split at line separators inside texts.
    for line in (_content(run, name) or "").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and record.get(key) is not None:
            found.append(record)
        else:
            odd += 1
    if odd:
        run.notes.append(f"{name}: {odd} {'line' if odd == 1 else 'lines'} cannot be read")
    return found


def _samples(run: RunRecord, name: str, key: str) -> list[Record]:
    """The lines of a file by a number in them; not every run has samples."""
    if not (run.folder / name).exists():
        return []
    found = ((number(line[key]), line) for line in _lines(run, name, key))
    numbered = [(value, line) for value, line in found if value is not None]
    return [line for _, line in sorted(numbered, key=lambda entry: entry[0])]


def _in_order(records: Iterable[Record]) -> list[Record]:
    """Records by step, of those of the same step the last."""
    by_step = {number(record["step"]): record for record in records}
    return [by_step[step] for step in sorted(step for step in by_step if step is not None)]


def number(value: object) -> float | None:
    """A number whose sums and ratios stay finite as it is, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if 0 < abs(value) < 1e-300:
        return 0.0
    return value if abs(value) < 1e300 else None  # no NaN either


def _config(run: RunRecord) -> Record:
    text = _content(run, CONFIG)
    if text is None:
        return {}
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError):
        loaded = None  # PyYAML's own errors, and those of what it makes of tags
    if not isinstance(loaded, Mapping):
        run.notes.append(f"{CONFIG} cannot be read")
        return {}
    return {str(key): value for key, value in loaded.items()}
