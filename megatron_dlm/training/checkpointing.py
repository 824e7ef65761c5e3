"""Megatron distributed checkpoints: written to a temporary name, published by rename, reshardable.

A run folder holds `iter_0000100/` folders and `latest_checkpointed_iteration.txt`. Each iteration
folder is complete in itself: tensors of the model (and optimizer), training progress, schedule and
configuration, and `hf/` with config.json and tokenizer. No random generator's state is among them
because none is consumed in training: every draw is keyed by the seed and the sample's index.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.utils import unwrap_model

from megatron_dlm.conversion.hf_checkpoint import is_finite
from megatron_dlm.conversion.hf_import import Place
from megatron_dlm.conversion.tokenizer_files import TOKENIZER_FILES
from megatron_dlm.entry import warn
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.models.architecture import GENERATION_CONFIG
from megatron_dlm.models.lora import (
    attach_adapters,
    can_have_adapters,
    linear_layers_by_weight,
    merge_adapters,
    remove_adapters,
)
from megatron_dlm.models.model_parameters import ADAPTER_PARAMETER, global_names
from megatron_dlm.parallel import errors_on_all_ranks, from_rank_zero
from megatron_dlm.training.checkpoint_metadata import checked_metadata
from megatron_dlm.training.checkpoint_slices import TensorReader, parts_along_inputs
from megatron_dlm.training.checkpoint_writing import UNREADABLE
from megatron_dlm.training.manifest import damages
from megatron_dlm.training.optimizer_state import (
    load_optimizer_state,
    loading_optimizer_state,
    sharded_optimizer_state,
)
from megatron_dlm.training.run_folder import find_checkpoint, is_iteration_folder
from megatron_dlm.training.stored_batch import StoredTrajectories, read_trajectories
from megatron_dlm.training.student import Student


@dataclasses.dataclass
class Progress:
    """How far a run has come; with the seed, all that decides what comes next.

    Attributes:
        iteration: Optimizer updates done.
        rollout: Rollout batches (or data-set batches) done.
        consumed_samples: Prompts or examples taken from the data, the data cursor.
        response_tokens_total: Response tokens obtained so far, each rollout counted once.
        trained_tokens_total: Response tokens trained on so far, counted at every update.
        updates_of_batch: Updates that the rollout batch in work has served.
        skipped_updates: Updates that were left out because they diverged, of `iteration`.
        skipped_in_a_row: Of these, the last ones.
    """

    iteration: int = 0
    rollout: int = 0
    consumed_samples: int = 0
    response_tokens_total: int = 0
    trained_tokens_total: int = 0
    updates_of_batch: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0


def is_rank_zero() -> bool:
    """Whether this process writes what is written once."""
    return torch.distributed.get_rank() == 0


def write_hf_files(
    folder: Path,
    hf_config: dict[str, Any],
    generation_config: dict[str, Any] | None,
    tokenizer_folder: Path | None,
) -> None:
    """Put config.json, generation_config.json and the tokenizer's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", hf_config), (GENERATION_CONFIG, generation_config)):
        if values:
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if tokenizer_folder is not None and (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def sharded_state(
    model: torch.nn.Module, student: Student | None, is_loading: bool
) -> dict[str, Any]:
    """What this rank holds of a checkpoint: the model and, with a student, what goes on from it."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {"model": unwrap_model(model).sharded_state_dict(metadata=metadata)}
    if student is not None:
        state["optimizer"] = sharded_optimizer_state(student.optimizer, state["model"], is_loading)
        state["scheduler"] = student.scheduler.state_dict()
    return state


def _damaged(checkpoint: Path, field: str) -> UserError:
    return bad_value(field, str(checkpoint), "is damaged or incomplete", "load another checkpoint")


def verified_checkpoint(path: str | Path, field: str = "--load", verify: bool = True) -> Path:
    """The checkpoint that a path stands for, every file of it as it was written; collective.

    Of a run folder it is the newest one that is not damaged; what is left out is named in a
    warning. Each rank reads a share of the files.

    Args:
        path: Run folder or one of its iteration folders.
        field: What the user named the path with, for error messages.
        verify: Whether to read the files of tensors; without it, only their sizes are compared.

    Raises:
        UserError: There is no checkpoint, the one that is named is damaged, or all are.
    """
    skip: list[Path] = []
    share = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    while True:
        checkpoint = from_rank_zero(functools.partial(find_checkpoint, path, field, skip))
        if not verify:
            return checkpoint
        found: list[list[str]] = [[] for _ in range(share[1])]
        torch.distributed.all_gather_object(found, damages(checkpoint, share))
        problems = [problem for part in found for problem in part]
        if not problems:
            return checkpoint
        problem = f"is damaged: {problems[0]}"
        if is_iteration_folder(path):
            raise bad_value(field, str(path), problem, "load another checkpoint of the run")
        warn(f"{checkpoint} is left out: {problem}")
        skip.append(checkpoint)


def _check_shapes(state: dict[str, Any], checkpoint: Path, field: str) -> None:
    """Compare the model's tensors with the checkpoint's before anything is loaded."""
    checked_metadata(checkpoint, field)
    try:
        saved = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    except UNREADABLE as error:
        raise _damaged(checkpoint, field) from error
    tensors = (
        (name, tensor)
        for name, value in state["model"].items()
        for tensor in nested_values(
            value.build() if isinstance(value, ShardedTensorFactory) else [value]
        )
        if isinstance(tensor, dist_checkpointing.ShardedTensor)
    )
    for name, tensor in tensors:
        key = tensor.key
        if key not in saved:
            raise bad_value(
                field,
                str(checkpoint),
                f"has no tensor {key}",
                "load a checkpoint of this architecture",
            )
        if saved[key].global_shape != tensor.global_shape and not tensor.allow_shape_mismatch:
            raise bad_value(
                field,
                str(checkpoint),
                f"tensor {name} has shape {list(saved[key].global_shape)}, "
                f"the model needs {list(tensor.global_shape)}",
                "load a checkpoint of this architecture",
            )


def _check_values(model: torch.nn.Module, checkpoint: Path, field: str) -> None:
    """Check that all weights are finite numbers; all ranks call this."""
    with errors_on_all_ranks():
        for parameter, name in global_names(model).items():
            if not (parameter.is_meta or is_finite(parameter.detach())):
                raise _not_finite(name, checkpoint, field)


def _not_finite(name: str, checkpoint: Path, field: str) -> UserError:
    problem = f"tensor {name} holds NaN or infinite values"
    return bad_value(field, str(checkpoint), problem, "load an earlier checkpoint")


def _load(state: dict[str, Any], checkpoint: Path, field: str) -> dict[str, Any]:
    with _told_as_damaged(checkpoint, field):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    return loaded


@contextmanager
def _told_as_damaged(checkpoint: Path, field: str) -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise bad_value(
            field,
            str(checkpoint),
            f"cannot be loaded ({reason})",
            "load another checkpoint, of this architecture",
        ) from error


def _load_common(checkpoint: Path, field: str) -> dict[str, Any]:
    if not (checkpoint / "common.pt").is_file():
        # megatron-core 0.19 keeps it among the tensors, and finds it by an index that may run code.
        checked_metadata(checkpoint, field)
    try:
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
    except (*UNREADABLE, RuntimeError) as error:
        raise _damaged(checkpoint, field) from error
    return common


AdapterUse = Literal["merge", "keep", "remove"]
"""What becomes of a checkpoint's adapters where its weights are loaded."""


def load_weights(
    path: str | Path,
    model: torch.nn.Module,
    field: str = "--load",
    adapters: AdapterUse = "merge",
    verify: bool = True,
    place: Place | None = None,
) -> None:
    """Load the weights of a checkpoint into a model of any parallel layout.

    Args:
        path: Run folder or one of its iteration folders.
        model: Without adapters.
        field: What the user named the path with, for error messages.
        adapters: Adapters of the checkpoint are merged, so that the model is the one that was
            trained; left in place, or removed.
        verify: See `verified_checkpoint`.
        place: Takes each weight that is on meta, with its adapter merged: one at a time is in
            memory. Adapters of these layers go away without values.

    Raises:
        UserError: There is no checkpoint, it does not fit the model, or its values are not all
            finite.
    """
    checkpoint = verified_checkpoint(path, field, verify)
    run_config = saved_config(checkpoint, field)
    with errors_on_all_ranks():
        attach_adapters_of_run(model, run_config, field)
    state = sharded_state(model, None, is_loading=True)
    with errors_on_all_ranks():
        _check_shapes(state, checkpoint, field)
    of_layers = _on_meta(state["model"])
    assert place is not None or not of_layers
    rest = {name: stored for name, stored in state["model"].items() if name not in of_layers}
    loaded = _load({"model": rest}, checkpoint, field)["model"]
    on_meta = {name: stored.data for name, stored in of_layers.items()}
    unwrap_model(model).load_state_dict(loaded | on_meta)
    if place is not None:
        assert adapters == "merge"
        with errors_on_all_ranks():
            _place_layers(model, of_layers, place, checkpoint, field)
        remove_adapters(model)
    elif adapters == "merge":
        merge_adapters(model)
    elif adapters == "remove":
        remove_adapters(model)
    _check_values(model, checkpoint, field)


def _on_meta(state: dict[str, Any]) -> dict[str, Any]:
    """What of a model's sharded state has no memory."""
    return {
        name: stored
        for name, stored in state.items()
        if isinstance(stored, (dist_checkpointing.ShardedTensor, ShardedTensorFactory))
        and stored.data is not None
        and stored.data.is_meta
    }


@torch.no_grad()
def _place_layers(
    model: torch.nn.Module, state: dict[str, Any], place: Place, checkpoint: Path, field: str
) -> None:
    """Read what has no memory, one linear layer after the other; see `load_weights`."""
    layers = linear_layers_by_weight(model)
    reader = TensorReader(checkpoint, checked_metadata(checkpoint, field))
    for name, stored in state.items():
        if ADAPTER_PARAMETER.search(name):
            continue  # with its layer's weight
        layer = layers[stored.data]
        of_layer = name.removesuffix("weight")
        adapter = [state.get(of_layer + part) for part in ("lora_a", "lora_b")]

        def read(
            further: int, stored: Any = stored, layer: Any = layer, adapter: Any = adapter
        ) -> torch.Tensor:
            weight = reader.read(stored, further)
            if None in adapter:
                return weight
            merged = layer.merged(weight, *(reader.read(part, further) for part in adapter))
            return merged.to(weight.dtype)

        with _told_as_damaged(checkpoint, field):
            weight = read(0)
            if not is_finite(weight):
                raise _not_finite(name, checkpoint, field)
            place(stored.data, weight, map(read, range(1, parts_along_inputs(stored))))


def attach_adapters_of_run(
    model: torch.nn.Module, run_config: dict[str, Any], field: str = "--lora-rank"
) -> None:
    """Attach the adapters that a run's flat configuration asks for, if any, as at its start.

    Raises:
        UserError: It asks for adapters and the model's layers cannot carry them.
    """
    rank = run_config.get("lora_rank")
    if rank is None:
        return
    if not can_have_adapters(model):
        raise bad_value(
            field, rank, "adapters need Megatron's local layers", "choose --transformer-impl local"
        )
    attach_adapters(
        model,
        rank=rank,
        alpha=run_config["lora_alpha"] or rank,
        target_modules=run_config["lora_target_modules"],
        seed=run_config["seed"],
    )


def load_training_state(
    path: str | Path, student: Student, field: str = "--load", verify: bool = True
) -> tuple[Progress, StoredTrajectories]:
    """Load weights, optimizer and schedule of a run, at any parallel layout.

    Args:
        path: Run folder or one of its iteration folders.
        student: What is filled.
        field: What the user named the path with, for error messages.
        verify: See `verified_checkpoint`.

    Returns:
        How far the run has come, and trajectories that it goes on with.

    Raises:
        UserError: There is no checkpoint, it does not fit, or it holds weights only.
    """
    checkpoint = verified_checkpoint(path, field, verify)
    common = _load_common(checkpoint, field)
    if "scheduler" not in common:
        raise bad_value(
            field,
            str(path),
            "holds weights but no training state",
            "add --finetune to start from it",
        )
    with loading_optimizer_state(student.optimizer):
        state = sharded_state(student.model, student, is_loading=True)
        with errors_on_all_ranks():
            _check_shapes(state, checkpoint, field)
        loaded = _load(state, checkpoint, field)
        student.model.load_state_dict(loaded["model"])
        _check_values(student.model, checkpoint, field)
        load_optimizer_state(student.optimizer, loaded["optimizer"], common["optimizer"])
    student.scheduler.load_state_dict(loaded["scheduler"])
    return Progress(**loaded["progress"]), read_trajectories(checkpoint)


def saved_config(path: str | Path, field: str = "--load") -> dict[str, Any]:
    """The flat configuration of the run that wrote a checkpoint; empty for imported weights."""
    common = _load_common(find_checkpoint(path, field), field)
    config: dict[str, Any] = common.get("config", {})
    return config


def saved_progress(path: str | Path, field: str = "--load") -> Progress | None:
    """How far the run had come that wrote a checkpoint; None if it can only supply weights."""
    common = _load_common(find_checkpoint(path, field), field)
    return Progress(**common["progress"]) if "scheduler" in common else None
