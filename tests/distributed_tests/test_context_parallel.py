"""What ranks that share a row send each other and keep, and that they compute what one would."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings

from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.attention_layout import Field, clean_layout
from megatron_dlm.models.context_parallel import share_of_row, token_ranks
from megatron_dlm.models.forward import Row
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from tests.distributed_tests.layouts import CP, RECOMPUTATION
from tests.distributed_tests.spawn import run_distributed
from tests.tiny import DENSE, run_config, save_random_model, write_data

LENGTH, BLOCK = 240, 16
"""Tokens of a response, that of the longest text of the model, which has no prompt."""
ELEMENT = 4
"""Bytes of a number."""
KEYS_AND_VALUES = 2 * DENSE["num_key_value_heads"] * DENSE["head_dim"] * ELEMENT
"""Bytes of a token's, of one layer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    write_data(folder, 8)
    save_random_model(folder / "dense")
    return folder


def _row() -> Row:
    """A response, all of whose blocks are trained on: clean but for the last one, and noisy."""
    clean = clean_layout([LENGTH], "block_causal", BLOCK)
    noisy = clean.clone()
    noisy[Field.STREAM] = 1
    layout = torch.cat((clean[:, :-BLOCK], noisy), dim=1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (layout.shape[1],), generator=generator)
    return Row(tokens, layout[Field.POSITION].long(), layout)


@contextmanager
def _sent_bytes() -> Iterator[dict[str, int]]:
    """Count what this rank sends to its context-parallel group."""
    sent = {"gathered": 0, "reduced": 0}
    gather, reduce = mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func
    others = parallel_state.get_context_parallel_world_size() - 1

    def counted_gather(output: torch.Tensor, own: torch.Tensor, group: Any) -> None:
        assert group == parallel_state.get_context_parallel_group()
        sent["gathered"] += others * own.nbytes
        gather(output, own, group=group)

    def counted_reduce(own: torch.Tensor, whole: torch.Tensor, group: Any) -> None:
        assert group == parallel_state.get_context_parallel_group()
        sent["reduced"] += others * own.nbytes
        reduce(own, whole, group=group)

    with (
        mock.patch.object(mappings, "dist_all_gather_func", counted_gather),
        mock.patch.object(mappings, "dist_reduce_scatter_func", counted_reduce),
    ):
        yield sent


def _forward_backward(model: torch.nn.Module, row: Row, weight: torch.Tensor) -> dict[str, Any]:
    """Hidden states, gradients and bytes that the forward keeps for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(
            input_ids=row.token_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=row.attention,
        )[:, 0]
    (hidden * weight).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"hidden": hidden.detach(), "gradients": gradients, "kept": sum(kept.values())}


def _columns(row: Row) -> int:
    """Tokens of a layout: more than the row has, if that is a share."""
    assert isinstance(row.attention, torch.Tensor)
    return row.attention.shape[1]


def _share_and_whole(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Compute a row whole, and this rank's share of it."""
    config = run_config(folder, folder / "dense", **options)
    with initialized(config):
        ranks = parallel_state.get_context_parallel_world_size()
        assert parallel_state.get_context_parallel_rank() == rank
        torch.manual_seed(0)
        model = build_model(read_architecture(str(folder / "dense" / "config.json"), ""), config)
        row, hidden_size = _row(), DENSE["hidden_size"]
        weight = torch.randn(len(row.token_ids), hidden_size)
        whole = _forward_backward(model, row, weight)
        holder = token_ranks(row.attention, ranks)
        share = share_of_row(row, holder, rank, ranks, 1)
        held = (share.place >= 0).nonzero()[:, 0]
        own_weight = torch.zeros(len(share.row.token_ids), hidden_size)
        own_weight[share.place[held]] = weight[held]
        with _sent_bytes() as sent:
            own = _forward_backward(model, share.row, own_weight)
        for name, gradient in own["gradients"].items():
            torch.distributed.all_reduce(gradient)
            assert torch.allclose(gradient, whole["gradients"][name], rtol=1e-4, atol=1e-4), name
        assert own["gradients"].keys() == whole["gradients"].keys()
        difference = own["hidden"][share.place[held]] - whole["hidden"][held]
        assert float(difference.abs().max()) < 1e-4
        return {
            "shared": _columns(share.row) - len(share.row.token_ids),
            "tokens": len(share.row.token_ids),
            "kept": own["kept"] / whole["kept"],
            **sent,
        }


@pytest.mark.parametrize("ranks", [2, 4])
def test_only_clean_keys_travel_and_a_rank_keeps_its_part(folder: Path, ranks: int) -> None:
    """Half of what would be sent if both streams were cut by position, and 1/R of the memory."""
    results = run_distributed(_share_and_whole, ranks, folder, {CP: ranks, **RECOMPUTATION})
    clean, both = LENGTH - BLOCK, 2 * LENGTH - BLOCK
    layers = DENSE["num_hidden_layers"]
    for result in results:
        assert clean <= result["shared"] <= 1.05 * clean  # with padding
        # A rank's clean tokens to each other rank: in the forward pass, and once more recomputed.
        to_others = layers * KEYS_AND_VALUES * (ranks - 1) // ranks
        assert result["gathered"] == 2 * to_others * result["shared"]
        assert result["reduced"] == to_others * result["shared"]
        assert result["shared"] <= both / 2
        assert result["tokens"] <= both / ranks + BLOCK
        assert result["kept"] <= 1.08 / ranks
