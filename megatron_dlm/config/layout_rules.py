"""Rules between the parallel layout, the batch sizes and the number of processes."""

from __future__ import annotations

from megatron_dlm.config.rule_support import divisors, refuse
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value


def check_world_size(config: Config, world_size: int) -> None:
    """Every model replica has the same number of processes."""
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % size:
        raise bad_value(
            "--tensor-model-parallel-size x --pipeline-model-parallel-size",
            size,
            f"does not divide the {world_size} processes of the run",
            f"choose sizes whose product is {divisors(world_size)}, or start a multiple of {size} "
            "processes",
        )


def check_expert_layout(config: Config, world_size: int) -> None:
    """The expert layers' own layout divides the processes as well."""
    parallel = config.parallel
    others = config.expert_tensor_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % others:
        raise bad_value(
            "--expert-tensor-parallel-size x --pipeline-model-parallel-size",
            others,
            f"does not divide the {world_size} processes of the run",
            f"choose sizes whose product is {divisors(world_size)}",
        )
    if (world_size // others) % parallel.expert_model_parallel_size:
        raise refuse(
            config,
            "expert_model_parallel_size",
            f"does not divide {world_size} processes / (expert tensor x pipeline size {others})",
            f"choose {divisors(world_size // others)}",
        )


def check_global_batch(config: Config, world_size: int) -> None:
    """Each data-parallel process runs the same whole number of rows per update."""
    training = config.training
    data_parallel_size = config.data_parallel_size(world_size)
    unit = training.micro_batch_size * data_parallel_size
    if training.global_batch_size % unit:
        raise refuse(
            config,
            "global_batch_size",
            f"is no multiple of --micro-batch-size {training.micro_batch_size} x data-parallel "
            f"size {data_parallel_size}",
            f"choose a multiple of {unit}",
        )


def check_rollout_batch(config: Config, world_size: int) -> None:
    """A rollout feeds whole updates, and every data-parallel process the same number of prompts."""
    if not config.uses_rollouts:
        return
    batch = config.training.global_batch_size
    if config.rollout.rollout_batch_size % batch:
        raise refuse(
            config,
            "rollout_batch_size",
            f"is no multiple of --global-batch-size {batch}",
            f"choose a multiple of {batch}",
        )
    data_parallel_size = config.data_parallel_size(world_size)
    if config.rollout.rollout_batch_size % data_parallel_size:
        raise refuse(
            config,
            "rollout_batch_size",
            f"is no multiple of the data-parallel size {data_parallel_size}",
            f"choose a multiple of {data_parallel_size}",
        )
