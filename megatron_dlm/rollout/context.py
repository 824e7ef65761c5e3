"""Attention of a rollout's forwards: against a KV cache, or within the forward."""

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.errors import bad_value
from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.attention_layout import clean_layout, pad_layout
from megatron_dlm.models.forward import decoding_multiple
from megatron_dlm.models.model import StageModel, local_layers
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.kv_cache import CacheView, KVCache
from megatron_dlm.rollout.pages import PAGE_SIZE, PagePool, pages_for, prefix_keys
from megatron_dlm.rollout.token_shares import TokenShares

# Share of the device's free memory that the cache takes at most; activations need the rest.
MAX_MEMORY_SHARE = 0.8


class RolloutContext(Protocol):
    """Attention of the sequences in decoding, for one call of the engine."""

    def admit(self, slot: int, token_ids: Tensor, length: int) -> bool:
        """Reserve what a sequence needs until its end, so that it never waits once it runs.

        Args:
            slot: Where it will be decoded.
            token_ids: [P] int64, its prompt.
            length: Positions it may have, prompt and longest response in whole blocks.

        Returns:
            False if it has to wait until others have ended.
        """

    def release(self, slot: int) -> None:
        """The sequence of a slot has ended."""

    def move(self, source: int, target: int) -> None:
        """Move the sequence of slot `source` to slot `target`, which is unused."""

    def reuse(self, slot: int, start: int) -> int:
        """First position from `start` on that no sequence has computed for this prompt yet."""

    def publish(self, slot: int, end: int) -> None:
        """Positions below `end` are final after this forward, or computed earlier in it."""

    def keep(self, slot: int, token_ids: Tensor) -> None:
        """Before `release`: these tokens, prompt and response, have final keys.

        A later prompt that begins with them, as the next turn of a chat does, finds the keys.

        Args:
            slot: Where they were decoded.
            token_ids: [n] int64, from the sequence's first token on.
        """

    def forget(self) -> None:
        """Keys of finished sequences are of no use any more: the weights have changed."""

    def attention(
        self, starts: np.ndarray, ends: np.ndarray, noisy_starts: np.ndarray
    ) -> Tensor | CachedAttention:
        """Attention of a forward over positions starts[r] to ends[r] - 1 of each slot r.

        Without slots: attention of a row with one token that belongs to no sequence.

        Args:
            starts: [R] int64.
            ends: [R] int64.
            noisy_starts: [R] int64, see `ForwardPlan`.
        """


