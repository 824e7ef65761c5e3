"""The record of a decoding strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_dlm.ranges import Range
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StrategyOption:
    """The option of a strategy; strategies may share one.

    Attributes:
        name: Of the flag and the key, with underscores.
        type: int or float.
        default: None stands for the number of tokens of a block.
        range: Valid values.
        unit: What the number is, in one word, for `--settings`.
        help: Text of `--help` and of docs/configuration.md.
        argument: Its name in `generate` of an exported folder; empty: `name`.
    """

    name: str
    type: type[int] | type[float]
    default: float | None
    range: Range
    unit: str
    help: str
    argument: str = ""

    @property
    def generate_argument(self) -> str:
        """Its name in `generate` of an exported folder."""
        return self.argument or self.name


@dataclass(frozen=True)
class Strategy:
    """A rule that decides which drawn tokens are committed at a denoising step.

    Attributes:
        name: Value of `--remasking-strategy`.
        short_name: In `--settings` and in tables.
        commit: Takes blocks and the option's value and returns the committed positions, [r, B]
            bool: masked ones only, at least one of them where there is one (decoding always ends),
            the lowest position first among equal scores.
        option: The only option that it reads; None: it reads none.
        help: What is kept, as a clause for `--help`.
        divides_block: Whether the option must divide the block size.
        verifies: Whether committed tokens are a draft, which the model's autoregressive mode
            verifies (`rollout.verification`).
    """

    name: str
    short_name: str
    commit: Callable[[DenoisedBlocks, Any], Tensor]
    option: StrategyOption | None
    help: str
    divides_block: bool = False
    verifies: bool = False

    def fits_block(self, value: Any, block_size: int | None) -> bool:
        """Whether the option's value fits a block size; None: a response is one block."""
        if not self.divides_block or value is None or block_size is None:
            return True
        return block_size % value == 0


STRATEGIES: dict[str, Strategy] = {}


def register(strategy: Strategy) -> None:
    """Add a strategy under its name.

    Raises:
        ValueError: Its name or short name is taken.
    """
    names = {other.short_name for other in STRATEGIES.values()} | STRATEGIES.keys()
    if {strategy.name, strategy.short_name} & names:
        raise ValueError(f"there are two decoding strategies {strategy.name}")
    STRATEGIES[strategy.name] = strategy
