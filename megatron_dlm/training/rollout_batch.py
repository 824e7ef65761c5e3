"""A rollout batch: the trajectories of the next samples, and figures over those of all ranks."""

from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.rollout.curriculum import responses_in_decoding
from megatron_dlm.training.metrics import LengthHistogram, Staleness
from megatron_dlm.training.rollout_figures import RolloutFigures
from megatron_dlm.training.rollout_selection import Leftovers, selected_and_shared, share_of
from megatron_dlm.training.run import Run
from megatron_dlm.training.shares import Share, balanced
from megatron_dlm.training.stored_batch import restored
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class Collected:
    """A rollout batch: this rank's trajectories, and statistics over those of all ranks.

    Attributes:
        shares: Of this rank, one for each update of an epoch.
        num_samples: Samples of all ranks.
        response_tokens: Number of tokens of all responses.
        trained_tokens: Response tokens that each update of an epoch trains on.
        response_length: Mean, in tokens.
        tokens_per_forward: Of the student's rollouts; None if there are none.
        eos_rate: Share of responses that ended in EOS.
        accuracy: See `StepMetrics`.
        solved_rate: See `StepMetrics`.
        staleness: See `StepMetrics`.
        decoded_tokens: Response tokens that this replica has just decoded.
        tokens_by_step: See `StepMetrics`.
        response_lengths: See `StepMetrics`.
        weight_version: See `Trajectory`; of this rank's, None if it has none.
    """

    shares: list[Share]
    num_samples: int
    response_tokens: int
    trained_tokens: list[int]
    response_length: float
    tokens_per_forward: float | None
    eos_rate: float
    accuracy: float | None
    solved_rate: float | None
    staleness: Staleness | None
    decoded_tokens: int
    tokens_by_step: list[float] | None
    response_lengths: LengthHistogram
    weight_version: int | None = None

    @property
    def trajectories(self) -> list[Trajectory]:
        """All of this rank, copies included."""
        return [trajectory for share in self.shares for trajectory in share.trajectories]

    @property
    def own(self) -> list[Trajectory]:
        """All of this rank without copies."""
        return [trajectory for share in self.shares for trajectory in share.own]

    def of_update(self, update: int) -> Share:
        """This rank's share of an update of the rollout batch, from 0, through all epochs."""
        return self.shares[update % len(self.shares)]


def samples_of_batch(config: Config, consumed: int) -> int:
    """Samples of the rollout batch after so many."""
    return min(config.rollout_batch_size, config.num_samples - consumed)


def collect(run: Run) -> Collected:
    """Obtain the next rollout batch, or that of the checkpoint if it has more updates to serve.

    The g-th sample of the batch is trained on by data-parallel rank g mod dp, whichever rank rolled
    it out, so that each update's global batch is the same set of trajectories under every layout.
    Ranks that share rows have the same samples. Under a token budget the ranks then share each
    update by cost (`shares`).

    Raises:
        StopRequested: On all ranks; nothing is changed.
    """
    config, groups, sampler = run.config, run.groups, run.sampler
    consumed = run.progress.consumed_samples
    count = samples_of_batch(config, consumed)
    if run.stored_batch:
        stored = {entry["sample_index"]: entry for entry in run.stored_batch}
        run.stored_batch = ()
        mine, num_own = share_of(sorted(stored), groups.dp_rank, groups.dp_size)
        trajectories = [restored(stored[sample], run.prompt_of(sample)) for sample in mine]
        return _described(run, trajectories, num_own, len(stored))
    if run.source.engine is None:
        mine, num_own = share_of(range(consumed, consumed + count), groups.dp_rank, groups.dp_size)
        samples = [(sample, sampler.record_index(sample)) for sample in mine]
        trajectories = run.source.trajectories(samples, run.progress.rollout)
        return _described(run, trajectories, num_own, count)
    before = Leftovers.of(run.leftovers, config.rollout.max_response_rollouts)
    begun = [(sample, sampler.record_index(sample)) for sample in before.by_sample]
    in_decoding = min(responses_in_decoding(config), config.num_samples - consumed)
    new = sampler.samples(consumed + len(begun), max(in_decoding - len(begun), 0))
    samples = begun + new
    held = run.source.trajectories(
        samples, run.progress.rollout, before, count if count < len(samples) else None
    )
    rolled_out = selected_and_shared(
        held,
        before,
        count,
        block_size=config.model.block_size,
        groups=groups,
        prompt_of=run.prompt_of,
    )
    run.leftovers = rolled_out.leftovers
    return _described(
        run, rolled_out.trajectories, rolled_out.num_own, count, rolled_out.decoded_tokens
    )


