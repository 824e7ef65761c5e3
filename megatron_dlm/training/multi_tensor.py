"""Norm and scale of many gradients where neither Transformer Engine nor Apex is installed.

Megatron-Core's own substitutes handle the tensors one by one and read each norm back: a wait for
the device a parameter, twice an update. These do the same arithmetic in a few kernels without any.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.megatron_internals import replace_multi_tensor


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], *per_tensor: Any
) -> tuple[Tensor, None]:
    """Euclidean norm [1] of all tensors of the first list; interface of `amp_C`."""
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.stack(norms).norm().view(1), None


def scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], factor: float
) -> None:
    """Multiply the tensors of the first list into those of the second; interface of `amp_C`."""
    source, target = tensor_lists
    if source is not target:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, factor)


def install_multi_tensor() -> None:
    """Replace Megatron-Core's substitutes, which it uses where there is no library with kernels."""
    replace_multi_tensor(l2_norm, scale)
