"""Mixtures of experts: values, gradients, kernels, waits of the host, and checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given
from megatron.core import dist_checkpointing, parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.experts import OperationCounter, sequential_layer
from megatron_dlm import platform
from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.models import token_dispatch
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.model_parameters import local_parameters
from megatron_dlm.models.model_provider import build_model, transformer_config
from megatron_dlm.models.moe_layer import GroupedMoELayer
from megatron_dlm.parallel import initialized
from tests.tiny import MOE

H, INNER = 8, 16


def _architecture(experts: int, top_k: int, **changes: Any) -> Any:
    sizes = {**MOE, "hidden_size": H, "moe_intermediate_size": INNER, **changes}
    sizes |= dict(model_type="qwen3_moe", num_experts=experts, num_experts_per_tok=top_k)
    return architecture_from_hf({**sizes, "rope_theta": 1e4}, "config.json")


def _config(experts: int, top_k: int, options: Any = None, **changes: Any) -> Any:
    flat = {"device": "cpu", **(options or {})}
    return transformer_config(_architecture(experts, top_k, **changes), Config.from_dict(flat))


@pytest.fixture
def alone() -> Iterator[None]:
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield


def _dense(layer: Any, hidden: torch.Tensor, top_k: int, renormalise: bool) -> torch.Tensor:
    """All experts on all tokens, weighted by a table that is zero for those not chosen."""
    fc1, fc2 = layer.experts.linear_fc1.weight.double(), layer.experts.linear_fc2.weight.double()
    probabilities = (hidden @ layer.router.weight.double().T).softmax(-1)
    threshold = probabilities.sort(-1, descending=True)[0][:, top_k - 1 : top_k]
    table = torch.where(probabilities >= threshold, probabilities, 0.0)
    if renormalise:
        table = table / table.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,efh->tef", hidden, fc1).chunk(2, -1)
    return torch.einsum("tef,ehf,te->th", F.silu(gate) * up, fc2, table)


@given(
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    tokens=st.integers(0, 12),
    renormalise=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(experts=6, top_k=1, tokens=1, renormalise=False, seed=0)  # five are empty
@example(experts=1, top_k=1, tokens=5, renormalise=True, seed=1)
@example(experts=4, top_k=2, tokens=0, renormalise=True, seed=2)
def test_layer_equals_all_experts_on_all_tokens(
    experts: int, top_k: int, tokens: int, renormalise: bool, seed: int
) -> None:
    top_k = min(top_k, experts)
    renormalise &= top_k > 1  # of one expert, Megatron takes the weight before any renormalisation
    torch.manual_seed(seed)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        layer = GroupedMoELayer(_config(experts, top_k, norm_topk_prob=renormalise))
        hidden = torch.randn(tokens, H, requires_grad=True)
        output = layer(hidden[:, None])[0][:, 0]
        grad = torch.randn(tokens, H)
        output.backward(grad)
        found = [hidden.grad, *(p.grad for p in layer.parameters())]
        layer.zero_grad()
        dense_hidden = hidden.detach().double().requires_grad_()
        expected = _dense(layer, dense_hidden, top_k, renormalise)
        expected.backward(grad.double())
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
        references = [dense_hidden.grad, *(p.grad for p in layer.parameters())]
        for gradient, reference in zip(found, references, strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient.double(), reference.double(), rtol=1e-4, atol=1e-5)


def test_two_runs_have_the_same_gradients_bit_for_bit(alone: None) -> None:
    layer = GroupedMoELayer(_config(8, 3))
    gradients = []
    for _ in range(2):
        hidden = torch.randn(40, 1, H, generator=torch.Generator().manual_seed(1))
        layer.zero_grad()
        layer(hidden.requires_grad_())[0].square().sum().backward()
        gradients.append([hidden.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@contextmanager
def _one_of(world_size: int, rank: int = 0, **parallel: int) -> Iterator[None]:
    """One rank of a world whose collectives do nothing."""
    platform.select("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(**parallel, create_gloo_process_groups=False)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


BF16 = {"bf16": True}
"""The only type of which PyTorch can say the result's shape without computing it."""
TOKENS = 16


def _count(config: Any, *, training: bool) -> OperationCounter:
    """Operations of a layer on tensors without values, which the host cannot read."""
    with FakeTensorMode():
        layer = GroupedMoELayer(config)
        hidden = torch.empty(TOKENS, 1, H, dtype=torch.bfloat16, requires_grad=training)
        with torch.set_grad_enabled(training):
            layer(hidden)  # asks once whether PyTorch has the kernel
            with OperationCounter() as counter:
                output = layer(hidden)[0]
                if training:
                    output.sum().backward()
    return counter


def test_kernels_do_not_grow_with_the_number_of_experts() -> None:
    with _one_of(1):
        for training, kernels in ((False, 20), (True, 48)):
            counts = {
                experts: _count(_config(experts, 4, BF16), training=training).kernels
                for experts in (8, 32, 128)
            }
            assert counts == dict.fromkeys((8, 32, 128), kernels)


