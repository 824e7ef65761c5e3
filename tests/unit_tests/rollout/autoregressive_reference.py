"""What an autoregressive model writes, enumerated, and frequencies compared with it.

Models are transformers' own; distributions are dense.
"""

from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_dlm.types.special_tokens import SpecialTokens

FEW = SpecialTokens(4, 0, 5, vocab_size=6)
"""Of a vocabulary of four tokens, EOS and MASK."""
FEW_SIZES: dict[str, int] = dict(
    vocab_size=6,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
"""Of a model of these tokens, as transformers names them."""


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that is drawn from, [..., V] float64, from the definitions of its filters.

    Of top-p, the token that reaches p is the last one; ties do not occur here.
    """
    p = (logits.double() / temperature).softmax(-1)
    if top_k:
        p = p * (p >= p.topk(top_k).values[..., -1:])
        p = p / p.sum(-1, keepdim=True)
    ordered, order = p.sort(descending=True)
    kept = torch.zeros_like(p).scatter(-1, order, (ordered.cumsum(-1) - ordered < top_p).double())
    return p * kept / (p * kept).sum(-1, keepdim=True)


@torch.no_grad()
def next_tokens(model: torch.nn.Module, tokens: list[int], mask_token_id: int) -> Tensor:
    """Logits [S, V] of transformers' causal model; MASK cannot be drawn."""
    logits = model(torch.tensor([tokens])).logits[0]
    logits[:, mask_token_id] = -torch.inf
    return logits


def enumerated(
    model: torch.nn.Module, prompt: list[int], limit: int, filters: tuple[float, int, float]
) -> dict[tuple[int, ...], float]:
    """The autoregressive probability of every response."""
    found: dict[tuple[int, ...], float] = {}
    ends, mask = FEW.eos_token_ids, FEW.mask_token_id
    for length in range(1, limit + 1):
        for response in product(range(mask), repeat=length):
            if set(ends) & set(response[:-1]) or (length < limit and response[-1] not in ends):
                continue
            p = filtered(next_tokens(model, [*prompt, *response], mask), *filters)
            at = torch.arange(len(prompt) - 1, len(prompt) + length - 1)
            found[response] = float(p[at, torch.tensor(response)].prod())
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    return found


def chi_square(responses: list[list[int]], expected: dict[tuple[int, ...], float]) -> float:
    """Deviations from the mean of the statistic in its standard deviations; rare responses as one.

    Raises:
        AssertionError: A response is impossible.
    """
    counts = Counter(map(tuple, responses))
    assert all(expected.get(response, 0.0) > 0.0 for response in counts)
    cells: list[tuple[float, int]] = []
    rare = (0.0, 0)
    for response, probability in expected.items():
        cell = (probability * len(responses), counts[response])
        if cell[0] >= 5:
            cells.append(cell)
        else:
            rare = (rare[0] + cell[0], rare[1] + cell[1])
    cells += [rare] if rare[0] >= 5 else []
    statistic = sum((observed - mean) ** 2 / mean for mean, observed in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5
