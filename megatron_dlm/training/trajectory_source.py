"""Where a run's trajectories come from: the student's rollout, given responses, or a mixture."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from megatron_dlm.config import Config
from megatron_dlm.config.curriculum import (
    dynamic_threshold,
    response_length,
    teacher_response_fraction,
)
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.teacher.given_responses import takes_given_response
from megatron_dlm.training.verified_rollout import Verifier, generate_until_right
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class TrajectorySource:
    """Turns samples of the data into trajectories.

    Attributes:
        config: The run's configuration.
        prompts: What the student answers; None without rollouts.
        engine: Decodes with the student's current weights; None without rollouts.
        examples: The same records with given responses: a data set's, a corpus's windows, or the
            teacher's; None where every response is the student's.
        verifier: Repeats a rollout until the answer is right; None takes the first answer.
    """

    config: Config
    prompts: PromptDataset | None = None
    engine: RolloutEngine | None = None
    examples: ExampleDataset | CorpusDataset | None = None
    verifier: Verifier | None = None

    def trajectories(self, samples: Sequence[tuple[int, int]], rollout: int) -> list[Trajectory]:
        """The trajectories of this rank's samples, in their order; all ranks call this.

        Args:
            samples: (sample index, record index) of each.
            rollout: Rollout step, from 0.

        Raises:
            UserError: A window of a corpus has an invalid token; raised on all ranks.
            StopRequested: On all ranks. The same call gives the same trajectories later.
        """
        if self.engine is None:
            assert self.examples is not None
            # Only a corpus is too large to be checked before the run.
            is_corpus = isinstance(self.examples, CorpusDataset)
            with errors_on_all_ranks() if is_corpus else nullcontext():
                trajectories = [self.examples.sample(record, sample) for sample, record in samples]
            return trajectories
        assert self.prompts is not None
        given: dict[int, Trajectory] = {}
        fraction = teacher_response_fraction(self.config, rollout)
        if self.examples is not None:
            for sample, record in samples:
                if takes_given_response(self.config.data.seed, sample, fraction):
                    given[sample] = self.examples.sample(record, sample)
        prompts = [
            self.prompts.sample(record, sample) for sample, record in samples if sample not in given
        ]
        length = response_length(self.config, rollout)
        changed: dict[str, Any] = {"dynamic_threshold": dynamic_threshold(self.config, rollout)}
        self.engine.generation = replace(self.engine.generation, **changed)
        if self.verifier is None:
            with self.engine.settled():
                trajectories = self.engine.generate(prompts, length)
        else:
            trajectories = generate_until_right(self.engine, prompts, length, self.verifier)
        rolled_out = iter(trajectories)
        return [given[sample] if sample in given else next(rolled_out) for sample, _ in samples]
