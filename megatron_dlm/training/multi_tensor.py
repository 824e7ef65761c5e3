"""Norm and scale of many gradients where neither Transformer Engine nor Apex is installed.

Megatron-Core's own substitutes handle the tensors one by one and read each norm back: a wait for
the device a parameter, twice an update. These do the same arithmetic in a few kernels without any.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor


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
    torch._foreach_copy_(target, torch._foreach_mul(source, factor))


def install_multi_tensor() -> None:
    """Replace Megatron-Core's substitutes, which it uses where there is no library with kernels."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
        clip_grads.multi_tensor_scale_impl = scale
