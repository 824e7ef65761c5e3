"""Rules about the teacher's precision, and about processes or servers of its own."""

from megatron_dlm.config.fields import flag_of
from megatron_dlm.config.rules import Refusals, model, rule
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.extras import check_installed
from megatron_dlm.types.model_sizes import ModelSizes


@rule("options")
def combinations(config: Config) -> Refusals:
    """A teacher that other processes hold gives what is asked of it."""
    own, distillation = config.teacher, config.distillation
    if own.teacher_ranks and own.teacher_url:
        problem = "--teacher-url names servers that hold the teacher"
        yield f"teacher_ranks: {problem}; leave one of the two out"
    where = "teacher_ranks" if own.teacher_ranks else "teacher_url"
    if config.has_remote_teacher and distillation.offload_teacher:
        problem = f"with {flag_of(where)} no process of the student holds the teacher"
        yield f"offload_teacher: {problem}; drop it"
    for package in ("fastapi", "prometheus_client", "uvicorn") if own.teacher_ranks else ():
        check_installed(package, "--teacher-ranks", own.teacher_ranks)
    for url in own.teacher_url:
        if not url.startswith(("http://", "https://")):
            problem = "is no address of a server"
            yield bad_value("--teacher-url", url, problem, "choose e.g. http://host:8100")
    if own.teacher_precision == "fp8" and config.model.transformer_impl != "local":
        problem = "fp8 is a precision of Megatron's local layers"
        yield f"teacher_precision: {problem}; choose bf16, or --transformer-impl local"


@rule("teacher processes")
def processes(config: Config, world_size: int) -> Refusals:
    """Processes are left for the student, and those of the teacher are whole replicas."""
    ranks = config.teacher.teacher_ranks
    if ranks >= world_size:
        remedy = f"start at least {ranks + 1}"
        if world_size > 1:
            remedy += f", or choose {world_size - 1} or fewer"
        yield f"teacher_ranks: leaves none of the {world_size} processes to the student; {remedy}"
    if ranks:
        yield from model.processes(config.of_teacher(), ranks)


@rule("teacher model")
def architecture(config: Config, teacher: ModelSizes) -> Refusals:
    """Processes share the parts of a teacher evenly, and one that answers can be recorded."""
    own = config.of_teacher()
    if config.teacher.teacher_ranks:
        yield from model.experts_exist(own, teacher)
    if not config.teacher.teacher_url:
        yield from model.parts(own, teacher)
        if config.uses_teacher_responses:
            yield from model.graphs(own, teacher)
    yield from model.positions(config, teacher)
