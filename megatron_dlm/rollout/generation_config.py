"""How a rollout or an evaluation decodes: one immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from megatron_dlm.errors import bad_value

if TYPE_CHECKING:
    from megatron_dlm.config.schema import Config

RemaskingStrategy = Literal[
    "low_confidence_static", "low_confidence_dynamic", "entropy", "entropy_bounded"
]
DecodingMode = Literal["block_diffusion", "autoregressive"]


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding settings; the defaults of a run live in `megatron_dlm.config`.

    Attributes:
        block_size: Tokens of a block; 1 under `autoregressive`.
        remasking_strategy: Which drawn tokens are committed at a denoising step.
        dynamic_threshold: Confidence that `low_confidence_dynamic` asks for.
        denoising_steps_per_block: Steps of `low_confidence_static` and `entropy` for a full block.
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        max_running_requests: Sequences decoded at once on a data-parallel rank.
        mode: `block_diffusion`: logits at a masked position predict that position; or
            `autoregressive`: logits at a token predict the next one (teachers).
        entropy_bound: Excess entropy in nats that `entropy_bounded` accepts at a step.

    Raises:
        UserError: A value out of range, or combinations that cannot work.
    """

    block_size: int
    remasking_strategy: RemaskingStrategy
    dynamic_threshold: float
    denoising_steps_per_block: int
    temperature: float
    top_k: int
    top_p: float
    max_running_requests: int
    mode: DecodingMode = "block_diffusion"
    entropy_bound: float = 0.1

    @classmethod
    def from_config(cls, config: Config) -> GenerationConfig:
        """The settings of a run's rollouts."""
        rollout = config.rollout
        return cls(
            block_size=config.model.block_size,
            remasking_strategy=rollout.remasking_strategy,
            dynamic_threshold=rollout.dynamic_threshold,
            denoising_steps_per_block=config.denoising_steps_per_block,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_running_requests=rollout.max_running_requests,
            entropy_bound=rollout.entropy_bound,
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
            mode="autoregressive",
        )

    def __post_init__(self) -> None:
        def require(name: str, fine: bool, problem: str, remedy: str) -> None:
            if not fine:
                flag = "--" + name.replace("_", "-")
                raise bad_value(flag, getattr(self, name), problem, remedy)

        strategies = get_args(RemaskingStrategy)
        require("block_size", self.block_size >= 1, "is not positive", "choose 1 or more")
        require(
            "remasking_strategy",
            self.remasking_strategy in strategies,
            "is unknown",
            f"choose one of {', '.join(strategies)}",
        )
        require(
            "denoising_steps_per_block",
            self.denoising_steps_per_block >= 1
            and self.block_size % self.denoising_steps_per_block == 0,
            f"does not divide the block size {self.block_size}",
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
