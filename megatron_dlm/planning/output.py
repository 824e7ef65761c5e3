"""Plans as tables and as JSON."""

from collections.abc import Sequence
from typing import Any

from megatron_dlm.planning.memory import PhaseName
from megatron_dlm.planning.plan import Plan
from megatron_dlm.terminal import COLUMNS

GB = 1e9
_PHASES: dict[PhaseName, str] = {
    "rollout": "rollout",
    "teacher": "teacher",
    "update": "update",
    "optimizer step": "step",
    "save": "save",
}
HEADINGS = ("layout", "batch", *_PHASES.values(), "room", "s/sample", "rollout %")
"""Of `table`."""


def cells(plan: Plan) -> tuple[str, ...]:
    """A row of `table`."""
    memory, seconds = plan.memory, plan.seconds
    peaks = (
        f"{memory.peak(phase) / GB:.1f}" if phase in memory.phases else "-" for phase in _PHASES
    )
    return (
        str(plan.layout),
        str(plan.config.training.global_batch_size),
        *peaks,
        f"{plan.room / GB:.1f}",
        f"{seconds.per_sample:.3g}",
        f"{100 * seconds.rollout / seconds.total:.0f}",
    )


def table(plans: Sequence[Plan]) -> list[str]:
    """Lines of a table: layout, batch, GB of a GPU by phase, what is left, seconds of a sample."""
    rows = [HEADINGS, *map(cells, plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for layout, *numbers in rows:
        others = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join((layout.ljust(widths[0]), *others)))
    assert max(map(len, lines)) <= COLUMNS
    return lines


def parts_table(plan: Plan) -> list[str]:
    """Lines of a table: GB of a GPU by part and phase."""
    phases = plan.memory.phases
    parts = dict.fromkeys(part for of_phase in phases.values() for part in of_phase)
    lines = [f"{'':12}" + "".join(f"{_PHASES[phase]:>9}" for phase in phases)]
    for part in parts:
        sizes = [of_phase.get(part, 0.0) / GB for of_phase in phases.values()]
        if any(sizes):
            lines.append(f"{part:12}" + "".join(f"{size:9.1f}" for size in sizes))
    totals = [plan.memory.peak(phase) / GB for phase in phases]
    return [*lines, f"{'all':12}" + "".join(f"{size:9.1f}" for size in totals)]


def record(plan: Plan) -> dict[str, Any]:
    """A plan as a JSON object: bytes and seconds."""
    seconds = plan.seconds
    return {
        "layout": vars(plan.layout) | {"data": plan.layout.replicas},
        "fits": plan.fits,
        "global_batch_size": seconds.samples,
        "memory_bytes": {
            phase: {part: round(size) for part, size in parts.items()}
            for phase, parts in plan.memory.phases.items()
        },
        "peak_bytes": round(plan.memory.most),
        "fullest_phase": plan.memory.fullest,
        "room_bytes": round(plan.room),
        "host_bytes": round(plan.memory.host),
        "cached_sequences": plan.memory.sequences,
        "seconds": {
            "rollout": seconds.rollout,
            "teacher": seconds.teacher,
            "update": seconds.update,
            "optimizer step": seconds.step,
            "total": seconds.total,
            "per_sample": seconds.per_sample,
        },
    }
