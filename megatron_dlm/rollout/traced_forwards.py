"""Recordings of forwards on the CPU: PyTorch's operations, with a symbolic number of tokens.

A recording is the list of operations that the modules called. It is of any number of tokens for
which the conditions hold that came up while it was made. Attention, whose sizes follow the
sequences, stays a call of the forward's own `CachedAttention`. Nothing is padded, and no operation
is replaced by another: results are those of the modules, bit for bit.

S: tokens of a forward; n: those of them that are read.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.megatron_internals import views_kept
from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.cpu_kernels import IMPLEMENTATIONS
from megatron_dlm.models.forward import Row, forward_row
from megatron_dlm.models.model import DiffusionGPTModel, StageModel
from megatron_dlm.rollout.kv_cache import CacheView
from megatron_dlm.rollout.recorded_forwards import (
    FORWARDS_BEFORE,
    MAX_RECORDINGS,
    ForwardRecorder,
    History,
    RecordingError,
    adapters_of,
    kind_of,
    tensors_of,
)


@torch.library.custom_op("megatron_dlm::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer_number: int, softmax_scale: float
) -> Tensor:
    """Stands for `CachedAttention.attend` while a forward is recorded."""
    raise NotImplementedError("only recorded, never called")


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer_number: int, softmax_scale: float) -> Tensor:
    return torch.empty_like(query)


class _AnyAttention:
    """A `CachedAttention` to record."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Tensor:
        context: Tensor = torch.ops.megatron_dlm.attend(
            query, key, value, layer_number, softmax_scale
        )
        return context


def _call_attention(
    attention: CachedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer_number: int,
    softmax_scale: float,
) -> Tensor:
    return attention.attend(layer_number, query, key, value, softmax_scale)


_VIEWS = frozenset({"chunk", "select", "t", "transpose", "unbind", "unsqueeze"})
"""Operations that give the same memory however often they are called."""


