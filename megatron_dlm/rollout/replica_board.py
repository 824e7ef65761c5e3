"""What replicas of the model tell each other during a rollout, each at its own pace.

No collective: replicas make different numbers of forwards, and none waits for another. Everything
goes through the store that the processes met at, in requests that are answered at once.
"""

from collections.abc import Callable
from itertools import count

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined] # documented, not listed

from megatron_dlm.parallel import ParallelGroups

_opened = count()


class ReplicaBoard:
    """Numbers that all replicas draw from, and notes that all can read; made by all ranks at once.

    Args:
        groups: Process groups of the model.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups.for_decoding()
        # Unlike the names of groups, this counter is the same on all ranks of every replica.
        name = f"megatron_dlm/rollout/{next(_opened)}"
        self._store = PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._questions = 0
        self._notes_read = 0
        self._own_notes: list[str] = []

    def agreed(self, ask: Callable[[], int]) -> int:
        """What the first rank of the replica gets for an answer, on all its ranks.

        All ranks of the replica call this, in the same order.
        """
        model = self._groups.model
        if model is None:
            return ask()
        key = f"answer/{self._groups.replica}/{self._questions}"
        self._questions += 1
        if self._groups.is_first_of_replica:
            answer = ask()
            self._store.set(key, str(answer))
            return answer
        answer = int(self._store.get(key))
        readers = f"{key}/readers"
        if self._store.add(readers, 1) == model.size() - 1:
            self._store.delete_key(key)
            self._store.delete_key(readers)
        return answer

    def draw_number(self) -> int:
        """The next number from 0 on, which no other replica gets; for `agreed`."""
        return self._store.add("numbers", 1) - 1

    def note(self, value: int) -> None:
        """Leave a note for all replicas; all ranks of this one call this."""
        if self._groups.is_first_of_replica:
            key = f"note/{self._store.add('notes', 1)}"
            self._store.set(key, str(value))
            self._own_notes.append(key)

    def new_notes(self) -> list[int]:
        """Notes of all replicas that this rank has not read yet; for the first of a replica."""
        last = self._store.add("notes", 0)
        unread = range(self._notes_read + 1, last + 1)
        self._notes_read = last
        return [int(self._store.get(f"note/{number}")) for number in unread]

    def close(self) -> None:
        """Forget the notes; after all replicas have met, so that none of them still reads."""
        for key in self._own_notes:
            self._store.delete_key(key)
