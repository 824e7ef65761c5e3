"""Show on an HTML page how responses were decoded.

megatron-dlm generate --load hf/ --prompts prompts.jsonl --output responses.jsonl --trajectories
megatron-dlm trajectory responses.jsonl            # writes responses.html

A slider goes through the forwards; tokens are coloured by denoising step or by confidence. The page
holds all that it shows and needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated

from megatron_dlm.commands import COMMANDS, PROGRAM
from megatron_dlm.config import parse_arguments
from megatron_dlm.entry import rank
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import check_output_file
from megatron_dlm.ranges import AT_LEAST_ONE
from megatron_dlm.report.trajectory_page import write_trajectory_page
from megatron_dlm.terminal import say


@dataclass(frozen=True)
class PageConfig:
    """Page: where it goes and what it shows."""

    output: str | None = None
    """HTML file to write (default: beside the trajectories, with the suffix .html)."""

    max_trajectories: Annotated[int, AT_LEAST_ONE] = 100
    """Trajectories on the page: the first ones of the file."""


@dataclass(frozen=True)
class Arguments:
    """Show trajectories."""

    page: PageConfig = field(default_factory=PageConfig)


def main(argv: Sequence[str]) -> int:
    """Read the file, which comes before the options, and write the page."""
    named = list(takewhile(lambda text: not text.startswith("-"), argv))
    arguments = parse_arguments(
        Arguments,
        argv[len(named) :],
        description=COMMANDS["trajectory"],
        prog=f"{PROGRAM} trajectory FILE",
    )
    if len(named) != 1:
        problem = "there is none" if not named else f"{len(named)} were given"
        raise bad_value("file", named or None, problem, f"write {PROGRAM} trajectory FILE")
    options = arguments.page
    if rank() != 0:
        return 0
    [file] = named
    if not Path(file).name:
        remedy = "name what generate --output wrote"
        raise bad_value("file", file, "is no name of a file", remedy)
    output = Path(file).with_suffix(".html") if options.output is None else Path(options.output)
    check_output_file(output, "--output", [("file", file)])
    shown = write_trajectory_page(file, output, options.max_trajectories)
    say(f"{output}  {shown} trajectories, {output.stat().st_size / 1e3:.0f} kB")
    return 0
