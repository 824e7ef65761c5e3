"""Measure all objectives side by side on the tiny model, and write the report.

    make study
    python -m benchmarks.study --jobs 4                 # the same with four cells at a time
    python -m benchmarks.study --only opdlm sft         # run these, and report what there is
    python -m benchmarks.study --report-only            # the report again, from results.json

What is finished is not run again: after an interruption, repeat the command. The cells of the
results.json in the output folder count as finished, as long as their recipes have not changed.
"""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from benchmarks.environment import REPOSITORY
from benchmarks.study.cells import all_cells, finished_result, restore_results
from benchmarks.study.problems import write_problems
from benchmarks.study.recipes import Sizes, recipes
from benchmarks.study.report import collect, published_results, write_report
from benchmarks.study.runner import Folders, run_cells
from megatron_dlm.entry import report_user_errors

PUBLISHED = REPOSITORY / "benchmarks/results/study"


def parse_options() -> argparse.Namespace:
    """The command line; sizes are options of the names in `Sizes`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Measure all objectives side by side on the tiny model.",
    )
    parser.add_argument(
        "--jobs", type=_positive, default=os.cpu_count() or 1, help="cells at a time"
    )
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/study", help="work folder")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of results.json, report.md and plots (benchmarks/results/study; of a study of "
        "other sizes, WORK/report)",
    )
    names = [recipe.name for recipe in recipes(Sizes())]
    parser.add_argument("--only", nargs="+", choices=names, help="run these recipes alone")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    for size in fields(Sizes):
        flag = "--" + size.name.replace("_", "-")
        parser.add_argument(flag, type=_positive, default=size.default, help=f"({size.default})")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1; choose 1 or more")
    return number


@report_user_errors
def main() -> int:
    """Write data, run cells, collect, report; exit status 1 if a cell is missing."""
    options = parse_options()
    sizes = Sizes(**{size.name: getattr(options, size.name) for size in fields(Sizes)})
    folders = Folders(options.work.resolve())
    output = options.output or (PUBLISHED if sizes == Sizes() else folders.work / "report")
    if options.report_only:
        write_report(output)
        return 0
    study = all_cells(sizes)
    cells = [cell for cell in study if options.only is None or cell.recipe.name in options.only]
    needed = [recipe for cell in cells for recipe in cell.recipe.with_models()]
    trained = {recipe.name: recipe for recipe in needed if recipe.example is not None}
    write_problems(folders.data, sizes.heldout, trained.values())
    restore_results(published_results(output), study, folders.results)
    run_cells(cells, folders, options.jobs)
    missing = [cell.name for cell in cells if finished_result(folders.results, cell) is None]
    collect(study, folders.results, output, sizes)
    write_report(output)
    print(f"report: {output / 'report.md'}")
    if missing:
        print(f"missing, repeat the command to run them: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
