"""Answer prompts with a loaded model; used by the commands generate and evaluate.

Prompt i of a file is answered by data-parallel rank i mod dp; its draws are keyed by i, so the
responses are the same under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from transformers import PreTrainedTokenizerBase

from megatron_dlm import platform
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.prompts import PromptDataset, tokenize_prompts
from megatron_dlm.data.records import RecordFile
from megatron_dlm.data.tokenizer import special_tokens_of
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Trajectory

T = TypeVar("T")


@dataclass(frozen=True)
class InferenceInputs:
    """Prompts to answer, and the longest response.

    Attributes:
        prompts: All prompts, of all ranks.
        special_tokens: Of tokenizer and checkpoint.
        max_response_length: In tokens, for all prompts; a prompt's own limit may be lower.
    """

    prompts: PromptDataset
    special_tokens: SpecialTokens
    max_response_length: int


def read_inference_inputs(
    setup: InferenceSetup, tokenizer: PreTrainedTokenizerBase, file: RecordFile
) -> InferenceInputs:
    """Tokenise and check prompts; loads no weights.

    Raises:
        UserError: A record is unusable, or there is no room for responses.
    """
    architecture, data = setup.source.architecture, setup.config.data
    special_tokens = special_tokens_of(tokenizer, architecture, setup.tokenizer_folder)
    prompts = tokenize_prompts(
        file,
        tokenizer,
        special_tokens,
        data.max_prompt_length,
        setup.config.template.chat_template_kwargs,
        domains=Domains.from_config(setup.config),
    )
    return InferenceInputs(prompts, special_tokens, _response_length(setup, prompts))


def _response_length(setup: InferenceSetup, prompts: PromptDataset) -> int:
    """Longest response, in tokens.

    Raises:
        UserError: With the longest prompt it does not fit the model's positions.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    positions = setup.source.architecture.max_position_embeddings
    block_size = setup.config.model.block_size
    room = positions // block_size * block_size - longest
    if room < 1:
        raise bad_value(
            "prompt length",
            longest,
            f"leaves no room for a response in the model's {positions} positions",
            "shorten the longest prompt",
        )
    length = setup.config.longest_response
    if setup.options.max_response_length is None:
        return min(length, room)
    if length > room:
        raise bad_value(
            "--max-response-length",
            length,
            f"after the longest prompt of {longest} tokens exceeds the model's {positions} "
            "positions",
            f"choose {room} or less",
        )
    return length


def load_frozen_model(setup: InferenceSetup) -> DiffusionGPTModel:
    """The model with its weights, this process's part of the layout; process groups must exist.

    Raises:
        UserError: The weights do not fit config.json.
    """
    model = build_frozen_model(setup.source.architecture, setup.config)
    setup.source.load_into(model)
    return model


class Generator:
    """Answers prompts; process groups must exist.

    Args:
        model: From `load_frozen_model`.
        setup: Decoding options.
        inputs: The prompts.
    """

    def __init__(
        self, model: DiffusionGPTModel, setup: InferenceSetup, inputs: InferenceInputs
    ) -> None:
        self._setup = setup
        self._inputs = inputs
        self._model = model
        rank = parallel_state.get_data_parallel_rank()
        self._share = range(len(inputs.prompts))[
            rank :: parallel_state.get_data_parallel_world_size()
        ]

    @property
    def share(self) -> Sequence[int]:
        """Indices of the prompts that this rank answers."""
        return self._share

    def generate(
        self,
        generation: GenerationConfig,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Answer this rank's share of the prompts; all ranks call this.

        Args:
            generation: Decoding setting.
            on_finished: Called with each response when it is complete.

        Returns:
            Trajectories in the order of `share`, the same on all model-parallel ranks.
        """
        engine = RolloutEngine(
            self._model,
            generation=generation,
            special_tokens=self._inputs.special_tokens,
            vocab_size=self._setup.source.architecture.vocab_size,
            seed=self._setup.config.data.seed,
        )
        return engine.generate(
            [self._inputs.prompts[index] for index in self._share],
            self._inputs.max_response_length,
            on_finished,
        )


def gather_in_order(items: Sequence[T]) -> list[T] | None:
    """Collect one item for each prompt of each data-parallel rank's share, in the file's order.

    Returns:
        All items on the first data-parallel rank (rank 0 of the job is one), None on the others.
    """
    group = parallel_state.get_data_parallel_group()
    first = torch.distributed.get_global_rank(group, 0)
    parts: list[Any] | None = None
    if torch.distributed.get_rank() == first:
        parts = [None] * group.size()
    torch.distributed.gather_object(list(items), parts, dst=first, group=group)
    if parts is None:
        return None
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def sum_over_ranks(counts: Sequence[int]) -> list[int]:
    """Add up counts of the data-parallel ranks; the same on all ranks."""
    total = torch.tensor(counts, dtype=torch.int64, device=platform.device())
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return [int(count) for count in total.tolist()]
