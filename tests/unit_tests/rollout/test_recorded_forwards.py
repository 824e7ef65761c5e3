"""Replayed forwards give what the modules give; what may not be replayed is noticed."""

import dataclasses
import gc
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.errors import UserError
from megatron_dlm.megatron_internals import views_kept
from megatron_dlm.models.lora import (
    attach_adapters,
    drop_out_adapter_inputs,
    train_adapters_only,
)
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import initialized
from megatron_dlm.rollout import kv_cache
from megatron_dlm.rollout.captured_forwards import Capture, CapturedForwards, token_bucket
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.recorded_forwards import MAX_RECORDINGS
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.rollout.traced_forwards import _OF_MODELS, MAX_STATES, TracedForwards
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.rollout.tiny_models import (
    FULL_ATTENTION,
    MASK,
    PAD,
    SPECULATIVE,
    VOCAB_SIZE,
    fields,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
    tiny_model,
)

PROMPTS = make_prompts([5, 40, 8, 2])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionGPTModel]:
    with tiny_model(tmp_path_factory.mktemp("qwen3")) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    _OF_MODELS.clear()


def results(trajectories: list[Trajectory]) -> list[tuple]:
    """All that may differ in one bit."""
    return [
        (*fields(t), None if t.confidence is None else t.confidence.tolist()) for t in trajectories
    ]


def generated(engine: RolloutEngine, length: int = 10) -> list[tuple]:
    return results(engine.generate(PROMPTS, length))


def expected(model: torch.nn.Module, **changes: Any) -> list[tuple]:
    return generated(make_engine(model, keeps_confidence=True, rollout_graphs="off", **changes))


def traced(engine: RolloutEngine) -> TracedForwards:
    assert engine._traced is not None
    return engine._traced


SETTINGS: dict[str, dict[str, Any]] = {
    **{
        name: {"remasking_strategy": name}
        for name, strategy in STRATEGIES.items()
        if not strategy.verifies
    },
    "speculative": SPECULATIVE,
    "greedy": {"temperature": 0.0},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8, "temperature": 0.7},
    "blocks of 8": {"block_size": 8, "max_running_requests": 6},
    "pieces of prompts": {"chunked_prefill_size": 8, "max_running_requests": 1},
}


@pytest.mark.slow
def test_replayed_rollouts_are_the_same_in_every_bit(model: DiffusionGPTModel) -> None:
    """Under every setting; recordings are of all, for they are of the model.

    Of forwards of which several tokens are read, one, or all.
    """
    recorder = TracedForwards(model, after=0)
    for name, changes in SETTINGS.items():
        engine = make_engine(model, keeps_confidence=True, rollout_graphs="on", **changes)
        engine._traced = recorder
        assert generated(engine) == expected(model, **changes), name
    assert recorder.history.problem is None
    assert recorder.replayed == recorder.history.forwards.total() > 5 * len(SETTINGS)
    assert recorder.recorded == 3 == len(recorder.history.forwards)


