"""Schedules over rollouts: response length (OPDLM section 4.3, L_s), threshold, mixture."""

import math

from megatron_dlm.config.schema import Config


def response_length(config: Config, rollout: int) -> int:
    """Longest response of a rollout step (from 0), in tokens, rounded up to whole blocks."""
    options = config.rollout
    longest = options.max_response_length
    warmup = options.response_length_warmup_rollouts
    if options.response_length_schedule == "constant" or rollout >= warmup:
        return longest
    shortest = options.min_response_length or longest
    fraction = rollout / warmup
    if options.response_length_schedule == "linear":
        length = shortest + math.floor(fraction * (longest - shortest))
    else:
        length = math.floor(
            shortest + (longest - shortest) * (1.0 - math.cos(math.pi / 2 * fraction))
        )
    block_size = config.model.block_size
    return min(-(-length // block_size) * block_size, longest)


def teacher_response_fraction_rollouts(config: Config) -> int:
    """Rollouts over which the share of the teacher's responses changes, default resolved."""
    return config.rollout.teacher_response_fraction_rollouts or config.num_rollouts


def dynamic_threshold_rollouts(config: Config) -> int:
    """Rollouts over which the confidence threshold changes, default resolved."""
    left = config.num_rollouts - config.rollout.dynamic_threshold_hold_rollouts
    return config.rollout.dynamic_threshold_rollouts or left


def responses_in_decoding(config: Config) -> int:
    """Responses that a rollout begins with: those that it waits for, and more."""
    return math.ceil(config.rollout_batch_size / config.rollout.partial_rollouts)


def teacher_response_fraction(config: Config, rollout: int) -> float:
    """Share of a rollout step (from 0) whose responses are the teacher's, in [0, 1]."""
    options = config.rollout
    start, end = options.teacher_response_fraction, options.final_teacher_response_fraction
    if options.teacher_response_fraction_schedule == "constant" or rollout == 0:
        return start
    progress = min(rollout / max(teacher_response_fraction_rollouts(config) - 1, 1), 1.0)
    if options.teacher_response_fraction_schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2
    return start + progress * (end - start)


def dynamic_threshold(config: Config, rollout: int) -> float:
    """Confidence threshold of a rollout step (from 0); the last step has the final value."""
    options = config.rollout
    start, end = options.dynamic_threshold, options.final_dynamic_threshold
    held = options.dynamic_threshold_hold_rollouts
    if options.dynamic_threshold_schedule == "constant" or end is None or rollout < held:
        return start
    progress = min((rollout + 1 - held) / max(dynamic_threshold_rollouts(config), 1), 1.0)
    if options.dynamic_threshold_schedule == "cosine":
        progress = 1.0 - math.cos(math.pi / 2 * progress)
    return start + progress * (end - start)
