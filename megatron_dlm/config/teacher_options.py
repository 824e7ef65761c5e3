"""Options of the teacher's model: its precision, and processes or servers of its own."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_dlm.ranges import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO

TeacherPrecision = Literal["fp32", "bf16", "fp8"]
LAYOUT = tuple(
    f"{name}_parallel_size"
    for name in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
)
"""Options of a layout that the teacher has too, with `teacher_` before their names."""
TEACHER_LAYOUT = tuple(f"teacher_{name}" for name in LAYOUT)


@dataclass(frozen=True)
class TeacherConfig:
    """Teacher: its precision, and processes or servers of its own."""

    teacher_precision: TeacherPrecision | None = None
    """Precision of a teacher with weights of its own (default: the student's). fp8: weights of
    linear layers and experts in e4m3 with a scale for each output, half of bf16's memory; the rest
    in bf16. GPUs with 8-bit products use them (inputs get a scale for each token)."""
    teacher_ranks: Annotated[int, AT_LEAST_ZERO] = 0
    """The last so many processes of the job hold only the teacher, and work while the student's
    roll out; the student's layout is that of the others."""
    teacher_tensor_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Of --teacher-ranks, those that share every layer of the teacher."""
    teacher_pipeline_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Of --teacher-ranks, pipeline stages that share its layers."""
    teacher_expert_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Of --teacher-ranks, those that share its experts."""
    teacher_expert_tensor_parallel_size: Annotated[int | None, AT_LEAST_ONE] = None
    """Of --teacher-ranks, those that share one expert (default: as many as share a layer)."""
    teacher_url: tuple[str, ...] = ()
    """Servers of the teacher (megatron-dlm serve-teacher), http://host:port, all of the same model,
    in place of --teacher-load: for distributions, and for the teacher's responses."""
    teacher_max_requests: Annotated[int, AT_LEAST_ONE] = 4
    """Requests that a process has with each of the teacher's servers at a time."""
    teacher_timeout_s: Annotated[float, ABOVE_ZERO] = 600.0
    """Seconds that a request to the teacher may take, with all its tries, until the run ends; they
    begin anew while a server that answers prompts says that it has come further."""
