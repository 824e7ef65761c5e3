"""Drawing of tokens, for plain transformers."""

import torch
from torch import Tensor


def draw_tokens(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token [n] for each row of logits [n, V] float32."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it do not hold enough yet.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def padded_responses(input_ids: Tensor, responses: list[Tensor], fill: int) -> Tensor:
    """Prompts [B, P] with their responses behind them, [B, P + longest response]."""
    output = input_ids.new_full((len(responses), max(map(len, responses))), fill)
    for row, response in enumerate(responses):
        output[row, : len(response)] = response
    return torch.cat((input_ids, output), dim=1)
