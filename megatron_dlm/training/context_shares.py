"""A rank's shares of the rows of an update, under context parallelism.

Ranks of a context-parallel group lay out the same rows, and each keeps the part of them that
`models.context_parallel` gives it: its noisy blocks and clean tokens, the losses at these tokens,
and the teacher's targets there.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.models.context_parallel import share_of_row, token_ranks
from megatron_dlm.models.forward import pad_row
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.teacher.placed_targets import delivered
from megatron_dlm.types.teacher_targets import PlacedTargets, TeacherTargets


def own_shares(
    rows: Sequence[TrainingBatch],
    groups: ParallelGroups,
    pad_multiple: int,
    teacher_hidden: Tensor | None = None,
) -> list[TrainingBatch]:
    """This rank's share of each row; all ranks of the context-parallel group call this.

    Losses and loss counts of the shares of a row add up to those of the row.

    Args:
        rows: The same on all these ranks.
        groups: Process groups of the model; without a context-parallel group rows are only padded.
        pad_multiple: Each share is padded to a multiple of this.
        teacher_hidden: This rank's hidden states of the teacher, for `PlacedTargets`.
    """
    if groups.cp is None:
        return [replace(batch, row=pad_row(batch.row, pad_multiple)) for batch in rows]
    placed = [batch.targets for batch in rows if isinstance(batch.targets, PlacedTargets)]
    shares, wanted = [], []
    for batch in rows:
        share, at = _share(batch, groups, pad_multiple)
        shares.append(share)
        wanted.append(at)
    if placed:
        assert teacher_hidden is not None
        targets = delivered(
            TeacherTargets.cat(placed), torch.cat(wanted), teacher_hidden, groups.cp
        )
        start = 0
        for i, share in enumerate(shares):
            end = start + len(share.supervised)
            shares[i] = replace(share, targets=targets[slice(start, end)])
            start = end
    return shares


def _share(
    batch: TrainingBatch, groups: ParallelGroups, pad_multiple: int
) -> tuple[TrainingBatch, Tensor]:
    """The share of a row, and the rank of each supervised token [n] of the whole row."""
    rank, ranks = groups.cp_rank, groups.cp_size
    holder = token_ranks(batch.row.attention, ranks)
    share = share_of_row(batch.row, holder, rank, ranks, pad_multiple)
    wanted = holder[batch.supervised]
    own = torch.nonzero(wanted == rank).flatten()
    targets = batch.targets
    if targets is not None and not isinstance(targets, PlacedTargets):
        targets = targets[own]
    return TrainingBatch(
        row=share.row,
        supervised=share.place[batch.supervised[own]],
        labels=batch.labels[own],
        weights=batch.weights[own],
        targets=targets,
        loss_count=batch.loss_count if rank == 0 else 0,
        pairs=share.pairs,
    ), wanted