class Products(TorchDispatchMode):
    """Counts products of matrices by operation and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[tuple[str, torch.Size]]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.counts[name, out.shape] += 1
        return out


def test_replays_have_the_products_of_the_modules(model: DiffusionGPTModel) -> None:
    counts = []
    for graphs in ("off", "on"):
        engine = make_engine(model, rollout_graphs=graphs)
        generated(engine)
        with Products() as products:
            generated(engine)
        counts.append(products.counts)
    assert traced(engine).replayed
    assert counts[0] == counts[1]


def test_weights_that_change_are_read_where_they_are(model: DiffusionGPTModel) -> None:
    engine = make_engine(model, keeps_confidence=True, rollout_graphs="on")
    before = generated(engine)
    recorder = traced(engine)
    first = recorder.recorded
    linear = model.decoder.layers[0].mlp.linear_fc1
    original = linear.weight
    try:
        with torch.no_grad():
            original.mul_(0.5)  # as an optimizer does
        assert generated(engine) == expected(model) != before
        original.data = original.data * 2.0  # other memory, as after an offload
        assert generated(engine) == before
        assert recorder.recorded == first
        linear.weight = torch.nn.Parameter(original.data * 0.5)  # another parameter
        assert generated(engine) == expected(model) != before
        assert recorder.recorded == 2 * first
    finally:
        linear.weight = original


@pytest.mark.slow
def test_what_the_host_decides_in_a_forward_is_noticed(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = model.decoder.final_layernorm
    forward, calls = norm.forward, []

    def reads(x: Tensor) -> Tensor:
        return forward(x) * (2.0 if x.sum().item() > 0 else 1.0)

    def keeps(x: Tensor) -> Tensor:
        calls.append(x)
        return forward(x) + torch.tensor([float(len(calls))])

    def changes(x: Tensor) -> Tensor:
        calls.append(x)
        return forward(x) * len(calls)

    def fails(x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise KeyError("another kind of tensor")
        return forward(x)

    for function, problem in (
        (reads, "GuardOnDataDependentSymNode: Could not guard on data-dependent expression"),
        (keeps, r"a tensor of shape \(1,\) is not the model's"),
        (changes, "replayed at once, the forward has another result"),
        (fails, "KeyError: 'another kind of tensor'"),
    ):
        _OF_MODELS.clear()
        monkeypatch.setattr(norm, "forward", function)
        calls.clear()
        engine = make_engine(model, rollout_graphs="on")
        engine.generate(PROMPTS, 6)
        recorder = traced(engine)
        assert recorder.history.problem is not None
        assert re.match(problem, recorder.history.problem), recorder.history.problem
        assert recorder.replayed == 0


def test_hooks_are_called(model: DiffusionGPTModel) -> None:
    """Whenever they were added; without them the recordings go on."""
    engine = make_engine(model, keeps_confidence=True, rollout_graphs="on")
    before = generated(engine)
    recorder, norm, calls = traced(engine), model.decoder.final_layernorm, []
    replayed = recorder.replayed

    def twice(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        if module is not norm:
            return None
        calls.append(output)
        return output * 2.0

    for hooked in (
        norm.register_forward_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        handle = hooked(twice)
        calls.clear()
        try:
            hooked_results = generated(engine)
            called = len(calls)
            assert hooked_results == expected(model) != before
        finally:
            handle.remove()
        assert len(calls) == 2 * called > 0
        assert recorder.replayed == replayed
    assert generated(engine) == before
    assert recorder.replayed == 2 * replayed
    assert recorder.recorded == 2  # several tokens are read, or one


def test_hooks_of_updates_need_no_call(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        model = load_model(tmp_path)
        attach_adapters(model, rank=2, alpha=4.0, target_modules=["linear_qkv"], seed=0)
        train_adapters_only(model)
        drop_out_adapter_inputs(model, dropout=0.5, seed=0)
        engine = make_engine(model, keeps_confidence=True, rollout_graphs="on")
        assert generated(engine) == expected(model)
        assert traced(engine).replayed


def test_recordings_come_after_some_forwards_and_stay(model: DiffusionGPTModel) -> None:
    """By default, short rollouts record nothing; recordings outlive a call."""
    engine = make_engine(model, keeps_confidence=True)
    recorder = TracedForwards(model, after=30)
    engine._traced = recorder
    same = expected(model)
    assert [generated(engine) for _ in range(3)] == [same] * 3
    several, one = (recorder.history.forwards[kind] for kind in ("some", "one"))
    assert several > 30 > one > 0
    assert recorder.recorded == 1
    assert recorder.replayed == several - 30


def check_shared_recordings(model: DiffusionGPTModel) -> None:
    """Of engines one after the other, with adapters on and off."""
    layer = model.decoder.layers[0].mlp.linear_fc1

    def decoded(choice: str, enabled: bool) -> TracedForwards:
        layer.adapter_enabled = enabled
        engine = make_engine(model, rollout_graphs=choice)
        engine.generate(PROMPTS, 3)
        return traced(engine)

    first = decoded("auto", True)
    forwards = first.history.forwards.copy()
    assert first.replayed == 0
    on, off, on_again, off_again = (decoded("on", x) for x in (True, False, True, False))
    kinds = len(forwards)
    assert [r.recorded for r in (on, off, on_again, off_again)] == [kinds, kinds, 0, 0]
    assert on_again.replayed == off_again.replayed == on.replayed == forwards.total()
    assert first.history is on.history is on_again.history
    assert off.history is off_again.history
    assert on.history.forwards == forwards + forwards + forwards


def test_engines_of_a_model_share_recordings(tmp_path: Path) -> None:
    """They end with the model."""
    save_tiny_model(tmp_path)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        model = load_model(tmp_path)
        check_shared_recordings(model)
        assert len(_OF_MODELS) == 1
        ended = weakref.ref(model)
        del model
        gc.collect()
        assert ended() is None
        assert len(_OF_MODELS) == 0


def test_few_states_are_kept(model: DiffusionGPTModel) -> None:
    of_model = TracedForwards(model)._of_model
    first = of_model.in_state("tensors", 0)
    assert of_model.in_state("tensors", 0) is first
    for state in range(1, MAX_STATES + 1):
        of_model.in_state("tensors", state)
    assert len(of_model.states) == MAX_STATES
    assert of_model.in_state("tensors", 0) is not first
    of_model.in_state("others", 0)
    assert len(of_model.states) == 1


def test_what_is_not_recorded_is_refused(model: DiffusionGPTModel) -> None:
    engine = make_engine(model, FULL_ATTENTION, rollout_graphs="on")
    with pytest.raises(UserError, match=r"--rollout-graphs = 'on': under full .*; choose auto"):
        engine.generate(PROMPTS, 4)
    engine = make_engine(model, FULL_ATTENTION)
    assert len(engine.generate(PROMPTS, 4)) == len(PROMPTS)
    assert engine._traced is None


def without_recording(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """A `Capture` that runs the modules each time."""
    output = function()
    return output, lambda: output.copy_(function())


def traced_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """A `Capture` like a CUDA graph: operations on fixed memory, all else is as it was."""
    with views_kept():
        graph = make_fx(function)()
    output = graph()
    return output, lambda: output.copy_(graph())


@pytest.mark.parametrize("error", [KeyError("a key"), RuntimeError("CUDA error"), AssertionError()])
def test_whatever_a_capture_raises_the_modules_run(
    model: DiffusionGPTModel, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        function()
        raise error

    monkeypatch.setattr(kv_cache, "has_static_shapes", lambda device: True)
    plain = expected(model)
    recorder = captured(monkeypatch, fails)
    assert generated(make_engine(model, keeps_confidence=True)) == plain
    assert recorder.history.problem == f"{type(error).__name__}: {error}"
    assert recorder.recorded == recorder.replayed == 0


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 5, "top_p": 0.9}, SPECULATIVE],
    ids=["filters", "speculative"],
)
@pytest.mark.slow
def test_graphs_of_fixed_sizes_and_memory(
    model: DiffusionGPTModel, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA captures, with operations of PyTorch in the place of kernels."""
    monkeypatch.setattr(kv_cache, "has_static_shapes", lambda device: True)
    plain = [t[:-1] for t in expected(model, **changes)]
    found = []
    for capture in (without_recording, traced_graph):
        recorder = captured(monkeypatch, capture)
        engine = make_engine(model, keeps_confidence=True, rollout_graphs="on", **changes)
        found.append(generated(engine))
        assert recorder.history.problem is None
        assert recorder.replayed > recorder.recorded >= 1
    assert found[0] == found[1]
    assert [t[:-1] for t in found[1]] == plain