def _shorten(graph: Graph) -> None:
    """Leave out operations that do nothing or were done before; call the others without detours."""
    known: dict[tuple[object, ...], Node] = {}
    for node in graph.nodes:
        target = node.target
        if target is torch._C._set_grad_enabled:  # there are no gradients to a replay
            graph.erase_node(node)
            continue
        if target in IMPLEMENTATIONS:
            node.target = IMPLEMENTATIONS[target]
            continue
        if target is operator.getitem:
            name, key = "", (target, *node.args)
        elif isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            name = target._schema.name.removeprefix("aten::")
            key = (name, *node.args)
        else:
            continue
        same = None
        # `view_as` of a tensor itself stays: it writes the strides in the usual way, and by them a
        # product of three dimensions is one of two, or of as many matrices as tokens.
        if name in ("dropout", "dropout_") and not node.args[2]:
            same = node.args[0]
        elif target is operator.getitem or name in _VIEWS:
            same = known.setdefault(key, node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif name and not node.kwargs:
            # What Python's binding calls is the same operation; `torch.ops` looks for it longer.
            if hasattr(torch._C.TensorBase, name):
                node.op, node.target = "call_method", name
            elif hasattr(torch, name):
                node.target = getattr(torch, name)


class Trace:
    """One recording.

    Args:
        model: The only tensors that the recording has of its own are this model's.
        token_ids: [S] int64, of the forward that it is made from.
        position_ids: [S] int64.
        read: [n] int64, see the model; nothing: all tokens.

    Attributes:
        replay: Takes token ids [S], positions [S], n tokens, and a `CachedAttention`; returns what
            the model does.

    Raises:
        RecordingError: The forward has another tensor of its own.
        Exception: It asks for values of a tensor, or PyTorch cannot record what it does.
    """

    replay: Callable[..., Tensor]

    def __init__(
        self, model: DiffusionGPTModel, token_ids: Tensor, position_ids: Tensor, *read: Tensor
    ) -> None:
        def forward(token_ids: Tensor, position_ids: Tensor, *read: Tensor) -> Tensor:
            hidden: Tensor = model(
                input_ids=token_ids[None],
                position_ids=position_ids[None],
                attention_mask=_AnyAttention(),
                read=read[0] if read else None,
            )
            return hidden

        record = make_fx(
            forward, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        with views_kept():
            graph: GraphModule = record(token_ids, position_ids, *read)
        own = {id(tensor) for tensor in tensors_of(model)}
        for node in graph.graph.find_nodes(op="get_attr"):
            tensor = getattr(graph, node.target)
            if id(tensor) not in own:
                raise RecordingError(f"a tensor of shape {tuple(tensor.shape)} is not the model's")
        inputs = graph.graph.find_nodes(op="placeholder")
        self._num_inputs = len(inputs)
        assert graph.shape_env is not None  # sizes are symbolic
        condition = graph.shape_env.produce_guards_expression(
            [node.meta["val"] for node in inputs], ignore_static=False
        )
        self._condition: CodeType = compile(condition or "True", "<sizes>", "eval")
        with graph.graph.inserting_after(inputs[-1]):
            attention = graph.graph.placeholder("attention")
        target = torch.ops.megatron_dlm.attend.default
        for node in graph.graph.find_nodes(op="call_function", target=target):
            node.target, node.args = _call_attention, (attention, *node.args)
        _shorten(graph.graph)
        graph.recompile()
        for node in graph.graph.find_nodes(op="get_attr"):  # found without `Module.__getattr__`
            vars(graph)[node.target] = getattr(graph, node.target)
        self.replay = graph.forward

    def fits(self, *inputs: Tensor) -> bool:
        """Whether it is of as many tokens, all those that are passed to `replay`."""
        named = {"L": {f"t{place}": tensor for place, tensor in enumerate(inputs)}}
        return len(inputs) == self._num_inputs and bool(eval(self._condition, SYMPY_INTERP, named))


MAX_STATES = 4
"""States of a model's adapters whose recordings are kept at once."""


@dataclass
class _Recordings(History):
    """Of a model with some of its adapters on.

    Attributes:
        traces: The recordings.
        trace_of: By the number of tokens and `kind_of`; None: there are too many.
    """

    traces: list[Trace] = field(default_factory=list)
    trace_of: dict[tuple[int, str], Trace | None] = field(default_factory=dict)


@dataclass
class _OfModel:
    """Recordings of a model, for all that decode with it.

    Attributes:
        tensors: Identities of the tensors that they are of.
        states: By the adapters that are on, the state used last at the end.
    """

    tensors: object = None
    states: OrderedDict[object, _Recordings] = field(default_factory=OrderedDict)

    def in_state(self, tensors: object, adapters: object) -> _Recordings:
        """The recordings of a state; those of other tensors are dropped."""
        if tensors != self.tensors:
            self.tensors = tensors
            self.states.clear()
        found = self.states.setdefault(adapters, _Recordings())
        self.states.move_to_end(adapters)
        if len(self.states) > MAX_STATES:
            self.states.popitem(last=False)
        return found


_OF_MODELS: WeakKeyDictionary[StageModel, _OfModel] = WeakKeyDictionary()
"""Rollouts may be short and have an engine each: a recording stays as long as its model."""


class TracedForwards(ForwardRecorder):
    """See the module.

    Args:
        model: Whose forwards it runs; other recorders of it have the same recordings.
        after: See `ForwardRecorder`.
    """

    def __init__(self, model: StageModel, after: int = FORWARDS_BEFORE) -> None:
        super().__init__(after)
        self._of_model = _OF_MODELS.setdefault(model, _OfModel())
        self._recordings = _Recordings()

    def _begin(self, state: tuple[object, ...]) -> History:
        self._recordings = self._of_model.in_state(*state)
        return self._recordings

    def _state_of(self, model: StageModel) -> tuple[object, ...]:
        # A recording has the tensors themselves: wherever their memory is, it is read there.
        return tuple(map(id, tensors_of(model))), adapters_of(model)

    def _run(self, model: DiffusionGPTModel, row: Row, view: CacheView) -> Tensor | None:
        inputs = [row.token_ids, row.position_ids]
        kind = kind_of(model, row)
        if kind != "all" and row.read is not None:
            inputs.append(row.read)
        sizes = len(row.token_ids), kind
        trace_of = self._recordings.trace_of
        if sizes not in trace_of:
            trace_of[sizes] = self._find(model, row, inputs, view)
        trace = trace_of[sizes]
        if trace is None:
            return None
        ACTIVITY.step()
        self.replayed += 1
        return trace.replay(*inputs, view)

    def _find(
        self, model: DiffusionGPTModel, row: Row, inputs: Sequence[Tensor], view: CacheView
    ) -> Trace | None:
        """The recording of such inputs, if necessary a new one; None: there are too many."""
        traces = self._recordings.traces
        for trace in traces:
            if trace.fits(*inputs):
                return trace
        if len(traces) == MAX_RECORDINGS:
            return None
        try:
            trace = Trace(model, *inputs)
            replayed = trace.replay(*inputs, view)
        except RecordingError:
            raise
        except Exception as error:  # whatever it is, the modules may do without a recording
            what = f"{type(error).__name__}: {error}"
            raise RecordingError(what.partition("\n")[0]) from error
        # What a forward writes into the cache is the same each time.
        if not torch.equal(replayed, forward_row(model, row, False)):
            raise RecordingError("replayed at once, the forward has another result")
        traces.append(trace)
        self.recorded += 1
        return trace
