"""Sum up a quickstart run: a table, summary.json and report.png.

python examples/tiny/report.py runs/quickstart --wall-seconds 480
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

mpl.use("Agg")

import matplotlib.pyplot as plt

from megatron_dlm.output_file import replaced_file, write_file

SETTINGS = ("static", "dynamic_0.9", "dynamic_0.7")


def summarize(run: Path, wall_seconds: int) -> dict[str, Any]:
    """Collect the figures of a run folder."""
    before, after = (
        json.loads((run / name).read_text())["settings"] for name in ("before.json", "after.json")
    )
    metrics = read_metrics(run)

    def rates(results: dict[str, Any]) -> dict[str, Any]:
        keys = ("accuracy", "tokens_per_forward")
        return {setting: {key: results[setting][key] for key in keys} for setting in SETTINGS}

    return {
        "teacher_accuracy": before["autoregressive"]["accuracy"],
        "before": rates(before),
        "after": rates(after),
        "response_tokens_total": metrics[-1]["response_tokens_total"],
        "trained_tokens_total": metrics[-1]["trained_tokens_total"],
        "flops_total": metrics[-1]["flops_total"],
        "optimizer_steps": metrics[-1]["step"],
        "wall_seconds": wall_seconds,
        "throughput": typical_throughput(metrics),
    }


def typical_throughput(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the updates (of a rollout: over rollouts) of the figures that were measured."""
    lines = [line["throughput"] for line in metrics]
    measured = {name: [line[name] for line in lines if line[name] is not None] for name in lines[0]}
    return {name: statistics.median(values) for name, values in measured.items() if values}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The run's metrics, a dictionary an optimizer step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def print_table(summary: dict[str, Any]) -> None:
    """Print the summary for a person."""
    table = Table(title="Held-out problems answered exactly", title_justify="left")
    for heading in ("model", "decoding", "accuracy", "tokens per forward"):
        table.add_column(heading, justify="left" if heading in ("model", "decoding") else "right")
    table.add_row("AR teacher", "autoregressive", f"{summary['teacher_accuracy']:.1%}", "1.00")
    for stage, name in (("before", "before conversion"), ("after", "after conversion")):
        table.add_section()
        for setting in SETTINGS:
            rates = summary[stage][setting]
            table.add_row(
                name,
                setting.replace("_", " "),
                f"{rates['accuracy']:.1%}",
                f"{rates['tokens_per_forward']:.2f}",
            )
    console = Console()
    console.print()
    console.print(table)
    console.print(
        f"{summary['response_tokens_total']:,} response tokens, "
        f"{summary['flops_total']:.2g} training FLOPs (OPDLM, eq. 7), "
        f"{summary['optimizer_steps']:,} optimizer steps, {summary['wall_seconds']} s in all"
    )
    speed = summary["throughput"]
    console.print(
        f"rollout {speed['rollout_tokens_per_second']:,.0f} tok/s, "
        f"student {1000 * speed['student_tflops']:.2f} GFLOP/s"
        + (
            f" ({speed['mfu']:.1%} MFU), rollout floor {speed['rollout_floor_share']:.1%} of it"
            if "mfu" in speed
            else ""
        )
        + f", peak memory {speed['peak_memory_gb']:.2f} GB, padding {speed['padding_share']:.0%}"
    )


def plot(run: Path, summary: dict[str, Any]) -> None:
    """Draw loss and tokens per forward over training, and accuracy against decoding speed."""
    metrics = read_metrics(run)
    figure, (loss, speed, trade) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    steps = [line["step"] for line in metrics]
    loss.plot(steps, [line["loss"] for line in metrics], linewidth=0.8)
    loss.set(title="Divergence from the teacher", xlabel="optimizer step", ylabel="nats per token")
    loss.set_yscale("log")
    rollouts = {line["rollout"]: line for line in metrics}
    tokens = [line["response_tokens_total"] for line in rollouts.values()]
    speed.plot(tokens, [line["tokens_per_forward"] for line in rollouts.values()])
    speed.set(
        title="Rollout speed", xlabel="response tokens generated", ylabel="tokens per forward"
    )
    for stage, marker in (("before", "x"), ("after", "o")):
        points = [summary[stage][setting] for setting in SETTINGS]
        trade.plot(
            [point["tokens_per_forward"] for point in points],
            [100 * point["accuracy"] for point in points],
            marker=marker,
            linestyle="--",
            label=f"{stage} conversion",
        )
        for row, (setting, point) in enumerate(zip(SETTINGS, points, strict=True)):
            trade.annotate(
                setting.replace("_", " "),
                (point["tokens_per_forward"], 100 * point["accuracy"]),
                textcoords="offset points",
                xytext=(0, 8 + 9 * row if stage == "before" else -14 - 9 * row),
                horizontalalignment="center",
                fontsize=8,
            )
    trade.axhline(100 * summary["teacher_accuracy"], color="gray", label="AR teacher")
    trade.set(title="Held-out accuracy", xlabel="tokens per forward", ylabel="%", ylim=(-4, 106))
    trade.margins(x=0.15)  # the settings' names stand at the outermost points
    trade.legend(loc="center left")
    with replaced_file(run / "report.png") as temporary:
        figure.savefig(temporary, dpi=110)


def main() -> None:
    """Write summary.json and report.png, print the table."""
    parser = argparse.ArgumentParser(description="Sum up a quickstart run.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--wall-seconds", type=int, required=True, help="of the whole quickstart")
    options = parser.parse_args()
    summary = summarize(options.run, options.wall_seconds)
    write_file(options.run / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_table(summary)
    plot(options.run, summary)


if __name__ == "__main__":
    main()
