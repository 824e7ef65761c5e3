"""A teacher's distribution as its k most likely tokens: small enough to keep on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopKTargets:
    """Distributions of a teacher over n predictions.

    Attributes:
        token_ids: [n, k] int32, most likely first.
        log_probs: [n, k] float32, under the whole vocabulary: their probabilities sum to at most 1.
        log_rest: [n] float32, log-probability of all other tokens together, or None where they do
            not count. One minus the sum of k probabilities near 1 would have no digit of it.
    """

    token_ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> TopKTargets:
        """The targets of some predictions."""
        rest = None if self.log_rest is None else self.log_rest[rows]
        return TopKTargets(self.token_ids[rows], self.log_probs[rows], rest)

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> TopKTargets:
        """The same targets on a device."""
        rest = None if self.log_rest is None else self.log_rest.to(device, non_blocking=True)
        return TopKTargets(
            self.token_ids.to(device, non_blocking=True),
            self.log_probs.to(device, non_blocking=True),
            rest,
        )

    @classmethod
    def cat(cls, parts: Sequence[TopKTargets]) -> TopKTargets:
        """Targets laid end to end; at least one part, all of the same k."""
        rests = [part.log_rest for part in parts if part.log_rest is not None]
        return cls(
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat(rests) if len(rests) == len(parts) else None,
        )
