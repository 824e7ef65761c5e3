"""Denoising of several prompts at once, block by block or as a whole, for plain transformers.

Each row has its own positions, blocks and steps and starts its next block as soon as one is clean;
rows that have ended are left out of the forwards. Under block-causal attention the keys of finished
blocks are cached: they are final once the block is clean, so its tokens are part of the next
block's first forward. Under full attention every kept token changes all keys, and each forward sees
the whole canvas.

R: rows; r: rows that have not ended; L: positions of a canvas; B: positions of a block; S: tokens
of a forward; K: positions that it sees; n: tokens drawn at once; h: hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dlm.rollout.strategies import STRATEGIES, DenoisedBlocks

from .generation_arguments import DecodingSettings
from .response_columns import ResponseColumns
from .row_cache import RowCache
from .token_draws import draw_tokens, row_seeds

# Most logits in memory at once.
MAX_LOGITS = 1 << 26


class Denoising:
    """The rows of one call of `generate`.

    Args:
        prompts: R prompts, without padding.
        settings: How to decode.
        seed: Seed of the draws.
        network: Computes hidden states [r, S, h] from token ids [r, S], a mask [r, S, K], true
            where visible, positions [r, S] and a cache or None.
        head: Computes logits from hidden states [n, h].
    """

    def __init__(
        self,
        prompts: list[Tensor],
        settings: DecodingSettings,
        seed: int,
        network: Callable[[Tensor, Tensor, Tensor, RowCache | None], Tensor],
        head: Callable[[Tensor], Tensor],
    ) -> None:
        self._settings, self._network, self._head = settings, network, head
        device = prompts[0].device
        self._size = settings.block_size or settings.max_new_tokens
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        # Under block-causal attention a last block past the limit is whole, as in training.
        self._ends = self.prompt_lengths + settings.max_new_tokens
        length = int(self._ends.max()) + self._size
        self.tokens = prompts[0].new_full((len(prompts), length), settings.mask_token_id)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = prompt
        self._is_known = torch.arange(length, device=device) < self.prompt_lengths[:, None]

        self._rows = torch.arange(len(prompts), device=device)
        self._seeds = torch.tensor(
            row_seeds([prompt.tolist() for prompt in prompts], seed), device=device
        )
        # A response that is denoised as a whole is one block, wherever the prompt ends.
        self._block_start = self.prompt_lengths.clone()
        if settings.block_size is not None:
            self._block_start -= self._block_start % settings.block_size
        self._step = torch.ones_like(self._block_start)
        self._masked_at_start = self._block_masks(self._rows).sum(dim=-1)
        self._start = torch.zeros_like(self._block_start)
        self._cache = RowCache() if settings.use_cache else None

    def run(self, columns: ResponseColumns | None) -> Tensor:
        """Decode all rows; returns the lengths of the responses, [R].

        Args:
            columns: Receives tokens as they become known, and may end rows.
        """
        lengths = torch.zeros_like(self.prompt_lengths)
        is_complete = torch.zeros_like(lengths, dtype=torch.bool)
        while len(self._rows):
            self._denoise()
            rows = self._rows
            lengths[rows], is_complete[rows] = self._known_responses(rows)
            has_ended = is_complete
            if columns is not None:
                columns.tell(self.responses(), lengths, is_complete)
                has_ended = is_complete | columns.has_ended
            self._keep(~has_ended[rows])
        return lengths if columns is None else columns.lengths

    def responses(self) -> Tensor:
        """Tokens after each prompt, [R, max_new_tokens]."""
        positions = torch.arange(self._settings.max_new_tokens, device=self.tokens.device)
        return self.tokens.gather(1, self.prompt_lengths[:, None] + positions)

    def _keep(self, goes_on: Tensor) -> None:
        if goes_on.all():
            return
        self._rows = self._rows[goes_on]
        if self._cache is not None:
            self._cache.keep(goes_on)

    def _block_positions(self, rows: Tensor) -> Tensor:
        offsets = torch.arange(self._size, device=rows.device)
        return self._block_start[rows, None] + offsets

    def _block_masks(self, rows: Tensor) -> Tensor:
        """Which positions of the blocks in decoding are MASK, [r, B] bool."""
        positions = self._block_positions(rows)
        masked = ~self._is_known[rows[:, None], positions]
        if self._settings.is_full:
            masked &= positions < self._ends[rows, None]
        return masked

    def _known_responses(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Leading tokens of each response that are known, [r], and whether it ends there.

        Known tokens never change, so a response is complete as soon as there is no MASK before its
        EOS.
        """
        settings = self._settings
        prompt_lengths = self.prompt_lengths[rows]
        positions = torch.arange(self.tokens.shape[1], device=rows.device)
        known = self._is_known[rows].long().cumprod(dim=-1).sum(dim=-1)
        known = known.minimum(self._ends[rows])
        is_eos = torch.isin(self.tokens[rows], self.tokens.new_tensor(settings.eos_token_ids))
        is_eos &= (positions >= prompt_lengths[:, None]) & (positions < known[:, None])
        has_eos = is_eos.any(dim=-1)
        known = torch.where(has_eos, is_eos.int().argmax(dim=-1) + 1, known)
        return known - prompt_lengths, has_eos | (known >= self._ends[rows])

    def _denoise(self) -> None:
        """One forward of all rows, and one step of each."""
        rows, settings = self._rows, self._settings
        positions, masked = self._block_positions(rows), self._block_masks(rows)
        starts = self._start[rows]
        ends = self._ends[rows] if settings.is_full else self._block_start[rows] + self._size
        hidden = self._forward(starts, ends, self._block_start[rows])

        row, column = masked.nonzero(as_tuple=True)
        drawn_at = positions[row, column]
        source = drawn_at - int(settings.is_shifted) - starts[row]
        tokens, confidence, entropy = self._draw(hidden[row, source], rows[row], drawn_at)

        def in_block(values: Tensor) -> Tensor:
            return values.new_zeros(masked.shape).index_put_((row, column), values)

        blocks = DenoisedBlocks(
            masked=masked,
            confidence=in_block(confidence),
            entropy=in_block(entropy),
            step=self._step[rows],
            masked_at_start=self._masked_at_start[rows],
        )
        strategy = STRATEGIES[settings.remasking_strategy]
        committed = strategy.commit(blocks, settings.strategy_value)
        kept = committed[row, column]
        self.tokens[rows[row[kept]], drawn_at[kept]] = tokens[kept]
        self._is_known[rows[row[kept]], drawn_at[kept]] = True
        self._step[rows] += 1
        if settings.use_cache:
            self._start[rows] = self._block_start[rows]
        self._open_blocks(rows[~(masked & ~committed).any(dim=-1)])

    def _open_blocks(self, rows: Tensor) -> None:
        """Start the next block of rows whose block is clean."""
        reached_end = self._block_start[rows] + self._size >= self._ends[rows]
        rows = rows[~reached_end]
        self._block_start[rows] += self._size
        self._step[rows] = 1
        self._masked_at_start[rows] = self._block_masks(rows).sum(dim=-1)

    def _forward(self, starts: Tensor, ends: Tensor, noisy: Tensor) -> Tensor:
        """Hidden states [r, S, h] of positions starts to ends - 1; undefined after these.

        With a causal context, positions from `noisy` [r] on see all of their block.
        """
        positions = starts[:, None] + torch.arange(int((ends - starts).max()), device=starts.device)
        within = positions.clamp(max=self.tokens.shape[1] - 1)
        token_ids = self.tokens[self._rows[:, None], within]
        seen = torch.arange(int(positions.max()) + 1, device=starts.device)
        mask = seen < ends[:, None, None]
        if not self._settings.is_full:
            block_mask = seen // self._size <= positions[:, :, None] // self._size
            if self._settings.has_causal_context:
                at = positions[:, :, None]
                block_mask = block_mask & ((at >= noisy[:, None, None]) | (seen <= at))
            mask = mask & block_mask
        if self._cache is not None:
            self._cache.open(positions)
        mask = mask.expand(-1, positions.shape[1], -1)
        # The last layers may be on another device than the rows.
        return self._network(token_ids, mask, positions, self._cache).to(starts.device)

    def _draw(
        self, hidden: Tensor, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, confidences and entropies from hidden states [n, h]; each [n]."""
        settings, parts = self._settings, []
        chunk = max(1, MAX_LOGITS // settings.vocab_size)
        for part in torch.arange(len(rows), device=rows.device).split(chunk):
            parts.append(
                draw_tokens(
                    self._logits(hidden[part], rows[part], positions[part]),
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    seeds=self._seeds[rows[part]],
                    positions=positions[part],
                    steps=self._step[rows[part]],
                )
            )
        tokens, confidence, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
        return tokens, confidence, entropy

    def _logits(self, hidden: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits [n, V] of tokens at positions [n], from hidden states [n, h]."""
        settings = self._settings
        logits = self._head(hidden).to(rows.device)
        forbidden = torch.finfo(logits.dtype).min
        logits[:, settings.mask_token_id] = forbidden
        if settings.min_new_tokens:
            length = positions - self.prompt_lengths[rows]
            for token in settings.eos_token_ids:
                logits[length < settings.min_new_tokens, token] = forbidden
        return logits
