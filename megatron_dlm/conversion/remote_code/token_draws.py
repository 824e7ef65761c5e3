"""Drawing of tokens, for plain transformers.

The number of a draw is a hash of the row's seed, the position and the denoising step: the draws of
a row do not depend on other rows or on their progress.

n: tokens drawn at once; V: vocabulary.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.rollout.block_draws import draw_from_logits, padded_columns
from megatron_dlm.rollout.uniforms import counter_uniforms


def row_seeds(prompts: list[list[int]], seed: int) -> list[int]:
    """A seed for each row, from its prompt and the number of equal prompts before it."""
    seeds = []
    for row, prompt in enumerate(prompts):
        key = f"{seed} {prompts[:row].count(prompt)} {prompt}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "little", signed=True))
    return seeds


def draw_tokens(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token for each row of logits; temperature 0 takes the most likely one.

    Args:
        logits: [n, V] of any floating type; what must not be drawn has the lowest value of it.
        temperature: Of the softmax.
        top_k: 0 is off.
        top_p: 1 is off.
        seeds: [n] int64, see `row_seeds`.
        positions: [n] int64.
        steps: [n] int64, denoising steps.

    Returns:
        Tokens [n], their probabilities before temperature and filters [n] float32, and the entropy
        of that distribution in nats [n] float32.
    """
    vocab_size = logits.shape[1]
    missing = padded_columns(vocab_size) - vocab_size
    if missing:
        logits = F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
    tokens, confidence, entropy = draw_from_logits(
        logits,
        counter_uniforms(0, seeds, positions, steps),
        temperature=temperature,
        top_k=top_k if top_k < vocab_size else 0,
        top_p=top_p,
    )
    return tokens.long(), confidence.float(), entropy.float()
