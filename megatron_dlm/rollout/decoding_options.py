"""Options of the decoding strategies, as dataclass fields made from the strategies' records."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_dlm.rollout.strategies import STRATEGIES, StrategyOption

DEFAULT_STRATEGY = "low_confidence_dynamic"

STRATEGY_OPTIONS: dict[str, StrategyOption] = {
    strategy.option.name: strategy.option
    for strategy in STRATEGIES.values()
    if strategy.option is not None
}
"""Options of all strategies by name, each once."""

if TYPE_CHECKING:

    class StrategyOptions:
        """Has an attribute for the chosen strategy and for the option of every strategy."""

        def __getattr__(self, name: str) -> Any: ...

else:
    _kept = ", or ".join(f"{strategy.help} ({name})" for name, strategy in STRATEGIES.items())
    StrategyOptions = make_dataclass(
        "StrategyOptions",
        [
            (
                "remasking_strategy",
                Literal[tuple(STRATEGIES)],
                field(
                    default=DEFAULT_STRATEGY,
                    metadata={"help": f"Which drawn tokens are kept at a denoising step: {_kept}."},
                ),
            ),
            *(
                (
                    name,
                    Annotated[
                        option.type | None if option.default is None else option.type, option.range
                    ],
                    field(default=option.default, metadata={"help": option.help}),
                )
                for name, option in STRATEGY_OPTIONS.items()
            ),
        ],
        frozen=True,
        kw_only=True,
        namespace={"__doc__": "The chosen strategy and the option of every strategy."},
    )
