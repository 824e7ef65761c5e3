"""Draw tokens from the hidden states of a forward; the result is on every pipeline stage.

S: tokens of a forward; n: draws of a forward; h: hidden size; Vp: padded vocabulary; tp:
tensor-parallel size.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens
from megatron_dlm.rollout.slots import ForwardPlan
from megatron_dlm.types.special_tokens import SpecialTokens

# Most logits in memory at once while drawing: their noise takes several 64-bit copies.
MAX_LOGITS = 1 << 24


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

    def draw(self, hidden: Tensor | None, plan: ForwardPlan, seed: int) -> SampledTokens:
        """Sample on the last stage from hidden states [S, h]; the result on every stage's CPU.

        Args:
            hidden: None on stages before the last.
            plan: The plan of that forward.
            seed: Seed of the draws.
        """
        if hidden is not None:
            packed = self._sample(hidden, plan, seed)
        else:
            packed = torch.empty(
                3, len(plan.draw_rows), dtype=torch.float64, device=platform.device()
            )
        if self._groups.pp is not None:
            dist.broadcast(packed, src=self._groups.pp_last_rank, group=self._groups.pp)
        token_ids, confidence, entropy = packed.cpu()
        return SampledTokens(token_ids.long(), confidence.float(), entropy.float())

    def _sample(self, hidden: Tensor, plan: ForwardPlan, seed: int) -> Tensor:
        """Token ids, confidences and entropies of the draws, [3, n] float64 (exact for ids)."""
        device = hidden.device
        weight = head_weight(self._model)  # [Vp/tp, h]
        hidden = hidden.index_select(0, plan.draw_rows.to(device))  # [n, h]
        counters = torch.stack((plan.sample_index, plan.position, plan.denoising_step)).to(device)
        tp_rank = self._groups.tp.rank() if self._groups.tp is not None else 0
        chunk = max(1, MAX_LOGITS // weight.shape[0])
        packed = []
        for part, (sample_index, position, step) in zip(
            hidden.split(chunk), counters.split(chunk, dim=1), strict=True
        ):
            sampled = sample_tokens(
                F.linear(part, weight),
                vocab_start=tp_rank * weight.shape[0],
                vocab_size=self._special_tokens.vocab_size,
                mask_token_id=self._special_tokens.mask_token_id,
                temperature=self._generation.temperature,
                top_k=self._generation.top_k,
                top_p=self._generation.top_p,
                seed=seed,
                sample_index=sample_index,
                position=position,
                denoising_step=step,
                tp_group=self._groups.tp,
            )
            packed.append(
                torch.stack(
                    (
                        sampled.token_ids.double(),
                        sampled.confidence.double(),
                        sampled.entropy.double(),
                    )
                )
            )
        return torch.cat(packed, dim=1)
