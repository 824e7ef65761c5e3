"""Layers of Transformer Engine and DeepEP, built and run as far as it goes without a GPU.

Transformer Engine's classes are written in Python and call a library of CUDA kernels; DeepEP is
such a library. No kernel runs here: layers of the first are built, and the exchange that the second
makes is done by PyTorch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.model_provider import build_model, transformer_config
from megatron_dlm.models.moe_layer import GroupedMoELayer
from tests.tiny import MOE, REPOSITORY

EXPERTS, OWN, TOP_K = 8, 4, 3
FLEX = {
    "device": "cpu",
    "expert_model_parallel_size": EXPERTS // OWN,
    "moe_token_dispatcher_type": "flex",
}
ARCHITECTURE = architecture_from_hf(
    {
        **MOE,
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "rope_theta": 1e4,
    },
    "config.json",
)


@contextmanager
def _first_of_two() -> Iterator[None]:
    """The first of two processes, each with half of the experts; collectives do nothing."""
    platform.select("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=2, create_gloo_process_groups=False
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _dispatch(
    rows: Tensor, experts: Tensor, weights: Tensor, num_experts: int, group: Any, **_: Any
) -> Any:
    """What DeepEP's dispatch returns on the first process if the other one has no tokens.

    Rows [N, h] for an expert of this process, the numbers of its experts [N, k], -1 for others, and
    their weights, tokens of each expert, and what combining needs.
    """
    is_own = experts < OWN
    sent = is_own.any(1).nonzero()[:, 0]
    numbers = experts[sent].masked_fill(~is_own[sent], -1)
    counts = numbers[numbers >= 0].bincount(minlength=OWN)
    own_weights = weights[sent].masked_fill(~is_own[sent], 0.0)
    return rows[sent], numbers, own_weights, counts, (sent, len(rows))


def _combine(rows: Tensor, group: Any, handle: Any, **_: Any) -> Any:
    sent, length = handle
    return rows.new_zeros(length, rows.shape[1]).index_add(0, sent, rows), None


@contextmanager
def _deepep() -> Iterator[None]:
    with (
        mock.patch.object(token_dispatcher, "fused_dispatch", _dispatch),
        mock.patch.object(token_dispatcher, "fused_combine", _combine),
        mock.patch.object(token_dispatcher, "set_deepep_num_sms", return_value=None),
    ):
        yield


def test_a_layer_with_deepep_adds_up_the_experts_of_its_process() -> None:
    torch.manual_seed(0)
    with _first_of_two(), _deepep():
        config = transformer_config(ARCHITECTURE, Config.from_dict(FLEX))
        layer = GroupedMoELayer(config)
        hidden = torch.randn(20, config.hidden_size, requires_grad=True)
        output = layer(hidden[:, None])[0][:, 0]
        gradient = torch.randn(output.shape)
        output.backward(gradient)

        dense = hidden.detach().double().requires_grad_()
        chosen, numbers = (dense @ layer.router.weight.double().T).softmax(-1).topk(TOP_K)
        table = torch.zeros(20, EXPERTS, dtype=torch.float64).scatter(1, numbers, chosen)
        table = (table / table.sum(-1, keepdim=True))[:, :OWN]
        fc1, fc2 = (getattr(layer.experts, name).weight for name in ("linear_fc1", "linear_fc2"))
        gate, up = torch.einsum("th,efh->tef", dense, fc1.double()).chunk(2, -1)
        expected = torch.einsum("tef,ehf,te->th", F.silu(gate) * up, fc2.double(), table)
        expected.backward(gradient.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-6)
    assert hidden.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(hidden.grad.double(), dense.grad, rtol=1e-4, atol=1e-6)


def test_a_model_with_deepep_is_built_on_the_meta_device() -> None:
    with _first_of_two(), _deepep(), platform.on_meta():
        model = build_model(ARCHITECTURE, Config.from_dict(FLEX))
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        devices = {value.device.type for value in model.parameters()}
    h, inner = MOE["hidden_size"], MOE["moe_intermediate_size"]
    experts = "decoder.layers.0.mlp.experts"
    assert shapes[f"{experts}.linear_fc1.weight"] == (OWN, 2 * inner, h)
    assert shapes[f"{experts}.linear_fc2.weight"] == (OWN, h, inner)
    assert devices == {"meta"}


def test_without_deepep_the_layer_says_so() -> None:
    absent = mock.patch.object(token_dispatcher, "fused_dispatch", None)
    with _first_of_two(), absent, pytest.raises(ImportError, match="DeepEP is not installed"):
        GroupedMoELayer(transformer_config(ARCHITECTURE, Config.from_dict(FLEX)))


PYTHON_PART = Path(sys.prefix) / "optional"
"""Where `make test-core-latest` puts the Transformer Engine of docker/versions.env."""


@pytest.mark.skipif(
    not (PYTHON_PART / "transformer_engine").is_dir(),
    reason="Transformer Engine is in the environment of make test-core-latest only",
)
def test_transformer_engines_layers_have_the_shapes_of_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit_tests.models.transformer_engine_shapes", PYTHON_PART],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for case in found:
        assert case["transformer_engine"] == case["local"], case["name"]
        assert len(case["local"]) > 20
        assert "TELayerNormColumnParallelLinear" in case["classes"]
