"""Find the critical batch size by branched training (RND1 section 3.3).

megatron-dlm critical-batch-size --training-config examples/tiny/scp.yaml --load runs/tiny/scp \
    --save runs/tiny/critical_batch_size --batch-sizes 8,16,32,64 --token-budget 1048576

From one checkpoint, branches are trained that differ in the batch size only: the learning rates of
the configuration belong to its own `global_batch_size` and are scaled by the square root of the
ratio; warm-up, decay and validation are aligned in tokens; each branch sees the same tokens in the
same order. A branch is an ordinary run with a fresh optimizer, in `batch_<size>` of the study's
folder. The same command goes on with what is not finished.

Writes `results.jsonl` (a line a branch), `summary.json` and `critical_batch_size.png`, and prints a
table. The critical batch size is the largest whose final loss is within --tolerance of the best.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from megatron_dlm.commands import parse_command
from megatron_dlm.config import Config, parse_config, validate
from megatron_dlm.entry import PREEMPTED_STATUS
from megatron_dlm.errors import bad_value
from megatron_dlm.extras import check_installed
from megatron_dlm.launcher import STATUS_FILE, die_with_parent
from megatron_dlm.output_file import replaced_file, write_file, writing
from megatron_dlm.ranges import AT_LEAST_ONE, AT_LEAST_ZERO
from megatron_dlm.stop_request import STOP_SIGNALS
from megatron_dlm.terminal import say, say_table
from megatron_dlm.training.branched_training import (
    Branch,
    BranchResult,
    critical_batch_size,
    plan_branches,
    read_metrics,
    read_result,
)


class StudyStopped(Exception):
    """A branch was asked to stop, and has saved."""


@dataclass(frozen=True)
class StudyConfig:
    """Study: checkpoint, data and batch sizes."""

    training_config: str | None = None
    """YAML file of the training run: objective, data, rates and the batch size they belong to."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options of the training run that win over the file, {"seed": 7} for one; JSON."""

    load: str | None = None
    """Checkpoint that all branches start from, its weights only (default: that of the run)."""

    save: str | None = None
    """Folder of the study."""

    batch_sizes: tuple[int, ...] = ()
    """Global batch sizes to compare, in windows, separated by commas."""

    token_budget: int | None = None
    """Tokens that each branch is trained on: a whole number of batches of every size."""

    tolerance: Annotated[float, AT_LEAST_ZERO] = 0.01
    """Fraction of the best final loss by which a branch may be worse and still count as good."""

    nproc_per_node: Annotated[int, AT_LEAST_ONE] = 1
    """Processes of a branch, under torchrun."""


@dataclass(frozen=True)
class Arguments:
    """Find the critical batch size."""

    study: StudyConfig = field(default_factory=StudyConfig)


def read_branches(study: StudyConfig) -> list[Branch]:
    """The branches to train, each of them valid.

    Raises:
        UserError: Something is missing or cannot work.
    """
    for name, value in (
        ("--training-config", study.training_config),
        ("--save", study.save),
        ("--token-budget", study.token_budget),
    ):
        if value is None:
            raise bad_value(name, None, "is missing", f"add {name}")
    file = parse_config(["--config", str(study.training_config)])
    base = Config.from_dict(file.to_dict() | study.options, "--options")
    load = study.load or base.model.load
    if load is None:
        raise bad_value("--load", None, "nothing to start from", "name a model or run folder")
    branches = plan_branches(
        base,
        load=load,
        save=str(study.save),
        batch_sizes=study.batch_sizes,
        token_budget=study.token_budget or 0,
    )
    for branch in branches:
        validate(branch.config, study.nproc_per_node)
    return branches


def run_branch(branch: Branch, nproc_per_node: int) -> None:
    """Train a branch, or what is left of it.

    Raises:
        UserError: Its folder holds a branch with other settings, or the run failed.
        StudyStopped: It was asked to stop, and has saved.
    """
    file, text = branch.folder / "branch.yaml", branch.config.to_yaml()
    if file.is_file() and file.read_text() != text:
        raise bad_value(
            "--save", str(branch.folder), "holds a branch with other settings", "name a new folder"
        )
    if branch.is_finished:
        return
    with writing(branch.folder, "--save"):
        branch.folder.mkdir(parents=True, exist_ok=True)
    write_file(file, text, "--save")
    command = [sys.executable]
    if nproc_per_node > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc_per_node)]
        # As examples/launch.sh: what asks to stop reaches the ranks, which get time to save.
        names = ",".join(number.name for number in STOP_SIGNALS)
        command += ["--signals-to-handle", names, "--shutdown-timeout", "270"]
    command += ["-m", "megatron_dlm", "train", "--config", str(file)]
    say(f"batch size {branch.batch_size}: {' '.join(command)}")
    status = _run(command)
    if status == PREEMPTED_STATUS:
        raise StudyStopped
    if status:
        raise bad_value(
            "--batch-sizes",
            branch.batch_size,
            f"its run ended with status {status}",
            "see its output above; the same command goes on where it stopped",
        )


