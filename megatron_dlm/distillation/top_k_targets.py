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
    """

    token_ids: Tensor
    log_probs: Tensor

    def __getitem__(self, rows: Tensor) -> TopKTargets:
        """The targets of some predictions."""
        return TopKTargets(self.token_ids[rows], self.log_probs[rows])

    def to(self, device: torch.device) -> TopKTargets:
        """The same targets on a device."""
        return TopKTargets(self.token_ids.to(device), self.log_probs.to(device))

    @classmethod
    def cat(cls, parts: Sequence[TopKTargets]) -> TopKTargets:
        """Targets laid end to end; at least one part, all of the same k."""
        return cls(
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.log_probs for part in parts]),
        )
