"""How a rollout or an evaluation decodes: one immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from megatron_dlm.errors import bad_value

if TYPE_CHECKING:
    from megatron_dlm.config.schema import Config
    from megatron_dlm.models.attention_layout import Pattern
    from megatron_dlm.types.diffusion_convention import DiffusionConvention

RemaskingStrategy = Literal[
    "low_confidence_static", "low_confidence_dynamic", "entropy", "entropy_bounded"
]

OPTION_OF_STRATEGY: dict[RemaskingStrategy, str] = {
    "low_confidence_static": "denoising_steps_per_block",
    "low_confidence_dynamic": "dynamic_threshold",
    "entropy": "denoising_steps_per_block",
    "entropy_bounded": "entropy_bound",
}
"""The one option that each strategy reads; it has no use for the others'."""


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding settings; the defaults of a run live in `megatron_dlm.config`.

    Attributes:
        block_size: Tokens of a block, on the grid from token 0; 1 for an autoregressive model. None
            (`full` attention only): the response is one block, decoded as a whole.
        remasking_strategy: Which drawn tokens are committed at a denoising step.
        dynamic_threshold: Confidence that `low_confidence_dynamic` asks for.
        denoising_steps_per_block: Steps of `low_confidence_static` (a divisor of the block size)
            and `entropy` for a block in which everything is MASK; None: as many as it has tokens.
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        max_running_requests: Sequences decoded at once on a data-parallel rank.
        entropy_bound: Excess entropy in nats that `entropy_bounded` accepts at a step.
        attention_pattern: What a forward sees: earlier blocks and its own (`block_causal`),
            everything up to the longest response, MASK where nothing is known yet (`full`), or
            earlier tokens (`causal`: an autoregressive model).
        shifted: Whether logits at position i predict token i + 1; always under `causal`.

    Raises:
        UserError: A value out of range, or combinations that cannot work.
    """

    block_size: int | None
    remasking_strategy: RemaskingStrategy
    dynamic_threshold: float
    denoising_steps_per_block: int | None
    temperature: float
    top_k: int
    top_p: float
    max_running_requests: int
    entropy_bound: float = 0.1
    attention_pattern: Pattern = "block_causal"
    shifted: bool = False

    @classmethod
    def from_config(
        cls, config: Config, convention: DiffusionConvention, block_size: int | None
    ) -> GenerationConfig:
        """The settings of a run's rollouts, or of a tool's responses.

        Args:
            config: Decoding options.
            convention: The diffusion model's.
            block_size: Tokens of a block; None decodes the response as a whole.
        """
        rollout = config.rollout
        return cls(
            block_size=block_size,
            remasking_strategy=rollout.remasking_strategy,
            dynamic_threshold=rollout.dynamic_threshold,
            denoising_steps_per_block=rollout.denoising_steps_per_block,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_running_requests=rollout.max_running_requests,
            entropy_bound=rollout.entropy_bound,
            attention_pattern=convention.attention_pattern,
            shifted=convention.shifted,
        )

    @classmethod
    def autoregressive(
        cls,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        max_running_requests: int,
    ) -> GenerationConfig:
        """Settings of next-token decoding, which has nothing to remask."""
        return cls(
            block_size=1,
            remasking_strategy="low_confidence_static",
            dynamic_threshold=1.0,
            denoising_steps_per_block=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_running_requests=max_running_requests,
            attention_pattern="causal",
            shifted=True,
        )

    @property
    def is_autoregressive(self) -> bool:
        """Whether tokens are predicted one after the other, without MASK."""
        return self.attention_pattern == "causal"

    @property
    def options_read(self) -> frozenset[str]:
        """Names of the decoding options that matter here."""
        read = {"temperature", "max_running_requests"}
        if self.temperature > 0:
            read |= {"top_k", "top_p"}
        if not self.is_autoregressive:
            read |= {"remasking_strategy", OPTION_OF_STRATEGY[self.remasking_strategy]}
        return frozenset(read)

    def __post_init__(self) -> None:
        def require(name: str, fine: bool, problem: str, remedy: str) -> None:
            if not fine:
                flag = "--" + name.replace("_", "-")
                raise bad_value(flag, getattr(self, name), problem, remedy)

        strategies = get_args(RemaskingStrategy)
        block_size, steps = self.block_size, self.denoising_steps_per_block
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
            self.remasking_strategy in strategies,
            "is unknown",
            f"choose one of {', '.join(strategies)}",
        )
        require(
            "denoising_steps_per_block",
            steps is None or steps >= 1,
            "is not positive",
            "choose 1 or more",
        )
        require(
            "denoising_steps_per_block",
            self.remasking_strategy != "low_confidence_static"
            or steps is None
            or block_size is None
            or block_size % steps == 0,
            f"does not divide the block size {block_size}",
            "choose a divisor of it",
        )
        require("temperature", self.temperature >= 0.0, "is negative", "choose 0 or more")
        require("top_k", self.top_k >= 0, "is negative", "choose 0 (off) or more")
        require("top_p", 0.0 < self.top_p <= 1.0, "is no probability", "choose from (0, 1]")
        require(
            "max_running_requests",
            self.max_running_requests >= 1,
            "is not positive",
            "choose 1 or more",
        )
        require("entropy_bound", self.entropy_bound >= 0.0, "is negative", "choose 0 or more")
        if self.shifted and self.attention_pattern == "block_causal":
            raise bad_value(
                "config.json: shifted",
                self.shifted,
                "blocks of a block-causal model are decoded from unshifted logits",
                "use a model of full attention, or one whose logits are not shifted",
            )
