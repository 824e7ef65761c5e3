"""Recordings of forwards on CUDA: graphs of kernels with fixed sizes and addresses.

There is a graph for each bucket of sizes. Its forward runs on tensors of its own, of the bucket's
sizes, into which those of a forward are copied; tokens after these are written to the null page,
and nobody reads what becomes of them. Forwards that prefill are not recorded: each prompt comes
once, and their kernels are long.

The first forward of a bucket runs on those tensors without a graph, so that what is compiled or
planned on a kernel's first call is there; the second one is recorded.

S: tokens of a forward; B: of a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.models.forward import Row
from megatron_dlm.models.model import DiffusionGPTModel, StageModel
from megatron_dlm.rollout.kv_cache import CacheView
from megatron_dlm.rollout.recorded_forwards import (
    FORWARDS_BEFORE,
    MAX_RECORDINGS,
    ForwardRecorder,
    History,
    RecordingError,
    adapters_of,
    tensors_of,
)

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Records a function of no arguments: what it returns, and what computes that again, from what the
same memory holds then, into the same memory."""

_PER_TOKEN = 4
"""So many of the tensors of `run_on` have an element for each token: they come first."""


class CudaGraphs:
    """A `Capture` whose graphs share one pool of memory, as they never run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """See `Capture`."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # PyTorch asks for a call on another stream before
            function()
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may use CUDA meanwhile: checkpoints are written in one.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        self._pool = graph.pool()
        return output, graph.replay


def run_on(model: DiffusionGPTModel, view: CacheView, tensors: Sequence[Tensor]) -> Tensor:
    """What is recorded: a forward of the kind of `view` on other tensors.

    Args:
        model: The model.
        view: Of a forward of that kind.
        tensors: Tokens [S], positions [S], and `CacheView.tensors`.
    """
    token_ids, position_ids, *of_view = tensors
    hidden: Tensor = model(
        input_ids=token_ids[None],
        position_ids=position_ids[None],
        attention_mask=view.over(of_view),
    )
    return hidden


@dataclass
class _Bucket:
    """Forwards of the same sizes.

    Attributes:
        tensors: Those of `run_on`, of this bucket but for the cache's layers.
        num_own: How many are of this bucket.
        has_run: Whether there was a forward of these sizes.
        output: [S, 1, h], of the last replay.
        replay: Computes it.
    """

    tensors: list[Tensor]
    num_own: int
    has_run: bool = False
    output: Tensor | None = None
    replay: Callable[[], object] | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], num_tokens: int, num_layers: int) -> _Bucket:
        """For forwards of the sizes of some tensors, but with `num_tokens` tokens."""
        num_own = len(tensors) - num_layers
        per_token = [tensor.new_zeros(num_tokens) for tensor in tensors[:_PER_TOKEN]]
        others = [torch.empty_like(tensor) for tensor in tensors[_PER_TOKEN:num_own]]
        return cls([*per_token, *others, *tensors[num_own:]], num_own)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors of a forward; what comes after its tokens is zero.

        Token 0 at position 0 is written to the first place of the null page, and what it would
        read, the context of the first query, exists.
        """
        for own, given in zip(self.tensors[: self.num_own], tensors, strict=False):
            own[: len(given)].copy_(given)
        for own in self.tensors[:_PER_TOKEN]:
            own[len(tensors[0]) :].zero_()


def token_bucket(num_tokens: int, num_rows: int, block_size: int) -> int:
    """Tokens of a forward with padding: quarters of what its rows have with one block each.

    With two blocks they have twice that, so a number of rows has four buckets at most.
    """
    step = max(num_rows * block_size // 4, 1)
    return -(-num_tokens // step) * step


class CapturedForwards(ForwardRecorder):
    """See the module.

    Args:
        capture: How a forward is recorded.
        block_size: B.
        after: See `ForwardRecorder`.
    """

    def __init__(self, capture: Capture, block_size: int, after: int = FORWARDS_BEFORE) -> None:
        super().__init__(after)
        self._capture, self._block_size = capture, block_size
        self._buckets: OrderedDict[tuple[object, ...], _Bucket] = OrderedDict()

    def _begin(self, state: tuple[object, ...]) -> History:
        self._buckets.clear()
        return History()

    def _state_of(self, model: StageModel) -> tuple[object, ...]:
        addresses = tuple((id(tensor), tensor.data_ptr()) for tensor in tensors_of(model))
        return addresses, adapters_of(model)

    def _run(self, model: DiffusionGPTModel, row: Row, view: CacheView) -> Tensor | None:
        if view.prefills:
            return None
        tensors = (row.token_ids, row.position_ids, *view.tensors)
        bucket = self._bucket(view, tensors)
        bucket.fill(tensors)
        if bucket.replay is not None and bucket.output is not None:
            ACTIVITY.step()
            self.replayed += 1
            bucket.replay()
            return bucket.output

        def function() -> Tensor:
            return run_on(model, view, bucket.tensors)

        if not bucket.has_run:
            bucket.has_run = True
            return function()
        try:
            bucket.output, bucket.replay = self._capture(function)
        except Exception as error:  # of CUDA, a compiler or the model's code: it runs without
            what = f"{type(error).__name__}: {error}"
            raise RecordingError(what.partition("\n")[0]) from error
        self.recorded += 1
        bucket.replay()
        return bucket.output

    def _bucket(self, view: CacheView, tensors: Sequence[Tensor]) -> _Bucket:
        """The bucket of a forward; a new one may take the place of the one not used for longest."""
        num_tokens = token_bucket(len(tensors[0]), view.num_rows, self._block_size)
        *of_forward, first_layer = tensors[_PER_TOKEN : len(tensors) - view.num_layers + 1]
        sizes = (num_tokens, first_layer.data_ptr(), *(tensor.shape for tensor in of_forward))
        bucket = self._buckets.get(sizes)
        if bucket is None:
            if len(self._buckets) == MAX_RECORDINGS:
                self._buckets.popitem(last=False)
            bucket = self._buckets[sizes] = _Bucket.of(tensors, num_tokens, view.num_layers)
        self._buckets.move_to_end(sizes)
        return bucket
