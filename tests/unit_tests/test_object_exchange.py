"""What ranks send each other: the same objects, and no more than they are."""

import pickle
from dataclasses import fields

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from megatron_dlm.object_exchange import _packed
from megatron_dlm.types.trajectory import Trajectory

DTYPES = [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16]


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_tensors_arrive_as_they_were(
    shape: list[int], dtype: torch.dtype, transposed: bool
) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    tensor = tensor.t() if transposed and tensor.ndim == 2 else tensor
    received = pickle.loads(_packed({"one": [tensor, 5], "same": tensor}))
    assert received["one"][0].dtype == dtype
    assert torch.equal(received["one"][0], tensor)
    received["same"].zero_()  # is its own and may be written


def test_a_trajectory_is_as_long_as_its_tokens() -> None:
    """Its tensors are views of those of a whole rollout, which PyTorch would send with each."""
    of_rollout = torch.arange(100_000)
    sent = Trajectory(3, of_rollout[:20], of_rollout[50:90], of_rollout[:40], record={"a": [1]})
    message = _packed([sent])
    assert len(message) < 3000 < len(pickle.dumps([sent])) / 100
    (received,) = pickle.loads(message)
    for field in fields(Trajectory):
        value, expected = getattr(received, field.name), getattr(sent, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value, expected), field.name
        else:
            assert value == expected, field.name


def test_a_gradient_is_not_sent() -> None:
    weight = torch.ones(3, requires_grad=True)
    received = pickle.loads(_packed(weight * 2))
    assert torch.equal(received, torch.full((3,), 2.0))
    assert not received.requires_grad


@pytest.mark.parametrize("value", [torch.nn.Parameter(torch.ones(2)), torch.eye(2).to_sparse()])
def test_other_tensors_go_as_pytorch_sends_them(value: torch.Tensor) -> None:
    received = pickle.loads(_packed(value))
    assert type(received) is type(value)
    assert torch.equal(received.to_dense(), value.to_dense())