class CachedContext:
    """Block-causal or causal attention against cached keys.

    A sequence gets the pages of its longest possible response when it is admitted. So it never
    waits for a page that only the end of another one would free: there is no deadlock, and nothing
    is computed twice. Sequences whose prompts begin alike share the pages of that.

    Args:
        model: This rank's part of the model.
        groups: Process groups of the rollout; ranks of a replica have equally many pages.
        lengths: Positions that each sequence of the rollout may have.
        num_slots: Sequences held at once.
        block_size: Tokens of a block in decoding; 1 for an autoregressive model.
        context_block_size: Final tokens that see each other: `block_size`, or 1, which is causal.
        max_total_tokens: Most positions that this rank keeps; None: what `num_slots` sequences
            need, as far as the device has memory for it.

    Raises:
        UserError: The longest sequence does not fit; on all ranks in step, whichever has it.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        groups: ParallelGroups,
        lengths: Sequence[int],
        num_slots: int,
        block_size: int,
        context_block_size: int,
        max_total_tokens: int | None,
    ) -> None:
        config = model.config
        layers = local_layers(model)
        tp_size = groups.tp.size() if groups.tp is not None else 1
        num_query_groups = config.num_query_groups // tp_size
        element_size = torch.empty(0, dtype=config.params_dtype).element_size()
        page_bytes = (
            len(layers) * PAGE_SIZE * 2 * num_query_groups * config.kv_channels * element_size
        )
        shares = TokenShares.of(groups)
        self._page_size = PAGE_SIZE if shares is None else shares.page_size
        needed = [pages_for(length, self._page_size) for length in lengths]
        longest = sorted(needed, reverse=True)[:num_slots]
        most, of_any = _agreed(_pages_in_memory(page_bytes), max(longest, default=0), groups)
        if max_total_tokens is not None:
            most = min(most, max_total_tokens // PAGE_SIZE)
        if most < of_any:
            remedy = (
                "raise it or free memory, or lower --max-response-length or --max-prompt-length"
            )
            if groups.cp is not None and shares is None:
                remedy += ", or add --rollout-context-parallel tokens"
            raise bad_value(
                "--max-total-tokens",
                max_total_tokens,
                f"the cache holds {most * self._page_size} tokens, and the longest prompt and "
                f"response need {of_any * self._page_size}",
                remedy,
            )
        num_pages = min(sum(longest), most)
        self.pool = PagePool(num_pages)
        self._block_size, self._context_block_size = block_size, context_block_size
        self._pages_of_longest = max(longest, default=0)
        self._open(num_slots)
        self._cache = KVCache(
            layer_numbers=[layer.layer_number for layer in layers],
            num_pages=num_pages,
            num_attention_heads_per_partition=config.num_attention_heads // tp_size,
            num_query_groups_per_partition=num_query_groups,
            head_size=config.kv_channels,
            dtype=config.params_dtype,
            device=platform.device(),
            backend=layers[0].self_attention.core_attention.backend_name,
            shares=shares,
        )

    def _open(self, num_slots: int) -> None:
        """Unused slots."""
        # Zero is the null page.
        self._tables = np.zeros((num_slots, self._pages_of_longest), dtype=np.int64)
        self._num_pages = np.zeros(num_slots, dtype=np.int64)
        self._keys: list[list[bytes]] = [[] for _ in range(num_slots)]
        self._last: tuple[tuple[np.ndarray, ...], CacheView] | None = None

    def with_slots(self, num_slots: int) -> "CachedContext":
        """Slots of their own, with the pages and keys of this context.

        Its forwards and those of this one run one after the other: what the earlier ones have
        published is there for the later ones.
        """
        other = copy.copy(self)
        other._open(num_slots)
        return other

    def admit(self, slot: int, token_ids: Tensor, length: int) -> bool:
        """See `RolloutContext`."""
        complete = len(token_ids) // self._block_size * self._block_size
        if self._context_block_size == 1:
            # Causally predicts the prompt's last token, which is therefore computed.
            complete = min(complete, len(token_ids) - 1)
        keys = prefix_keys(token_ids, complete, self._context_block_size, self._page_size)
        pages: list[int] = []
        for key in keys:
            page = self.pool.share(key)
            if page is None:
                break
            pages.append(page)
        needed = pages_for(length, self._page_size) - len(pages)
        if needed > self.pool.num_free:
            self.pool.release(pages)
            return False
        pages += self.pool.allocate(needed)
        self._keys[slot] = keys
        self._num_pages[slot] = len(pages)
        self._tables[slot, : len(pages)] = pages
        return True

    def release(self, slot: int) -> None:
        """See `RolloutContext`."""
        # The last page first: of a prompt that comes again, the beginning stays longest.
        self.pool.release(self._tables[slot, : self._num_pages[slot]][::-1].tolist())
        self._tables[slot] = 0
        self._num_pages[slot] = 0

    def move(self, source: int, target: int) -> None:
        """See `RolloutContext`: the page table moves, no key does."""
        self._tables[target] = self._tables[source]
        self._num_pages[target] = self._num_pages[source]
        self._keys[target] = self._keys[source]
        self._tables[source] = 0
        self._num_pages[source] = 0

    def reuse(self, slot: int, start: int) -> int:
        """See `RolloutContext`; the pages of what was computed take the place of own ones."""
        keys = self._keys[slot]
        size = self._page_size
        while start % size == 0 and start // size < len(keys):
            index = start // size
            page = self.pool.share(keys[index])
            if page is None:
                break
            # One user fewer for its own page; or for the shared one, which it had already.
            self.pool.release([int(self._tables[slot, index])])
            self._tables[slot, index] = page
            start += size
        return start

    def publish(self, slot: int, end: int) -> None:
        """See `RolloutContext`."""
        for index, key in enumerate(self._keys[slot][: end // self._page_size]):
            self.pool.publish(int(self._tables[slot, index]), key)

    def keep(self, slot: int, token_ids: Tensor) -> None:
        """See `RolloutContext`."""
        end, size = len(token_ids), self._page_size
        self._keys[slot] = prefix_keys(token_ids, end, self._context_block_size, size)
        self.publish(slot, end)

    def forget(self) -> None:
        """See `RolloutContext`."""
        self.pool.forget()

    def attention(
        self, starts: np.ndarray, ends: np.ndarray, noisy_starts: np.ndarray
    ) -> CacheView:
        """See `RolloutContext`; the keys of the forward's tokens are written into the cache."""
        # Most steps of a block are at the same positions as the step before.
        places = (starts, ends, noisy_starts, self._tables[: len(starts)])
        if self._last is None or not all(map(np.array_equal, places, self._last[0])):
            view = CacheView(
                self._cache,
                self._tables[: len(starts)],
                starts,
                ends,
                self._block_size,
                context_block_size=self._context_block_size,
                noisy_starts=noisy_starts,
            )
            self._last = tuple(place.copy() for place in places), view
        return self._last[1]


