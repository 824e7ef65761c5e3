"""Answers of the student to held-out prompts in the course of training.

The draws for prompt i are keyed by the run's seed and by i, at every evaluation the same, so that
figures of different updates and layouts are of the same noise. Training is not affected.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_dlm.config import Config
from megatron_dlm.evaluation.evaluator import EvaluationResult, Response, rates
from megatron_dlm.evaluation.rewards import RIGHT
from megatron_dlm.parallel import (
    ParallelGroups,
    errors_on_all_ranks,
    from_rank_zero,
    on_rank_zero,
)
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.training.best_checkpoint import ACCURACY, HeldOutFigure
from megatron_dlm.training.evaluation_inputs import EvaluationInputs, evaluates_after
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Trajectory

SAMPLES = 4
"""Prompts, from the first on, whose responses are shown."""


@dataclass(frozen=True)
class AnsweredPrompts:
    """Held-out prompts as the student answers them after an update; the same on all ranks.

    Attributes:
        rates: By decoding setting, in the order of the options.
        samples: Responses to the first prompts for a person to read, a JSON object each.
        figure: The accuracy under the first setting.
        seconds: That it took.
    """

    rates: Mapping[str, EvaluationResult]
    samples: Sequence[Mapping[str, Any]]
    figure: HeldOutFigure
    seconds: float

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The rates as a JSON object."""
        return {name: result.to_json() for name, result in self.rates.items()}


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Answers the prompts; all ranks make one.

    Attributes:
        config: The run's configuration, `of_data`.
        inputs: The prompts, and how they are answered.
        tokenizer: Decodes responses.
        special_tokens: Of the student.
        groups: Process groups of the student.
        stop: Asked before every forward.
    """

    config: Config
    inputs: EvaluationInputs
    tokenizer: PreTrainedTokenizerBase
    special_tokens: SpecialTokens
    groups: ParallelGroups
    stop: StopAgreement

    def is_due(self, iteration: int) -> bool:
        """Whether the prompts are answered after this optimizer step."""
        return evaluates_after(self.config, iteration)

    def answer(self, model: torch.nn.Module) -> AnsweredPrompts:
        """Answer the prompts under each decoding setting; all ranks call this.

        Args:
            model: This rank's part of the student.

        Raises:
            StopRequested: On all ranks.
            UserError: On all ranks: the reward could not rate the responses.
        """
        started = time.perf_counter()
        results: dict[str, EvaluationResult] = {}
        samples: list[dict[str, Any]] = []
        for name, generation in self.inputs.decodings.items():
            results[name], shown = self._answer(model, name, generation)
            samples += shown
        first, result = next(iter(results.items()))
        metric = f"{ACCURACY}/{first}"
        figure = HeldOutFigure(
            metric, result.accuracy, higher_is_better=True, data=self.inputs.fingerprint
        )
        return AnsweredPrompts(results, samples, figure, time.perf_counter() - started)

    def _answer(
        self, model: torch.nn.Module, name: str, generation: GenerationConfig
    ) -> tuple[EvaluationResult, list[dict[str, Any]]]:
        """Rates under one setting, and the responses to show."""
        groups, prompts = self.groups, self.inputs.prompts
        engine = RolloutEngine(
            model,
            generation=generation,
            special_tokens=self.special_tokens,
            seed=self.config.data.seed,
            groups=groups,
            stop=self.stop,
        )
        with engine.settled():
            trajectories = engine.generate_together(
                [prompts[index] for index in range(len(prompts))],
                self.inputs.max_response_length,
                one_queue=self.config.rollout.shared_rollout_queue,
            )
        with errors_on_all_ranks():
            rated = self._rated(trajectories) if groups.is_first_of_replica else []
        everything = sorted(on_rank_zero(rated), key=lambda entry: entry[0].sample_index)

        def result() -> tuple[EvaluationResult, list[dict[str, Any]]]:
            responses, rewards = [r for r, _ in everything], [reward for _, reward in everything]
            shown = [
                self._sample(name, response, reward) for response, reward in everything[:SAMPLES]
            ]
            return rates(responses, rewards), shown

        return from_rank_zero(result)

    def _rated(self, trajectories: Sequence[Trajectory]) -> list[tuple[Response, float]]:
        responses = [Response.of(trajectory, self.tokenizer) for trajectory in trajectories]
        records = [trajectory.record for trajectory in trajectories]
        rewards = self.inputs.reward.rate(records, [response.text for response in responses])
        return list(zip(responses, rewards, strict=True))

    def _sample(self, name: str, response: Response, reward: float) -> dict[str, Any]:
        """A response for a person to read."""
        prompt = self.inputs.prompts[response.sample_index]
        forwards = response.denoising_forwards
        return {
            "decoding": name,
            "sample": response.sample_index,
            "prompt": self.tokenizer.decode(prompt.token_ids.tolist()),
            "response": response.text,
            "reference": None if (answer := prompt.record.get("answer")) is None else str(answer),
            "response_tokens": response.tokens,
            "finish_reason": response.finish_reason,
            "tokens_per_forward": response.tokens / forwards if forwards else None,
            "reward": reward,
            "correct": reward >= RIGHT,
        }
