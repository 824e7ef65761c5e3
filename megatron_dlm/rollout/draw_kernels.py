"""The passes of `block_draws` over logits as Triton kernels, and the choice of a token.

Each reads the logits once, in their own type, and writes a few numbers a block. The sums of a
kernel have a fixed order and there are no atomics: the same logits give the same bits. The kernels
are called as PyTorch operators, so that counters and fake tensors see what they read and write.

n: tokens drawn at once; v: this rank's columns of the vocabulary, a multiple of the block; b: its
blocks; s: programs that share a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.rollout.block_draws import VOCABULARY_BLOCK, BlockStatistics, DrawPasses
from megatron_dlm.rollout.top_p_search import DIGIT_BITS, DigitSearch, Gather

_BLOCKS_OF_A_PROGRAM = 8
_DIGITS = 1 << DIGIT_BITS
_COLUMNS_OF_A_STEP = 32  # of a histogram: compared with every digit at once
_STEPS_OF_A_PROGRAM = 256
# Bits of a float32 that tell apart all values of a type; the others are zero.
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 24, torch.float32: 32}


@triton.jit
def statistics_kernel(
    logits, maximum, mass, moment, tempered, stride, blocks, inverse_temperature,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Statistics of `GROUP` blocks of a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_there = block < blocks
    x = tl.load(logits + row * stride + column, mask=is_there[:, None], other=0.0).to(tl.float32)
    top = tl.max(x, axis=1)
    shifted = x - top[:, None]
    weight = tl.exp(shifted)
    at = row * blocks + block
    tl.store(maximum + at, top, mask=is_there)
    tl.store(mass + at, tl.sum(weight, axis=1), mask=is_there)
    tl.store(moment + at, tl.sum(weight * shifted, axis=1), mask=is_there)
    if TEMPERED:
        sums = tl.sum(tl.exp(shifted * inverse_temperature), axis=1)
        tl.store(tempered + at, sums, mask=is_there)


@triton.jit
def filtered_kernel(
    logits, maximum, threshold, masses, stride, blocks, inverse_temperature,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tempered masses of the logits of `GROUP` blocks of a row that reach its threshold."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_there = block < blocks
    x = tl.load(logits + row * stride + column, mask=is_there[:, None], other=0.0).to(tl.float32)
    at = row * blocks + block
    top = tl.load(maximum + at, mask=is_there, other=0.0)
    weight = tl.exp((x - top[:, None]) * inverse_temperature)
    weight = tl.where(x >= tl.load(threshold + row), weight, 0.0)
    tl.store(masses + at, tl.sum(weight, axis=1), mask=is_there)


@triton.jit
def histogram_kernel(
    logits, top, floor, prefix, sums, stride, columns, inverse_temperature, shift,
    KEY_BITS: tl.constexpr, DIGITS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Masses by one digit of the keys, of logits whose higher digits are those of `prefix`."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    digit_ids = tl.arange(0, DIGITS)
    total = tl.zeros([DIGITS], dtype=tl.float32)
    highest = tl.load(top + row)
    wanted = tl.load(prefix + row)
    first = part * STEPS * STEP
    for start in range(first, tl.minimum(first + STEPS * STEP, columns), STEP):
        column = start + tl.arange(0, STEP)
        is_there = column < columns
        x = tl.load(logits + row * stride + column, mask=is_there, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        # In unsigned order, and only as many bits as the type of the logits has.
        key = ((key.to(tl.int64) + 2147483648) >> (32 - KEY_BITS)).to(tl.int64)
        counts = is_there & ((key >> (shift + 8)) == wanted)
        if HAS_FLOOR:
            counts = counts & (x >= tl.load(floor + row))
        weight = tl.where(counts, tl.exp((x - highest) * inverse_temperature), 0.0)
        digit = ((key >> shift) & (DIGITS - 1)).to(tl.int32)
        total += tl.sum(
            tl.where(digit_ids[:, None] == digit[None, :], weight[None, :], 0.0), axis=1
        )
    tl.store(sums + (row * tl.num_programs(1) + part) * DIGITS + digit_ids, total)


@triton.jit
def choice_kernel(
    logits, masses, best, fractions, regular, threshold, tokens, values, stride, blocks,
    inverse_temperature,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DRAWS: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Choose a block by the masses and a column by its logits, as `block_draws` does."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.load(best + row)
    fraction = 0.0
    is_regular = 0
    if DRAWS:
        is_regular = tl.load(regular + row)
        index = tl.arange(0, BLOCKS)
        mass = tl.load(masses + row * blocks + index, mask=index < blocks, other=0.0)
        reached = tl.cumsum(mass, axis=0)
        # The sum is the last of the cumulative ones, and no mass of zero is chosen.
        total = tl.max(reached, axis=0)
        target = tl.load(fractions + row) * total
        below = tl.sum((reached <= target).to(tl.int32), axis=0)
        last = tl.sum((reached < total).to(tl.int32), axis=0)
        drawn = tl.minimum(below, last)
        before = tl.max(tl.where(index < drawn, reached, 0.0), axis=0)
        own = tl.max(tl.where(index == drawn, mass, 0.0), axis=0)
        fraction = tl.minimum(tl.maximum((target - before) / own, 0.0), 1.0)
        block = tl.where(is_regular != 0, drawn, block)
    column = tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + block.to(tl.int64) * BLOCK + column).to(tl.float32)
    highest = tl.max(x, axis=0)
    chosen = tl.min(tl.where((x == highest) | (x != x), column, BLOCK - 1), axis=0)
    if DRAWS:
        weight = tl.exp((x.to(tl.float64) - highest.to(tl.float64)) * inverse_temperature)
        if HAS_THRESHOLD:
            weight = tl.where(x >= tl.load(threshold + row), weight, 0.0)
        reached = tl.cumsum(weight, axis=0)
        total = tl.max(reached, axis=0)
        below = tl.sum((reached <= fraction * total).to(tl.int32), axis=0)
        last = tl.sum((reached < total).to(tl.int32), axis=0)
        chosen = tl.where(is_regular != 0, tl.minimum(below, last), chosen)
    tl.store(tokens + row, block.to(tl.int64) * BLOCK + chosen)
    value = tl.max(tl.where(column == chosen, x, float("-inf")), axis=0)
    tl.store(values + row, value)


def _groups_of_blocks(logits: Tensor) -> tuple[int, tuple[int, int]]:
    blocks = logits.shape[1] // VOCABULARY_BLOCK
    return blocks, (len(logits), triton.cdiv(blocks, _BLOCKS_OF_A_PROGRAM))


@torch.library.custom_op("megatron_dlm::block_statistics", mutates_args=())
def _statistics(logits: Tensor, temperature: float) -> Tensor:
    """[4, n, b] float32, the fields of `BlockStatistics`."""
    blocks, grid = _groups_of_blocks(logits)
    result = logits.new_empty(4, len(logits), blocks, dtype=torch.float32)
    maximum, mass, moment, tempered = result
    is_tempered = temperature not in (0.0, 1.0)
    statistics_kernel[grid](
        *(logits, maximum, mass, moment, tempered, logits.stride(0), blocks),
        1.0 / temperature if is_tempered else 1.0,
        BLOCK=VOCABULARY_BLOCK,
        GROUP=_BLOCKS_OF_A_PROGRAM,
        TEMPERED=is_tempered,
    )
    if not is_tempered:
        tempered.copy_(mass)
    return result


@_statistics.register_fake
def _(logits: Tensor, temperature: float) -> Tensor:
    blocks = logits.shape[1] // VOCABULARY_BLOCK
    return logits.new_empty(4, len(logits), blocks, dtype=torch.float32)


@torch.library.custom_op("megatron_dlm::filtered_masses", mutates_args=())
def _filtered_masses(
    logits: Tensor, maximum: Tensor, threshold: Tensor, temperature: float
) -> Tensor:
    blocks, grid = _groups_of_blocks(logits)
    masses = torch.empty(maximum.shape, dtype=torch.float32, device=maximum.device)
    filtered_kernel[grid](
        *(logits, maximum.contiguous(), threshold.contiguous(), masses),
        *(logits.stride(0), blocks, 1.0 / temperature),
        BLOCK=VOCABULARY_BLOCK,
        GROUP=_BLOCKS_OF_A_PROGRAM,
    )
    return masses


@_filtered_masses.register_fake
def _(logits: Tensor, maximum: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    return torch.empty(maximum.shape, dtype=torch.float32, device=maximum.device)


def _programs_of_a_row(logits: Tensor) -> int:
    return -(-logits.shape[1] // (_COLUMNS_OF_A_STEP * _STEPS_OF_A_PROGRAM))


@torch.library.custom_op("megatron_dlm::digit_masses", mutates_args=())
def _digit_masses(
    logits: Tensor,
    top: Tensor,
    floor: Tensor | None,
    prefix: Tensor,
    temperature: float,
    shift: int,
) -> Tensor:
    """[n, s, 256] float32; masses by the digit at `shift`, ascending."""
    parts = _programs_of_a_row(logits)
    sums = logits.new_empty(len(logits), parts, _DIGITS, dtype=torch.float32)
    histogram_kernel[(len(logits), parts)](
        *(logits, top.contiguous(), top if floor is None else floor.contiguous()),
        *(prefix.contiguous(), sums, logits.stride(0), logits.shape[1], 1.0 / temperature, shift),
        KEY_BITS=_KEY_BITS[logits.dtype],
        DIGITS=_DIGITS,
        STEP=_COLUMNS_OF_A_STEP,
        STEPS=_STEPS_OF_A_PROGRAM,
        HAS_FLOOR=floor is not None,
    )
    return sums


@_digit_masses.register_fake
def _(logits: Tensor, *search: Tensor | float | None) -> Tensor:
    return logits.new_empty(len(logits), _programs_of_a_row(logits), _DIGITS, dtype=torch.float32)


@torch.library.custom_op("megatron_dlm::choose_columns", mutates_args=())
def _choose_columns(
    logits: Tensor,
    masses: Tensor,
    best_block: Tensor,
    fractions: Tensor | None,
    is_regular: Tensor | None,
    threshold: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Columns [n] int64 and their logits [n] float32; reads one block of each row of logits."""
    columns = torch.empty_like(best_block)
    values = torch.empty_like(best_block, dtype=torch.float32)
    blocks = masses.shape[1]
    draws = fractions is not None and is_regular is not None
    choice_kernel[(len(logits),)](
        *(logits, masses.contiguous(), best_block),
        masses if fractions is None else fractions.contiguous(),
        best_block if is_regular is None else is_regular.to(torch.int32),
        masses if threshold is None else threshold.contiguous(),
        *(columns, values, logits.stride(0), blocks, 1.0 / temperature if temperature else 1.0),
        BLOCK=VOCABULARY_BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
        DRAWS=draws,
        HAS_THRESHOLD=threshold is not None,
        num_warps=4 if blocks <= 4096 else 8,
    )
    return columns, values


