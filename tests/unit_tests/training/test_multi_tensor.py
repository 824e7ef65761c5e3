"""Norm and scale of gradients: Apex's where it is installed, ours in its place."""

import json
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from megatron_dlm.training import multi_tensor
from tests.tiny import REPOSITORY


@pytest.mark.slow
def test_with_apex_its_optimizer_and_kernels_get_every_parameter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit_tests.training.apex_steps"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taken"]
    shapes = sorted(found["parameters"])
    assert len(shapes) > 20
    assert sorted(found["optimizer"]) == shapes
    sizes = sorted(math.prod(shape) for shape in shapes)
    for kind in ("norm", "scale"):
        assert all(sorted(call) == sizes for call in found[kind])
        assert found[kind]


def test_without_apex_the_same_is_done_in_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", None)
    multi_tensor.install_multi_tensor()
    assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
    assert clip_grads.multi_tensor_scale_impl is multi_tensor.scale
    tensors = [torch.randn(size) for size in (3, 70, 1)]
    nothing = torch.zeros(1)
    norm, _ = multi_tensor.l2_norm(0, nothing, [tensors], False)
    assert float(norm) == pytest.approx(float(torch.cat(tensors).double().norm()), rel=1e-6)
    scaled = [torch.zeros_like(tensor) for tensor in tensors]
    multi_tensor.scale(0, nothing, [tensors, scaled], 0.3)
    for tensor, result in zip(tensors, scaled, strict=True):
        torch.testing.assert_close(result, tensor * 0.3)
    same = [tensor.clone() for tensor in tensors]
    multi_tensor.scale(0, nothing, [same, same], 0.3)
    for tensor, result in zip(scaled, same, strict=True):
        assert torch.equal(tensor, result)
    # What a library has is left alone.
    with mock.patch.object(clip_grads, "l2_norm_impl", len):
        multi_tensor.install_multi_tensor()
        assert clip_grads.l2_norm_impl is len
