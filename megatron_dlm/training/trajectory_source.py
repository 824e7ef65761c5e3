"""Where a run's trajectories come from: the student's rollout, given responses, or a mixture."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from megatron_dlm.config import Config
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.rollout.curriculum import (
    dynamic_threshold,
    response_length,
    teacher_response_fraction,
)
from megatron_dlm.rollout.cutoff import Cutoff
from megatron_dlm.rollout.replica_board import ReplicaBoard
from megatron_dlm.rollout.trajectory_engine import AheadEngine, TrajectoryEngine
from megatron_dlm.teacher.given_responses import takes_given_response
from megatron_dlm.training.rollout_selection import NO_LEFTOVERS, Leftovers
from megatron_dlm.training.verified_rollout import Verifier, generate_until_right
from megatron_dlm.types.trajectory import Prompt, Trajectory


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
        on_finished: Called with each trajectory when the student has finished it; None: nobody
            waits for it before the rollout ends.
    """

    config: Config
    prompts: PromptDataset | None = None
    engine: TrajectoryEngine | None = None
    examples: ExampleDataset | CorpusDataset | None = None
    verifier: Verifier | None = None
    on_finished: Callable[[Trajectory], None] | None = None

    def trajectories(
        self,
        samples: Sequence[tuple[int, int]],
        rollout: int,
        leftovers: Leftovers = NO_LEFTOVERS,
        wanted: int | None = None,
    ) -> list[Trajectory]:
        """The trajectories of samples; all ranks call this.

        Args:
            samples: (sample index, record index) of each: of this replica's for given responses; of
                all replicas', the same on all of them, for rollouts.
            rollout: Rollout step, from 0.
            leftovers: What the rollout before has left of them.
            wanted: Trajectories that have to be complete in the end; None: all.

        Returns:
            For given responses those of the samples. For rollouts those that this replica has, in
            the order of the samples: each trajectory is on one replica.

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
        complete = {s for s, t in leftovers.by_sample.items() if t.is_finished}
        given, prompts = self._asked(samples, rollout, leftovers)
        number = len(prompts)
        if wanted is not None:
            number = wanted - len(given) - len(complete)
        held = {t.sample_index: t for t in self._rolled_out(prompts, rollout, number, leftovers)}
        groups = self.engine.groups
        for sample in sorted(given.keys() | complete)[groups.replica :: groups.num_replicas]:
            if sample in complete:
                leftover = leftovers.by_sample[sample]
                held[sample] = replace(leftover, rollouts=leftover.rollouts + 1)
            else:
                assert self.examples is not None
                held[sample] = self.examples.sample(given[sample], sample)
        return [held[sample] for sample, _ in samples if sample in held]

    def begin(self, samples: Sequence[tuple[int, int]], rollout: int) -> None:
        """Let servers decode a rollout, which `trajectories` waits for then; all ranks call this.

        Args:
            samples: Of the rollout, as in `trajectories`.
            rollout: Rollout step, from 0.

        Raises:
            UserError: On all ranks: a server does not take the weights.
        """
        assert isinstance(self.engine, AheadEngine)
        _, prompts = self._asked(samples, rollout, NO_LEFTOVERS)
        self.engine.begin(prompts, response_length(self.config, rollout))

    def _asked(
        self, samples: Sequence[tuple[int, int]], rollout: int, leftovers: Leftovers
    ) -> tuple[dict[int, int], list[Prompt]]:
        """Samples whose response is given, with their records, and prompts for the student."""
        assert self.prompts is not None
        fraction = teacher_response_fraction(self.config, rollout)
        given = {
            sample: record
            for sample, record in samples
            if self.examples is not None
            and takes_given_response(self.config.data.seed, sample, fraction)
        }
        prompts = []
        for sample, record in samples:
            beginning = leftovers.by_sample.get(sample)
            if sample not in given and not (beginning and beginning.is_finished):
                prompt = self.prompts.sample(record, sample)
                prompts.append(replace(prompt, beginning=beginning))
        return given, prompts

    def _rolled_out(
        self, prompts: Sequence[Prompt], rollout: int, wanted: int, leftovers: Leftovers
    ) -> list[Trajectory]:
        """This replica's responses of the student, of all of which so many have to be complete."""
        engine, config = self.engine, self.config
        assert engine is not None
        length = response_length(config, rollout)
        changed: dict[str, Any] = {"dynamic_threshold": dynamic_threshold(config, rollout)}
        engine.generation = replace(engine.generation, **changed)
        one_queue = config.rollout.shared_rollout_queue
        if self.verifier is not None:
            return generate_until_right(engine, prompts, length, self.verifier, one_queue=one_queue)
        cutoff = None
        if wanted < len(prompts):
            board = None if engine.groups.replicas is None else ReplicaBoard(engine.groups)
            cutoff = Cutoff(wanted - len(leftovers.last_time), leftovers.last_time, board)
        with engine.settled():
            trajectories = engine.generate_together(
                prompts, length, one_queue=one_queue, cutoff=cutoff, on_finished=self.on_finished
            )
        if cutoff is not None:
            cutoff.close()
        return trajectories
