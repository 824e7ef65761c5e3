"""Answer prompts with a loaded model; used by the commands generate and evaluate.

The draws for response j to prompt i of a file are keyed by i and j, so the responses are the same
under every layout, however many there are, and whether or not others were answered before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_dlm.data.chat_template import unread_variables
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.prompts import PromptDataset, tokenize_prompts
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.tokenizer import special_tokens_of
from megatron_dlm.entry import warn
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.models.model import StageModel
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

_RESPONSE_SHIFT = 40
"""Bits of a sample's number that the prompt takes; the response's are above."""


def sample_number(prompt: int, response: int) -> int:
    """The sample index that keys the draws for a response to a prompt, both from 0."""
    return response << _RESPONSE_SHIFT | prompt


@dataclass(frozen=True)
class InferenceInputs:
    """Prompts to answer, and the longest response.

    Attributes:
        prompts: All prompts, of all ranks.
        special_tokens: Of tokenizer and checkpoint.
        max_response_length: In tokens, for all prompts; a prompt's own limit may be lower.
        num_responses: To each prompt.
    """

    prompts: PromptDataset
    special_tokens: SpecialTokens
    max_response_length: int
    num_responses: int = 1

    def prompt(self, index: int) -> Prompt:
        """The prompt of a response; those to prompt i of n are n i to n (i + 1) - 1."""
        which, response = divmod(index, self.num_responses)
        return self.prompts.sample(which, sample_number(which, response))

    def place(self, trajectory: Trajectory) -> tuple[int, int]:
        """Prompt and response, each from 0, of a trajectory."""
        response, which = divmod(trajectory.sample_index, 1 << _RESPONSE_SHIFT)
        return which, response

    def index(self, trajectory: Trajectory) -> int:
        """The index that `prompt` was given."""
        which, response = self.place(trajectory)
        return which * self.num_responses + response


def read_inference_inputs(
    setup: InferenceSetup,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordSource,
    num_responses: int = 1,
) -> InferenceInputs:
    """Tokenise and check prompts; loads no weights.

    Raises:
        UserError: A record is unusable, or there is no room for responses.
    """
    architecture, data = setup.source.architecture, setup.config.data
    for line in unread_variables(tokenizer, setup.config.template.chat_template_kwargs):
        warn(line)
    special_tokens = special_tokens_of(tokenizer, architecture, setup.tokenizer_folder)
    prompts = tokenize_prompts(
        file,
        tokenizer,
        special_tokens,
        data.max_prompt_length,
        setup.config.template.chat_template_kwargs,
        domains=Domains.from_config(setup.config),
    )
    length = _response_length(setup, prompts)
    return InferenceInputs(prompts, special_tokens, length, num_responses)


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


def load_frozen_model(setup: InferenceSetup) -> StageModel:
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
        groups: Process groups of the model; replicas are those that decode.
        keeps_confidence: Whether trajectories have `confidence`.

    Attributes:
        inputs: As passed.
    """

    def __init__(
        self,
        model: StageModel,
        setup: InferenceSetup,
        inputs: InferenceInputs,
        groups: ParallelGroups,
        *,
        keeps_confidence: bool = False,
    ) -> None:
        self._setup = setup
        self._keeps_confidence = keeps_confidence
        self.inputs = inputs
        self._model = model
        self._groups = groups.for_decoding()

    @property
    def num_responses(self) -> int:
        """Of all ranks, to all prompts."""
        return len(self.inputs.prompts) * self.inputs.num_responses

    @property
    def groups(self) -> ParallelGroups:
        """Process groups of the model in decoding."""
        return self._groups

    def generate(
        self,
        generation: GenerationConfig,
        indices: Sequence[int] | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
        seed: int | None = None,
    ) -> list[Trajectory]:
        """Generate this rank's share of the responses; all ranks call this.

        Args:
            generation: Decoding setting.
            indices: Of the responses (`InferenceInputs.prompt`), the same on all ranks; None for
                all. Of n replicas, number r takes every n-th from the r-th on.
            on_finished: Called with each response when it is complete.
            seed: Of the draws; None for that of the options.

        Returns:
            Trajectories in the order of the share, the same on all model-parallel ranks.
        """
        if indices is None:
            indices = range(self.num_responses)
        engine = RolloutEngine(
            self._model,
            generation=generation,
            special_tokens=self.inputs.special_tokens,
            seed=self._setup.config.data.seed if seed is None else seed,
            groups=self._groups,
            keeps_confidence=self._keeps_confidence,
        )
        share = indices[self._groups.replica :: self._groups.num_replicas]
        return engine.generate(
            [self.inputs.prompt(index) for index in share],
            self.inputs.max_response_length,
            on_finished,
        )
