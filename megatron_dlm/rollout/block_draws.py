"""Draw tokens by inverse CDF over blocks of the vocabulary, in plain PyTorch.

The distribution is softmax(logits / temperature), restricted to the `top_k` most likely tokens and
then to the smallest set of these with mass >= `top_p`; tokens with equal logits stay together. With
one uniform number u a draw, the token is the first one, by ascending id, up to which the
distribution has a mass > u. Temperature 0 takes the most likely token, the lowest id among equals.

The vocabulary is cut into blocks of `VOCABULARY_BLOCK` ids. One pass over the logits, in chunks
that stay in cache, leaves a few numbers a block; a draw then chooses a block by these and a token
by the logits of that block. Sums over blocks are float64, in the order of the ids. Ranks that hold
shards of the vocabulary exchange a few numbers a draw: `gather` makes [tp, ...] in the order of
ranks from each rank's [...].

A token that must not be drawn has the lowest logit of its type. Where a row has no finite sum of
probabilities (a logit is NaN or infinite), its most likely token is taken.

Modelling code of exported folders contains this module.

n: tokens drawn at once; v: this rank's columns of the vocabulary, a multiple of the block; b: its
blocks; c: columns of a chunk; tp: ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.rollout.nucleus import LEAST_COLUMNS, nucleus
from megatron_dlm.rollout.top_p_search import Gather, only_rank, top_p_threshold

VOCABULARY_BLOCK = 128
# Columns of a chunk: for 64 rows, float32 buffers of 2 MiB each. Narrower products take longer.
CHUNK_COLUMNS = 64 * VOCABULARY_BLOCK
# Share of a chunk's blocks below which the CPU computes those alone.
FEW_BLOCKS = 0.3


@dataclass(frozen=True)
class BlockStatistics:
    """What a pass over the logits leaves, each [n, b] float32; x is a logit of the block.

    Attributes:
        maximum: m = max x.
        mass: Sum of exp(x - m).
        moment: Sum of exp(x - m) (x - m).
        tempered: Sum of exp((x - m) / temperature).
    """

    maximum: Tensor
    mass: Tensor
    moment: Tensor
    tempered: Tensor


def chunk_columns(device: torch.device) -> int:
    """Columns of a chunk; other devices than the CPU have larger caches, and launches to pay."""
    return CHUNK_COLUMNS if device.type == "cpu" else 4 * CHUNK_COLUMNS


def _host_computes(device: torch.device) -> bool:
    """Whether the host reads a value without waiting for a device."""
    return device.type == "cpu"


def padded_columns(columns: int) -> int:
    """Columns rounded up to whole blocks."""
    return -(-columns // VOCABULARY_BLOCK) * VOCABULARY_BLOCK


def forbid_tokens(
    logits: Tensor, *, first_id: int, vocab_size: int, mask_token_id: int | None
) -> None:
    """Give MASK and ids that the vocabulary does not have the lowest logit, in place.

    Args:
        logits: [n, c].
        first_id: Vocabulary id of the first column.
        vocab_size: Ids from here on are padding.
        mask_token_id: None: there is no MASK.
    """
    lowest = torch.finfo(logits.dtype).min
    logits[:, max(vocab_size - first_id, 0) :] = lowest
    if mask_token_id is not None and first_id <= mask_token_id < first_id + logits.shape[1]:
        logits[:, mask_token_id - first_id] = lowest


def block_statistics(chunks: Iterable[Tensor], temperature: float) -> BlockStatistics:
    """Statistics of the blocks of consecutive chunks of logits.

    Args:
        chunks: [n, c] each, c a multiple of the block; the first one is the widest. A chunk is used
            up before the next one is asked for.
        temperature: 0 and 1 need no tempered masses of their own.
    """
    parts = []
    buffers: Tensor | None = None
    for chunk in chunks:
        blocks = chunk.unflatten(1, (-1, VOCABULARY_BLOCK))
        if buffers is None:
            buffers = chunk.new_empty(2, *blocks.shape, dtype=torch.float32)
        shifted, weight = buffers[:, :, : blocks.shape[1]]
        maximum = blocks.amax(dim=-1).float()
        torch.sub(blocks, maximum[..., None], out=shifted)
        torch.exp(shifted, out=weight)
        mass = weight.sum(dim=-1)
        moment = weight.mul_(shifted).sum(dim=-1)
        tempered = mass
        if temperature not in (0.0, 1.0):
            tempered = shifted.mul_(1.0 / temperature).exp_().sum(dim=-1)
        parts.append(torch.stack((maximum, mass, moment, tempered)))
    return BlockStatistics(*torch.cat(parts, dim=-1).unbind())


def chunks_of(logits: Tensor) -> Iterable[Tensor]:
    """The chunks of logits [n, v]."""
    return logits.split(chunk_columns(logits.device), dim=1)


def block_of(logits: Tensor, blocks: Tensor) -> Tensor:
    """Logits [n, block] of one block, [n] int64, of each row of logits [n, v]."""
    index = blocks[:, None, None].expand(-1, 1, VOCABULARY_BLOCK)
    return logits.unflatten(1, (-1, VOCABULARY_BLOCK)).gather(1, index)[:, 0]


def top_k_threshold(logits: Tensor, maximum: Tensor, top_k: int, gather: Gather) -> Tensor:
    """The k-th largest logit of each row, over all ranks.

    The k largest values lie in the k blocks with the largest maxima.

    Args:
        logits: [n, v].
        maximum: [n, b] of the blocks.
        top_k: At least 1.
        gather: See the module.

    Returns:
        [n] float32.
    """
    if top_k < maximum.shape[1]:
        blocks = maximum.topk(top_k, dim=-1).indices[..., None].expand(-1, -1, VOCABULARY_BLOCK)
        logits = logits.unflatten(1, (-1, VOCABULARY_BLOCK)).gather(1, blocks).flatten(1)
    largest = logits.topk(min(top_k, logits.shape[1]), dim=-1).values.float()
    candidates = gather(largest).transpose(0, 1).flatten(1)
    return candidates.topk(min(top_k, candidates.shape[1]), dim=-1).values[:, -1]


def filtered_masses(
    chunks: Iterable[Tensor], maximum: Tensor, temperature: float, threshold: Tensor
) -> Tensor:
    """Tempered masses [n, b] float32 of the tokens of each block that reach a threshold.

    Args:
        chunks: As for `block_statistics`.
        maximum: [n, b] of the blocks.
        temperature: Above 0.
        threshold: [n].
    """
    masses, start = [], 0
    buffers: Tensor | None = None
    # Blocks without a token that reaches it have no mass. A NaN is looked at.
    reaches = ~(maximum < threshold[:, None])
    for chunk in chunks:
        blocks = chunk.unflatten(1, (-1, VOCABULARY_BLOCK))
        chunk_maximum = maximum[:, start : start + blocks.shape[1]]
        chosen = reaches[:, start : start + blocks.shape[1]]
        start += blocks.shape[1]
        if _host_computes(chunk.device) and chosen.sum() < FEW_BLOCKS * chosen.numel():
            rows, columns = chosen.nonzero(as_tuple=True)
            few = blocks[rows, columns]
            weight = (few.float() - chunk_maximum[chosen][:, None]).mul_(1.0 / temperature).exp_()
            weight.mul_(few >= threshold[rows, None])
            masses.append(torch.zeros_like(chunk_maximum).masked_scatter_(chosen, weight.sum(-1)))
            continue
        if buffers is None:
            buffers = chunk.new_empty(2, *blocks.shape, dtype=torch.float32)
        weight, is_kept = buffers[:, :, : blocks.shape[1]]
        torch.sub(blocks, chunk_maximum[..., None], out=weight)
        weight.mul_(1.0 / temperature).exp_()
        # As a number: a mask of bytes would take several times as long on the CPU.
        torch.ge(blocks, threshold[:, None, None], out=is_kept)
        masses.append(weight.mul_(is_kept).sum(dim=-1))
    return torch.cat(masses, dim=-1)


def first_above(masses: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Index [n] of the first of masses [n, m] up to which their sum is above a fraction of all.

    Also returned: which fraction of that mass, [n], the target has reached. A mass of zero is never
    chosen.
    """
    reached = masses.cumsum(dim=-1)
    total = reached[:, -1]
    target = (fraction * total).minimum(total.nextafter(torch.zeros_like(total)))
    index = (reached <= target[:, None]).sum(dim=-1).clamp_(max=masses.shape[1] - 1)
    mass = masses.gather(1, index[:, None])[:, 0]
    before = reached.gather(1, index[:, None])[:, 0] - mass
    return index, ((target - before) / mass).clamp_(0.0, 1.0)


