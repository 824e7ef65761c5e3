"""Speculative decoding: drafts by diffusion, verified by the autoregressive mode.

Each cycle fills what is left of every row's block with drafts, in one forward or several, and then
holds the block as final tokens in one more: the logits before each draft are those of the
autoregressive mode, which accepts drafts up to the first that it would not have drawn, and draws
the token after them. The first token of a block may therefore be known before its draft.

r: rows that have not ended; B: positions of a block; h: hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.rollout.block_draws import draw_from_logits, padded_columns
from megatron_dlm.rollout.strategies import STRATEGIES, DenoisedBlocks
from megatron_dlm.rollout.top_p_search import only_rank
from megatron_dlm.rollout.uniforms import counter_uniforms
from megatron_dlm.rollout.verification_draws import (
    draw_residual,
    probabilities,
    probability_of,
)

from .denoising import MAX_LOGITS, Denoising


class Speculation(Denoising):
    """Rows that verify their drafts; arguments as `Denoising`."""

    def _denoise(self) -> None:
        """One cycle of all rows: drafts, and their verification."""
        rows = self._rows
        start = self._block_start[rows]
        observed = self._size - self._block_masks(rows).sum(dim=-1)
        drafts = (self._ends[rows] - start).clamp(max=self._size) - observed
        # The last token of a block or response is drawn at once, which takes one forward as well.
        drafts = drafts.masked_fill(drafts == 1, 0)
        num_final, drawn = self._verify(self._draft(drafts > 0), observed, drafts)
        self._settle(num_final, drawn)

    def _draft(self, drafts: Tensor) -> Tensor | None:
        """Fill the blocks of some rows, [r] bool, with drafts.

        Returns:
            Hidden states [r, B, h] that they were drawn from; None without any.
        """
        rows, settings = self._rows, self._settings
        positions = self._block_positions(rows)
        masked = self._block_masks(rows) & drafts[:, None]
        missing = masked.sum(dim=-1)
        strategy = STRATEGIES[settings.remasking_strategy]
        proposal: Tensor | None = None
        while masked.any():
            starts = self._start[rows]
            hidden = self._forward(starts, positions[:, -1] + 1, self._block_start[rows])
            if proposal is None:
                proposal = hidden.new_zeros(*masked.shape, hidden.shape[-1])
            blocks = DenoisedBlocks(
                masked=masked,
                confidence=torch.zeros(masked.shape, device=masked.device),
                entropy=torch.zeros(masked.shape, device=masked.device),
                step=self._step[rows],
                masked_at_start=missing,
            )
            kept = strategy.commit(blocks, settings.strategy_value)
            row, column = kept.nonzero(as_tuple=True)
            drawn_at = positions[row, column]
            states = hidden[row, drawn_at - starts[row]]
            tokens, _, _ = self._draw(states, rows[row], drawn_at)
            self.tokens[rows[row], drawn_at] = tokens
            proposal[row, column] = states
            self._step[rows[masked.any(dim=-1)]] += 1
            masked = masked & ~kept
        return proposal

    def _verify(
        self, proposal: Tensor | None, observed: Tensor, drafts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Columns [r] up to the first draft that is refused, and the token [r] after them.

        Args:
            proposal: Hidden states [r, B, h] that drafts were drawn from, if there are any.
            observed: Final columns [r] of each block.
            drafts: Columns [r] after these that hold drafts.
        """
        rows, size = self._rows, self._size
        positions = self._block_positions(rows)
        starts, ends = self._start[rows], positions[:, -1] + 1
        hidden = self._forward(starts, ends, ends)
        every = torch.arange(len(rows), device=rows.device)
        columns = torch.arange(size + 1, device=rows.device)
        before = (positions[:, :1] + columns - 1 - starts[:, None]).clamp(min=0)
        target = hidden[every[:, None], before]  # [r, B + 1, h]
        block = self.tokens[rows[:, None], positions]
        limit = observed + drafts
        if proposal is None:
            proposal = torch.zeros_like(target[:, 1:])
        is_observed = columns[:-1] < observed[:, None]
        is_draft = ~is_observed & (columns[:-1] < limit[:, None])
        numbers = counter_uniforms(
            0,
            *(
                values.expand_as(positions).flatten()
                for values in (self._seeds[rows, None], positions, self._step[rows, None])
            ),
        ).view(positions.shape)
        flat_rows, flat_positions = rows.repeat_interleave(size), positions.flatten()
        p, q = self._of_tokens(
            target[:, :-1].flatten(0, 1),
            proposal.flatten(0, 1),
            block.flatten(),
            flat_rows,
            flat_positions,
        ).view(2, *block.shape)
        accepted = is_observed | (is_draft & (numbers * q < p))
        num_final = accepted.long().cumprod(dim=-1).sum(dim=-1)
        drawn = self._after(
            target[every, num_final],
            proposal[every, num_final.clamp(max=size - 1)],
            num_final < limit,
            positions[:, 0] + num_final,
        )
        self._step[rows] += 1
        return num_final, drawn

    def _settle(self, num_final: Tensor, drawn: Tensor) -> None:
        """Take over verified tokens [r]; drafts after them are MASK again."""
        rows, size = self._rows, self._size
        positions = self._block_positions(rows)
        block = self.tokens[rows[:, None], positions]
        columns = torch.arange(size, device=rows.device)
        is_final = columns < num_final[:, None]
        self.tokens[rows[:, None], positions] = block.where(is_final, self._settings.mask_token_id)
        after = positions[:, 0] + num_final
        has_next = after < self._ends[rows]
        self.tokens[rows[has_next], after[has_next]] = drawn[has_next]
        known = torch.arange(self.tokens.shape[1], device=rows.device)
        self._is_known[rows] = known < (after + has_next.long())[:, None]
        final = after + has_next.long()
        self._open_blocks(rows[(final >= positions[:, -1] + 1)])
        if self._settings.use_cache:
            # A draft is predicted from the token before it, whose keys are final only then.
            self._start[rows] = self._block_start[rows].minimum(final - 1)

    def _distribution(self, hidden: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """[n, columns] float64 of hidden states [n, h]; temperature 0 is certain."""
        settings = self._settings
        logits = self._logits(hidden, rows, positions)
        missing = padded_columns(logits.shape[1]) - logits.shape[1]
        logits = F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
        if settings.temperature == 0.0:
            uniforms = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
            drawn = draw_from_logits(logits, uniforms, temperature=0.0, top_k=0, top_p=1.0)
            return F.one_hot(drawn[0].long(), logits.shape[1]).double()
        return probabilities(
            logits,
            temperature=settings.temperature,
            top_k=settings.top_k if settings.top_k < settings.vocab_size else 0,
            top_p=settings.top_p,
            gather=only_rank,
        )

    def _chunks(self, count: int, device: torch.device) -> tuple[Tensor, ...]:
        rows = max(1, MAX_LOGITS // (4 * self._settings.vocab_size))
        return torch.arange(count, device=device).split(rows)

    def _of_tokens(
        self, target: Tensor, proposal: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """Probabilities of tokens [n] under both distributions, [2, n]."""
        parts = []
        for part in self._chunks(len(tokens), tokens.device):
            both = [
                self._distribution(hidden[part], rows[part], positions[part])
                for hidden in (target, proposal)
            ]
            chosen = [probability_of(p, tokens[part], 0, only_rank) for p in both]
            parts.append(torch.stack(chosen))
        return torch.cat(parts, dim=1)

    def _after(
        self, target: Tensor, proposal: Tensor, is_refused: Tensor, positions: Tensor
    ) -> Tensor:
        """The tokens [r] after the accepted ones."""
        rows = self._rows
        uniforms = counter_uniforms(0, self._seeds[rows], positions, -self._step[rows])
        parts = []
        for part in self._chunks(len(rows), rows.device):
            p = self._distribution(target[part], rows[part], positions[part])
            q = self._distribution(proposal[part], rows[part], positions[part])
            q = q.masked_fill(~is_refused[part, None], 0.0)
            parts.append(draw_residual(p, q, uniforms[part], 0, only_rank))
        return torch.cat(parts)
