import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.rollout.kv_cache import CacheView, KVCache

HEADS, GROUPS, HEAD_SIZE, FIRST_LAYER = 4, 2, 8, 3
SCALE = 1 / math.sqrt(HEAD_SIZE)


def new_cache(num_slots: int, max_length: int) -> KVCache:
    return KVCache(
        num_layers=2,
        first_layer_number=FIRST_LAYER,
        num_slots=num_slots,
        max_length=max_length,
        num_attention_heads_per_partition=HEADS,
        num_query_groups_per_partition=GROUPS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, position: int, block_size: int
) -> Tensor:
    """One query [n, d] against all keys [K, g, d] of its sequence, head by head, in float64."""
    visible = min((position // block_size + 1) * block_size, len(keys))
    heads = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = keys[:visible, group].double() @ query[head].double() * SCALE
        heads.append(scores.softmax(-1) @ values[:visible, group].double())
    return torch.stack(heads).float()


def random_tokens(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def tensor(heads: int) -> Tensor:
        return torch.randn(count, 1, heads, HEAD_SIZE, generator=generator)

    return tensor(HEADS), tensor(GROUPS), tensor(GROUPS)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([1, 2, 4]), padding=st.integers(0, 3))
def test_ragged_forwards_against_dense_attention(
    data: st.DataObject, block_size: int, padding: int
) -> None:
    """Forwards of any mixture: prompts, single blocks, two blocks, rewritten blocks, idle slots."""
    num_slots, max_blocks = data.draw(st.integers(1, 5)), 40 // block_size
    cache = new_cache(num_slots, max_blocks * block_size)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shape = (2, num_slots, cache.max_length, GROUPS, HEAD_SIZE)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    written = [0] * num_slots
    for _ in range(3):
        starts, ends = [], []
        for slot in range(num_slots):
            first = data.draw(st.integers(0, written[slot] // block_size))
            last = data.draw(st.integers(first, max_blocks))
            starts.append(first * block_size)
            # Blocks may be incomplete at the end of a prompt: keys that do not exist are not seen.
            missing = data.draw(st.integers(0, block_size - 1)) if last > first else 0
            ends.append(last * block_size - missing)
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        view = CacheView(cache, torch.tensor(starts), torch.tensor(ends), block_size)
        for layer in range(2):
            query, key, value = random_tokens(sum(lengths) + padding, generator)
            token = 0
            expected = torch.zeros_like(query)
            for slot in range(num_slots):
                span = slice(starts[slot], ends[slot])
                here = slice(token, token + lengths[slot])
                keys[layer, slot, span] = key[here, 0]
                values[layer, slot, span] = value[here, 0]
                for position in range(starts[slot], ends[slot]):
                    expected[token, 0] = dense_attention(
                        query[token, 0],
                        keys[layer, slot, : ends[slot]],
                        values[layer, slot, : ends[slot]],
                        position,
                        block_size,
                    )
                    token += 1
            context = view.attend(FIRST_LAYER + layer, query, key, value, SCALE)
            torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
        written = [e if e > s else w for w, s, e in zip(written, starts, ends, strict=True)]


def test_a_moved_slot_attends_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    for slot in (2, 0):
        cache = new_cache(3, 8)
        for layer in range(FIRST_LAYER, FIRST_LAYER + 2):
            query, key, value = random_tokens(12, generator.manual_seed(layer))
            everything = CacheView(cache, torch.tensor([0, 0, 0]), torch.tensor([4, 4, 4]), 4)
            everything.attend(layer, query, key, value, SCALE)
        if slot == 0:
            cache.move(2, 0)
        starts = ends = torch.tensor([4, 4, 4])
        ends = ends.clone()
        ends[slot] = 8
        view = CacheView(cache, starts, ends, 4)
        query, key, value = random_tokens(4, generator.manual_seed(9))
        results.append(
            [view.attend(FIRST_LAYER + layer, query, key, value, SCALE) for layer in range(2)]
        )
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before, after)


def test_a_forward_of_padding_only_leaves_the_cache_alone() -> None:
    cache = new_cache(2, 4)
    query, key, value = random_tokens(3, torch.Generator().manual_seed(0))
    none = torch.empty(0, dtype=torch.int64)
    assert not CacheView(cache, none, none, 4).attend(FIRST_LAYER, query, key, value, SCALE).any()
    assert not any(tensor.any() for tensor in cache.layer(FIRST_LAYER))


def test_a_position_behind_the_cache_is_an_error() -> None:
    with pytest.raises(ValueError, match="position 4 is beyond 4 positions"):
        CacheView(new_cache(1, 4), torch.tensor([0]), torch.tensor([5]), 1)
