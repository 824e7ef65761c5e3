"""How a diffusion model attends and which token its logits predict."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DiffusionKind:
    """How a diffusion model attends and which token its logits predict; part of its config.json.

    Attributes:
        attention_pattern: `block_causal`, `full` (bidirectional over the whole sequence), or
            `causal` (each token sees those before it; shifted only). A causal diffusion model is a
            stage of training: it is decoded from left to right, like an autoregressive one.
        shifted: Whether logits at position i predict token i + 1 (RND1) instead of token i.
    """

    attention_pattern: Literal["block_causal", "full", "causal"]
    shifted: bool


BLOCK_DIFFUSION = DiffusionKind("block_causal", shifted=False)
RND1 = DiffusionKind("full", shifted=True)
