"""Gradients of whole models, whatever layout they were computed under."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_dlm.training import student


class Piece(NamedTuple):
    """What a rank holds of the gradient of a parameter, which has a name in checkpoints."""

    name: str
    shape: tuple[int, ...]
    place: tuple[int | slice, ...]
    values: Tensor


@contextmanager
def recorded_gradients() -> Iterator[list[list[Piece]]]:
    """Keep the gradients of updates, summed over all ranks and before clipping.

    Parameters that are not trained have none, and count as zeros. Under a distributed optimizer or
    virtual stages a rank would not hold what is asked for here.

    Yields:
        This rank's pieces of each update.
    """
    updates: list[list[Piece]] = []
    original = student.finalize_model_grads

    def recorded(chunks: list[DistributedDataParallel], *args: Any, **options: Any) -> None:
        original(chunks, *args, **options)
        [chunk] = chunks
        assert not chunk.ddp_config.use_distributed_optimizer
        updates.append(_pieces(chunk.module))

    with mock.patch.object(student, "finalize_model_grads", recorded):
        yield updates


def _pieces(model: torch.nn.Module) -> list[Piece]:
    """Those of a rank, which a checkpoint would say of its weights."""
    weights = {parameter: parameter.data for parameter in model.parameters()}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        for parameter, weight in weights.items():
            gradient = getattr(parameter, "main_grad", None)
            parameter.data = torch.zeros_like(weight) if gradient is None else gradient
        state = model.sharded_state_dict(metadata={"dp_cp_group": group})
        apply_factories(state)
        return [
            Piece(part.key, part.global_shape, part.global_slice(), part.data.detach().clone())
            for part in nested_values(state)
            if isinstance(part, ShardedTensor)
        ]
    finally:
        for parameter, weight in weights.items():
            parameter.data = weight


def whole(pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The gradient of each parameter, NaN where no piece has it."""
    gradients: dict[str, Tensor] = {}
    for piece in pieces:
        gradient = gradients.setdefault(piece.name, torch.full(piece.shape, torch.nan))
        gradient[piece.place] = piece.values
    return gradients


def largest_difference(ranks: Sequence[Sequence[Piece]], expected: dict[str, Tensor]) -> float:
    """How far any number of any rank is from what is expected.

    Args:
        ranks: Pieces of each rank; together they have every number.
        expected: The gradient of each parameter.

    Returns:
        The largest difference, as a share of the parameter's largest gradient; for parameters that
        have no gradient the difference itself.
    """
    together = whole([piece for pieces in ranks for piece in pieces])
    assert together.keys() == expected.keys()
    assert all(bool(gradient.isfinite().all()) for gradient in together.values())
    return max(
        float((piece.values - expected[piece.name][piece.place]).abs().max())
        / (float(expected[piece.name].abs().max()) or 1.0)
        for pieces in ranks
        for piece in pieces
    )
