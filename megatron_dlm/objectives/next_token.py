"""Autoregressive training on prompt + response or on a corpus; makes a teacher."""

import torch

from megatron_dlm.models.attention_layout import CLEAN
from megatron_dlm.objectives.block_diffusion import supervised_positions
from megatron_dlm.objectives.cross_entropy import CrossEntropyObjective
from megatron_dlm.types.document import Document
from megatron_dlm.types.trajectory import Trajectory


class NextToken(CrossEntropyObjective):
    """Cross entropy of each response token given everything before it, under causal attention."""

    def document(self, trajectory: Trajectory, generator: torch.Generator) -> Document:
        """The sequence without its last token; each position predicts its document's next token."""
        tokens = trajectory.token_ids
        document, position = trajectory.documents()
        supervised = supervised_positions(trajectory, self.config.objective.supervise_eos)
        target = supervised & (position > 0)
        predicted = target.nonzero()[:, 0]
        position = position[:-1].int()
        return Document(
            token_ids=tokens[:-1],
            block=position,
            stream=torch.full_like(position, CLEAN),
            position=position,
            supervised=predicted - 1,
            labels=tokens[predicted],
            weights=torch.ones(len(predicted)),
            document_ids=document[:-1],
        )
