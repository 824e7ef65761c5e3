"""Drawing of tokens, for plain transformers.

The noise of a draw is a hash of the row's seed, the position, the denoising step and the vocabulary
id: what a row draws depends neither on the rows beside it nor on how far they are.

n: tokens drawn at once; V: vocabulary.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

# Multipliers of the SplitMix64 generator, as signed integers.
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND_MULTIPLIER = 0x94D049BB133111EB - (1 << 64)
NOISE_BITS = 40


class DrawnTokens(NamedTuple):
    """Tokens and what remasking needs to know about them.

    Attributes:
        tokens: [n] int64.
        confidence: [n] float32, probability of the token before temperature and filters.
        entropy: [n] float32, of that distribution, in nats.
    """

    tokens: Tensor
    confidence: Tensor
    entropy: Tensor


def row_seeds(prompts: list[list[int]], seed: int) -> list[int]:
    """A seed for each row, from its prompt and the number of equal prompts before it."""
    seeds = []
    for row, prompt in enumerate(prompts):
        key = f"{seed} {prompts[:row].count(prompt)} {prompt}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "little", signed=True))
    return seeds


def scrambled(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on int64 words that wrap around."""

    def shifted(word: Tensor, bits: int) -> Tensor:
        return (word >> bits) & ((1 << (64 - bits)) - 1)

    words = words + GOLDEN_RATIO
    words = (words ^ shifted(words, 30)) * FIRST_MULTIPLIER
    words = (words ^ shifted(words, 27)) * SECOND_MULTIPLIER
    return words ^ shifted(words, 31)


def gumbel_noise(seeds: Tensor, positions: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [n, V] for seeds, positions and denoising steps [n]."""
    keys = scrambled(scrambled(scrambled(seeds) ^ positions) ^ steps)
    words = scrambled(keys[:, None] ^ torch.arange(vocab_size, device=keys.device))
    words = (words >> (64 - NOISE_BITS)) & ((1 << NOISE_BITS) - 1)
    real = torch.float32 if words.device.type == "mps" else torch.float64
    exponential = -torch.log1p(-(words.to(real) + 0.5) / (1 << NOISE_BITS))
    return -exponential.log()


def filtered_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [n, V] with -inf at what top-k and then top-p leave out."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it do not hold enough yet.
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
) -> DrawnTokens:
    """One token for each row of logits [n, V] float32; temperature 0 takes the most likely one."""
    if temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        noise = gumbel_noise(seeds, positions, steps, logits.shape[-1])
        tokens = (filtered_logits(logits / temperature, top_k, top_p) + noise).argmax(dim=-1)
    probabilities = logits.softmax(dim=-1)
    return DrawnTokens(
        tokens,
        probabilities.gather(-1, tokens[:, None])[:, 0],
        torch.special.entr(probabilities).sum(dim=-1),
    )
