"""Loads a checkpoint's optimizer state into the optimizer of any parallel layout.

Parameter groups are not taken from a checkpoint: which parameters they hold and at what rates is
said by the configuration, which a resumed run cannot change (`run.RESUME_FIXED`), and the current
rates by the schedule. Only tensors and the number of updates are.

The only place that reaches into Megatron's optimizers by private names. It calls what they have in
an order in which it works; nothing of Megatron's is replaced.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _parts(built: MegatronOptimizer) -> list[Any]:
    return built.chained_optimizers if isinstance(built, ChainedOptimizer) else [built]


def _part_states(state: Any) -> list[dict[str, Any]]:
    """The states of the optimizers in a chain, or of the only one."""
    if isinstance(state, list):
        return state
    chained = sorted(key for key in state if isinstance(key, int))
    return [state[key] for key in chained] or [state]


@contextmanager
def loading_optimizer_state(built: MegatronOptimizer) -> Iterator[None]:
    """Make a new optimizer ready to be loaded; surrounds listing what to load and loading it.

    Two things stand in the way. Megatron's distributed optimizer reads the step count of PyTorch's
    AdamW from its state when it lists what to load, before anything has allocated that state. And
    parameter groups are matched by multipliers of rate and decay, which groups with rates of their
    own have in common: meanwhile, a multiplier that nothing reads is the group's number.
    """
    for part in _parts(built):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
    multipliers = [group["lr_mult"] for group in built.param_groups]
    for number, group in enumerate(built.param_groups):
        group["lr_mult"] = number
    try:
        yield
    finally:
        for group, multiplier in zip(built.param_groups, multipliers, strict=True):
            group["lr_mult"] = multiplier


def _update_count(state: Any) -> Any:
    """The number of updates somewhere in a saved optimizer state; all parameters share it."""
    if isinstance(state, dict):
        for key in ("common_step", "step"):
            if key in state:
                return state[key]
    values = state.values() if isinstance(state, dict) else state
    for value in values if isinstance(state, dict | list) else ():
        count = _update_count(value)
        if count is not None:
            return count
    return None


def _fit_to_layout(loaded: dict[Any, Any], saved: Any, current: Any) -> list[dict[str, Any]]:
    """Give the loaded state the chain of optimizers and the groups that this layout has.

    Under expert parallelism Megatron chains an optimizer for the experts to that for the rest. The
    tensors have the same names either way, but groups and step counts are listed by optimizer.

    Args:
        loaded: The state as loaded into this layout's structure; changed in place.
        saved: What the checkpoint says of the optimizer, without tensors.
        current: The state of this layout's optimizer.

    Returns:
        The states of the optimizers in the chain.
    """
    needed = _part_states(current)
    for key in [key for key in loaded if isinstance(key, int) != (len(needed) > 1)]:
        del loaded[key]
    count = _update_count(saved)
    parts = _part_states(loaded)
    for part, own in zip(parts, needed, strict=True):
        for key, value in _part_states(saved)[0].items():
            part.setdefault(key, copy.deepcopy(value))
        part, own = part.get("optimizer", part), own.get("optimizer", own)
        part["param_groups"] = own["param_groups"]
        if "state" in part:
            part["state"]["common_step"] = count
        else:  # the distributed optimizer keeps tensors elsewhere and the count with the groups
            for group in part["param_groups"]:
                group["step"] = count
    return parts


def _load_part(part: Any, state: dict[str, Any]) -> None:
    if not isinstance(part, DistributedOptimizer):
        part.load_state_dict(state)
        return
    tensors = state.pop("param_state")
    part.load_state_dict(state)
    # AdamW now counts the updates in one tensor that all parameters share, and the loading of the
    # tensors below knows nothing of such a count.
    steps = {param: values.pop("step").clone() for param, values in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(tensors)
    for param, step in steps.items():
        part.optimizer.state[param]["step"] = step


@torch.no_grad()
def load_optimizer_state(built: MegatronOptimizer, loaded: dict[Any, Any], saved: Any) -> None:
    """Load what a checkpoint holds of an optimizer, within `loading_optimizer_state`.

    Args:
        built: This layout's optimizer.
        loaded: Its sharded state dict, loaded; used up.
        saved: What the checkpoint says of the optimizer, without tensors.
    """
    states = _fit_to_layout(loaded, saved, built.state_dict())
    for part, state in zip(_parts(built), states, strict=True):
        _load_part(part, state)
    if isinstance(built, ChainedOptimizer):
        built._synchronize_steps()
