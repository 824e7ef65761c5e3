"""Two modes in one checkpoint against the block-causal recipe, on the tiny model.

    python -m benchmarks.two_modes --output benchmarks/results/two_modes.json

Distils the tiny teacher three times with `examples/tiny/off_policy.yaml`, on the same data in the
same order and number of updates: with a block-causal context, with a causal one and the second loss
that keeps the autoregressive mode, and with a causal one without that loss. Then answers held-out
problems: by blocks, from left to right, and speculatively where there is a mode to verify with. The
run is a small part of the recipe's length: accuracies are not those of a finished conversion. With
`--work`, an interrupted measurement goes on: what an arm has trained or measured stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.environment import REPOSITORY, commit, machine, versions
from megatron_dlm.output_file import write_file

RECIPE = "examples/tiny/off_policy.yaml"
UPDATES, EXAMPLES = 480, 200
ARMS: dict[str, list[str]] = {
    "block_causal": [],
    "causal": ["--context-attention", "causal"],
    "causal_without_second_loss": ["--context-attention", "causal", "--causal-loss-weight", "0"],
}
BLOCKS = ("static", "dynamic:0.9", "dynamic:0.7")
SECOND_MODE = ("autoregressive", "speculative", "speculative:2")
KEPT = ("accuracy", "tokens_per_forward", "acceptance_rate", "mean_response_length")
"""Of the results of `evaluate`."""


def run(*command: str) -> float:
    """Run a command of this repository; returns the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(arm: str, folder: Path, updates: int, examples: int) -> dict[str, Any]:
    """Train one arm and evaluate it."""
    save, results, finished = (folder / f"{arm}{end}" for end in ("", ".json", ".measured.json"))
    of = {"updates": updates, "held_out_problems": examples, "options": ARMS[arm]}
    if finished.is_file():
        measured = json.loads(finished.read_text())
        if {key: measured[key] for key in of} == of:
            return dict(measured)
    goes_on = save.exists()  # then the time is not that of the whole training
    trained = run(
        "pretrain_opdlm.py",
        *("--config", RECIPE, "--prompts", str(folder / "data/prompts.jsonl")),
        *("--teacher-responses", str(folder / "teacher_responses"), "--save", str(save)),
        *("--train-iters", str(updates), "--lr-warmup-iters", str(min(50, updates // 10))),
        *("--device", "cpu", "--no-tensorboard", "--no-measure-machine", "--log-interval", "40"),
        *ARMS[arm],
    )
    settings = (*BLOCKS, *(SECOND_MODE if arm != "block_causal" else SECOND_MODE[:1]))
    run(
        "tools/evaluate.py",
        *("--load", str(save), "--data", str(folder / "data/heldout.jsonl")),
        *("--max-examples", str(examples), "--max-response-length", "40"),
        *("--settings", ",".join(settings), "--output", str(results), "--device", "cpu"),
    )
    lines = (save / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines[-40:]]
    found = json.loads(results.read_text())["settings"]
    measured = {
        **of,
        "commit": commit(),
        "loss": sum(line["loss"] for line in last) / len(last),
        "causal_loss": None
        if last[0]["causal_loss"] is None
        else sum(line["causal_loss"] for line in last) / len(last),
        "processor_seconds_of_training": None if goes_on else round(trained, 1),
        "settings": {
            name: {key: round(rates[key], 4) for key in KEPT if rates[key] is not None}
            for name, rates in found.items()
        },
    }
    write_file(finished, json.dumps(measured))
    return measured


def main() -> int:
    """Measure all arms and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, help="folder that stays (default: a temporary one)")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        files = ("--only", "prompts.jsonl", "heldout.jsonl")
        run("examples/tiny/build_data.py", "--output", str(folder / "data"), *files)
        arms = {
            arm: measure(arm, folder, options.updates, options.examples) for arm in options.arms
        }
    result = {
        "command": "python -m benchmarks.two_modes",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "recipe": RECIPE,
        "updates": options.updates,
        "note": f"short: {options.updates} of the recipe's 1920 updates, one seed",
        "held_out_problems": options.examples,
        "last_updates_of_loss": 40,
        "arms": arms,
    }
    write_file(options.output, json.dumps(result, indent=2) + "\n", "--output")
    print(json.dumps(arms, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
