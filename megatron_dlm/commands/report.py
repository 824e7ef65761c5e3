"""Compare training runs on one HTML page.

megatron-dlm report runs/a runs/b --output compare.html
megatron-dlm report runs/a          # writes runs/a/report.html

The page holds all that it shows and needs no network: charts, options that differ, samples of
rollouts, history, versions. What is missing in a run folder is named on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from megatron_dlm.commands import COMMANDS, PROGRAM
from megatron_dlm.config import parse_arguments
from megatron_dlm.entry import rank
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import check_output_file
from megatron_dlm.report.page import REPORT, write_report
from megatron_dlm.terminal import say


@dataclass(frozen=True)
class ReportConfig:
    """Report: where the page goes."""

    output: str | None = None
    """HTML file to write (default: report.html in the folder of the only run)."""


@dataclass(frozen=True)
class Arguments:
    """Compare runs."""

    report: ReportConfig = field(default_factory=ReportConfig)


def main(argv: Sequence[str]) -> int:
    """Read the run folders, which come before the options, and write the page."""
    runs = list(takewhile(lambda text: not text.startswith("-"), argv))
    arguments = parse_arguments(
        Arguments,
        argv[len(runs) :],
        description=COMMANDS["report"],
        prog=f"{PROGRAM} report RUN [RUN ...]",
    )
    if not runs:
        remedy = f"write {PROGRAM} report RUN [RUN ...] --output FILE"
        raise bad_value("run", None, "nothing to report on", remedy)
    output = arguments.report.output
    if output is None and len(runs) > 1:
        raise bad_value(
            "--output", None, f"{len(runs)} runs have no folder in common", "name a file"
        )
    if rank() != 0:
        return 0
    if output is not None:
        check_output_file(output, "--output")
    file = Path(runs[0]) / REPORT if output is None else Path(output)
    for note in write_report(runs, file, "--output"):
        say(f"note: {note}", error=True)
    say(f"{file}  {file.stat().st_size / 1e3:.0f} kB")
    return 0
