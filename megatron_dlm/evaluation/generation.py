"""Answer prompts with a loaded model; used by the commands generate and evaluate.

The draws for prompt i of a file are keyed by i, so the responses are the same under every layout,
and whether or not other prompts were answered before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_dlm.data.domains import Domains
from megatron_dlm.data.prompts import PromptDataset, tokenize_prompts
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.tokenizer import special_tokens_of
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Trajectory


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
    setup: InferenceSetup, tokenizer: PreTrainedTokenizerBase, file: RecordSource
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
        groups: Process groups of the model.
    """

    def __init__(
        self,
        model: DiffusionGPTModel,
        setup: InferenceSetup,
        inputs: InferenceInputs,
        groups: ParallelGroups,
    ) -> None:
        self._setup = setup
        self._inputs = inputs
        self._model = model
        self._groups = groups

    @property
    def num_prompts(self) -> int:
        """Of all ranks."""
        return len(self._inputs.prompts)

    @property
    def groups(self) -> ParallelGroups:
        """Process groups of the model."""
        return self._groups

    def generate(
        self,
        generation: GenerationConfig,
        indices: Sequence[int] | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
        seed: int | None = None,
    ) -> list[Trajectory]:
        """Answer this rank's share of the prompts; all ranks call this.

        Args:
            generation: Decoding setting.
            indices: Of the prompts to answer, the same on all ranks; None for all prompts. Of n
                data-parallel ranks, rank r takes every n-th from the r-th on.
            on_finished: Called with each response when it is complete.
            seed: Of the draws; None for that of the options.

        Returns:
            Trajectories in the order of the share, the same on all model-parallel ranks.
        """
        if indices is None:
            indices = range(self.num_prompts)
        engine = RolloutEngine(
            self._model,
            generation=generation,
            special_tokens=self._inputs.special_tokens,
            seed=self._setup.config.data.seed if seed is None else seed,
            groups=self._groups,
        )
        share = indices[self._groups.dp_rank :: self._groups.dp_size]
        return engine.generate(
            [self._inputs.prompts[index] for index in share],
            self._inputs.max_response_length,
            on_finished,
        )
