"""The tokens that top-p keeps of a large vocabulary, on a CPU: no sort, and one pass of `exp`.

A row whose tokens are in few blocks, as of most models, is decided by the blocks with the largest
logits alone: what all others hold is known from the statistics of the blocks. In any other row a
histogram of every 16th token says where top-p may end. The exact mass above that logit then says
how far away the end is: after three or four such sums few tokens are left, which are sorted.

Modelling code of exported folders contains this module.

n: tokens drawn at once; v: columns of the whole vocabulary; b: its blocks; B: columns of a block;
k: blocks looked at alone.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.rollout.top_p_search import LOG_VOCABULARY, radix_search

# Smaller vocabularies are searched as fast digit by digit, all rows at once.
LEAST_COLUMNS = 1 << 15
_BEST_BLOCKS = 16
_SAMPLED = 16  # one column of so many
_BINS = 256
_FEW_TOKENS = 64  # left to be sorted
_AIMED_AT = 24  # so many tokens beside the end that is expected
_MOST_SUMS = 8
_MOST_TOKENS = 256


@dataclass(frozen=True)
class _Rows:
    """Rows of logits, and what a token of them weighs.

    Attributes:
        blocks: [n, b, B] of any floating type.
        top: [n], the largest of each row.
        temperature: Above 0.
        top_p: Below 1.
        floor: [n], lower logits are left out; None: none are.
    """

    blocks: Tensor
    top: Tensor
    temperature: float
    top_p: float
    floor: Tensor | None

    def of(self, rows: Tensor, values: Tensor) -> Tensor:
        """Weights exp((x - largest) / temperature) of values [m, B] float32 of rows [m]."""
        weights = (values - self.top[rows, None]).mul_(1.0 / self.temperature).exp_()
        return weights if self.floor is None else weights.mul_(values >= self.floor[rows, None])


def nucleus(
    logits: Tensor,
    maximum: Tensor,
    totals: Tensor | None,
    temperature: float,
    top_p: float,
    floor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The lowest logit that top-p keeps, and what the blocks hold of the tokens that it keeps.

    Args:
        logits: [n, v].
        maximum: [n, b] float32 of the blocks.
        totals: [n] float64, sum of exp((x - largest) / temperature) of a row; with `floor` None.
        temperature: Above 0.
        top_p: Below 1.
        floor: [n], lower logits are left out before; None: none are.

    Returns:
        Logits [n] float32, and masses [n, b] float32: sums of exp((x - m) / temperature), m the
        largest logit of the block.
    """
    top = maximum.amax(dim=-1)
    rows = _Rows(logits.unflatten(1, (maximum.shape[1], -1)), top, temperature, top_p, floor)
    thresholds, masses, is_found = _of_best_blocks(rows, maximum, totals)
    left = (~is_found).nonzero()[:, 0]
    if len(left):
        # Memory of its own for each row would cost more than what is computed in it.
        buffers = [torch.empty_like(rows.blocks[0], dtype=torch.float32) for _ in range(2)]
        found: dict[int, _Between] = {}
        for row, guide in zip(left.tolist(), _guides(rows, left), strict=True):
            search = _RowSearch(rows, row, buffers)
            total = search.total if totals is None else float(totals[row])
            between = search.ends(top_p * total, total, guide)
            if between is None:
                thresholds[row], masses[row] = search.whole(top_p * total)
            else:
                found[row] = between
        if found:
            few = torch.tensor(list(found))
            thresholds[few], masses[few] = _among_few(rows, few, list(found.values()))
    # From the largest logit of the row to that of the block; what is empty may be far from it.
    scale = ((top[:, None] - maximum) * (1.0 / temperature)).exp_()
    return thresholds, masses.mul_(scale.masked_fill_(masses == 0.0, 1.0))


