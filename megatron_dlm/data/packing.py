"""Packs the documents of a micro-batch into one row, without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dlm.models.attention_layout import PADDING_DOCUMENT, Field
from megatron_dlm.models.forward import Row, pad_row, texts_of_rows
from megatron_dlm.types.document import Document
from megatron_dlm.types.teacher_targets import TeacherTargets


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch: a packed row and the inputs of its loss.

    S: tokens of the row; n: supervised tokens.

    Attributes:
        row: Input of the student.
        supervised: [n] int64, indices into S.
        labels: [n] int64.
        weights: [n] float32.
        targets: The teacher's n targets, or None.
        loss_count: What the loss sum is divided by, summed over the global batch: supervised
            tokens (or the objective's own count) or, under `row_mean`, samples whose count is not
            zero.
    """

    row: Row
    supervised: Tensor
    labels: Tensor
    weights: Tensor
    targets: TeacherTargets | None
    loss_count: int


def pack(
    documents: Sequence[Document], *, pad_multiple: int = 1, row_mean: bool = False
) -> TrainingBatch:
    """Lay documents end to end.

    Args:
        documents: At least one.
        pad_multiple: The row is padded to a multiple of this (sequence parallelism, kernel tiles).
        row_mean: Average over each document first, then over documents, instead of over tokens.
    """
    lengths = [len(document.token_ids) for document in documents]
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    layout = torch.stack(
        (
            _document_ids(documents).int(),
            torch.cat([document.block for document in documents]).int(),
            torch.cat([document.stream for document in documents]).int(),
            torch.cat([document.position for document in documents]).int(),
        )
    )
    annealing = [document.annealing for document in documents if document.annealing is not None]
    keys = [document.keys for document in documents if document.keys is not None]
    if annealing:  # in all documents of an update, or in none
        layout = torch.cat((layout, torch.cat(annealing, dim=1)))
    elif keys:  # likewise
        layout = torch.cat((layout, torch.cat(keys)[None]))
    row = Row(
        token_ids=torch.cat([document.token_ids for document in documents]),
        position_ids=layout[Field.POSITION].long(),
        attention=layout,
    )
    supervised = torch.cat(
        [document.supervised + start for document, start in zip(documents, starts, strict=True)]
    )
    weights = torch.cat([document.weights for document in documents])
    loss_counts = [
        len(document.supervised) if document.loss_count is None else document.loss_count
        for document in documents
    ]
    if row_mean:
        counts = torch.tensor(loss_counts).clamp(min=1)
        weights = weights / torch.repeat_interleave(
            counts, torch.tensor([len(document.supervised) for document in documents])
        )
    targets = [document.targets for document in documents if document.targets is not None]
    return TrainingBatch(
        row=pad_row(row, pad_multiple),
        supervised=supervised,
        labels=torch.cat([document.labels for document in documents]),
        weights=weights,
        # All documents of a row have been annotated, or none.
        targets=TeacherTargets.cat(targets) if len(targets) == len(documents) else None,
        loss_count=sum(d.loss_count != 0 for d in documents) if row_mean else sum(loss_counts),
    )


def cut_row(batch: TrainingBatch, max_tokens: int, pad_multiple: int = 1) -> list[TrainingBatch]:
    """Cut a row between texts that do not see each other, to need less memory at a time.

    Loss sums of the parts add up to that of the row; its loss count stays with the first part.

    Args:
        batch: What `pack` returned.
        max_tokens: Limit of a part before padding; a longer text gets a part of its own.
        pad_multiple: Each part is padded to a multiple of this.
    """
    assert isinstance(batch.row.attention, Tensor)
    text = batch.row.attention[Field.DOCUMENT]
    lengths = text[text != PADDING_DOCUMENT].bincount()  # numbered in the order in which they lie
    ends = [0, *lengths.cumsum(0).tolist()]
    return [
        _part(batch, ends[texts.start], ends[texts.stop], pad_multiple)
        for texts in texts_of_rows(lengths.tolist(), max_tokens)
    ]


def empty_row(batch: TrainingBatch, pad_multiple: int = 1) -> TrainingBatch:
    """A row of padding only, like another one: adds exactly zero to loss and gradient."""
    return replace(_part(batch, 0, 0, pad_multiple), loss_count=0)


def _part(batch: TrainingBatch, start: int, end: int, pad_multiple: int) -> TrainingBatch:
    row, targets = batch.row, batch.targets
    assert isinstance(row.attention, Tensor)
    inside = (batch.supervised >= start) & (batch.supervised < end)
    tokens = Row(
        token_ids=row.token_ids[start:end],
        position_ids=row.position_ids[start:end],
        attention=row.attention[:, start:end].contiguous(),
    )
    return TrainingBatch(
        row=pad_row(tokens, pad_multiple),
        supervised=batch.supervised[inside] - start,
        labels=batch.labels[inside],
        weights=batch.weights[inside],
        targets=None if targets is None else targets[inside],
        loss_count=batch.loss_count if start == 0 else 0,
    )


def _document_ids(documents: Sequence[Document]) -> Tensor:
    """Document of each token of a row, numbered 0, 1, ... across all its samples."""
    numbered, first = [], 0
    for document in documents:
        own = document.document_ids
        if own is None:
            own = torch.zeros(len(document.token_ids), dtype=torch.int64)
        numbered.append(own + first)
        first += int(own[-1]) + 1 if len(own) else 1
    return torch.cat(numbered)


def batch_to(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    """The same batch on a device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    row = batch.row
    assert isinstance(row.attention, Tensor)
    return replace(
        batch,
        row=Row(
            token_ids=move(row.token_ids),
            position_ids=move(row.position_ids),
            attention=move(row.attention),
        ),
        supervised=move(batch.supervised),
        labels=move(batch.labels),
        weights=move(batch.weights),
        targets=None if batch.targets is None else batch.targets.to(device),
    )
