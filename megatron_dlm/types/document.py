"""Documents that objectives make from trajectories.

T: tokens of the document; n: supervised tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_dlm.types.teacher_targets import TeacherTargets


@dataclass(frozen=True)
class Document:
    """One document of a training row.

    Attributes:
        token_ids: [T] int64, the student's input.
        block: [T] int32, block ids.
        stream: [T] int32, 0 clean, noisy streams from 1.
        position: [T] int32, RoPE positions.
        supervised: [n] int64, indices into T whose hidden states the loss reads.
        labels: [n] int64, the x_0 token that each of them should predict.
        weights: [n] float32, w(t).
        targets: The teacher's n targets for the same predictions, or None.
        document_ids: [T] from 0 without gaps, where the sample holds several texts that do not see
            each other (a corpus window); None for one text.
        loss_count: What the loss sum is divided by, summed over the global batch; None for the
            number of supervised tokens.
        keys: [T] int32, random integers that decide draws in the layers (dropout); None without
            such draws. Annealed attention has its own keys.
        annealing: [2, T] int32, keys and thresholds of annealed attention; None for the visibility
            of `block` and `stream` alone.
    """

    token_ids: Tensor
    block: Tensor
    stream: Tensor
    position: Tensor
    supervised: Tensor
    labels: Tensor
    weights: Tensor
    targets: TeacherTargets | None = None
    document_ids: Tensor | None = None
    loss_count: int | None = None
    keys: Tensor | None = None
    annealing: Tensor | None = None