def _described(
    run: Run, trajectories: list[Trajectory], num_own: int, count: int, decoded_tokens: int = 0
) -> Collected:
    """Add the figures over all ranks."""
    config, dp_size = run.config, run.groups.dp_size
    ours = run.groups.part_of_shared(trajectories[:num_own])
    # Responses of the teacher or a data set needed no forwards of the student.
    rolled_out = [trajectory for trajectory in ours if trajectory.is_rollout]
    local = config.training.global_batch_size // dp_size
    trained = [0] * -(-count // config.training.global_batch_size)
    shares = [
        Share(trajectories[start : start + local], min(max(0, num_own - start), local))
        for start in range(0, len(trajectories), local)
    ]
    for i, trajectory in zip(run.groups.part_of_shared(range(num_own)), ours, strict=True):
        if trajectory.correct is not False:  # wrong answers are not trained on
            trained[i // local] += len(trajectory.response_ids)
    figures = RolloutFigures(_longest(run), config.model.block_size)
    sums = torch.tensor(
        [
            sum(len(trajectory.response_ids) for trajectory in ours),
            sum(len(trajectory.response_ids) for trajectory in rolled_out),
            sum(trajectory.total_forwards for trajectory in rolled_out),
            sum(trajectory.finish_reason == "eos" for trajectory in ours),
            sum(bool(trajectory.correct) and trajectory.tries == 1 for trajectory in ours),
            sum(bool(trajectory.correct) for trajectory in ours),
            sum(trajectory.rollouts > 1 for trajectory in ours),
            sum(trajectory.rollouts - 1 for trajectory in ours),
            *figures.counts(ours),
            *trained,
        ],
        dtype=torch.float64,
        device=platform.device(),
    )
    if run.groups.replicas is not None:
        torch.distributed.all_reduce(sums, group=run.groups.replicas)
    tokens, rolled_out_tokens, forwards, ended, right_at_once, right, continued, age, *rest = (
        platform.to_host(sums).tolist()
    )
    counts, trained = rest[: figures.SIZE], rest[figures.SIZE :]
    verifies = run.source.verifier is not None
    versions = [t.weight_version for t in ours if t.weight_version is not None]
    if config.training.max_tokens_per_micro_batch is not None:
        shares = balanced(run, shares)
    return Collected(
        shares=shares,
        num_samples=count,
        response_tokens=int(tokens),
        trained_tokens=[int(number) for number in trained],
        response_length=tokens / count,
        tokens_per_forward=rolled_out_tokens / forwards if forwards else None,
        eos_rate=ended / count,
        accuracy=right_at_once / count if verifies else None,
        solved_rate=right / count if verifies else None,
        staleness=None
        if config.rollout.partial_rollouts == 1
        else Staleness(continued / count, age / count, len(run.leftovers)),
        decoded_tokens=decoded_tokens,
        tokens_by_step=figures.tokens_by_step(counts),
        response_lengths=figures.lengths(counts),
        weight_version=min(versions, default=None),
    )


def _longest(run: Run) -> int:
    """Tokens of the longest response, of a corpus of a window."""
    if run.config.response_source == "corpus":
        return run.config.data.seq_length
    return run.config.longest_response
