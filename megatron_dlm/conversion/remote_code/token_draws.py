"""Drawing of tokens, for plain transformers.

The noise of a draw is a hash of the row's seed, the position, the denoising step and the vocabulary
id: the draws of a row do not depend on other rows or on their progress.

n: tokens drawn at once; V: vocabulary.
"""

import hashlib

import torch
from torch import Tensor

from megatron_dlm.rollout.gumbel_noise import gumbel_noise


def row_seeds(prompts: list[list[int]], seed: int) -> list[int]:
    """A seed for each row, from its prompt and the number of equal prompts before it."""
    seeds = []
    for row, prompt in enumerate(prompts):
        key = f"{seed} {prompts[:row].count(prompt)} {prompt}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "little", signed=True))
    return seeds


def filtered_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [n, V] with -inf at what top-k and then top-p leave out."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # A token stays if the tokens before it have less than top_p in sum.
        left_out = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(left_out.scatter(-1, order, left_out), -torch.inf)
    return logits


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
        logits: [n, V] float32.
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
    if temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        noise = gumbel_noise(0, seeds, positions, steps, ids)
        tokens = (filtered_logits(logits / temperature, top_k, top_p) + noise).argmax(dim=-1)
    probabilities = logits.softmax(dim=-1)
    confidence = probabilities.gather(-1, tokens[:, None])[:, 0]
    return tokens, confidence, torch.special.entr(probabilities).sum(dim=-1)
