"""Hidden states of the teacher that are spread over the ranks of a context-parallel group.

The teacher's forward is sharded as the student's is, by its own visibility: the hidden state that
predicts a token is rarely on the rank that trains on it. It travels once an update, as many bytes
as one layer's keys and values, instead of being kept on all ranks.

n: predictions of the rows of an update; h: hidden size.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.types.teacher_targets import HiddenTargets, PlacedTargets


def delivered(
    targets: PlacedTargets, wanted: Tensor, hidden: Tensor, group: ProcessGroup
) -> HiddenTargets:
    """The hidden states of the predictions that this rank trains on; all of the group call this.

    Args:
        targets: n, the same on all ranks.
        wanted: [n] int64, the rank that trains on each prediction; the same on all ranks.
        hidden: [slots, h], the hidden states that this rank holds.
        group: The ranks.
    """
    own, ranks = group.rank(), range(group.size())
    holder, slot = targets.holder.cpu(), targets.slot.cpu()
    to_send = [((holder == own) & (wanted == rank)).nonzero()[:, 0] for rank in ranks]
    to_get = [((holder == rank) & (wanted == own)).nonzero()[:, 0] for rank in ranks]
    sent = hidden[slot[torch.cat(to_send)].to(hidden.device)]
    got = hidden.new_empty(sum(map(len, to_get)), hidden.shape[1])
    torch.distributed.all_to_all_single(
        got,
        sent,
        [len(predictions) for predictions in to_get],
        [len(predictions) for predictions in to_send],
        group=group,
    )
    # Sorted by rank as they arrive; in the order of the predictions afterwards.
    return HiddenTargets(got[torch.cat(to_get).argsort().to(hidden.device)])
