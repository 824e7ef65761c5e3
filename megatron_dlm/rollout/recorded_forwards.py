"""Forwards of a rollout that are recorded once and then replayed, without the modules' own code.

Where a step's kernels are short, most of its time goes to the calls that start them: Python on a
CPU, launches on a GPU. The layers of a forward over the paged cache are a fixed sequence of
operations on a few tensors. It is recorded (`traced_forwards` on the CPU, `captured_forwards` on
CUDA) and replayed on what those tensors hold in a later forward. What the host decides within it
would be repeated for ever: a value of the device that it asks for ends a recording, and forwards go
on without.

Draws and commits follow the forward and are not recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dlm.models.forward import Row, forward_row
from megatron_dlm.models.model import DiffusionGPTModel, StageModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.kv_cache import CacheView
from megatron_dlm.terminal import say

MAX_RECORDINGS = 16
"""Recordings that are kept at once."""

FORWARDS_BEFORE = 600
"""Forwards before the first recording: so many replayed ones save the time that it takes."""


def obstacle(model: StageModel, generation: GenerationConfig, groups: ParallelGroups) -> str | None:
    """Why forwards of a model are not recorded; None: they are."""
    if groups.model is not None or groups.lockstep is not None:
        return "ranks share a copy of the model, and messages between them are not recorded"
    if generation.attention_pattern == "full":
        return "under full attention a forward holds whole sequences, without a cache"
    if model.config.num_moe_experts is not None:
        return "the host has a part in dividing tokens over experts"
    if model.config.fp8 is not None:
        return "FP8 keeps converted weights beside the model's own"
    return None


class RecordingError(RuntimeError):
    """A forward does not only depend on what it may."""


@dataclass
class History:
    """What is known of a model in one state.

    Attributes:
        forwards: How many there were, by `kind_of`.
        problem: Why nothing is recorded any more, in PyTorch's words; None: there is no reason.
    """

    forwards: Counter[str] = field(default_factory=Counter)
    problem: str | None = None


class ForwardRecorder(ABC):
    """Runs forwards of one model in evaluation mode, from recordings where there are some.

    Args:
        after: Forwards in the model's state, of a kind, before any of it is recorded.

    Attributes:
        recorded: Recordings made so far.
        replayed: Forwards that were replayed.
        history: Of the model in its state.
    """

    def __init__(self, after: int) -> None:
        self.recorded = self.replayed = 0
        self.history = History()
        self._after = after
        self._state: tuple[object, ...] | None = None
        self._hooked: str | None = None

    def __call__(self, model: DiffusionGPTModel, row: Row, equally_long: bool) -> Tensor:
        """What `forward_row` returns; further tokens may follow those of the row."""
        view = row.attention
        kind = kind_of(model, row)
        self.history.forwards[kind] += 1
        if (
            self.history.problem is None
            and self._hooked is None
            and self.history.forwards[kind] > self._after
            and isinstance(view, CacheView)
            and view.num_tokens == len(row.token_ids)  # else there is padding of other origin
        ):
            try:
                output = self._run(model, row, view)
            except RecordingError as error:
                self.history.problem = str(error)
                say(f"rollout graphs: {error}; forwards go on without", error=True)
            else:
                if output is not None:
                    return output
        return forward_row(model, row, equally_long)

    def check(self, model: StageModel) -> None:
        """Replay no recordings any more that would not be of this model.

        To be called before forwards after a time in which parameters may have been replaced or
        hooks added; what is written into parameters needs no call. While a module has hooks, the
        modules run: a recording would call none of them.
        """
        hooked = hooked_module(model)
        if hooked is not None and hooked != self._hooked:
            say(f"rollout graphs: {hooked} has a hook; forwards go on without", error=True)
        self._hooked = hooked
        state = self._state_of(model)
        if state != self._state:
            self._state = state
            self.history = self._begin(state)

    @abstractmethod
    def _run(self, model: DiffusionGPTModel, row: Row, view: CacheView) -> Tensor | None:
        """A forward; None: it is not to be replayed.

        Raises:
            RecordingError: It cannot be recorded.
        """

    @abstractmethod
    def _begin(self, state: tuple[object, ...]) -> History:
        """Go on with the recordings that there are of a state; returns what is known of it."""

    @abstractmethod
    def _state_of(self, model: StageModel) -> tuple[object, ...]:
        """What a recording has of the model but for the contents of its tensors."""


def kind_of(model: DiffusionGPTModel, row: Row) -> str:
    """Which tokens of a forward the last layer goes on with: "all", "one" or "some"."""
    if row.read is None or not model.leaves_out(row.read):
        return "all"
    return "one" if len(row.read) == 1 else "some"


def tensors_of(model: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and other tensors that a model's modules hold."""
    for module in model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            yield from [value for value in held.values() if isinstance(value, Tensor)]


def hooked_module(model: torch.nn.Module) -> str | None:
    """The name of a module whose forward calls hooks; None: there is none but those of updates."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "every module"
    for name, module in model.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(getattr(hook, "is_of_updates", False) for hook in hooks.values()):
                return name or type(module).__name__
    return None


def adapters_of(model: torch.nn.Module) -> tuple[bool, ...]:
    """Which adapters add their output."""
    return tuple(vars(module).get("adapter_enabled", True) for module in model.modules())
