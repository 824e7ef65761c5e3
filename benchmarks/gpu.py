"""What needs a GPU, written into one JSON file: its tests, attention, divergence and real models.

    bash benchmarks/gpu.sh                   # under nine minutes on an H200, by estimate
    bash benchmarks/gpu.sh tests attention   # parts
    bash benchmarks/gpu.sh --dry             # on a CPU, tiny: does it run?

A part replaces its own key of the file as soon as it is measured; the others stay. A part that
fails says why there, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, commit, machine, versions
from benchmarks.gpu_parts import DRY, Load, measure_attention, measure_divergence, measure_model
from benchmarks.real_shapes import SHAPES
from megatron_dlm.output_file import write_file

PARTS = ("tests", "attention", "divergence", "models")
RESULT = REPOSITORY / "benchmarks/results/gpu.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; exit status 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="of the part `models`")
    parser.add_argument("--output", type=Path, help=f"({RESULT}; with --dry: none)")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"part = {min(unknown)}: is unknown; choose from {', '.join(PARTS)}")
    load = DRY if options.dry else Load()
    if options.shapes:
        load = replace(load, shapes=tuple(options.shapes))
    output = options.output or (None if options.dry else RESULT)

    work: dict[str, Callable[[], Any]] = {
        "tests": run_tests,
        "attention": lambda: measure_attention(load),
        "divergence": lambda: measure_divergence(load),
        **{f"models {shape}": partial(measure_model, shape, load) for shape in load.shapes},
    }
    failed = False
    for name, measure in work.items():
        if name.partition(" ")[0] not in (options.parts or PARTS):
            continue
        started = time.perf_counter()
        try:
            measured = measure()
        except Exception:
            failed, measured = True, {"failed": traceback.format_exc()}
        failed |= bool(measured.get("failed"))
        measured["seconds_of_part"] = time.perf_counter() - started
        publish(output, load, name, measured)
    return int(failed)


def publish(path: Path | None, load: Load, part: str, measured: dict[str, Any]) -> None:
    """Print a part, and replace its key of the result file, with what it was measured on."""
    print(json.dumps({part: measured}), flush=True)
    if path is None:
        return
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    result[part] = {
        "machine": machine(load.device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": asdict(load),
        "results": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(result, indent=1) + "\n")


def marked_files() -> list[Path]:
    """The files with tests that are marked `gpu`: to collect all others takes half a minute."""
    return [
        file
        for file in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        if re.search(r"^@pytest\.mark\.gpu$", file.read_text(), re.MULTILINE)
    ]


def run_tests() -> dict[str, Any]:
    """The tests that are marked `gpu`: how many, and which failed."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={report}"]
        subprocess.run([*command, *map(str, marked_files())], cwd=REPOSITORY, check=False)
        [suite] = xml.etree.ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": bad}


if __name__ == "__main__":
    sys.exit(main())