def _of_best_blocks(
    rows: _Rows, maximum: Tensor, totals: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nucleus`, with masses relative to the row; and whether it is found, [n].

    No token outside of the k best blocks has a larger logit than the best block after these. The
    most likely token is taken where the sum of a row is not finite.
    """
    n, b, size = rows.blocks.shape
    highest, best = maximum.topk(min(_BEST_BLOCKS, b - 1) + 1, dim=-1)
    bound, best = highest[:, -1:], best[:, :-1]
    values = rows.blocks.gather(1, best[..., None].expand(-1, -1, size)).float().flatten(1)
    weights = rows.of(torch.arange(n), values)
    if rows.floor is not None:
        totals = weights.double().sum(dim=-1)
    assert totals is not None
    is_irregular = ~totals.isfinite()
    if rows.floor is not None:  # tokens of other blocks would be in the sum too
        totals = totals.masked_fill(bound[:, 0] >= rows.floor, math.inf)
    needed = rows.top_p * totals
    above = (weights * (values > bound)).double().sum(dim=-1)
    found = ((above >= needed) & ~is_irregular).nonzero()[:, 0]
    thresholds, masses = rows.top.clone(), maximum.new_zeros(n, b)
    masses.masked_fill_(is_irregular[:, None], math.nan)
    if len(found):
        values, weights = values[found], weights[found]
        distance = values - rows.top[found, None]
        threshold = radix_search(
            values, weights, distance, rows.temperature, rows.top_p, needed=needed[found]
        )
        weights.mul_(values >= threshold[:, None])
        thresholds[found] = threshold
        kept = weights.unflatten(1, (-1, size)).sum(dim=-1)
        masses[found] = masses[found].scatter_(1, best[found], kept)
    return thresholds, masses, is_irregular.index_fill_(0, found, True)


class _Guide:
    """Roughly what mass is above a logit of a row, from a part of its tokens.

    A place is a distance from the largest logit, in bins of a histogram.

    Args:
        reached: 1 + `_BINS` masses above the bins' upper ends, and above the last one's lower end.
        step: Width of a bin, in logits over the temperature.
    """

    def __init__(self, reached: list[float], step: float) -> None:
        self._reached, self._step = reached, step

    def weight(self, place: float) -> float:
        """Of a token there."""
        return math.exp(-self._step * place)

    def _mass_above(self, place: float) -> float:
        index = min(int(place), _BINS - 1)
        before, after = self._reached[index : index + 2]
        return before + (place - index) * (after - before)

    def _place_of(self, mass: float) -> float:
        index = min(max(bisect_left(self._reached, mass), 1), _BINS)
        before, after = self._reached[index - 1 : index + 1]
        share = (mass - before) / (after - before) if after > before else 0.5
        return index - 1 + min(max(share, 0.0), 1.0)

    def place(self, place: float, mass: float) -> float:
        """The place with so much more mass above it than above a place."""
        return self._place_of(self._mass_above(place) + mass)

    def between(self, first: float, last: float, share: float) -> float:
        """The place between two with that share of the mass between them."""
        start, stop = self._mass_above(first), self._mass_above(last)
        if start == stop:
            return first + share * (last - first)
        return self._place_of(start + share * (stop - start))


def _guides(rows: _Rows, left: Tensor) -> list[_Guide]:
    """Of the rows in `left`."""
    # Tokens further from the top than this hold less than 1 - p together.
    step = (LOG_VOCABULARY - math.log1p(-rows.top_p)) / _BINS
    sample = rows.blocks[:, :, ::_SAMPLED].index_select(0, left).float().flatten(1)
    weights = rows.of(left, sample).mul_(_SAMPLED)
    sample.sub_(rows.top[left, None]).mul_(-1.0 / (step * rows.temperature))
    places = sample.clamp_(0, _BINS - 1).int()
    places += torch.arange(0, len(left) * _BINS, _BINS, dtype=torch.int32)[:, None]
    size = len(left) * _BINS
    sums = torch.bincount(places.flatten(), weights.flatten(), minlength=size).double()
    reached = torch.nn.functional.pad(sums.view(-1, _BINS).cumsum(dim=-1), (1, 0))
    return [_Guide(row, step) for row in reached.tolist()]


@dataclass(frozen=True)
class _Between:
    """The end of a row's tokens that are kept is among those with weights in (low, high].

    Attributes:
        low: Tokens of larger weight have enough mass.
        high: Tokens of larger weight have less than enough.
        lower: Masses [b] above `low`.
        upper: Masses [b] above `high`.
        needed: Mass of the tokens between that is needed.
    """

    low: float
    high: float
    lower: Tensor
    upper: Tensor
    needed: float


class _RowSearch:
    """Tells the tokens of a row apart by their weights, until few are left.

    Args:
        rows: See the class.
        row: Which one.
        buffers: Two of [b, B] float32.
    """

    def __init__(self, rows: _Rows, row: int, buffers: list[Tensor]) -> None:
        self._rows, self._top = rows, float(rows.top[row])
        self._weights, self._kept = buffers
        self._values = rows.blocks[row].float()
        torch.sub(self._values, self._top, out=self._weights)
        if rows.temperature != 1.0:
            self._weights.mul_(1.0 / rows.temperature)
        self._weights.exp_()
        if rows.floor is not None:
            self._weights.mul_(torch.ge(self._values, float(rows.floor[row]), out=self._kept))

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return self._sums(0.0)[1]

    def _sums(self, weight: float) -> tuple[Tensor, float]:
        """Masses [b] of the tokens with more than a weight, and their sum."""
        sums = torch.threshold(self._weights, weight, 0.0, out=self._kept).sum(dim=-1)
        return sums, float(sums.sum(dtype=torch.float64))

    def ends(self, needed: float, total: float, guide: _Guide) -> _Between | None:
        """Where the tokens that are kept end; None: too many are left.

        Args:
            needed: Mass of the tokens that are kept.
            total: Sum of all weights.
            guide: Where to look.
        """
        lower, upper = None, torch.zeros_like(self._weights[:, 0])
        low, high, below, above = 0.0, 1.0, total, 0.0
        low_at, high_at = float(_BINS), 0.0
        at = guide.place(low_at, needed - total)
        for turn in range(_MOST_SUMS):
            weight = guide.weight(at)
            if not low < weight < high:
                break
            sums, mass = self._sums(weight)
            if mass >= needed:
                low, lower, below, low_at = weight, sums, mass, at
            else:
                high, upper, above, high_at = weight, sums, mass, at
            between = below - above
            if between <= _FEW_TOKENS * low:
                break
            # Next beside the expected end, on the side that is further away.
            margin = _AIMED_AT * weight
            if turn == 0:
                margin = max(margin, 0.25 * abs(mass - needed))
                at = guide.place(at, needed - mass + (margin if mass < needed else -margin))
            else:
                if below - needed < needed - above:
                    margin = -margin
                at = guide.between(high_at, low_at, (needed - above + margin) / between)
            # No further away: `needed` may be more than there is, where p is close to 1.
            at = min(max(at, high_at), low_at)
        if below - above > _MOST_TOKENS * low:
            return None
        if lower is None:
            lower, _ = self._sums(low)
        return _Between(low, high, lower, upper, needed - above)

    def whole(self, needed: float) -> tuple[Tensor, Tensor]:
        """The threshold and the masses [b], with all tokens looked at: sums told few apart."""
        values, weights = self._values.view(1, -1), self._weights.view(1, -1)
        threshold = radix_search(
            values,
            weights,
            torch.sub(values, self._top, out=self._kept.view(1, -1)),
            self._rows.temperature,
            self._rows.top_p,
            needed=torch.tensor([needed], dtype=torch.float64),
        )[0]
        kept = torch.ge(self._values, threshold, out=self._kept)
        return threshold, kept.mul_(self._weights).sum(dim=-1)


def _among_few(rows: _Rows, left: Tensor, between: list[_Between]) -> tuple[Tensor, Tensor]:
    """Thresholds [m] and masses [m, b] of the rows in `left`, [m], from what is left of each."""
    upper = torch.stack([part.upper for part in between])
    lower = torch.stack([part.lower for part in between])
    limits = torch.tensor(
        [(part.low, part.high, part.needed) for part in between], dtype=torch.float64
    )
    low, high, needed = limits.unbind(1)
    row, block = (lower != upper).nonzero(as_tuple=True)
    values = rows.blocks[left[row], block].float()
    weights = rows.of(left[row], values)
    # As those that the sums were compared with.
    is_between = (weights > low.float()[row, None]) & (weights <= high.float()[row, None])
    pair, column = is_between.nonzero(as_tuple=True)
    found, weight, of = values[pair, column], weights[pair, column], row[pair]
    counts = torch.bincount(of, minlength=len(left))
    # As rows of the same length: tokens of no weight come last.
    place = of, torch.arange(len(of)) - (counts.cumsum(dim=0) - counts)[of]
    shape = len(left), int(counts.max())
    ordered, order = (
        found.new_full(shape, -math.inf).index_put_(place, found).sort(dim=-1, descending=True)
    )
    padded = weight.new_zeros(shape).index_put_(place, weight)
    reached = padded.gather(1, order).double().cumsum(dim=-1)
    last = (reached < needed[:, None]).sum(dim=-1).minimum(counts - 1).clamp_(min=0)
    thresholds = ordered.gather(1, last[:, None])[:, 0]
    is_kept = is_between & (values >= thresholds[row, None])
    upper[row, block] += weights.mul_(is_kept).sum(dim=-1)
    return thresholds, upper
