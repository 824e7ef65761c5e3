"""Tokens of a run's rows and rollouts: at most, for memory, and in the mean, for time."""

from dataclasses import dataclass

from megatron_dlm.config import Config
from megatron_dlm.models.attention import FLEX_TILE


@dataclass(frozen=True)
class Row:
    """A packed row of an update.

    Attributes:
        clean: Tokens of clean streams, or of the only one.
        noisy: Tokens of noisy streams.
        supervised: Tokens with a loss.
        pairs: Of a query and a key that it sees.
    """

    clean: int
    noisy: int
    supervised: int
    pairs: int

    @property
    def tokens(self) -> int:
        """Of the row, padded to the attention kernel's tile."""
        return -(-(self.clean + self.noisy) // FLEX_TILE) * FLEX_TILE


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a response, and what a forward of a rollout commits.

    Attributes:
        prompt: Of a prompt.
        response: Of a response.
        tokens_per_forward: That a sequence gains in a forward; at most a block.
    """

    prompt: int
    response: int
    tokens_per_forward: float

    @classmethod
    def longest(cls, config: Config, tokens_per_forward: float) -> "Lengths":
        """Those that no sample of the run exceeds."""
        return cls(config.data.max_prompt_length, config.longest_response, tokens_per_forward)

    def of_row(self, config: Config, texts: int) -> Row:
        """A row of so many samples, each of these lengths."""
        if config.response_source == "corpus":
            length = config.data.seq_length
            scale = 1 if config.traits.diffusion_kind is not None else 2  # causal: half the pairs
            return Row(texts * length, 0, texts * length, texts * length**2 // scale)
        whole = self.prompt + self.response
        if config.traits.self_distillation:
            # Each visited state is a text of its own.
            states = max(1, round(self.response / self.tokens_per_forward))
            supervised = states * config.self_distillation.positions_per_state
            return Row(texts * states * whole, 0, texts * supervised, texts * states * whole**2)
        causal = whole * (whole + 1) // 2
        if config.traits.diffusion_kind is None:
            return Row(texts * whole, 0, texts * self.response, texts * causal)
        block = config.model.block_size
        states = 1
        if config.state_selection == "all":
            states = max(1, round(block / self.tokens_per_forward))
        noisy = states * (-(-self.response // block) * block)
        pairs = causal + noisy * (self.prompt + self.response // 2 + block)
        supervised = states * self.response
        kind = config.diffusion_kind
        if kind is not None and kind.has_causal_context and config.objective.causal_loss_weight > 0:
            supervised += self.response  # clean tokens, which the autoregressive mode predicts
        return Row(texts * whole, texts * noisy, texts * supervised, texts * pairs)


def mean_lengths(
    config: Config,
    prompt: int | None = None,
    response: int | None = None,
    tokens_per_forward: float = 2.0,
) -> Lengths:
    """Lengths in the mean: given ones, or assumptions.

    Args:
        config: Of the run.
        prompt: Tokens of a prompt; None: a quarter of the longest.
        response: Tokens of a response; None: half of the longest.
        tokens_per_forward: That a sequence gains in a forward of a rollout; at most a block.
    """
    return Lengths(
        prompt or max(1, config.data.max_prompt_length // 4),
        response or max(1, config.longest_response // 2),
        min(tokens_per_forward, float(config.model.block_size)),
    )


def row_of(config: Config, lengths: Lengths) -> tuple[Row, float]:
    """A row of an update, and the samples in it."""
    training = config.training
    texts: float = training.micro_batch_size
    if training.max_tokens_per_micro_batch is not None:
        one = lengths.of_row(config, 1)
        texts = max(1, training.max_tokens_per_micro_batch // max(one.clean + one.noisy, 1))
    return lengths.of_row(config, int(texts)), texts