def most_tokens(max_total_tokens: int | None, groups: ParallelGroups) -> int | None:
    """Positions of the longest sequence that `--max-total-tokens` leaves room for; None: of any."""
    if max_total_tokens is None:
        return None
    shares = TokenShares.of(groups.for_decoding())
    page_size = PAGE_SIZE if shares is None else shares.page_size
    return max_total_tokens // PAGE_SIZE * page_size


def _pages_in_memory(page_bytes: int) -> int:
    """Pages that the device has memory for."""
    return int(platform.available_memory() * MAX_MEMORY_SHARE) // page_bytes


def _agreed(pages: int, longest: int, groups: ParallelGroups) -> tuple[int, int]:
    """The fewest pages and the longest sequence, in pages, of all ranks in step with this one.

    Replicas that share experts have other prompts, and none may give up alone: the others would
    wait for its part of a forward.
    """
    found = torch.tensor([pages, -longest], device=platform.device())
    for group in (groups.model, groups.lockstep):
        if group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    fewest, of_any = platform.to_host(found).tolist()
    return fewest, -of_any


class CanvasContext:
    """Full attention: every forward holds whole sequences, without a cache.

    Every committed token changes the keys of all others, so no key could be reused.

    Args:
        multiple: The length of a forward is padded to a multiple of this.
    """

    def __init__(self, multiple: int) -> None:
        self._multiple = multiple
        self._lengths: list[int] | None = None
        self._layout = torch.empty(0)

    def admit(self, slot: int, token_ids: Tensor, length: int) -> bool:
        """See `RolloutContext`; there is nothing to reserve."""
        return True

    def release(self, slot: int) -> None:
        """See `RolloutContext`."""

    def move(self, source: int, target: int) -> None:
        """See `RolloutContext`; nothing has to move."""

    def reuse(self, slot: int, start: int) -> int:
        """See `RolloutContext`; nothing was kept."""
        return start

    def publish(self, slot: int, end: int) -> None:
        """See `RolloutContext`; nothing is kept."""

    def keep(self, slot: int, token_ids: Tensor) -> None:
        """See `RolloutContext`; nothing is kept."""

    def forget(self) -> None:
        """See `RolloutContext`; nothing is kept."""

    def attention(self, starts: np.ndarray, ends: np.ndarray, noisy_starts: np.ndarray) -> Tensor:
        """See `RolloutContext`; a layout tensor, with the padding of the forward."""
        lengths = (ends - starts).tolist()
        # The same tensor as long as no sequence ends, so that its cached masks are reused.
        if lengths != self._lengths:
            self._lengths = lengths
            nothing = torch.empty(4, 0, dtype=torch.int32)
            layout = clean_layout(lengths, "full", 1) if lengths else pad_layout(nothing, 1)
            padded = -(-layout.shape[1] // self._multiple) * self._multiple
            self._layout = pad_layout(layout, padded).to(platform.device())
        return self._layout


def rollout_contexts(
    model: StageModel,
    generation: GenerationConfig,
    *,
    groups: ParallelGroups,
    num_slots: Sequence[int],
    lengths: Sequence[int],
) -> list[RolloutContext]:
    """New, empty contexts: no key in them is from older weights.

    Args:
        model: This rank's part of the model.
        generation: Decoding settings.
        groups: Process groups.
        num_slots: Sequences held at once in each; with a cache, all share its pages.
        lengths: Positions that each sequence of the rollout may have.

    Raises:
        UserError: The longest sequence does not fit into the cache.
    """
    if generation.attention_pattern == "full":
        if groups.together is not None:
            raise ValueError("full attention has no cache that ranks could share")
        return [CanvasContext(decoding_multiple(model)) for _ in num_slots]
    assert generation.block_size is not None
    assert generation.context_block_size is not None
    context = CachedContext(
        model,
        groups=groups,
        lengths=lengths,
        num_slots=sum(num_slots),
        block_size=generation.block_size,
        context_block_size=generation.context_block_size,
        max_total_tokens=generation.max_total_tokens,
    )
    return [context.with_slots(number) for number in num_slots]
