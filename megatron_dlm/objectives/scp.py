"""Continual pretraining on a corpus (RND1): full attention from the first step, or causal."""

import torch

from megatron_dlm.models.attention_layout import CLEAN, block_ids
from megatron_dlm.objectives.attention_annealing import anneal_attention
from megatron_dlm.objectives.cross_entropy import CrossEntropyObjective
from megatron_dlm.types.document import Document
from megatron_dlm.types.trajectory import Trajectory


class SCP(CrossEntropyObjective):
    """Masked diffusion of whole documents, with the autoregressive model's shift (RND1 eq. 2).

    For each document t ~ U(0, 1); every token but the first is masked with probability t:

        sum over i of 1[x_t^{i+1} = MASK] * (1/t) * -log p(x_0^{i+1} | x_t), read off position i.

    Nothing predicts the first token, so it is never masked. Divided by the number of all other
    tokens, masked or not, the expectation is an upper bound of their negative log-likelihood given
    the first one, in nats per token. A document in which no token was masked adds zero: drawing
    again, as for short blocks, would bias the bound.

    Under `--attention-pattern causal` position i sees x_t up to itself: the causal diffusion model
    that RND1's grafting begins with. Everything else is the same.
    """

    def update_document(self, trajectory: Trajectory, epoch: int, iteration: int) -> Document:
        """The document as an update sees it while attention is annealed."""
        document = super().update_document(trajectory, epoch, iteration)
        return anneal_attention(document, self.config, trajectory.sample_index, iteration)

    def document(self, trajectory: Trajectory, generator: torch.Generator) -> Document:
        """The window under full or causal attention, each of its documents by itself."""
        tokens = trajectory.token_ids
        document, position = trajectory.documents()
        maskable = position > 0
        draws = torch.rand(int(document[-1]) + 1, generator=generator, dtype=torch.float64)
        t = draws[document]
        masked = maskable & (torch.rand(len(tokens), generator=generator, dtype=torch.float64) < t)
        target = masked.nonzero()[:, 0]
        weights = torch.ones(len(target))
        if self.config.objective.loss_weighting == "inverse_t":
            weights = t[target].reciprocal().float()
        kind = self.config.diffusion_kind
        assert kind is not None
        block = block_ids(position, kind.attention_pattern, block_size=1).int()
        return Document(
            token_ids=tokens.masked_fill(masked, self.mask_token_id),
            block=block,
            stream=torch.full_like(block, CLEAN),
            position=position,
            supervised=target - 1,
            labels=tokens[target],
            weights=weights,
            document_ids=document,
            loss_count=int(maskable.sum()),
        )
