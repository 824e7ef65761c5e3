"""The next rollout is decoded by servers while the student is trained on the one before.

`--max-rollout-staleness` updates before the end of a rollout batch, the servers get the weights as
they are and begin. When the batch ends, the run waits for what has not come yet. A checkpoint holds
what has come, so that a run that goes on from it is the same.
"""

from megatron_dlm.rollout.trajectory_engine import AheadEngine
from megatron_dlm.training.rollout_batch import Collected, samples_of_batch
from megatron_dlm.training.run import Run


def begin_if_due(run: Run, collected: Collected, updates_left: int) -> None:
    """Begin the next rollout if no more updates are left than it may be behind; all ranks call.

    Args:
        run: Between two updates.
        collected: The rollout batch in work.
        updates_left: That it has to serve.

    Raises:
        UserError: On all ranks: a server does not take the weights.
    """
    engine, config = run.source.engine, run.config
    consumed = run.progress.consumed_samples + collected.num_samples
    if (
        updates_left > config.engine.max_rollout_staleness
        or not isinstance(engine, AheadEngine)
        or engine.is_ahead
        or consumed >= config.num_samples
    ):
        return
    run.student.gather_weights()
    samples = run.sampler.samples(consumed, samples_of_batch(config, consumed))
    run.source.begin(samples, run.progress.rollout + 1)
