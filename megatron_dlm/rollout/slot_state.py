"""State of the sequences in decoding: what is known of each on the host, and on the device.

R: slots in use; B: positions of a block (its size, or the longest response where that is decoded as
a whole); T: positions of a slot.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.rollout.block_grid import first_block, sequence_length
from megatron_dlm.rollout.finished import finished_trajectory
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.uniforms import signed
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory, VerificationRound


class SlotState:
    """Sequences in slots 0 to R - 1; the last one moves into the place of one that ends.

    Args:
        num_slots: Sequences held at once.
        max_length: Most positions of a sequence, see `sequence_length`.
        max_response_length: Tokens after which a response is cut; a `Prompt` may have a lower
            limit.
        config: Decoding settings, of sequences that are placed without their own.
        special_tokens: Each of `eos_token_ids` ends a response; MASK stands for tokens not
            committed yet.
        seed: Of the draws, of sequences that are placed without their own.
        keeps_confidence: Whether trajectories have `confidence`, and their `rounds`.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_length: int,
        max_response_length: int,
        config: GenerationConfig,
        special_tokens: SpecialTokens,
        seed: int,
        keeps_confidence: bool = False,
    ) -> None:
        self.num_slots = num_slots
        self.num_active = 0
        self._config = config
        self._seed = seed
        self._keeps_confidence = keeps_confidence
        self._max_response_length = max_response_length
        self._mask_token_id = special_tokens.mask_token_id
        self._block_size = config.block_size or max_response_length
        # Pieces end with blocks.
        blocks = max(config.chunked_prefill_size // self._block_size, 1)
        self._chunk = blocks * self._block_size
        self._settings = [config] * num_slots
        self._prompts: list[Prompt | None] = [None] * num_slots
        self._requests = [0] * num_slots
        self._rounds: list[list[VerificationRound]] = [[] for _ in range(num_slots)]
        self._placed = 0

        device = platform.device()
        self._end_ids = torch.tensor(special_tokens.eos_token_ids)
        self._eos_token_ids = self._end_ids.to(device)
        self._columns = torch.arange(self._block_size, device=device)
        # On the device: what the network sees and writes.
        shape = (num_slots, max_length)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._masked = torch.zeros(num_slots, self._block_size, dtype=torch.bool, device=device)
        # On the host: blocks as the device reported them, and where each sequence is.
        self._known_tokens = np.zeros(shape, dtype=np.int64)
        self._known_step = np.zeros(shape, dtype=np.int64)
        columns = max_length if keeps_confidence else 0
        self._known_confidence = np.zeros((num_slots, columns), dtype=np.float32)
        self._known_masked = np.zeros((num_slots, self._block_size), dtype=bool)

        def per_slot() -> np.ndarray:
            return np.zeros(num_slots, dtype=np.int64)

        self._order = per_slot()  # of admission
        self._seeds = per_slot()
        self._prompt_length = per_slot()
        self._end = per_slot()  # of prompt and longest response
        self._sample_index = per_slot()
        self._start = per_slot()
        self._block_start = per_slot()
        self._step = per_slot()
        self._masked_at_start = per_slot()
        self._forwards = per_slot()
        self._drafted = per_slot()  # tokens that were verified, and those accepted
        self._accepted = per_slot()
        self._prefilling = np.zeros(num_slots, dtype=bool)
        self._verifies = np.zeros(num_slots, dtype=bool)
        self._per_slot: tuple[np.ndarray | Tensor, ...] = (
            self._tokens,
            self._masked,
            self._known_tokens,
            self._known_step,
            self._known_confidence,
            self._known_masked,
            self._order,
            self._seeds,
            self._prompt_length,
            self._end,
            self._sample_index,
            self._start,
            self._block_start,
            self._step,
            self._masked_at_start,
            self._forwards,
            self._drafted,
            self._accepted,
            self._prefilling,
            self._verifies,
        )

    def length(self, prompt: Prompt) -> int:
        """Positions of a prompt and its longest response, in whole blocks."""
        return sequence_length(prompt, self._config, self._max_response_length)

    @property
    def _has_canvas(self) -> bool:
        """Whether a forward covers positions after the block in decoding."""
        return self._config.attention_pattern == "full"

    def request(self, slot: int) -> int:
        """The index that the sequence in a slot was placed with."""
        return self._requests[slot]

    def slot_of(self, request: int) -> int | None:
        """Where the sequence that was placed with this index is; None if it has ended."""
        active = self._requests[: self.num_active]
        return active.index(request) if request in active else None

    def place(
        self,
        request: int,
        prompt: Prompt,
        generation: GenerationConfig | None = None,
        seed: int | None = None,
    ) -> None:
        """Start decoding a prompt in the first unused slot.

        Args:
            request: Index of the sequence.
            prompt: What to decode.
            generation: Its own settings, of the table's block size and attention.
            seed: Of its own draws.

        Raises:
            ValueError: The prompt is empty, and the first token is predicted from it.
        """
        slot, known, length = self.num_active, prompt.known_ids, len(prompt.token_ids)
        setting = self._config if generation is None else generation
        if setting.verifies and not length:
            raise ValueError(f"sample {prompt.sample_index} has no token to predict from")
        block_start = first_block(known, self._config)
        masked = block_start + np.arange(self._block_size) >= len(known)
        self._end[slot] = length + prompt.response_limit(self._max_response_length)
        if self._has_canvas:
            masked &= block_start + np.arange(self._block_size) < self._end[slot]
        tokens, on_device = platform.to_device(known, torch.from_numpy(masked.astype(np.int64)))
        self._tokens[slot, : len(known)] = tokens
        self._tokens[slot, len(known) :] = self._mask_token_id
        self._masked[slot] = on_device.bool()
        self._prompts[slot], self._requests[slot] = prompt, request
        self._settings[slot], self._verifies[slot] = setting, setting.verifies
        self._seeds[slot] = signed(self._seed if seed is None else seed)
        self._known_masked[slot] = masked
        self._known_confidence[slot] = 0
        self._rounds[slot] = []
        if prompt.beginning is not None:
            decoded = slice(length, len(known))
            self._known_tokens[slot, decoded] = prompt.beginning.response_ids
            self._known_step[slot, decoded] = prompt.beginning.unmask_step
        self._order[slot] = self._placed
        self._prompt_length[slot] = length
        self._sample_index[slot] = prompt.sample_index
        self._start[slot] = 0
        self._block_start[slot] = block_start
        self._step[slot] = 1
        self._masked_at_start[slot] = masked.sum()
        self._forwards[slot] = self._drafted[slot] = self._accepted[slot] = 0
        self._prefilling[slot] = not self._has_canvas
        self._placed += 1
        self.num_active += 1

    def remove(self, slot: int) -> int | None:
        """Free a slot.

        Returns:
            The slot whose sequence moved into this one (its cache must move too), or None.
        """
        self.num_active -= 1
        last = self.num_active
        self._prompts[slot] = self._prompts[last]
        self._requests[slot] = self._requests[last]
        self._settings[slot] = self._settings[last]
        self._rounds[slot] = self._rounds[last]
        self._prompts[last] = None
        if slot == last:
            return None
        for state in self._per_slot:
            state[slot] = state[last]
        return last

    def _settled_end(self, slot: int) -> int:
        """One past the last position that is in a finished block, or verified."""
        end = int(self._block_start[slot])
        if self._verifies[slot]:
            end += self._block_size - int(self._masked_at_start[slot])
        return end

    def settled(self, slot: int) -> np.ndarray:
        """Tokens of the response in finished blocks, [n]; what follows EOS is among them."""
        return self._known_tokens[slot, self._prompt_length[slot] : self._settled_end(slot)]

    def final_ids(self, slot: int) -> Tensor:
        """The tokens of prompt and response whose keys are final, [n] int64."""
        prompt = self._prompts[slot]
        assert prompt is not None
        end, length = int(self._start[slot]), len(prompt.token_ids)
        decoded = torch.from_numpy(self._known_tokens[slot, length : max(end, length)].copy())
        return torch.cat((prompt.token_ids, decoded))[:end]

    def block(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The response in the block that is not finished: tokens [n], and which are MASK [n]."""
        start, end = self._block_start[slot], self._end[slot]
        first = max(self._settled_end(slot), self._prompt_length[slot])
        shown = slice(first, min(start + self._block_size, end))
        columns = slice(shown.start - start, shown.stop - start)
        masked = self._known_masked[slot, columns] | self._verifies[slot]  # a draft is no token yet
        return self._known_tokens[slot, shown], masked

    def forwards(self, slot: int) -> int:
        """Forwards so far that drew tokens for the sequence of a slot."""
        return int(self._forwards[slot])

    def trajectory(self, slot: int) -> Trajectory:
        """The trajectory decoded in a finished slot."""
        end = int(self._block_start[slot]) + self._block_size
        if self._has_canvas:
            end = min(end, int(self._end[slot]))
        if self._verifies[slot]:  # a verified token may be the first one of the next block
            end = int(self._end[slot])
        return self._trajectory(slot, end, int(self._forwards[slot]))

    def unfinished(self, slot: int) -> Trajectory:
        """The blocks decoded so far, of a sequence under block-causal attention."""
        # The block in decoding begins anew, its steps too.
        forwards = int(self._forwards[slot] - self._step[slot] + 1)
        trajectory = self._trajectory(slot, int(self._block_start[slot]), forwards)
        return replace(trajectory, finish_reason="unfinished")

    def _trajectory(self, slot: int, end: int, forwards: int) -> Trajectory:
        """The trajectory of a slot up to a position, `forwards` of this rollout."""
        prompt = self._prompts[slot]
        assert prompt is not None
        decoded = slice(len(prompt.token_ids), end)
        confidence = None
        if self._keeps_confidence:
            confidence = torch.from_numpy(self._known_confidence[slot, decoded].copy())
        return finished_trajectory(
            prompt,
            tokens=torch.from_numpy(self._known_tokens[slot, decoded].copy()),
            unmask_step=torch.from_numpy(self._known_step[slot, decoded].copy()),
            confidence=confidence,
            limit=prompt.response_limit(self._max_response_length),
            eos_token_ids=self._end_ids,
            has_states=not (self._config.is_autoregressive or self._verifies[slot]),
            canvas_length=int(self._end[slot]) if self._has_canvas else None,
            denoising_forwards=forwards,
            total_forwards=forwards + self._prefill_forwards(prompt),
            drafted_tokens=int(self._drafted[slot]),
            accepted_tokens=int(self._accepted[slot]),
            rounds=tuple(self._rounds[slot]),
        )

    def _prefill_forwards(self, prompt: Prompt) -> int:
        """Forwards without draws that a prompt takes where nothing of it is shared.

        The last piece of a prompt, and what commits a block, travel in denoising forwards.
        """
        if self._has_canvas:
            return 0
        complete = first_block(prompt.known_ids, self._config)
        complete -= int(self._config.is_autoregressive)
        return max(-(-complete // self._chunk) - 1, 0)
