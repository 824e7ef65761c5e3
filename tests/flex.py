"""FlexAttention with gradients on a CPU: its own dense implementation, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_dlm.models import attention, model_provider
from megatron_dlm.models.attention_layout import LayoutCache
from megatron_dlm.models.block_mask import block_mask


def shown(mask: BlockMask) -> Tensor:
    """What a kernel computes of each query and key, [S, K].

    All of a tile in the one list, what the rule says of one in the other, of the rest nothing.
    """
    queries, keys = mask.seq_lengths
    rows, columns = mask.BLOCK_SIZE

    def listed(numbers: Tensor, indices: Tensor) -> Tensor:  # -> [S, K]
        table = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for row, number in enumerate(numbers[0, 0].tolist()):
            table[row, indices[0, 0, row, :number].long()] = True
        query, key = torch.arange(queries) // rows, torch.arange(keys) // columns
        return table[query][:, key]

    query, key = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    zero = torch.tensor(0)
    partly = listed(mask.kv_num_blocks, mask.kv_indices)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    return whole | (partly & mask.mask_mod(zero, zero, query, key))


@contextmanager
def flex_on_cpu(tile: int = 16) -> Iterator[list[int]]:
    """Let models be built with FlexAttention, in tiles of so many tokens, and have gradients.

    The public function refuses gradients on a CPU; the operator beneath it has them. It knows
    scores of all pairs only, so what a kernel makes of a block mask is worked out here.
    Rollouts, which have no gradients, use SDPA.

    Yields:
        Queries of each call.
    """
    original, calls = torch_flex.flex_attention, list[int]()

    def attend(*inputs: Tensor, block_mask: Any, **options: Any) -> Any:
        calls.append(inputs[0].shape[2])
        seen = shown(block_mask)
        block_mask.mask_mod = lambda b, h, q, k: seen[q, k]
        return original(*inputs, block_mask=block_mask, **options)

    of_rollouts = property(lambda module: "sdpa", lambda module, name: None)
    with (
        mock.patch.object(torch_flex, "_validate_device"),
        mock.patch.object(attention, "flex_attention", attend),
        mock.patch.object(attention, "FLEX_TILE", tile),
        mock.patch.object(attention, "_block_masks", LayoutCache(partial(block_mask, tile=tile))),
        mock.patch.object(model_provider, "FLEX_TILE", tile),
        mock.patch.object(model_provider, "attention_backend", return_value="flex"),
        mock.patch.object(attention.DiffusionAttention, "backend_name", of_rollouts, create=True),
    ):
        yield calls
