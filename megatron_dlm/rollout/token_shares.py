"""A rollout whose sequences are shared by ranks: `--rollout-context-parallel tokens`.

Ranks of a context-parallel group then decode the same sequences. Each computes an equal part of the
tokens of every forward, a prompt's as those of blocks in decoding, and keeps an equal part of the
keys and values: pages are dealt out, so that rank r of R has positions `PAGE_SIZE` r to
`PAGE_SIZE` (r + 1) - 1 of every R pages of a sequence. Two messages a layer: queries, keys and
values of a forward's tokens go to all ranks; each attends with all queries to what it keeps; and
the results go back to the ranks of the tokens, where they are added up by their log-sum-exp, which
is exact (Milakov and Gimelshein 2018; for decoding, Dao et al. 2023, Flash-Decoding).

S: tokens of a forward; R: ranks; N: tokens of a rank, S / R, rounded up; n: query heads; d: head
size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.pages import PAGE_SIZE


class TokenShares:
    """What a rank has of sequences that it decodes together with others.

    Args:
        group: The ranks.

    Attributes:
        page_size: Positions of a page of all ranks together.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank, self._ranks = group.rank(), group.size()
        self.page_size = PAGE_SIZE * self._ranks

    @classmethod
    def of(cls, groups: ParallelGroups) -> TokenShares | None:
        """Those of the groups of a rollout; None where each rank decodes sequences of its own."""
        return None if groups.together is None else cls(groups.together)

    def length(self, tokens: int) -> int:
        """N of so many tokens."""
        return -(-tokens // self._ranks)

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's part [N] of the tokens of a forward [S], or of what belongs to each."""
        length = self.length(len(tokens))
        part = tokens[self._rank * length : (self._rank + 1) * length]
        return pad(part, (0, length - len(part)))

    def gather(self, own: Tensor, tokens: int) -> Tensor:
        """All ranks' parts, [N, ...] -> [S, ...], the same on all ranks.

        Args:
            own: This rank's part, with whatever stands where it has fewer tokens.
            tokens: S.
        """
        whole = own.new_empty(self._ranks * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(whole, own.contiguous(), group=self._group)
        return whole[:tokens]

    def keeps(self, positions: np.ndarray) -> np.ndarray:
        """Whether this rank keeps the key and value of each position of a sequence."""
        kept: np.ndarray = positions // PAGE_SIZE % self._ranks == self._rank
        return kept

    def kept_below(self, limits: np.ndarray) -> np.ndarray:
        """Positions below each limit that this rank keeps: its first so many ones."""
        before = limits % self.page_size - self._rank * PAGE_SIZE
        kept: np.ndarray = limits // self.page_size * PAGE_SIZE + np.clip(before, 0, PAGE_SIZE)
        return kept

    def merge(self, context: Tensor, log_sum_exp: Tensor) -> Tensor:
        """Attention of this rank's tokens to all keys, [N, n, d].

        Args:
            context: [S, n, d], attention of all tokens to what this rank keeps.
            log_sum_exp: [S, n], of the scores; minus infinity where it keeps nothing visible.
        """
        tokens, heads, head_size = context.shape
        dtype, length = context.dtype, self.length(tokens)
        # The bits of a float32, in one message with the rest.
        wide = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
        bits = log_sum_exp.to(wide)[..., None].view(dtype)
        sent = pad(
            torch.cat((context, bits), dim=-1), (0, 0, 0, 0, 0, self._ranks * length - tokens)
        )
        parts = torch.empty_like(sent)
        dist.all_to_all_single(parts, sent, group=self._group)
        parts = parts.view(self._ranks, length, heads, -1)
        contexts = parts[..., :head_size].to(wide)
        sums = parts[..., head_size:].contiguous().view(wide)[..., 0]
        # Padding tokens see nothing anywhere; of the others the largest weight is 1.
        weights = (sums - sums.amax(dim=0).nan_to_num(neginf=0.0)).exp()
        total = weights.sum(dim=0).clamp(min=1.0)
        merged = (contexts * weights[..., None]).sum(dim=0) / total[..., None]
        return merged.to(dtype)

    def drawn(self, draws: Tensor, count: int) -> Tensor:
        """What all ranks have drawn, [k, N] each -> [k, count], the same on all ranks."""
        return self.gather(draws.T, count).T

    def agree(self, results: list[Tensor]) -> list[Tensor]:
        """The first rank's results, on all ranks: what all have computed may differ in rounding."""
        for result in results:
            dist.broadcast(result, group=self._group, group_src=0)
        return results
