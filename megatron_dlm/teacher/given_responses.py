"""Which samples of a run use a response of the teacher instead of a rollout."""

import torch

from megatron_dlm.config import Config
from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.rollout.curriculum import teacher_response_fraction
from megatron_dlm.seeding import keyed_generator


def given_records(config: Config, sampler: ShuffledSampler) -> list[int]:
    """Records for which the run uses a response of the teacher.

    Args:
        config: Configuration of a run with the teacher's responses.
        sampler: Maps samples to records.

    Returns:
        Their indices, ascending.
    """
    records = set()
    for rollout, start in enumerate(range(0, config.num_samples, config.rollout_batch_size)):
        fraction = teacher_response_fraction(config, rollout) if config.uses_rollouts else 1.0
        count = min(config.rollout_batch_size, config.num_samples - start)
        for sample, record in sampler.samples(start, count):
            if record not in records and takes_given_response(config.data.seed, sample, fraction):
                records.add(record)
    return sorted(records)


def takes_given_response(seed: int, sample_index: int, fraction: float) -> bool:
    """Whether a sample uses the teacher's response; depends on its index, not on the layout."""
    draw = torch.rand((), generator=keyed_generator(seed, sample_index), dtype=torch.float64)
    return bool(draw < fraction)
