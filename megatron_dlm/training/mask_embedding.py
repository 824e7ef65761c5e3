"""Initial input embedding of MASK when an autoregressive model is converted.

No text contained MASK, so its row has the values of the table's initialisation (or padding). That
is fine if the embedding is trained. Under RND1's rates it hardly changes, and with adapters not at
all; then the row should at least be similar to inputs that the layers know.
"""

import torch
from torch.distributed import ProcessGroup

from megatron_dlm.config.groups import MaskEmbeddingInit
from megatron_dlm.models.model import StageModel, chunks_of, head_weight


@torch.no_grad()
def initialize_mask_embedding(
    model: StageModel,
    mask_token_id: int,
    vocab_size: int,
    init: MaskEmbeddingInit,
    tp_group: ProcessGroup | None,
) -> None:
    """Replace the row of MASK by the mean of all other rows, or keep it; all ranks call this.

    A tied output layer shares the table, on the last pipeline stage as a copy: it is changed as
    well. An output layer of its own is not.

    Args:
        model: This rank's part, weights loaded.
        mask_token_id: Id of MASK.
        vocab_size: Rows from here on are padding.
        init: `mean` or `keep`.
        tp_group: Ranks that hold the other rows; None for one rank.
    """
    if init == "keep":
        return
    first = chunks_of(model)[0]
    if model.pre_process:
        table = first.embedding.word_embeddings.weight
        _fill_row(table, mask_token_id, vocab_size, tp_group)
    elif model.post_process and first.share_embeddings_and_output_weights:
        _fill_row(head_weight(model), mask_token_id, vocab_size, tp_group)


def _fill_row(
    table: torch.Tensor, row: int, vocab_size: int, tp_group: ProcessGroup | None
) -> None:
    """Write the mean of the other rows of a vocabulary-parallel table [V / tp, h] into a row."""
    start = len(table) * (0 if tp_group is None else tp_group.rank())
    here = start <= row < start + len(table)
    total = table[: max(0, vocab_size - start)].double().sum(0)
    if here:
        total -= table[row - start].double()
    if tp_group is not None:
        torch.distributed.all_reduce(total, group=tp_group)
    if here:
        table[row - start] = (total / (vocab_size - 1)).to(table.dtype)
