"""The teacher's targets for each prediction: hidden states, or its k most likely tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import torch
from torch import Tensor

Targets = TypeVar("Targets", bound="TeacherTargets")


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's distributions over n predictions.

    Every field of a subclass is a tensor with n rows, or None. Only a loss treats the subclasses
    differently; indexing, joining and moving are the same for all.
    """

    def __len__(self) -> int:
        tensor: Tensor = getattr(self, fields(self)[0].name)
        return len(tensor)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """The targets of some predictions; indices or a mask may be on another device."""

        def of_rows(tensor: Tensor) -> Tensor:
            return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]

        return self._each(of_rows)

    def to(self, device: torch.device) -> Self:
        """The same targets on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    @staticmethod
    def cat(parts: Sequence[Targets]) -> Targets:
        """Targets laid end to end; at least one part, all of the same kind and sizes.

        A field that any of them lacks is None.
        """
        joined: dict[str, Tensor | None] = {}
        for field in fields(parts[0]):
            found = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if any(t is None for t in found) else torch.cat(found)
        return type(parts[0])(**joined)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: None if t is None else change(t) for name, t in values.items()}
        return type(self)(**changed)


@dataclass(frozen=True)
class HiddenTargets(TeacherTargets):
    """The teacher's hidden states; its output layer turns them into distributions.

    Attributes:
        hidden: [n, h].
    """

    hidden: Tensor


@dataclass(frozen=True)
class PlacedTargets(TeacherTargets):
    """Hidden states by where they lie among the ranks of a context-parallel group.

    Attributes:
        holder: [n] int64, the rank that holds each.
        slot: [n] int64, its place among those of that rank.
    """

    holder: Tensor
    slot: Tensor


@dataclass(frozen=True)
class TopKTargets(TeacherTargets):
    """The teacher's k most likely tokens: small enough to keep on disk.

    Attributes:
        token_ids: [n, k] int32, most likely first.
        log_probs: [n, k] float32, under the whole vocabulary: their probabilities sum to at most 1.
        log_rest: [n] float32, log-probability of all other tokens together, or None where they do
            not count. Not computed as one minus the sum: near 1 that loses all digits.
    """

    token_ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StateTargets(TopKTargets):
    """Distributions at positions of visited states; the same on every rank.

    Attributes:
        state: [n] int64, number of the visited state, ascending.
        position: [n] int64, position in the sequence, ascending within a state.
    """

    state: Tensor
    position: Tensor

    @property
    def top_k(self) -> TopKTargets:
        """The n distributions, without states and positions."""
        return TopKTargets(self.token_ids, self.log_probs, self.log_rest)
