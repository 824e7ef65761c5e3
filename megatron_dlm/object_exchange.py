"""Objects that ranks send each other, with the tensors in them as arrays.

PyTorch pickles a tensor as a file of its own, with all of the memory that it is a view of: a
rollout's hundreds of short tensors take a dozen times as long as NumPy's arrays of the same.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def _of_bits(bits: Any) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """How a tensor of the host is taken apart; all else as usual."""
        if type(value) is not Tensor or value.device.type != "cpu" or value.layout != torch.strided:
            return NotImplemented
        if value.dtype == torch.bfloat16:  # which NumPy does not know
            return _of_bits, (value.detach().view(torch.int16).numpy(),)
        return torch.from_numpy, (value.detach().numpy(),)


def _packed(value: Any) -> bytes:
    """A message of an object; tensors come without the history of their gradients."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def all_gather(own: T, group: dist.ProcessGroup) -> list[T]:
    """The objects of all ranks of a group, in their order; all of them call this.

    Args:
        own: Of this rank, which is returned as it is.
        group: The ranks.
    """
    messages = [b""] * group.size()
    dist.all_gather_object(messages, _packed(own), group=group)
    return [own if i == group.rank() else pickle.loads(m) for i, m in enumerate(messages)]


def gather(own: T, group: dist.ProcessGroup) -> list[T]:
    """What `all_gather` returns, on the first rank of the group; nothing on the others."""
    messages = [b""] * group.size()
    is_first = group.rank() == 0
    first = dist.get_process_group_ranks(group)[0]
    dist.gather_object(_packed(own), messages if is_first else None, first, group)
    return [own, *map(pickle.loads, messages[1:])] if is_first else []


def broadcast(own: T, group: dist.ProcessGroup) -> T:
    """The object of the first rank of the group, on all of them; all of them call this."""
    message = [_packed(own) if group.rank() == 0 else b""]
    dist.broadcast_object_list(message, group=group, group_src=0)
    received: T = own if group.rank() == 0 else pickle.loads(message[0])
    return received
