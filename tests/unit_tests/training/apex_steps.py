"""An update with Apex's optimizer and lists of tensors, on tensors without data.

    python -m tests.unit_tests.training.apex_steps

Apex is a library of CUDA kernels with a thin layer of Python, and its packages here are stand-ins
by their names: PyTorch's arithmetic, which writes down what it is called with. Prints which of them
Megatron-Core has taken, and the shapes that each got.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CALLS: dict[str, Any] = {"norm": [], "scale": [], "optimizer": []}


class FusedAdam(torch.optim.AdamW):
    """The optimizer's interface."""

    def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **options)
        groups = (group["params"] for group in self.param_groups)
        CALLS["optimizer"] += [list(parameter.shape) for group in groups for parameter in group]


def _applier(operation: Any, noop: Tensor, lists: list[list[Tensor]], *arguments: Any) -> Any:
    return operation(2048 * 32, noop, lists, *arguments)


def _norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], each: bool) -> Any:
    CALLS["norm"].append([tensor.numel() for tensor in lists[0]])
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm().view(1), None


def _scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], factor: Any) -> None:
    CALLS["scale"].append([tensor.numel() for tensor in lists[0]])
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def install() -> None:
    """Put the stand-ins where Apex would be."""
    parts: dict[str, dict[str, Any]] = {
        "apex": {},
        "apex.optimizers": {"FusedAdam": FusedAdam, "FusedSGD": torch.optim.SGD},
        "apex.multi_tensor_apply": {"multi_tensor_applier": _applier},
        "amp_C": {"multi_tensor_l2norm": _norm, "multi_tensor_scale": _scale},
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=name == "apex")
        vars(module).update(attributes)
        sys.modules[name] = module


def main() -> None:
    install()
    from megatron.core.optimizer import Adam, clip_grads

    from benchmarks.iteration import iteration
    from benchmarks.real_shapes import SHAPES
    from megatron_dlm.accounting.fake_cuda import fake_cuda

    values = {"device": "cuda", "bf16": True}
    with fake_cuda(0, 1), iteration(SHAPES["tiny"], **values) as made:
        parameters = [list(p.shape) for p in made.student.model.parameters()]
        made.update(made.rows([40, 56]))
    taken = Adam is FusedAdam and clip_grads.l2_norm_impl is _norm
    taken &= clip_grads.multi_tensor_scale_impl is _scale
    print(json.dumps({"taken": taken, "parameters": parameters, **CALLS}))


if __name__ == "__main__":
    main()
