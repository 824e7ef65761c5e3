"""A chat with a model: its messages, and its answers while they are decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.evaluation.generation import InferenceInputs, read_inference_inputs
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.models.model import StageModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.block_grid import sequence_length
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.trajectory import Prompt, Trajectory

THINKING = "enable_thinking"
"""Variable by which chat templates switch thinking on and off."""


@dataclass(frozen=True)
class Decoding:
    """An answer after a forward.

    Attributes:
        finished: Tokens in finished blocks, before the end of the response.
        block: Tokens of the block in decoding; None for MASK.
    """

    finished: list[int]
    block: list[int | None]


class ChatSession:
    """A model, and the chat with it so far.

    An answer is what `megatron-dlm generate` writes for the same messages, options and seed. Keys
    and values of earlier turns stay in the cache: a forward computes what is new.

    Args:
        model: With its weights; process groups must exist.
        setup: Options.
        generation: Decoding setting.
        tokenizer: With a chat template.
        thinking: Whether the model thinks first; None leaves it to the template.

    Attributes:
        messages: Of the chat, with roles; a system message comes first.
        seed: Of the draws.

    Raises:
        UserError: There is no chat template, or it cannot switch thinking.
    """

    def __init__(
        self,
        model: StageModel,
        setup: InferenceSetup,
        generation: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool | None = None,
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.seed = setup.config.data.seed
        self._model = model
        # What an answer may still take shrinks as the chat grows, whatever the limit.
        self._setup = replace(setup, options=replace(setup.options, max_response_length=None))
        self._generation = generation
        self._tokenizer = tokenizer
        self._engine: RolloutEngine | None = None
        self._batch: DecodingBatch | None = None
        self._room = 0  # positions that the batch has
        self._thinking: bool | None = None
        if thinking is not None:
            self.think(thinking)

    def think(self, thinking: bool) -> None:
        """Switch thinking on or off.

        Raises:
            UserError: The chat template does not know how.
        """
        check_thinking(self._tokenizer, thinking)
        self._thinking = thinking

    def set_system(self, text: str) -> None:
        """Put a system message first, in place of an earlier one; an empty one removes it."""
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *others] if text else others

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def record(self) -> dict[str, Any]:
        """The chat as `--prompts` takes it."""
        record: dict[str, Any] = {"messages": list(self.messages)}
        if self._thinking is not None:
            record["chat_template_kwargs"] = {THINKING: self._thinking}
        return record

    def ask(self, text: str) -> InferenceInputs:
        """Add a user's message; an answer comes from `answer`.

        Returns:
            The chat as a prompt, with the longest answer that there is room for.

        Raises:
            UserError: It does not fit, or the template refuses it; the message is not added.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            source = RecordsInMemory([self.record()], "chat")
            return read_inference_inputs(self._setup, self._tokenizer, source)
        except UserError:
            self.messages.pop()
            raise

    def answer(self, inputs: InferenceInputs) -> Iterator[Decoding | Trajectory]:
        """Decode the answer.

        Yields:
            Its state after every forward, then its trajectory.

        Raises:
            ValueError: An earlier answer was neither decoded to its end nor closed.
        """
        prompt = inputs.prompt(0)
        longest = prompt.response_limit(inputs.max_response_length)
        prompt = replace(prompt, max_response_length=longest)
        engine, batch = self._opened(inputs, prompt)
        with engine.evaluating():
            if not batch.admit(0, prompt, seed=self.seed):
                raise ValueError("an earlier answer is still being decoded; close it first")
            try:
                while True:
                    ended, _ = batch.step()
                    if ended:
                        [(_, trajectory)] = ended
                        break
                    [(_, finished)] = batch.settled()
                    tokens, masked = batch.block(0)
                    block = zip(tokens.tolist(), masked.tolist(), strict=True)
                    yield Decoding(
                        finished.tolist(), [None if is_mask else token for token, is_mask in block]
                    )
            except GeneratorExit:  # between two forwards
                batch.cancel(0)
                raise
            except BaseException:
                self._batch = None
                raise
        yield trajectory

    def _opened(
        self, inputs: InferenceInputs, prompt: Prompt
    ) -> tuple[RolloutEngine, DecodingBatch]:
        """A batch with room for an answer, which has the keys of earlier turns.

        It is opened with room for a chat of twice the length, as far as model and memory have it,
        so that a chat of n turns computes its history anew some log n times.
        """
        longest = self._setup.config.longest_response
        needed = sequence_length(prompt, self._generation, longest)
        if self._engine is None:
            self._engine = RolloutEngine(
                self._model,
                generation=self._generation,
                special_tokens=inputs.special_tokens,
                seed=self.seed,
                groups=ParallelGroups.from_parallel_state(),
            )
        if self._generation.attention_pattern == "full":  # no keys, and the canvas is the answer's
            longest = inputs.max_response_length
            return self._engine, self._engine.open(1, [needed], longest)
        if self._batch is None or needed > self._room:
            self._batch = None  # its memory is free before the next one asks for some
            grid = self._generation.block_size or 1
            most = self._setup.source.architecture.max_position_embeddings // grid * grid
            self._room = max(needed, min(2 * needed, most))
            try:
                self._batch = self._engine.open(1, [self._room], longest)
            except (UserError, torch.OutOfMemoryError):
                self._room = needed
                self._batch = self._engine.open(1, [self._room], longest)
        return self._engine, self._batch

    def keep(self, answer: str) -> None:
        """Add an answer to the chat."""
        self.messages.append({"role": "assistant", "content": answer})

    def take_back(self) -> None:
        """Forget a question that was not answered."""
        self.messages.pop()

    def text(self, token_ids: list[int]) -> str:
        """What tokens say, without special ones."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def check_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Check that a chat template can switch thinking.

    Raises:
        UserError: It cannot.
    """
    if THINKING not in str(tokenizer.chat_template):
        raise bad_value(
            "thinking",
            "on" if thinking else "off",
            f"the chat template has no variable {THINKING}",
            "leave it out, or name a --tokenizer whose template has it",
        )
