"""What a run is about to do, in a few lines before its models are built."""

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture, parameter_counts
from megatron_dlm.terminal import COLUMNS
from megatron_dlm.training.evaluation_inputs import EvaluationInputs
from megatron_dlm.training.inputs import RunInputs

_HEADING = 9
"""Columns of a line's first word."""


def start_summary(config: Config, inputs: RunInputs, world_size: int) -> list[str]:
    """Model, teacher, data, layout, memory and folder of a run; no line is wider than a terminal.

    Args:
        config: Of the run.
        inputs: What it has read.
        world_size: Processes of the run.
    """
    resumed = inputs.resumed
    start = "random weights" if inputs.source is None else str(inputs.source.path)
    if resumed is not None:
        start = str(resumed.path)
    lines = {"model": _model(inputs.architecture, start)}
    own = inputs.teacher
    if own is not None:
        lines["teacher"] = _model(own.source.architecture, str(own.source.path))
    elif config.teaches_itself:
        lines["teacher"] = "the student itself"
    lines["data"] = _data(config.of_data(len(inputs.data)))
    if inputs.evaluation is not None:
        lines["held-out"] = _evaluation(config, inputs.evaluation)
    lines["layout"] = _layout(config, world_size)
    if config.shares_tokens_in_rollouts:
        ranks = config.parallel.context_parallel_size
        lines["decoding"] = f"{ranks} processes share each sequence: its tokens, keys and values"
    lines["memory"] = _memory(config, inputs, world_size)
    moved = [
        name
        for name, is_moved in (
            ("gradients and optimizer", config.optimizer.offload_optimizer),
            ("teacher", config.distillation.offload_teacher),
        )
        if is_moved
    ]
    if moved:
        lines["offload"] = f"{' and '.join(moved)}: not on the device while unused"
    save = config.logging.save
    if save is None:
        lines["folder"] = "none: nothing is saved without --save"
    elif resumed is None:
        lines["folder"] = f"{_tail(save)}, a new run"
    else:
        lines["folder"] = f"{_tail(save)}, goes on after update {resumed.progress.iteration}"
    return [f"{name:{_HEADING}}{text}" for name, text in lines.items()]


def _model(architecture: Architecture, origin: str) -> str:
    dense, experts = parameter_counts(architecture)
    return (
        f"{architecture.family}, {architecture.num_layers} layers, "
        f"{_amount(dense + experts)} parameters, from {_tail(origin)}"
    )


def _data(config: Config) -> str:
    records, samples, batch = config.num_records, config.num_samples, config.rollout_batch_size
    path = getattr(config.data, config.data_option)
    length = f" in rollouts of {batch:,}" if config.uses_rollouts else ""
    return (
        f"{records:,} records of {_tail(str(path), 24)}; {samples:,} samples{length}"
        f"; {config.train_iters:,} updates"
    )


def _evaluation(config: Config, evaluation: EvaluationInputs) -> str:
    interval = config.held_out.eval_prompts_interval
    when = f"every {interval:,} updates" if interval else "at the end"
    first, *others = evaluation.decodings
    more = f" and {len(others)} more" if others else ""
    return (
        f"{len(evaluation.prompts):,} prompts of {_tail(str(config.held_out.eval_prompts), 24)} "
        f"{when}, by {first}{more}"
    )


def _layout(config: Config, world_size: int) -> str:
    p, training = config.parallel, config.training
    sizes = {
        "tensor": p.tensor_model_parallel_size,
        "pipeline": p.pipeline_model_parallel_size,
        "expert": p.expert_model_parallel_size,
        "context": p.context_parallel_size,
        "data": _replicas(config, world_size) // p.context_parallel_size,
    }
    split = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    processes = f"{world_size} processes ({split})" if split else "1 process"
    precision = "bf16" if config.model.bf16 else "fp32"
    return f"{processes}, {precision}, updates of {training.global_batch_size} samples"


def _memory(config: Config, inputs: RunInputs, world_size: int) -> str:
    """Of a process; what does not depend on lengths."""
    width = 2 if config.model.bf16 else 4
    own = _of_process(inputs.architecture, config)
    parts = [f"weights {_bytes(width * own)}"]
    if config.lora.lora_rank is None:
        # Gradients are summed in fp32; Adam has two moments and, for bf16, weights in fp32.
        state = own * (8 if width == 4 else 12)
        if config.parallel.use_distributed_optimizer:
            state //= _replicas(config, world_size)
        parts += [f"gradients {_bytes(4 * own)}", f"optimizer {_bytes(state)}"]
    if inputs.teacher is not None and not config.has_remote_teacher:
        size = _teacher_bytes(inputs.teacher.source.architecture, config)
        parts.append(f"teacher {_bytes(size)}")
    return f"{', '.join(parts)} a process"


def _teacher_bytes(teacher: Architecture, config: Config) -> int:
    """Of a process's part of the teacher's weights, in its precision."""
    own = _of_process(teacher, config)
    if config.teacher_precision != "fp8":
        return own * (2 if config.teacher_precision == "bf16" else 4)
    # Layers have a byte for each weight; tables stay in bf16.
    tables = teacher.vocab_size * teacher.hidden_size * (1 if teacher.tie_word_embeddings else 2)
    return round(own * (1 + tables / sum(parameter_counts(teacher))))


def _of_process(architecture: Architecture, config: Config) -> int:
    """Parameters of a process, as if they were split evenly."""
    dense, experts = parameter_counts(architecture)
    p = config.parallel
    expert_ranks = p.expert_model_parallel_size * config.expert_tensor_parallel_size
    share = dense // p.tensor_model_parallel_size + experts // expert_ranks
    return share // p.pipeline_model_parallel_size


def _replicas(config: Config, world_size: int) -> int:
    """Replicas of the model: data times context parallelism."""
    p = config.parallel
    return world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)


def _amount(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 10**8 else f"{number / 1e6:.2f} MB"


def _tail(path: str, longest: int = COLUMNS - 55) -> str:
    """A path, without its beginning where it is long."""
    return path if len(path) <= longest else f"...{path[3 - longest :]}"
