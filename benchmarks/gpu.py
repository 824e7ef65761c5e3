"""What needs a GPU, written into one JSON file: its tests, divergence, training and rollout.

    bash benchmarks/gpu.sh           # in about a quarter of an hour
    bash benchmarks/gpu.sh tests     # a part
    python -m benchmarks.gpu shapes --device cpu --shapes tiny --output cpu.json   # does it run?

A part replaces its own key of the file as soon as it is measured; the others stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, commit, machine, versions
from benchmarks.real_shapes import SHAPES, Load, measure
from megatron_dlm.output_file import write_file

PARTS = ("tests", "divergence", "shapes")
RESULT = REPOSITORY / "benchmarks/results/gpu.json"


def main() -> int:
    """Run the parts; exit status 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3_0.6b", "qwen3_1.7b"])
    parser.add_argument("--output", type=Path, default=RESULT)
    for size in fields(Load):
        flag = "--" + size.name.replace("_", "-")
        kind = str if size.name == "device" else int
        parser.add_argument(flag, type=kind, default=size.default, help=f"({size.default})")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"part = {min(unknown)}: is unknown; choose from {', '.join(PARTS)}")
    if options.rollouts < 2:
        parser.error(f"--rollouts = {options.rollouts}: the first one warms up; choose 2 or more")

    def publish(part: str, measured: object) -> None:
        publish_part(options.output, options.device, part, measured)

    failed = 0
    parts = options.parts or PARTS
    if "tests" in parts:
        tests = run_tests()
        failed = tests["failures"] + tests["errors"]
        publish("tests", tests)
    if "divergence" in parts:
        publish("divergence", measure_divergence(options.device))
    if "shapes" in parts:
        load = Load(**{size.name: getattr(options, size.name) for size in fields(Load)})
        results = {}
        for shape in options.shapes:
            results[shape] = measure(shape, load)
            publish("shapes", {"load": asdict(load), **results})
    return 1 if failed else 0


def publish_part(path: Path, device: str, part: str, measured: object) -> None:
    """Replace a key of the result file, and say what it was measured on."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    result[part] = {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps({part: measured}), flush=True)


def run_tests() -> dict[str, Any]:
    """The tests that are marked `gpu`: how many, and which failed."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={report}"]
        subprocess.run(command, cwd=REPOSITORY, check=False)
        [suite] = xml.etree.ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": bad, "seconds": float(suite.get("time", 0))}


def measure_divergence(device: str) -> dict[str, Any]:
    """What `benchmarks/divergence_memory.py` writes."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "divergence.json"
        command = [sys.executable, "-m", "benchmarks.divergence_memory", "--device", device]
        subprocess.run([*command, "--output", str(output)], cwd=REPOSITORY, check=True)
        result: dict[str, Any] = json.loads(output.read_text())
        return result


if __name__ == "__main__":
    sys.exit(main())
