"""Forward passes without gradients through all pipeline stages: rollouts, teacher, evaluation."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.attention import CachedAttention, release_masks
from megatron_dlm.models.attention_layout import Field, Pattern, clean_layout, pad_layout
from megatron_dlm.models.fp8 import fp8_multiple
from megatron_dlm.models.model import ModelChunks, chunks_of
from megatron_dlm.models.token_dispatch import can_gather, rows_of_equal_length
from megatron_dlm.parallel import ParallelGroups


@dataclass(frozen=True)
class Row:
    """One packed row for a forward pass.

    Attributes:
        token_ids: [S] int64.
        position_ids: [S] int64.
        attention: Layout of 4 to 6 rows and S columns, or with those of a share of a row
            (`context_parallel.Share`); or a `CachedAttention`, which ignores the padding tokens
            after its own.
        read: [n] int64, the tokens whose hidden states are wanted; None: all.
    """

    token_ids: Tensor
    position_ids: Tensor
    attention: Tensor | CachedAttention
    read: Tensor | None = None


def pad_row(row: Row, multiple: int) -> Row:
    """Append padding tokens up to a positive multiple; a layout is padded like the row."""
    length = len(row.token_ids)
    missing = -length % multiple if length else multiple
    if not missing:
        return row
    zeros = row.token_ids.new_zeros(missing)
    attention = row.attention
    if isinstance(attention, Tensor):
        attention = pad_layout(attention, attention.shape[1] + missing)
    return replace(
        row,
        token_ids=torch.cat((row.token_ids, zeros)),
        position_ids=torch.cat((row.position_ids, zeros)),
        attention=attention,
    )


def clean_row(texts: Sequence[Tensor], pattern: Pattern) -> Row:
    """A row of texts end to end, each seeing what the pattern shows of itself.

    Args:
        texts: Token ids [L] of each; none for the empty row of a rank that only takes part.
        pattern: `causal` or `full`, which know no blocks.
    """
    layout = clean_layout([len(text) for text in texts], pattern, block_size=1)
    none = torch.empty(0, dtype=torch.int64)
    return Row(torch.cat([none, *texts]), layout[Field.POSITION].long(), layout)


def most_rows(rows: int) -> int:
    """The largest number of rows of any replica of the model; all ranks call this.

    Ranks that share experts must run equally many rows, so the others add empty ones.
    """
    most = torch.tensor([rows], device=platform.device())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(platform.to_host(most).item())


def _sequence_parts(model: torch.nn.Module) -> int:
    """Ranks that a row is split over."""
    config = get_model_config(model)
    return int(config.tensor_model_parallel_size) if config.sequence_parallel else 1


def decoding_multiple(model: torch.nn.Module) -> int:
    """`forward_hidden` pads rows of a rollout to a multiple of this: parts that FP8 multiplies."""
    return _sequence_parts(model) * fp8_multiple(get_model_config(model))


def row_multiple(model: torch.nn.Module) -> int:
    """Rows with a layout are padded to a multiple of this: whole tiles of the attention kernel."""
    return math.lcm(decoding_multiple(model), chunks_of(model)[0].attention_tile)


def padded_rows(model: torch.nn.Module, rows: Sequence[Row]) -> tuple[list[Row], bool]:
    """Rows as long as parallelism needs them, and whether they are as long on all ranks.

    Experts that are shared by ranks get short rows without any word to the host if these are
    equally long. Ranks agree on the lengths once for all layers.
    """
    config = get_model_config(model)
    decoding, whole = decoding_multiple(model), row_multiple(model)
    padded = [
        pad_row(row, whole if isinstance(row.attention, Tensor) else decoding) for row in rows
    ]
    ranks = parallel_state.get_expert_tensor_and_model_parallel_world_size()
    if config.num_moe_experts is None or ranks == 1:
        return padded, False
    lengths = [len(row.token_ids) for row in padded]
    lockstep = ParallelGroups.from_parallel_state().lockstep
    if lockstep is not None:
        longest = torch.tensor(lengths, device=platform.device())
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=lockstep)
        lengths = platform.to_host(longest).tolist()
    elif parallel_state.get_tensor_model_parallel_world_size() % ranks:
        return padded, False  # a rank shares parts of experts with others than those of its rows
    if not can_gather(max(lengths) // _sequence_parts(model), ranks, config.moe_router_topk):
        return padded, False
    return [pad_row(row, length) for row, length in zip(padded, lengths, strict=True)], True


def rows_of_rounds(model: torch.nn.Module, count: int) -> int:
    """So many rows, or more: under virtual stages Megatron's schedule takes one a stage at once."""
    chunks = unwrap_model(model)
    if not isinstance(chunks, ModelChunks):
        return count
    stages = int(chunks.config.pipeline_model_parallel_size)
    return -(-count // stages) * stages


def whole_rounds(model: torch.nn.Module, rows: Sequence[Row]) -> list[Row]:
    """The rows, followed by rows without tokens; see `rows_of_rounds`."""
    missing = rows_of_rounds(model, len(rows)) - len(rows)
    return [*rows, *[clean_row([], "causal") for _ in range(missing)]]


def forward_row(model: torch.nn.Module, row: Row, equally_long: bool) -> Tensor:
    """Run the layers of this rank's stage on one row.

    Args:
        model: This rank's part of a `StageModel`; under Megatron's schedule as it passes it.
        row: As `padded_rows` returns it, as the flag.
        equally_long: Whether the ranks that share experts have rows of the same length.

    Returns:
        As the model does.
    """
    attention = row.attention
    if isinstance(attention, Tensor):
        attention = attention.to(platform.device())
    chosen = () if row.read is None else (row.read,)
    token_ids, position_ids, *read = platform.to_device(row.token_ids, row.position_ids, *chosen)
    with rows_of_equal_length() if equally_long else nullcontext():
        hidden: Tensor = model(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            attention_mask=attention,
            read=read[0] if read else None,
        )
    return hidden


def read_of_row(model: torch.nn.Module, row: Row, output: Tensor) -> Tensor:
    """What is wanted of a row's hidden states, on the last stage.

    Args:
        model: This rank's part of a `StageModel`.
        row: Without padding.
        output: What `forward_row` returned of the padded row, gathered from ranks that have parts.

    Returns:
        [S, h] without the padding, or [n, h] of the tokens that are read.
    """
    hidden = output[:, 0]
    if row.read is None:
        return hidden[: len(row.token_ids)]
    if chunks_of(model)[-1].leaves_out(row.read):
        return hidden
    return hidden.index_select(0, *platform.to_device(row.read))


@torch.no_grad()
def forward_hidden(model: torch.nn.Module, rows: Sequence[Row]) -> list[Tensor] | None:
    """Final hidden states of packed rows, by Megatron's forward-only schedule.

    All ranks of a pipeline must call this with the same number of rows of the same lengths; ranks
    that share expert-parallel collectives with the same number of rows.

    Args:
        model: This rank's part of a `StageModel` in evaluation mode.
        rows: The rows; each is padded to what sequence parallelism and the attention kernel need.

    Returns:
        On the last pipeline stage, per row, [S, h] on every tensor-parallel rank, without the
        padding, or [n, h] of the tokens that are read; on other stages None.
    """
    config = get_model_config(model)
    padded, equally_long = padded_rows(model, whole_rounds(model, rows))

    def forward_step(data_iterator: Iterator[Row], model: torch.nn.Module) -> tuple[Tensor, Any]:
        hidden = forward_row(model, next(data_iterator), equally_long)
        return hidden, lambda output, non_loss_data=True: output

    if config.pipeline_model_parallel_size == 1 and len(padded) == 1:
        # The schedule of one stage and one row, without its bookkeeping.
        outputs = [forward_row(model, padded[0], equally_long)]
    else:
        chunks = chunks_of(model)
        iterators = [iter(padded) for _ in chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if isinstance(model, ModelChunks) else iterators[0],
            model=chunks,
            num_microbatches=len(padded),
            seq_length=len(padded[0].token_ids),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    release_masks()
    if not parallel_state.is_pipeline_last_stage():
        return None
    if config.sequence_parallel:
        outputs = [gather_from_sequence_parallel_region(output) for output in outputs]
    return [read_of_row(model, row, output) for row, output in zip(rows, outputs, strict=False)]
