"""Decoding settings of a rollout or an evaluation, as one immutable value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_dlm.config import DecodingConfig
from megatron_dlm.config.fields import option_fields
from megatron_dlm.config.rules import divisors
from megatron_dlm.errors import bad_value
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS, StrategyOptions
from megatron_dlm.rollout.strategies import STRATEGIES, Strategy
from megatron_dlm.types.diffusion_kind import DiffusionKind

if TYPE_CHECKING:
    from megatron_dlm.config.groups import RolloutGraphs
    from megatron_dlm.config.schema import Config
    from megatron_dlm.models.attention_layout import Pattern
    from megatron_dlm.rollout.decoding_settings import DecodingSetting
    from megatron_dlm.types.diffusion_kind import ContextAttention

# Settings of speed and memory: a rollout's tokens do not depend on them.
DECIDE_NO_TOKEN = frozenset(
    {
        "max_running_requests",
        "max_total_tokens",
        "chunked_prefill_size",
        "decoding_groups",
        "rollout_graphs",
    }
)


_OF_EVERY_DECODING = (
    "temperature",
    "top_k",
    "top_p",
    "max_running_requests",
    "max_total_tokens",
    "chunked_prefill_size",
    "decoding_groups",
    "rollout_graphs",
)
"""Options that diffusion and next-token decoding both have."""


@dataclass(frozen=True)
class GenerationConfig(StrategyOptions):
    """Decoding settings; the defaults of a run are in `megatron_dlm.config`.

    `remasking_strategy` and the strategies' options are attributes too.

    Attributes:
        block_size: Tokens of a block, on the grid from token 0; 1 for an autoregressive model. None
            (`full` attention only): the response is one block, decoded as a whole.
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        max_running_requests: Sequences decoded at once on a data-parallel rank.
        max_total_tokens: Positions that the KV cache has room for; None: what those sequences need.
        chunked_prefill_size: Most prompt tokens of a forward.
        decoding_groups: Groups that the sequences are split into; None: one for each pipeline
            stage.
        rollout_graphs: Whether forwards are recorded and replayed: `on`, `off` or, on a CPU and
            where that is possible, after some hundred of them (`auto`).
        attention_pattern: What a forward sees: earlier blocks and its own (`block_causal`),
            everything up to the longest response, MASK where no token is known yet (`full`), or
            earlier tokens (`causal`: an autoregressive model).
        shifted: Whether logits at position i predict token i + 1; always under `causal`.
        context_attention: Under `block_causal`, what final tokens see of each other: all of their
            block, or only the tokens before them (`DiffusionKind`).

    Raises:
        UserError: A value is out of range, or a combination cannot work.
    """

    block_size: int | None
    temperature: float
    top_k: int
    top_p: float
    max_running_requests: int
    max_total_tokens: int | None = None
    chunked_prefill_size: int = DecodingConfig.chunked_prefill_size
    decoding_groups: int | None = None
    rollout_graphs: RolloutGraphs = DecodingConfig.rollout_graphs
    attention_pattern: Pattern = "block_causal"
    shifted: bool = False
    context_attention: ContextAttention = DiffusionKind.context_attention

    @classmethod
    def from_config(
        cls, config: Config, diffusion_kind: DiffusionKind, block_size: int | None
    ) -> GenerationConfig:
        """The settings of a run's rollouts, or of a tool's responses.

        Args:
            config: Decoding options.
            diffusion_kind: The diffusion model's.
            block_size: Tokens of a block; None decodes the response as a whole.
        """
        rollout = config.rollout
        names = (*_OF_EVERY_DECODING, "remasking_strategy", *STRATEGY_OPTIONS)
        return cls(
            block_size=block_size,
            attention_pattern=diffusion_kind.attention_pattern,
            shifted=diffusion_kind.shifted,
            context_attention=diffusion_kind.context_attention,
            **{name: getattr(rollout, name) for name in names},
        )

    @classmethod
    def autoregressive(
        cls,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        max_running_requests: int,
        max_total_tokens: int | None = None,
        chunked_prefill_size: int = DecodingConfig.chunked_prefill_size,
        decoding_groups: int | None = None,
        rollout_graphs: RolloutGraphs = DecodingConfig.rollout_graphs,
    ) -> GenerationConfig:
        """Settings of next-token decoding, which has nothing to remask."""
        return cls(
            block_size=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens,
            chunked_prefill_size=chunked_prefill_size,
            decoding_groups=decoding_groups,
            rollout_graphs=rollout_graphs,
            attention_pattern="causal",
            shifted=True,
        )

    @classmethod
    def autoregressive_from_config(cls, config: Config) -> GenerationConfig:
        """Settings of next-token decoding by the options of a run or a command."""
        return cls.autoregressive(
            **{name: getattr(config.rollout, name) for name in _OF_EVERY_DECODING}
        )

    @property
    def is_autoregressive(self) -> bool:
        """Whether tokens are decoded one by one, without MASK."""
        return self.attention_pattern == "causal"

    @property
    def _has_two_modes(self) -> bool:
        return self.attention_pattern == "block_causal" and self.context_attention == "causal"

    @property
    def verifies(self) -> bool:
        """Whether drafts are verified, so that a response is one of the autoregressive mode."""
        return not self.is_autoregressive and self.strategy.verifies

    @property
    def context_block_size(self) -> int | None:
        """Tokens that see each other once they are final; None: all (`full`)."""
        if self.attention_pattern == "full":
            return None
        return 1 if self.context_attention == "causal" else self.block_size

    @property
    def strategy(self) -> Strategy:
        """The rule that decides which drawn tokens are committed."""
        return STRATEGIES[self.remasking_strategy]

    @property
    def strategy_value(self) -> Any:
        """Value of the strategy's option; None where it has none."""
        option = self.strategy.option
        return None if option is None else getattr(self, option.name)

    @property
    def options_read(self) -> frozenset[str]:
        """Names of the decoding options that these settings use."""
        read = {"temperature", "rollout_context_parallel", *DECIDE_NO_TOKEN}
        if self.attention_pattern == "full":  # there is no cache
            read -= {"max_total_tokens", "chunked_prefill_size", "rollout_graphs"}
            read.discard("rollout_context_parallel")
        if self.temperature > 0:
            read |= {"top_k", "top_p"}
        if not self.is_autoregressive:
            read.add("remasking_strategy")
            if self.strategy.option is not None:
                read.add(self.strategy.option.name)
        return frozenset(read)

    def setting_name(self, block_size: int | None = None) -> str:
        """Name of the setting in tables and results: `static`, `dynamic_0.9@8`, ...

        Args:
            block_size: Where the setting names one of its own.
        """
        if self.is_autoregressive:
            return "autoregressive"
        strategy, value = self.strategy, self.strategy_value
        # An option without a default counts the steps of a block, and one token a step goes unsaid.
        has_default = strategy.option is not None and strategy.option.default is not None
        name = strategy.short_name
        if value is not None and (has_default or value != self.block_size):
            name += f"_{value:g}"
        return name if block_size is None else f"{name}@{block_size}"

    def with_setting(self, setting: DecodingSetting, field: str) -> GenerationConfig:
        """The same settings with what a decoding setting names, but for its block size.

        Args:
            setting: Not autoregressive.
            field: The option that it is a value of, for error messages.

        Raises:
            UserError: It does not fit the blocks.
        """
        strategy, size = setting.strategy, self.block_size
        option = strategy.option
        value = None if option is None else setting.options.get(option.name)
        if option and size is not None and not strategy.fits_block(value, size):
            raise bad_value(
                field,
                setting.text,
                f"does not divide the block size {size}",
                f"choose {divisors(size)} {option.unit}",
            )
        return replace(self, **setting.options)

    def __post_init__(self) -> None:
        def require(name: str, fine: bool, problem: str, remedy: str) -> None:
            if not fine:
                flag = "--" + name.replace("_", "-")
                raise bad_value(flag, getattr(self, name), problem, remedy)

        block_size = self.block_size
        require(
            "block_size",
            block_size is not None or self.attention_pattern == "full",
            f"a response is decoded as a whole only under full attention, this model's is "
            f"{self.attention_pattern}",
            "give the block size that the model was trained with",
        )
        require(
            "block_size",
            block_size is None or block_size >= 1,
            "is not positive",
            "choose 1 or more",
        )
        require(
            "remasking_strategy",
            self.remasking_strategy in STRATEGIES,
            "is unknown",
            f"choose one of {', '.join(STRATEGIES)}",
        )
        for name, option in option_fields(DecodingConfig).items():
            allowed = option.range
            if allowed is not None and (value := getattr(self, name)) is not None:
                require(name, value in allowed, allowed.problem, allowed.remedy)
        if self.strategy.option is not None:
            require(
                self.strategy.option.name,
                self.strategy.fits_block(self.strategy_value, block_size),
                f"does not divide the block size {block_size}",
                "choose a divisor of it",
            )
        require(
            "remasking_strategy",
            self.is_autoregressive or not self.strategy.verifies or self._has_two_modes,
            "verifies drafts with the autoregressive mode that only models with a causal context "
            "have (context_attention in config.json)",
            "choose another strategy, or train the model with --context-attention causal",
        )
        require(
            "block_size",
            not self.verifies or block_size != 1,
            f"leaves {self.remasking_strategy} nothing to draft",
            "choose autoregressive decoding",
        )
        if self.shifted and self.attention_pattern == "block_causal":
            raise bad_value(
                "config.json: shifted",
                self.shifted,
                "blocks of a block-causal model are decoded from unshifted logits",
                "use a model of full attention, or one whose logits are not shifted",
            )
