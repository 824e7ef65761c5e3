"""How a diffusion model attends and which token its logits predict."""

from dataclasses import dataclass
from typing import Literal

ContextAttention = Literal["block_causal", "causal"]


@dataclass(frozen=True)
class DiffusionKind:
    """How a diffusion model attends and which token its logits predict; part of its config.json.

    Attributes:
        attention_pattern: `block_causal`, `full` (bidirectional over the whole sequence), or
            `causal` (each token sees those before it; shifted only). A causal diffusion model is a
            stage of training: it is decoded from left to right, like an autoregressive one.
        shifted: Whether logits at position i predict token i + 1 (RND1) instead of token i.
        context_attention: Under `block_causal`, how tokens that are final see each other: those of
            a block all of it (`block_causal`), or each only those before it (`causal`). With a
            causal context the same weights have a second mode, that of an autoregressive model:
            logits at a final token predict the next one.
    """

    attention_pattern: Literal["block_causal", "full", "causal"]
    shifted: bool
    context_attention: ContextAttention = "block_causal"

    @property
    def has_causal_context(self) -> bool:
        """Whether the model has an autoregressive mode beside block diffusion."""
        return self.context_attention == "causal"


BLOCK_DIFFUSION = DiffusionKind("block_causal", shifted=False)
TWO_MODES = DiffusionKind("block_causal", shifted=False, context_attention="causal")
RND1 = DiffusionKind("full", shifted=True)
