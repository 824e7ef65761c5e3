"""Divisibility rules of the parallel layout: processes, model and batch.

They are the same for a model that is trained, its teacher, and a model that generates or is
converted. All of them are in the two tables of this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_dlm.config.fields import flag_of
from megatron_dlm.config.rules.registry import Stage, rule
from megatron_dlm.config.rules.support import divisors, refuse
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.types.model_sizes import ModelSizes


@dataclass(frozen=True)
class Split:
    """Something that is split into equal parts.

    Attributes:
        options: Names of the options whose product is the number of parts.
        parts: That number.
        whole: Number of items to split.
        name: Description of the items, with their number.
        remedy: Values that work.
    """

    options: tuple[str, ...]
    parts: int
    whole: int
    name: str
    remedy: str


def splits_of_processes(config: Config, world_size: int) -> Iterator[Split]:
    """How the processes of a run are divided among the dimensions of the layout."""
    parallel, etp = config.parallel, config.expert_tensor_parallel_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    processes, product = f"the {world_size} processes of the run", "choose sizes whose product is"
    yield Split(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        tp * pp,
        world_size,
        processes,
        f"{product} {divisors(world_size)}, or start a multiple of {tp * pp} processes",
    )
    yield Split(
        ("expert_tensor_parallel_size", "pipeline_model_parallel_size"),
        etp * pp,
        world_size,
        processes,
        f"{product} {divisors(world_size)}",
    )
    rest = world_size // (etp * pp)
    yield Split(
        ("expert_model_parallel_size",),
        parallel.expert_model_parallel_size,
        rest,
        f"{world_size} processes / (expert tensor x pipeline size {etp * pp})",
        f"choose {divisors(rest)}",
    )


def splits_of_model(config: Config, model: ModelSizes) -> Iterator[Split]:
    """How the parts of a model are divided among the processes that share it."""
    parallel = config.parallel
    shared_by_tp = {
        "attention heads": model.num_attention_heads,
        "query groups": model.num_query_groups,
    }
    if model.num_moe_experts is None:
        shared_by_tp["feed-forward units"] = model.ffn_hidden_size
    for what, number in shared_by_tp.items():
        yield Split(
            ("tensor_model_parallel_size",),
            parallel.tensor_model_parallel_size,
            number,
            f"the model's {number} {what}",
            f"choose {divisors(math.gcd(*shared_by_tp.values()))}",
        )
    others = (
        (
            "pipeline_model_parallel_size",
            parallel.pipeline_model_parallel_size,
            model.num_layers,
            "the model's {} layers",
        ),
        (
            "expert_model_parallel_size",
            parallel.expert_model_parallel_size,
            model.num_moe_experts,
            "the model's {} experts",
        ),
        (
            "expert_tensor_parallel_size",
            config.expert_tensor_parallel_size,
            model.moe_ffn_hidden_size,
            "the {} units of an expert",
        ),
    )
    for option, parts, whole, name in others:
        if whole is not None:
            yield Split((option,), parts, whole, name.format(whole), f"choose {divisors(whole)}")


def _check(splits: Iterable[Split]) -> None:
    for split in splits:
        if split.whole % split.parts:
            options = " x ".join(flag_of(option) for option in split.options)
            raise bad_value(options, split.parts, f"does not divide {split.name}", split.remedy)


@rule(Stage.LAYOUT, "training", "inference")
def check_processes(config: Config, world_size: int) -> None:
    """Every replica has the same number of processes, and so has every copy of the experts."""
    _check(splits_of_processes(config, world_size))


@rule(Stage.MODELS, "training", "inference")
def check_experts_exist(config: Config, *models: ModelSizes) -> None:
    """Experts are spread over processes only where some model of the run has them."""
    if any(model.num_moe_experts is not None for model in models):
        return
    if config.parallel.expert_model_parallel_size > 1:
        raise refuse(config, "expert_model_parallel_size", "the model has no experts", "choose 1")
    if config.parallel.expert_tensor_parallel_size is not None:
        raise refuse(
            config, "expert_tensor_parallel_size", "the model has no experts", "leave it out"
        )


@rule(Stage.ARCHITECTURE, "training", "teacher", "inference")
def check_parts_of_model(config: Config, model: ModelSizes) -> None:
    """Layers, heads and experts are shared evenly by the processes of a replica."""
    _check(splits_of_model(config, model))


@rule(Stage.LAYOUT)
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


@rule(Stage.LAYOUT)
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
