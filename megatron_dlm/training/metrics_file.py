"""The file `metrics.jsonl` of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_dlm.entry import warn
from megatron_dlm.output_file import write_file, writing


class MetricsFile:
    """`metrics.jsonl`: one line a step, appended.

    A resumed run repeats the steps after its checkpoint. Their earlier lines, and lines that cannot
    be read, move to `metrics_superseded.jsonl` when the first new line is written: a start that
    ends before that changes nothing.

    Args:
        path: Of `metrics.jsonl`.
        first_step: Steps done before this process started.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._first_step = first_step
        self._file: TextIO | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            UserError: It cannot be written.
        """
        with writing(self._path, "--save"):
            if self._file is None:
                self._set_aside()
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def add_evaluation(
        self, step: int, evaluation: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> None:
        """Complete the line of a step of an earlier start, if there is one, before the first step.

        Raises:
            UserError: The file cannot be written.
        """
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for i, line in enumerate(lines):
            if _step_of(line) == step:
                record = json.loads(line) | {"evaluation": evaluation}
                record["time"]["evaluation"] = seconds
                lines[i] = json.dumps(record) + "\n"
        write_file(self._path, "".join(lines), "--save")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _set_aside(self) -> None:
        if not self._path.exists():
            return
        kept: list[str] = []
        superseded: list[str] = []
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            step = _step_of(line)
            if step is None:
                warn(f"{self._path}:{number} cannot be read and is set aside")
            is_kept = step is not None and step <= self._first_step
            (kept if is_kept else superseded).append(line + "\n")
        if not superseded:
            return
        with self._path.with_name("metrics_superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(superseded)
        write_file(self._path, "".join(kept), "--save")


def _step_of(line: str) -> int | None:
    """The step that a line of metrics is about; None if it cannot be read."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
