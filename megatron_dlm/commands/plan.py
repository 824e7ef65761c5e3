"""Plan a run: which layout fits so many GPUs, and how long an update takes.

megatron-dlm plan --config examples/qwen3_30b_a3b/opdlm.yaml --gpus 8 --gpu b200
megatron-dlm plan --config ... --gpus 64 --gpu h100 --larger-batch --output chosen.yaml

Takes every option of training, flags over the file. Of a model only its config.json is read, of
data nothing. Lists the layouts that training accepts, whichever the configuration states: those
that fit first, the fastest on top, then the memory of the first by part. Exit status 2 if none
fits.

Memory is counted for the longest prompts and responses, on models that are built without memory.
Times are estimates from published rates and stated shares of them, or from --rates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_dlm.commands import parse_command
from megatron_dlm.config import Config
from megatron_dlm.entry import rank
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import check_output_file, write_file
from megatron_dlm.ranges import ABOVE_ZERO, AT_LEAST_ONE
from megatron_dlm.terminal import say, write_results

DOES_NOT_FIT = 2
"""Exit status."""


@dataclass(frozen=True)
class PlanOptions:
    """Plan: GPUs, assumptions and output."""

    gpus: Annotated[int | None, AT_LEAST_ONE] = None
    """GPUs of the run."""
    gpu: str | None = None
    """Their kind: a100-40gb, a100, h100, h200, b200 or gb200."""
    rates: str | None = None
    """JSON object with measured rates of the GPU, in place of published ones and of the shares that
    are assumed: memory_gb, tflops, memory_gb_s, node_gb_s, network_gb_s, host_gb_s, dense_share,
    moe_share, bandwidth_share, launch_us, reserve_gb."""
    student_config: str | None = None
    """config.json of the student, or its folder (default: that of --load or --model-config)."""
    teacher_config: str | None = None
    """config.json of the teacher, or its folder (default: that of --teacher-load, or the
    student's)."""
    mean_prompt_length: Annotated[int | None, AT_LEAST_ONE] = None
    """Tokens of a prompt in the mean, for times (default: a quarter of --max-prompt-length)."""
    mean_response_length: Annotated[int | None, AT_LEAST_ONE] = None
    """Tokens of a response in the mean, for times (default: half of the longest)."""
    tokens_per_forward: Annotated[float, ABOVE_ZERO] = 2.0
    """Tokens that a sequence gains in a forward of a rollout, in the mean."""
    larger_batch: bool = False
    """Plan layouts with more replicas than --global-batch-size has rows too, each with a batch of
    one row a replica and learning rates by the square root of the ratio (--lr-batch-size)."""
    rows: Annotated[int, AT_LEAST_ONE] = 10
    """Layouts to list in the table; JSON has all."""
    output: str | None = None
    """YAML file to write the chosen configuration to."""
    json: bool = False
    """Print a JSON object a line for each layout instead of tables."""


@dataclass(frozen=True)
class Arguments(Config):
    """Plan a run; training options as of `train`."""

    plan: PlanOptions = field(default_factory=PlanOptions)


def main(argv: Sequence[str]) -> int:
    """Read the configuration, plan, print."""
    arguments = parse_command("plan", Arguments, argv)
    options = arguments.plan
    for name, value in (("--gpus", options.gpus), ("--gpu", options.gpu)):
        if value is None:
            raise bad_value(name, None, "is missing", f"add {name}, such as --gpus 8 --gpu h100")
    if rank() != 0:
        return 0
    if options.output is not None:
        check_output_file(options.output, "--output")
    from megatron_dlm.planning.gpus import find_gpu

    assert options.gpus is not None
    assert options.gpu is not None
    gpu = find_gpu(options.gpu, options.rates)
    from megatron_dlm.planning.inputs import read_planner

    planner = read_planner(
        Config.from_dict(arguments.to_dict()),
        gpu,
        student=options.student_config,
        teacher=options.teacher_config,
        mean_prompt=options.mean_prompt_length,
        mean_response=options.mean_response_length,
        tokens_per_forward=options.tokens_per_forward,
    )
    students = planner.config.student_ranks(options.gpus)
    if students < 1:
        problem = f"--teacher-ranks {arguments.teacher.teacher_ranks} leaves none to the student"
        raise bad_value("--gpus", options.gpus, problem, "choose more, or fewer of the teacher")
    plans = planner.all(students, larger_batch=options.larger_batch)
    from megatron_dlm.planning.notice import teacher_lines
    from megatron_dlm.planning.output import parts_table, record, table
    from megatron_dlm.planning.plan import remedies

    first = plans[0]
    if options.json:
        write_results("".join(f"{json.dumps(record(plan))}\n" for plan in plans))
    else:
        fitting = sum(plan.fits for plan in plans)
        heading = f"{students} x {gpu.name} of {gpu.memory_gb:g} GB: {fitting} of {len(plans)}"
        say(f"{heading} layouts fit; GB of a GPU by phase, seconds of a sample")
        for line in teacher_lines(planner.config, planner.teacher, gpu):
            say(line)
        say("\n".join(table(plans[: options.rows])))
        say(f"\n{first.layout}: GB by part")
        say("\n".join(parts_table(first)))
    if not first.fits:
        phase, lacking = first.memory.fullest, -first.room / 1e9
        say(
            f"nothing fits {options.gpus} x {gpu.name}: nearest is {first.layout}, whose {phase} "
            f"needs {first.memory.most / 1e9:.1f} GB of {gpu.memory_gb:g}, {lacking:.1f} GB too "
            f"much; try {', '.join(remedies(first))}",
            error=True,
        )
        return DOES_NOT_FIT
    if options.output is not None:
        heading = f"# {options.gpus} x {gpu.name}: {first.layout}, by megatron-dlm plan\n"
        write_file(Path(options.output), heading + first.config.to_yaml(), "--output")
    return 0
