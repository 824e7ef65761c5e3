"""What a dry run says of memory: which GPUs the run fits, and in which phase others run out."""

from dataclasses import replace

import torch

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.planning.gpus import GPUS, Gpu
from megatron_dlm.planning.memory import teacher_rank_bytes
from megatron_dlm.planning.plan import Plan, Planner, remedies
from megatron_dlm.planning.workload import Lengths, mean_lengths


def memory_notice(
    config: Config, student: Architecture, teacher: Architecture | None, gpus: int
) -> list[str]:
    """Lines on the memory of a run's GPUs, planned.

    Where `auto` finds no GPU, as where a run for others is prepared, there are none if each kind
    has enough: a small run on a CPU.

    Args:
        config: Of the run.
        student: Architecture of the student.
        teacher: That of a teacher with weights of its own; None without one.
        gpus: Of the run.
    """
    has_gpu = torch.cuda.is_available()
    known = [_own_gpu()] if has_gpu else list(GPUS.values())
    lengths = mean_lengths(config)
    if not config.traits.uses_teacher:
        teacher = None
    plans = [Planner(config, student, teacher, gpu, lengths).stated(gpus) for gpu in known]
    is_elsewhere = config.parallel.device == "auto" and not has_gpu
    apart = [teacher_lines(config, teacher, gpu) for gpu in known]
    fits = all(plan.fits for plan in plans) and not any(lines[1:] for lines in apart)
    if is_elsewhere and fits:
        return []
    largest = max(plans, key=lambda plan: plan.memory.most).memory
    peaks = ", ".join(f"{phase} {largest.peak(phase) / 1e9:.1f}" for phase in largest.phases)
    lines = [f"GB of a GPU, planned (megatron-dlm plan): {peaks}"]
    for gpu, plan, of_teacher in zip(known, plans, apart, strict=True):
        if not plan.fits:
            lines.append(_warning(gpu, plan))
        lines += of_teacher[0 if gpu is known[0] else 1 :]
    return lines


def teacher_lines(config: Config, teacher: Architecture | None, gpu: Gpu) -> list[str]:
    """Lines on the memory of the GPUs of `--teacher-ranks`; none without these."""
    if teacher is None or not config.teacher.teacher_ranks:
        return []
    lengths = Lengths.longest(config, mean_lengths(config).tokens_per_forward)
    parts = teacher_rank_bytes(config, teacher, lengths)
    needed = sum(parts.values()) + gpu.reserve_gb * 1e9
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    lines = [f"GB of a GPU of --teacher-ranks {config.teacher.teacher_ranks}, planned: {named}"]
    if needed > gpu.memory:
        lines.append(
            f"warning: the teacher needs {needed / 1e9:.1f} GB of each {gpu.name} with "
            f"{gpu.memory_gb:g} GB; try --teacher-precision fp8, or more --teacher-ranks with a "
            "larger --teacher-tensor-model-parallel-size"
        )
    return lines


def _warning(gpu: Gpu, plan: Plan) -> str:
    """The first phase that has too little memory, as phases follow each other in a run."""
    memory = plan.memory
    first, *_ = phases = list(memory.phases)
    short = [phase for phase in phases if memory.first_peak(phase) > gpu.memory]
    if short:
        phase, needed = short[0], memory.first_peak(short[0])
        when = f"first {phase}" + ("" if phase == first else f", after a whole {first}")
    else:  # the first step has made the optimizer's state since
        phase = next(phase for phase in phases if memory.peak(phase) > gpu.memory)
        when, needed = f"second {phase}", memory.peak(phase)
    return (
        f"warning: {gpu.name} with {gpu.memory_gb:g} GB runs out of memory in the {when}: "
        f"{needed / 1e9:.1f} GB; try {', '.join(remedies(plan))}"
    )


def _own_gpu() -> Gpu:
    """This process's GPU; its rates do not matter here."""
    total = torch.cuda.get_device_properties(0).total_memory
    own = {"name": torch.cuda.get_device_name(0), "memory_gb": total / 1e9}
    return replace(GPUS["h100"], **own)  # type: ignore[arg-type]
