"""Draw tokens from the hidden states of a forward.

n: draws of a forward; h: hidden size.
"""

import torch
from torch import Tensor

from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.forward_plan import ForwardPlan
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import KeptLogits, sample_tokens
from megatron_dlm.rollout.token_shares import TokenShares
from megatron_dlm.types.special_tokens import SpecialTokens


class TokenDrawer:
    """Draws the tokens of a `ForwardPlan`.

    Args:
        model: This rank's part of the model.
        special_tokens: MASK is never drawn, nor are ids that the vocabulary does not have.
        groups: Process groups.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        special_tokens: SpecialTokens,
        groups: ParallelGroups,
    ) -> None:
        self._model = model
        self._special_tokens = special_tokens
        self._groups = groups
        self._shares = TokenShares.of(groups)
        self._kept_logits = KeptLogits()

    def draw(self, hidden: Tensor, plan: ForwardPlan) -> Tensor:
        """Sample from the hidden states [n, h] of a forward's draws, on the last stage.

        Args:
            hidden: Of the draws.
            plan: The plan of that forward.

        Returns:
            Packed `SampledTokens`, [3, n] float64 (exact for ids).
        """
        packed = plan.uniforms.new_empty(3, len(plan.draw_rows))
        if not len(plan.draw_rows):  # pieces of prompts, and drafts to verify
            return packed
        for group in plan.groups:
            if group.draws is None:
                return self._sample_alike(hidden, plan.uniforms, group.generation)
            own, uniforms = hidden[group.draws], plan.uniforms[group.draws]
            packed[:, group.draws] = self._sample_alike(own, uniforms, group.generation)
        return packed

    def _sample_alike(
        self, hidden: Tensor, uniforms: Tensor, generation: GenerationConfig
    ) -> Tensor:
        """The draws from hidden states [n, h], under one setting.

        Ranks that decode the same sequences have the same ones, and draw an equal part each.
        """
        count = len(hidden)
        if self._shares is not None:
            rows = self._shares.own(torch.arange(count, device=hidden.device))
            hidden, uniforms = hidden.index_select(0, rows), self._shares.own(uniforms)
        weight = head_weight(self._model)
        tp_rank = self._groups.tp.rank() if self._groups.tp is not None else 0
        drawn = sample_tokens(
            hidden,
            weight,
            uniforms,
            vocab_start=tp_rank * weight.shape[0],
            vocab_size=self._special_tokens.vocab_size,
            mask_token_id=self._special_tokens.mask_token_id,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            tp_group=self._groups.tp,
            kept_logits=self._kept_logits,
        )
        return drawn if self._shares is None else self._shares.drawn(drawn, count)
