"""Repeat what a run promises, many times at random moments: `make soak`, no test of its own.

python -m tests.faults --kills 60 --signals 20 --restarts 10 --damages 100 --hours 1

Each part hits a small job of two ranks, starts it again with the same command until it has
finished, and compares it with one that nobody hit, bit for bit. Prints a table, writes JSON, and
ends with status 1 if a promise was broken.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.environment import commit, machine, versions
from tests.faults import hits
from tests.faults.hits import Promise
from tests.faults.jobs import Job, job_config, prepare

PARTS: dict[str, tuple[int, Callable[[Path, int, random.Random], Promise]]] = {
    "kills": (60, hits.kills),
    "signals": (20, hits.signals),
    "restarts": (10, hits.restarts),
    "damages": (100, hits.damages),
}
"""How often each is repeated by default."""


@dataclass
class Report:
    """What one call of the harness found."""

    seed: int
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))
    promises: list[Promise] = field(default_factory=list)

    def table(self) -> str:
        """For people."""
        rows = [f"{'promise':<10} {'times':>6} {'runs':>5} {'broken':>7} {'minutes':>8}"]
        for p in self.promises:
            minutes = p.seconds / 60
            rows.append(f"{p.name:<10} {p.times:>6} {p.runs:>5} {len(p.broken):>7} {minutes:>8.1f}")
            rows += [f"  {line}" for broken in p.broken for line in broken.splitlines()[-6:]]
        return "\n".join(rows)


def main() -> int:
    """Repeat all promises, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    for name, (times, _) in PARTS.items():
        parser.add_argument(f"--{name}", type=int, default=times, help="how often")
    parser.add_argument("--hours", type=float, default=0.0, help="of long runs that are hit")
    parser.add_argument("--seed", type=int, default=0, help="of targets and moments")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    report, rng = Report(options.seed), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        whole = Job(job_config(folder, folder / "whole"), folder / "whole.log", restarts=0)
        assert whole.wait(600) == 0, whole.output
        for part, (_, repeat) in PARTS.items():
            times = getattr(options, part)
            if times:
                report.promises.append(repeat(folder, times, rng))
                print(report.table(), flush=True)
        if options.hours:
            report.promises.append(hits.soak(folder, options.hours, rng))
    print(report.table())
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        measured_on = {"machine": machine(), "commit": commit(), "versions": versions()}
        options.output.write_text(json.dumps(measured_on | asdict(report), indent=2) + "\n")
    return int(any(promise.broken for promise in report.promises))


if __name__ == "__main__":
    sys.exit(main())
