"""Feed many odd inputs: `make fuzz`, or `python -m tests.fuzz --inputs 10000 --first 0`.

With `--output` the counts are written as JSON, for `benchmarks/results/reliability/`.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import commit, machine, versions
from tests.fuzz.inputs import Outcome, feed
from tests.fuzz.template import write_runs


def main() -> int:
    """Feed inputs, print those that ended otherwise than they may, and count all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    started = shown = time.monotonic()
    counts: dict[str, Counter[Outcome]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        template, work = Path(temporary) / "template", Path(temporary) / "work"
        write_runs(template)

        def make_folder() -> Path:
            shutil.rmtree(work, ignore_errors=True)
            return Path(shutil.copytree(template, work))

        for done, number in enumerate(range(options.first, options.first + options.inputs), 1):
            fed = feed(number, make_folder)
            counts.setdefault(fed.kind, Counter())[fed.outcome] += 1
            if fed.problem is not None:
                print(f"input {number}: {fed.detail}\n{fed.problem}", flush=True)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                rate = done / (shown - started)
                found = sum(count["finding"] for count in counts.values())
                print(
                    f"{done} of {options.inputs} inputs, {found} findings, {rate:.1f}/s", flush=True
                )
    _print_table(counts)
    findings = sum(count["finding"] for count in counts.values())
    print(f"{options.inputs} inputs, {findings} findings, {time.monotonic() - started:.0f} s")
    if options.output is not None:
        result = {
            "machine": machine(),
            "commit": commit(),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
            "first": options.first,
            "inputs": options.inputs,
            "findings": findings,
            "kinds": {kind: dict(counts[kind]) for kind in sorted(counts)},
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return min(findings, 1)


def _print_table(counts: dict[str, Counter[Outcome]]) -> None:
    table = Table("made odd", "inputs", "read", "refused", "findings")
    for kind, count in sorted(counts.items()):
        numbers = (count.total(), count["read"], count["refused"], count["finding"])
        table.add_row(kind, *map(str, numbers))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
