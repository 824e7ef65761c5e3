"""Running our models; kept apart from transformers' models, which take long to import."""

import torch

from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model import DiffusionGPTModel, head_weight

VOCAB_SIZE = 150  # padded to 256 by Megatron: with TP 2 the second shard is mostly padding


def random_tokens(length: int = 23, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def megatron_logits(
    model: DiffusionGPTModel, tokens: torch.Tensor, pattern: str = "causal", block_size: int = 1
) -> torch.Tensor | None:
    """This rank's vocabulary shard of the logits, [S, Vp / tp]; None before the last stage."""
    layout = clean_layout([len(tokens)], pattern, block_size)
    hidden = forward_hidden(model.eval(), [Row(tokens, torch.arange(len(tokens)), layout)])
    return None if hidden is None else hidden[0] @ head_weight(model).T