def _run(command: Sequence[str]) -> int:
    """Run a branch, hand on to it the signals that ask to stop, and return its exit status."""
    with tempfile.NamedTemporaryFile("r") as status_file:
        process = subprocess.Popen(
            command,
            env=os.environ | {STATUS_FILE: status_file.name},
            preexec_fn=die_with_parent,
        )

        def hand_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        # torchrun ends with 1 whatever its processes ended with: they leave that in the file.
        left = status_file.read()
    return int(left) if status and left else status


def print_table(results: Sequence[BranchResult], critical: BranchResult) -> None:
    """Print the results for a person."""
    from rich.table import Table

    table = Table(title="Branches of equal token budgets", title_justify="left")
    for heading in ("batch size", "batch tokens", "peak lr", "updates", "train", "validation"):
        table.add_column(heading, justify="right")
    for result in results:
        held_out = result.validation_loss
        table.add_row(
            f"{result.batch_size}{' *' if result == critical else ''}",
            f"{result.batch_tokens:,}",
            f"{result.lr:.2e}",
            f"{result.train_iters:,}",
            f"{result.train_loss:.4f}",
            "-" if held_out is None else f"{held_out:.4f}",
        )
    say_table(table)


def write_plot(
    branches: Sequence[Branch], results: Sequence[BranchResult], tolerance: float, path: Path
) -> None:
    """Draw loss over tokens for each branch, and final loss against batch size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, final) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    key = "loss" if results[0].validation_loss is None else "validation_loss"
    for branch, result in zip(branches, results, strict=True):
        lines = [line for line in read_metrics(branch) if line[key] is not None]
        tokens = [line["step"] * result.batch_tokens for line in lines]
        curves.plot(tokens, [line[key] for line in lines], label=f"{result.batch_tokens:,}")
    name = key.replace("_", " ")
    curves.set(title=name.capitalize(), xlabel="tokens", ylabel="nats per token")
    curves.legend(title="batch tokens")
    final.plot([r.batch_tokens for r in results], [r.loss for r in results], marker="o")
    best = min(result.loss for result in results)
    final.axhline(best * (1 + tolerance), color="gray", linestyle="--", label="best + tolerance")
    final.set_xscale("log", base=2)
    final.set(title=f"Final {name}", xlabel="batch tokens", ylabel="nats per token")
    final.legend()
    with replaced_file(path, "--save") as temporary:
        figure.savefig(temporary, dpi=110)


def main(argv: Sequence[str]) -> int:
    """Parse, plan, train what is left, compare."""
    study = parse_command("critical-batch-size", Arguments, argv).study
    check_installed("matplotlib", "command", "critical-batch-size")
    branches = read_branches(study)
    try:
        for branch in branches:
            run_branch(branch, study.nproc_per_node)
    except StudyStopped:
        say("stopped: the same command goes on with the branch that was trained")
        return PREEMPTED_STATUS
    results = [read_result(branch) for branch in branches]
    critical = critical_batch_size(results, study.tolerance)
    folder = Path(str(study.save))
    lines = [json.dumps(asdict(result)) + "\n" for result in results]
    write_file(folder / "results.jsonl", "".join(lines), "--save")
    is_bound = critical == results[-1]
    summary = {
        "critical_batch_size": critical.batch_size,
        "critical_batch_tokens": critical.batch_tokens,
        "is_lower_bound": is_bound,
        "tolerance": study.tolerance,
    }
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n", "--save")
    write_plot(branches, results, study.tolerance, folder / "critical_batch_size.png")
    print_table(results, critical)
    say(
        f"critical batch size: {'at least ' if is_bound else ''}{critical.batch_size} windows, "
        f"{critical.batch_tokens:,} tokens (* within {study.tolerance:.1%} of the best loss)"
    )
    return 0
