"""The loss of objectives that learn the tokens of x_0 themselves, without a teacher."""

from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from megatron_dlm.objectives.base import LossInputs, Objective


class CrossEntropyObjective(Objective):
    """Cross entropy w(t) * -log q(label) at the supervised positions of a document."""

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Cross entropy; see `Objective.loss`."""
        return vocab_parallel_cross_entropy(
            inputs.hidden,
            inputs.head,
            inputs.labels,
            inputs.weights,
            vocab_size=self.vocab_size,
            tp_group=inputs.tp_group,
            chunk_size=self.config.distillation.divergence_chunk_size,
        )
