"""Attention-mask annealing (Gong et al. 2025, DiffuLLaMA): from causal to full attention by steps.

At update u of the first N, a token sees itself and every earlier token, and each later token of its
document with probability u / N, drawn for each pair of tokens. The draws are keyed by seed, sample
and update, so they are the same under every parallel layout, after a resume and in recomputed
activations.
"""

from dataclasses import replace

import torch

from megatron_dlm.config.schema import Config
from megatron_dlm.models.attention_layout import DRAW_UNIT
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.types.document import Document


def anneal_attention(
    document: Document, config: Config, sample_index: int, iteration: int
) -> Document:
    """Add annealed attention to a document; return it unchanged once annealing has ended.

    Args:
        document: A clean document under full attention.
        config: `attention_annealing_iters` is N.
        sample_index: Of the sample that the document was made of.
        iteration: Updates done before this one.
    """
    update, last = iteration + 1, config.objective.attention_annealing_iters
    if update >= last:
        return document
    length = len(document.token_ids)
    generator = keyed_generator(config.data.seed, sample_index, iteration, "attention annealing")
    keys = torch.randint(0, 2**31 - 1, (length,), generator=generator)
    thresholds = torch.full_like(keys, round(DRAW_UNIT * update / last))
    return replace(
        document,
        block=document.position.int(),  # blocks of one token: causal
        annealing=torch.stack((keys, thresholds)).int(),
    )
