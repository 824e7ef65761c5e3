"""Write docs/plans.md: the plan of every shipped recipe on several machines.

    python docs/generate_plans.py             # minutes
    python docs/generate_plans.py qwen3_8b/opdlm   # print one recipe's part

Of the models only their shapes are known here (`benchmarks.real_shapes`).
"""

import sys
from pathlib import Path

from benchmarks.real_shapes import REAL_SHAPES, qwen3
from megatron_dlm.config import parse_config
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import Architecture, architecture_from_hf
from megatron_dlm.planning.gpus import GPUS
from megatron_dlm.planning.output import HEADINGS, cells
from megatron_dlm.planning.plan import Plan, Planner
from megatron_dlm.planning.workload import mean_lengths

REPOSITORY = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("plans.md")
MACHINES = (
    (8, "h100"),
    (8, "h200"),
    (8, "b200"),
    (16, "b200"),
    (32, "b200"),
    (64, "b200"),
    (512, "b200"),
)
SHAPES = {**REAL_SHAPES, "qwen3_32b": qwen3(64, 5120, 64, 8, 25600, tied=False)}

HEAD = """# Plans of the recipes

Written by `docs/generate_plans.py` with what `megatron-dlm plan` computes
([how, and how far it holds](planning.md)); nothing here was measured. A line is the fastest layout
of those that fit, or the nearest one: GB of a GPU at most in each phase, for the longest prompts
and responses; what is left of its memory; seconds of the run for each sample, in the mean, and the
share of rollouts in them. A machine has a second line where a larger batch than the recipe's, with
learning rates by its square root (`lr_batch_size`), is faster.
"""


def recipes() -> list[str]:
    """Names of all recipes but the tiny ones."""
    files = sorted((REPOSITORY / "examples").glob("qwen3_*/*.yaml"))
    return [f"{file.parent.name}/{file.stem}" for file in files]


def shape_of(path: str) -> Architecture:
    """The architecture of `models/Qwen3-8B`."""
    name = Path(path).name.lower().replace("-", "_")
    return architecture_from_hf(SHAPES[name])


def planner(name: str, gpu: str) -> Planner:
    """The planner of a recipe."""
    config = parse_config(["--config", str(REPOSITORY / "examples" / f"{name}.yaml")])
    student = architecture_from_hf(SHAPES[name.partition("/")[0]])
    teacher = None
    if config.traits.uses_teacher and config.needs_teacher:
        other = config.distillation.teacher_load
        teacher = student if other is None else shape_of(other)
    return Planner(config, student, teacher, GPUS[gpu], mean_lengths(config))


def line(machine: str, plan: Plan) -> str:
    """A row of the table."""
    fits = "" if plan.fits else " (does not fit)"
    return f"| {machine}{fits} | {' | '.join(cells(plan))} |"


def section(name: str) -> str:
    """The part of a recipe."""
    lines = [f"## {name}", "", f"| GPUs | {' | '.join(HEADINGS)} |"]
    lines.append("|---" * (1 + len(HEADINGS)) + "|")
    for gpus, gpu in MACHINES:
        machine, planned = f"{gpus} {gpu.upper()}", planner(name, gpu)
        own: Plan | None = None
        try:
            own = planned.all(gpus)[0]
            lines.append(line(machine, own))
        except UserError:
            pass  # more GPUs than the batch can use
        if gpus <= 8 and own is not None:
            continue
        try:
            other = planned.all(gpus, larger_batch=True)[0]
        except UserError:
            other = None
        if other is not None and other.config.optimizer.lr_batch_size is not None:
            lines.append(line(machine, other))
        elif own is None:
            lines.append(f"| {machine} | no layout |" + " |" * (len(HEADINGS) - 1))
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Write the page, or print the parts of some recipes."""
    if names:
        print("\n".join(section(name) for name in names))
        return
    PAGE.write_text("\n".join([HEAD, *(section(name) for name in recipes())]))


if __name__ == "__main__":
    main(sys.argv[1:])
