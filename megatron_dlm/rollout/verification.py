"""Verification of drafts by the autoregressive mode, in the forward of a block of drafted tokens.

The drafted block stands in the forward as final tokens under a causal context, with the token
before it, so that the hidden state before each draft is there: it gives p, the distribution of the
next token. q, which the draft was drawn from, is that of the hidden state kept when it was drawn.
Neither is kept as a distribution over the vocabulary.

V: verified sequences; B: positions of a block; c: a column of it; h: hidden size; v: vocabulary
shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.block_draws import draw_from_logits, padded_columns
from megatron_dlm.rollout.forward_plan import ForwardPlan, Verification
from megatron_dlm.rollout.sampling import MAX_LOGITS, Head, gather_from_ranks
from megatron_dlm.rollout.verification_draws import (
    draw_residual,
    probabilities,
    probability_of,
)
from megatron_dlm.types.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Verified:
    """What became of drafts; on the device.

    Attributes:
        num_final: [V] int64, columns of the block up to the first draft that was not accepted.
        next_token: [V] int64, the token after these, which the autoregressive mode drew.
        confidence: [V, B + 1] float32, the autoregressive mode's probability of the token in each
            column, `next_token` included, at temperature 1 and unfiltered; None where nobody asked
            for it. What follows `next_token` means nothing.
    """

    num_final: Tensor
    next_token: Tensor
    confidence: Tensor | None = None

    @classmethod
    def unpack(cls, packed: Tensor) -> Verified:
        """From what `DraftVerifier.verify` returns of a verification."""
        num_final, next_token = packed[:2].long()
        return cls(num_final, next_token, packed[2:].T.float() if len(packed) > 2 else None)


class DraftVerifier:
    """Keeps what drafts were drawn from, and verifies them; for the sequences of one batch.

    Args:
        model: This rank's part of the model.
        special_tokens: MASK is never drawn, nor are ids that the vocabulary does not have.
        groups: Process groups.
        num_slots: Sequences decoded at once.
        block_size: B.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        special_tokens: SpecialTokens,
        groups: ParallelGroups,
        num_slots: int,
        block_size: int,
    ) -> None:
        self._model = model
        self._special_tokens = special_tokens
        self._groups = groups
        self._shape = (num_slots, block_size)
        self._drafted: Tensor | None = None

    def keep(self, hidden: Tensor, plan: ForwardPlan) -> None:
        """Keep the hidden states that drafts of a forward were drawn from, if there are any.

        Args:
            hidden: [n, h] of the draws, on the last pipeline stage.
            plan: The plan of that forward.
        """
        if plan.drafts is None:
            return
        where = (plan.draw_slots[plan.drafts], plan.draw_columns[plan.drafts])
        self._states(hidden)[where] = hidden[plan.drafts]

    def _states(self, hidden: Tensor) -> Tensor:
        """What drafts were drawn from, [slots, B, h]; memory that nobody else needs."""
        if self._drafted is None:
            self._drafted = hidden.new_zeros(*self._shape, hidden.shape[1])
        return self._drafted

    def move(self, source: int, target: int) -> None:
        """The sequence of slot `source` has moved to slot `target`."""
        if self._drafted is not None:
            self._drafted[target] = self._drafted[source]

    def verify(self, hidden: Tensor, plan: ForwardPlan, blocks: Tensor) -> list[Tensor]:
        """Accept drafts and draw the tokens after them, on the last pipeline stage.

        Args:
            hidden: [S, h] of the forward.
            plan: The plan of that forward.
            blocks: [R, B] int64, tokens of the block in decoding of each slot.

        Returns:
            For each of the plan's verifications the rows of a `Verified`, float64, exact for ids,
            of the verification's `result_shape`.
        """
        found = []
        for verification in plan.verifications:
            drafts = blocks[verification.slots]
            ids = self._verify(hidden, verification, drafts)
            parts = [ids.double()]
            if verification.keeps_confidence:
                parts.append(self._confidence(hidden[verification.rows], drafts, ids).T)
            found.append(torch.cat(parts))
        return found

    def _confidence(self, target: Tensor, drafts: Tensor, ids: Tensor) -> Tensor:
        """[V, B + 1] float64 under target [V, B + 1, h], see `Verified`.

        Args:
            target: Hidden states that predict each column.
            drafts: [V, B] int64.
            ids: [2, V] int64, the first two rows of a `Verified`.
        """
        tokens = pad(drafts, (0, 1)).scatter(1, ids[:1].T, ids[1:].T)
        gather, first_id = partial(gather_from_ranks, tp_group=self._groups.tp), self._vocab_start
        parts = [
            probability_of(
                probabilities(
                    self._logits(hidden), temperature=1.0, top_k=0, top_p=1.0, gather=gather
                ),
                token_ids,
                first_id,
                gather,
            )
            for hidden, token_ids in self._chunks(target.flatten(0, 1), tokens.flatten())
        ]
        return torch.cat(parts).view(tokens.shape)

    def _verify(self, hidden: Tensor, verification: Verification, drafts: Tensor) -> Tensor:
        """The ids of a `Verified`, [2, V] int64, of drafts [V, B]."""
        generation, size = verification.generation, drafts.shape[1]
        target = hidden[verification.rows]  # [V, B + 1, h]
        columns = torch.arange(size, device=drafts.device)
        observed = columns < verification.observed[:, None]
        drafted = ~observed & (columns < verification.limit[:, None])
        if generation.temperature == 0.0:
            best = self._most_likely(target.flatten(0, 1)).view(len(drafts), size + 1)
            accepted = observed | (drafted & (drafts == best[:, :-1]))
            num_final = accepted.long().cumprod(dim=-1).sum(dim=-1)
            return torch.stack((num_final, best.gather(1, num_final[:, None])[:, 0]))
        proposal = self._states(hidden)[verification.slots]  # [V, B, h]
        gather = partial(gather_from_ranks, tp_group=self._groups.tp)
        first_id = self._vocab_start
        parts = []
        flat = (target[:, :-1].flatten(0, 1), proposal.flatten(0, 1), drafts.flatten())
        for p_hidden, q_hidden, tokens in self._chunks(*flat):
            p, q = (self._probabilities(part, verification) for part in (p_hidden, q_hidden))
            chosen = [probability_of(x, tokens, first_id, gather) for x in (p, q)]
            parts.append(torch.stack(chosen))
        p_draft, q_draft = torch.cat(parts, dim=1).view(2, *drafts.shape)
        accepted = observed | (drafted & (verification.acceptance * q_draft < p_draft))
        num_final = accepted.long().cumprod(dim=-1).sum(dim=-1)
        is_refused = num_final < verification.limit
        rows = torch.arange(len(drafts), device=drafts.device)
        uniforms = verification.draws.gather(1, num_final[:, None])[:, 0]
        tokens_after = []
        for p_hidden, q_hidden, refused, numbers in self._chunks(
            target[rows, num_final],
            proposal[rows, num_final.clamp(max=size - 1)],
            is_refused,
            uniforms,
        ):
            p, q = (self._probabilities(part, verification) for part in (p_hidden, q_hidden))
            q.masked_fill_(~refused[:, None], 0.0)
            tokens_after.append(draw_residual(p, q, numbers, first_id, gather))
        return torch.stack((num_final, torch.cat(tokens_after)))

    @property
    def _vocab_start(self) -> int:
        rank = self._groups.tp.rank() if self._groups.tp is not None else 0
        return rank * len(head_weight(self._model))

    def _chunks(self, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
        """Parts of tensors with equally many rows, as many rows as logits may be in memory."""
        rows = max(1, MAX_LOGITS // (4 * padded_columns(len(head_weight(self._model)))))
        return zip(*(tensor.split(rows) for tensor in tensors), strict=True)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, v], MASK and padding with the lowest value."""
        weight, start = head_weight(self._model).detach(), self._vocab_start
        head = Head(
            hidden,
            weight,
            vocab_start=start,
            vocab_end=min(self._special_tokens.vocab_size, start + len(weight)),
            mask_token_id=self._special_tokens.mask_token_id,
        )
        logits = hidden.new_empty(len(hidden), head.columns)
        head.write(logits)
        return logits

    def _probabilities(self, hidden: Tensor, verification: Verification) -> Tensor:
        generation, top_k = verification.generation, verification.generation.top_k
        return probabilities(
            self._logits(hidden),
            temperature=generation.temperature,
            top_k=top_k if top_k < self._special_tokens.vocab_size else 0,
            top_p=generation.top_p,
            gather=partial(gather_from_ranks, tp_group=self._groups.tp),
        )

    def _most_likely(self, hidden: Tensor) -> Tensor:
        """Most likely tokens [n] of hidden states [n, h], the lowest id among equals."""
        gather = partial(gather_from_ranks, tp_group=self._groups.tp)
        parts = []
        for (part,) in self._chunks(hidden):
            numbers = torch.zeros(len(part), dtype=torch.float64, device=part.device)
            drawn = draw_from_logits(
                self._logits(part),
                numbers,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                first_id=self._vocab_start,
                gather=gather,
            )
            parts.append(drawn[0].long())
        return torch.cat(parts)