@_choose_columns.register_fake
def _(
    logits: Tensor, masses: Tensor, best_block: Tensor, *draw: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(best_block), torch.empty_like(best_block, dtype=torch.float32)


def block_statistics(logits: Tensor, temperature: float) -> BlockStatistics:
    """As `block_draws.block_statistics`, of logits [n, v]."""
    return BlockStatistics(*_statistics(logits, temperature).unbind())


def _nucleus(
    logits: Tensor,
    statistics: BlockStatistics,
    temperature: float,
    top_p: float,
    floor: Tensor | None,
    gather: Gather,
) -> tuple[Tensor, Tensor]:
    """See `DrawPasses`."""
    top = gather(statistics.maximum.amax(dim=-1)).amax(dim=0)
    search = DigitSearch(len(logits), logits.device, top_p, gather)
    for shift in range(_KEY_BITS[logits.dtype] - DIGIT_BITS, -1, -DIGIT_BITS):
        sums = _digit_masses(logits, top, floor, search.prefix[:, 0], temperature, shift)
        search.advance(sums.sum(dim=1, dtype=torch.float64))
    threshold = search.values(_KEY_BITS[logits.dtype])
    return threshold, _filtered_masses(logits, statistics.maximum, threshold, temperature)


TRITON_PASSES = DrawPasses(
    block_statistics=block_statistics,
    nucleus=_nucleus,
    filtered_masses=_filtered_masses,
    choose_columns=_choose_columns,
)