@pytest.mark.parametrize("etp", [1, 2])
def test_the_host_waits_at_most_once_a_layer(etp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all on one rank and for rows of equal length; once where tokens are exchanged."""
    ranks, ep, reads = 8, 8 // etp, []

    def read_sizes(sizes: torch.Tensor) -> list[list[int]]:
        reads.append(sizes)
        return [[TOKENS * 4 * etp // ranks] * ranks] * ranks

    monkeypatch.setattr(token_dispatch, "read_sizes", read_sizes)
    parallel = dict(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    config = _config(16, 4, {**BF16, **parallel})
    with _one_of(ranks, **parallel):
        with token_dispatch.rows_of_equal_length():
            gathered = _count(config, training=False)
        assert not reads
        exchanged = _count(config, training=False)
        assert len(reads) == 2  # of two forwards
        _count(config, training=True)
        assert len(reads) == 4
    assert (gathered.kernels, exchanged.kernels) == {1: (28, 40), 2: (28, 48)}[etp]


def test_dispatch_of_short_and_long_rows() -> None:
    assert token_dispatch.can_gather(tokens=64, ranks=8, experts_per_token=8)  # a step of decoding
    assert not token_dispatch.can_gather(tokens=8192, ranks=8, experts_per_token=8)  # a prefill


def test_megatrons_sequential_experts_and_ours_read_each_others_checkpoints(
    alone: None, tmp_path: Path
) -> None:
    config = _config(4, 2)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    layers = {"sequential": sequential_layer(config), "grouped": GroupedMoELayer(config)}
    for source, target in (("sequential", "grouped"), ("grouped", "sequential")):
        layers[source].apply(lambda m: [p.data.normal_() for p in m.parameters(recurse=False)])
        (tmp_path / source).mkdir()
        dist_checkpointing.save(
            layers[source].sharded_state_dict(metadata=metadata), tmp_path / source
        )
        state = layers[target].sharded_state_dict(metadata=metadata)
        # What Megatron's linear layers store for Transformer Engine's, which is nothing.
        state = {name: value for name, value in state.items() if "_extra_state" not in name}
        loaded = dist_checkpointing.load(state, str(tmp_path / source))
        assert not layers[target].load_state_dict(loaded, strict=False).unexpected_keys
        experts: Any = layers["sequential"].experts.local_experts
        for name in ("linear_fc1", "linear_fc2"):
            stacked = torch.stack([getattr(expert, name).weight for expert in experts])
            assert torch.equal(getattr(layers["grouped"].experts, name).weight, stacked)


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_every_layout_stores_the_same_tensors(ep: int, etp: int) -> None:
    """[experts, gate and up, h] and [experts, h, inner], each element by one rank."""
    whole = {"linear_fc1": torch.randn(4, 2 * INNER, H), "linear_fc2": torch.randn(4, H, INNER)}
    stored = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    parallel = dict(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    for rank in range(ep * etp):
        with _one_of(ep * etp, rank, **parallel):
            layer = GroupedMoELayer(_config(4, 2, parallel))
            part = parallel_state.get_expert_tensor_parallel_rank()
            for name, tensor in whole.items():
                weight = getattr(layer.experts, name).weight
                own = tensor[layer.local_expert_indices]
                if name == "linear_fc1":
                    halves = [half.chunk(etp, dim=1)[part] for half in own.chunk(2, dim=1)]
                    weight.data.copy_(torch.cat(halves, dim=1))
                else:
                    weight.data.copy_(own.chunk(etp, dim=2)[part])
            for key, factory in layer.experts.sharded_state_dict("", ()).items():
                name = key.removesuffix(".weight")
                for shard in factory.build():
                    assert shard.key == f"experts.{name}.weight"
                    assert shard.global_shape == tuple(whole[name].shape)
                    start, size = shard.global_offset, (1, *shard.local_shape)
                    box = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
                    assert stored[name][box].isnan().all()
                    stored[name][box] = shard.data
                built = [shard.data for shard in factory.build()]
                assert torch.equal(factory.merge_fn(built), factory.data)
    for name, tensor in whole.items():
        assert torch.equal(stored[name], tensor)


def test_initial_weights_are_those_that_one_expert_after_the_other_draws(alone: None) -> None:
    torch.manual_seed(3)
    sequential = sequential_layer(_config(4, 2))
    torch.manual_seed(3)
    grouped = GroupedMoELayer(_config(4, 2))
    for expert, of_sequential in enumerate(sequential.experts.local_experts):
        for name in ("linear_fc1", "linear_fc2"):
            stacked = getattr(grouped.experts, name).weight
            assert torch.equal(stacked[expert], getattr(of_sequential, name).weight)


def test_parameters_have_the_names_of_single_experts(alone: None) -> None:
    """Those of Transformer Engine too, which keeps a parameter for each expert of a rank."""
    architecture = _architecture(4, 2)
    model = build_model(architecture, Config.from_dict({"device": "cpu"}))
    stacked = {local.mapping.megatron: local for local in local_parameters(model, architecture)}
    for layer in model.decoder.layers:
        layer.mlp.router.weight.requires_grad_(False)
        for name in ("linear_fc1", "linear_fc2"):
            weight = getattr(layer.mlp.experts, name).weight.detach()
            single = torch.nn.Module()
            for number, matrix in enumerate(weight):
                single.register_parameter(f"weight{number}", torch.nn.Parameter(matrix.clone()))
            setattr(layer.mlp.experts, name, single)
    single = {local.mapping.megatron: local for local in local_parameters(model, architecture)}
    assert stacked.keys() == single.keys()
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight" in single
    for name, local in stacked.items():
        assert torch.equal(local.parameter, single[name].parameter), name