def chosen_columns(
    block_logits: Callable[[Tensor], Tensor],
    masses: Tensor,
    best_block: Tensor,
    fractions: Tensor | None,
    is_regular: Tensor | None,
    threshold: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Choose a block of each row by the masses, and a column by the logits of that block.

    Args:
        block_logits: Logits [n, block] of one block, [n] int64, of each row.
        masses: [n, b] float64 of the blocks.
        best_block: [n], the one that holds the largest logit.
        fractions: [n] float64, share of the masses before the draw; None: the most likely token.
        is_regular: [n], false: the most likely token in this row; None with `fractions`.
        threshold: [n], lower logits are not drawn; None: all can be.
        temperature: Of the draw.

    Returns:
        Columns [n] int64 and their logits [n].
    """
    block, fraction = best_block, None
    if fractions is not None and is_regular is not None:
        drawn, fraction = first_above(masses, fractions)
        block = torch.where(is_regular, drawn, best_block)
    values = block_logits(block).double()
    column = values.argmax(dim=-1)
    if fraction is not None and is_regular is not None:
        weights = ((values - values.amax(dim=-1, keepdim=True)) / temperature).exp()
        if threshold is not None:
            weights = weights.masked_fill(values < threshold[:, None], 0.0)
        column = torch.where(is_regular, first_above(weights, fraction)[0], column)
    return block * VOCABULARY_BLOCK + column, values.gather(1, column[:, None])[:, 0]


def _columns_of_logits(logits: Tensor, *choice: Any) -> tuple[Tensor, Tensor]:
    """`chosen_columns` from logits [n, v]."""
    return chosen_columns(partial(block_of, logits), *choice)


def choose_tokens(
    statistics: BlockStatistics,
    choose_columns: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]],
    uniforms: Tensor,
    *,
    temperature: float,
    first_id: int,
    gather: Gather,
) -> Tensor:
    """Choose a rank, a block and a token for each row.

    Args:
        statistics: Of this rank's blocks; `tempered` after the filters.
        choose_columns: `chosen_columns` from the masses on, up to `is_regular`.
        uniforms: [n] float64 in [0, 1).
        temperature: 0 takes the most likely token.
        first_id: Vocabulary id of this rank's first column.
        gather: See the module.

    Returns:
        Token ids, their probabilities before temperature and filters, and the entropy in nats of
        that distribution, [3, n] float64; the same on every rank.
    """
    maximum = statistics.maximum.double()
    top, best_block = maximum.max(dim=-1)
    shift = maximum - top[:, None]
    scale, mass = shift.exp(), statistics.mass.double()
    block_masses = statistics.tempered.double()
    if temperature:
        block_masses = block_masses * (shift / temperature).exp()
    sums = torch.stack(
        (
            top,
            (scale * mass).sum(dim=-1),
            (scale * (statistics.moment.double() + shift * mass)).sum(dim=-1),
            block_masses.sum(dim=-1),
        )
    )
    of_ranks = gather(sums)
    owner: Tensor | None = None
    if len(of_ranks) == 1:
        highest, total, moment, all_masses = of_ranks[0]
    else:
        tops, masses, moments, tempered = of_ranks.unbind(dim=1)  # [tp, n] each
        highest, owner = tops.max(dim=0)
        shift = tops - highest
        scale = shift.exp()
        total = (scale * masses).sum(dim=0)
        moment = (scale * (moments + shift * masses)).sum(dim=0)
    log_total = total.log()
    entropy = log_total - moment / total

    fraction, is_regular = None, None
    if temperature:
        fraction = uniforms
        if owner is not None:
            rank_masses = (tempered * (shift / temperature).exp()).T
            drawn_owner, fraction = first_above(rank_masses, uniforms)
            all_masses = rank_masses.sum(dim=-1)
        is_regular = all_masses.isfinite() & (all_masses > 0.0)
        if owner is not None:
            owner = torch.where(is_regular, drawn_owner, owner)
    column, logit = choose_columns(block_masses, best_block, fraction, is_regular)
    chosen = torch.stack(((first_id + column).double(), logit.double()))
    of_ranks = gather(chosen)
    if owner is None:
        token_ids, logit = of_ranks[0]
    else:
        token_ids, logit = of_ranks.gather(0, owner.expand(1, 2, -1))[0]
    confidence = (logit - highest - log_total).exp()
    return torch.stack((token_ids, confidence, entropy.clamp(min=0.0)))


def _statistics_of_logits(logits: Tensor, temperature: float) -> BlockStatistics:
    return block_statistics(chunks_of(logits), temperature)


def _masses_of_logits(
    logits: Tensor, maximum: Tensor, threshold: Tensor, temperature: float
) -> Tensor:
    return filtered_masses(chunks_of(logits), maximum, temperature, threshold)


def _nucleus_of_logits(
    logits: Tensor,
    statistics: BlockStatistics,
    temperature: float,
    top_p: float,
    floor: Tensor | None,
    gather: Gather,
) -> tuple[Tensor, Tensor]:
    """See `DrawPasses`."""
    maximum = statistics.maximum
    tops = gather(maximum.amax(dim=-1))
    is_large = _host_computes(logits.device) and logits.shape[1] >= LEAST_COLUMNS
    if is_large and len(tops) == 1:
        totals = None
        if floor is None:
            shift = (maximum.double() - tops[0, :, None].double()) / temperature
            totals = (statistics.tempered.double() * shift.exp()).sum(dim=-1)
        return nucleus(logits, maximum, totals, temperature, top_p, floor)
    top = tops.amax(dim=0)
    threshold = top_p_threshold(logits, top, temperature, top_p, floor, gather)
    return threshold, filtered_masses(chunks_of(logits), maximum, temperature, threshold)


@dataclass(frozen=True)
class DrawPasses:
    """What passes over logits [n, v]: here in PyTorch, `draw_kernels` has others.

    Attributes:
        block_statistics: Logits and temperature to the statistics of the blocks.
        nucleus: What top-p keeps: the lowest logit [n] and the masses [n, b], from logits, their
            statistics, temperature, p, the lowest logits [n] that are left, and `gather`.
        filtered_masses: Logits, maxima of the blocks, threshold and temperature to masses [n, b].
        choose_columns: See `chosen_columns`, with logits for `block_logits`.
    """

    block_statistics: Callable[[Tensor, float], BlockStatistics] = _statistics_of_logits
    nucleus: Callable[
        [Tensor, BlockStatistics, float, float, Tensor | None, Gather], tuple[Tensor, Tensor]
    ] = _nucleus_of_logits
    filtered_masses: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _masses_of_logits
    choose_columns: Callable[
        [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float],
        tuple[Tensor, Tensor],
    ] = _columns_of_logits


TORCH_PASSES = DrawPasses()


def draw_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    first_id: int = 0,
    gather: Gather = only_rank,
    statistics: BlockStatistics | None = None,
    passes: DrawPasses = TORCH_PASSES,
) -> Tensor:
    """Draw one token for each row of logits.

    Args:
        logits: [n, v] of any floating type; what must not be drawn has the lowest value of it.
        uniforms: [n] float64 in [0, 1).
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        first_id: Vocabulary id of the first column.
        gather: See the module.
        statistics: Of the blocks, where they are known already.
        passes: What passes over the logits.

    Returns:
        As `choose_tokens`.
    """
    if statistics is None:
        statistics = passes.block_statistics(logits, temperature)
    threshold = None
    if temperature and top_k:
        threshold = top_k_threshold(logits, statistics.maximum, top_k, gather)
    if temperature and top_p < 1.0:
        threshold, masses = passes.nucleus(
            logits, statistics, temperature, top_p, threshold, gather
        )
        statistics = replace(statistics, tempered=masses)
    elif threshold is not None:
        masses = passes.filtered_masses(logits, statistics.maximum, threshold, temperature)
        statistics = replace(statistics, tempered=masses)

    def choose_columns(
        masses: Tensor, best_block: Tensor, fractions: Tensor | None, is_regular: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return passes.choose_columns(
            logits, masses, best_block, fractions, is_regular, threshold, temperature
        )

    return choose_tokens(
        statistics,
        choose_columns,
        uniforms,
        temperature=temperature,
        first_id=first_id,
        gather=gather,
    )