def captured(monkeypatch: pytest.MonkeyPatch, capture: Capture) -> CapturedForwards:
    """What takes the place of the engine's recorder from here on."""
    recorder = CapturedForwards(capture, block_size=4, after=0)
    monkeypatch.setattr(RolloutEngine, "_recorder", lambda engine: recorder)
    return recorder


def test_a_long_rollout_has_few_graphs(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3 + 13 * index % 150 for index in range(8)]
    prompts = [
        dataclasses.replace(prompt, max_response_length=20 + 24 * index)
        for index, prompt in enumerate(make_prompts(lengths))
    ]
    monkeypatch.setattr(kv_cache, "has_static_shapes", lambda device: True)
    recorder = captured(monkeypatch, without_recording)
    engine = make_engine(
        model,
        max_running_requests=8,
        remasking_strategy="low_confidence_static",
        denoising_steps_per_block=2,
        rollout_graphs="on",
        special_tokens=SpecialTokens(MASK, PAD, MASK, vocab_size=VOCAB_SIZE),  # no draw is an end
    )
    engine.generate(prompts, 200)
    assert len(recorder._buckets) <= MAX_RECORDINGS
    assert recorder.recorded <= MAX_RECORDINGS
    assert recorder.replayed > 0.7 * recorder.history.forwards.total()


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_a_bucket_is_at_most_a_quarter_larger(block_size: int) -> None:
    for num_rows in (4, 8, 64):
        least, most = num_rows // 2 * block_size, 2 * num_rows * block_size
        buckets = {n: token_bucket(n, num_rows, block_size) for n in range(least + 1, most + 1)}
        step = max(num_rows * block_size // 4, 1)
        assert all(n <= bucket < n + step for n, bucket in buckets.items())
        assert len(set(buckets.values())) <= 6
