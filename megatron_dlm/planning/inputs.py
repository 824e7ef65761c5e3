"""What a plan is made from: a configuration and the config.json of its models."""

from pathlib import Path

from megatron_dlm.config import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import Architecture, read_architecture
from megatron_dlm.planning.gpus import Gpu
from megatron_dlm.planning.plan import Planner
from megatron_dlm.planning.workload import mean_lengths
from megatron_dlm.training.model_source import open_model_source


def read_planner(
    config: Config,
    gpu: Gpu,
    *,
    student: str | None = None,
    teacher: str | None = None,
    mean_prompt: int | None = None,
    mean_response: int | None = None,
    tokens_per_forward: float = 2.0,
) -> Planner:
    """Read the architectures of a run's models and put the assumptions together.

    Args:
        config: Of the run.
        gpu: Each of the run's.
        student: config.json of the student, or its folder; None: that of the configuration.
        teacher: The same of the teacher; None: that of the configuration, or the student's.
        mean_prompt: Tokens of a prompt; None: a quarter of the longest.
        mean_response: Tokens of a response; None: half of the longest.
        tokens_per_forward: That a sequence gains in a forward of a rollout.

    Raises:
        UserError: There is no such file, or it describes no supported model.
    """
    if student is not None:
        own = read_architecture(student, "--student-config")
    elif config.model.load is not None:
        own = _read(config.model.load, "--load", "--student-config")
    elif config.model.model_config is not None:
        own = read_architecture(config.model.model_config, "--model-config")
    else:
        remedy = "name a model folder, or give --student-config"
        raise bad_value("--load", None, "there is no model to plan", remedy)
    other: Architecture | None = None
    if config.needs_teacher and not config.distillation.cache_teacher_targets:
        if teacher is not None:
            other = read_architecture(teacher, "--teacher-config")
        elif config.distillation.teacher_load is not None:
            other = _read(config.distillation.teacher_load, "--teacher-load", "--teacher-config")
        else:
            other = own
    if not config.traits.uses_teacher:
        other = None  # it has answered before training, and is gone
    lengths = mean_lengths(config, mean_prompt, mean_response, tokens_per_forward)
    return Planner(config, own, other, gpu, lengths)


def _read(path: str, field: str, instead: str) -> Architecture:
    """The architecture of a model that is loaded, whether its weights are there or not."""
    folder = Path(path)
    if not folder.exists():
        raise bad_value(field, path, "there is no such folder", f"give {instead} config.json")
    if (folder / "config.json").is_file():
        return read_architecture(path, field)
    return open_model_source(path, field).architecture
