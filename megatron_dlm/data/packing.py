"""Packs documents into the rows of micro-batches, without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dlm.models.attention_layout import Field
from megatron_dlm.models.forward import Row, pad_row
from megatron_dlm.models.row_packing import RowPacking, texts_of_rows
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
        pairs: Pairs of a query and a key that it sees, of a share of a row
            (`training.context_shares`); None for a whole row, whose layout says.
    """

    row: Row
    supervised: Tensor
    labels: Tensor
    weights: Tensor
    targets: TeacherTargets | None
    loss_count: int
    pairs: int | None = None


def pack(
    documents: Sequence[Document], *, pad_multiple: int = 1, row_mean: bool = False
) -> TrainingBatch:
    """Lay documents end to end.

    Args:
        documents: At least one.
        pad_multiple: The row is padded to a multiple of this (sequence parallelism, kernel tiles).
        row_mean: Average over each document first, then over documents, instead of over tokens.
    """
    return _joined([_single(document, row_mean) for document in documents], pad_multiple)


def pack_rows(
    documents: Sequence[Document],
    packing: RowPacking,
    *,
    pad_multiple: int = 1,
    row_mean: bool = False,
) -> list[TrainingBatch]:
    """Lay documents into rows. Loss sums and loss counts of the rows add up to those of `pack`.

    Under a budget of tokens, a document of several texts that do not see each other is cut between
    them where it is too long for a row.

    Args:
        documents: At least one.
        packing: How many to a row.
        pad_multiple: As in `pack`, of each row.
        row_mean: As in `pack`.
    """
    batches = [_single(document, row_mean) for document in documents]
    if packing.max_tokens is not None:
        batches = [part for batch in batches for part in _cut(batch, packing.max_tokens)]
    rows = packing.rows([len(batch.row.token_ids) for batch in batches])
    return [_joined([batches[i] for i in row], pad_multiple) for row in rows]


def empty_row(batch: TrainingBatch, pad_multiple: int = 1) -> TrainingBatch:
    """A row of padding only, like another one: adds exactly zero to loss and gradient."""
    empty = replace(_part(batch, 0, 0), loss_count=0)
    return replace(empty, row=pad_row(empty.row, pad_multiple))


def document_layout(document: Document) -> Tensor:
    """The layout of a document as a row of its own, without padding (`attention_layout`)."""
    texts = document.document_ids
    if texts is None:
        texts = torch.zeros(len(document.token_ids), dtype=torch.int64)
    layout = torch.stack(
        (texts.int(), document.block.int(), document.stream.int(), document.position.int())
    )
    if document.annealing is not None:  # in all documents of an update, or in none
        layout = torch.cat((layout, document.annealing))
    elif document.keys is not None:  # likewise
        layout = torch.cat((layout, document.keys[None]))
    return layout


def _single(document: Document, row_mean: bool) -> TrainingBatch:
    """A document as a row of its own, without padding."""
    layout = document_layout(document)
    supervised = len(document.supervised)
    count = supervised if document.loss_count is None else document.loss_count
    return TrainingBatch(
        row=Row(document.token_ids, layout[Field.POSITION].long(), layout),
        supervised=document.supervised,
        labels=document.labels,
        weights=document.weights / max(count, 1) if row_mean else document.weights,
        targets=document.targets,
        loss_count=int(count > 0) if row_mean else count,
    )


def _joined(batches: Sequence[TrainingBatch], pad_multiple: int) -> TrainingBatch:
    """Rows without padding laid end to end, and padded."""
    layouts, supervised, length, texts = [], [], 0, 0
    for batch in batches:
        layout = batch.row.attention
        assert isinstance(layout, Tensor)
        layout = layout.clone()
        if layout.shape[1]:
            # Parts of a row keep their numbers, and in a row texts count from 0.
            layout[Field.DOCUMENT] += texts - layout[Field.DOCUMENT, 0]
            texts = int(layout[Field.DOCUMENT, -1]) + 1
        layouts.append(layout)
        supervised.append(batch.supervised + length)
        length += layout.shape[1]
    row = Row(
        token_ids=torch.cat([batch.row.token_ids for batch in batches]),
        position_ids=torch.cat([batch.row.position_ids for batch in batches]),
        attention=torch.cat(layouts, dim=1),
    )
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return TrainingBatch(
        row=pad_row(row, pad_multiple),
        supervised=torch.cat(supervised),
        labels=torch.cat([batch.labels for batch in batches]),
        weights=torch.cat([batch.weights for batch in batches]),
        # All documents of a row have been annotated, or none.
        targets=TeacherTargets.cat(targets) if len(targets) == len(batches) else None,
        loss_count=sum(batch.loss_count for batch in batches),
    )


def _cut(batch: TrainingBatch, max_tokens: int) -> list[TrainingBatch]:
    """Cut a row without padding into parts of at most `max_tokens`, or of one text that is longer.

    Loss sums of the parts add up to that of the row; its loss count stays with the first part.
    """
    if len(batch.row.token_ids) <= max_tokens:
        return [batch]
    assert isinstance(batch.row.attention, Tensor)
    lengths = batch.row.attention[Field.DOCUMENT].bincount()
    ends = [0, *lengths.cumsum(0).tolist()]
    return [
        _part(batch, ends[texts.start], ends[texts.stop])
        for texts in texts_of_rows(lengths.tolist(), max_tokens)
    ]


def _part(batch: TrainingBatch, start: int, end: int) -> TrainingBatch:
    row, targets = batch.row, batch.targets
    assert isinstance(row.attention, Tensor)
    inside = (batch.supervised >= start) & (batch.supervised < end)
    return TrainingBatch(
        row=Row(
            token_ids=row.token_ids[start:end],
            position_ids=row.position_ids[start:end],
            attention=row.attention[:, start:end].contiguous(),
        ),
        supervised=batch.supervised[inside] - start,
        labels=batch.labels[inside],
        weights=batch.weights[inside],
        targets=None if targets is None else targets[inside],
        loss_count=batch.loss_count if start == 0 else 0,
    )


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
