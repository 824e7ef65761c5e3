"""Draw tokens from the hidden states of a forward; the result is on every pipeline stage.

S: tokens of a forward; n: draws of a forward; h: hidden size.
"""

import torch.distributed as dist
from torch import Tensor

from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens
from megatron_dlm.rollout.slots import ForwardPlan
from megatron_dlm.types.special_tokens import SpecialTokens


class TokenDrawer:
    """Draws the tokens of a `ForwardPlan`.

    Args:
        model: This rank's part of the model.
        generation: Temperature, top-k and top-p.
        special_tokens: MASK is never drawn, nor are ids that the vocabulary does not have.
        groups: Process groups.
    """

    def __init__(
        self,
        model: DiffusionGPTModel,
        *,
        generation: GenerationConfig,
        special_tokens: SpecialTokens,
        groups: ParallelGroups,
    ) -> None:
        self._model = model
        self._generation = generation
        self._special_tokens = special_tokens
        self._groups = groups

    def draw(self, hidden: Tensor | None, plan: ForwardPlan) -> SampledTokens:
        """Sample on the last stage from hidden states [S, h]; the result on every stage's device.

        Args:
            hidden: None on stages before the last.
            plan: The plan of that forward.
        """
        if hidden is not None:
            packed = self._sample(hidden, plan)
        else:
            packed = plan.uniforms.new_empty(3, len(plan.draw_rows))
        if self._groups.pp is not None:
            dist.broadcast(packed, src=self._groups.pp_last_rank, group=self._groups.pp)
        return SampledTokens.unpack(packed)

    def _sample(self, hidden: Tensor, plan: ForwardPlan) -> Tensor:
        """Token ids, confidences and entropies of the draws, [3, n] float64 (exact for ids)."""
        weight = head_weight(self._model)
        tp_rank = self._groups.tp.rank() if self._groups.tp is not None else 0
        return sample_tokens(
            hidden.index_select(0, plan.draw_rows),
            weight,
            plan.uniforms,
            vocab_start=tp_rank * weight.shape[0],
            vocab_size=self._special_tokens.vocab_size,
            mask_token_id=self._special_tokens.mask_token_id,
            temperature=self._generation.temperature,
            top_k=self._generation.top_k,
            top_p=self._generation.top_p,
            tp_group=self._groups.tp,
        )
