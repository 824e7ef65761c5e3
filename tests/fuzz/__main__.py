"""Feed many odd inputs: `make fuzz`, or `python -m tests.fuzz --inputs 10000 --first 0`."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.inputs import feed
from tests.fuzz.template import write_run


def main() -> int:
    """Feed inputs, and print those that ended otherwise than they may."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    started, shown, found = time.monotonic(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        template, work = Path(temporary) / "template", Path(temporary) / "work"
        write_run(template)

        def make_folder() -> Path:
            shutil.rmtree(work, ignore_errors=True)
            return Path(shutil.copytree(template, work))

        for done, number in enumerate(range(options.first, options.first + options.inputs)):
            finding = feed(number, make_folder)
            if finding is not None:
                found += 1
                print(f"input {number}: {finding.kind}\n{finding.problem}", flush=True)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                rate = done / (shown - started)
                print(f"{done} of {options.inputs} inputs, {found} findings, {rate:.1f}/s")
    print(f"{options.inputs} inputs, {found} findings, {time.monotonic() - started:.0f} s")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
