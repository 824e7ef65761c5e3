"""Queues of prompts that wait for a slot: of one replica of the model, or of all of them."""

from collections.abc import Sequence

from megatron_dlm.rollout.replica_board import ReplicaBoard
from megatron_dlm.types.trajectory import Prompt


class PromptQueue:
    """Prompts that wait, the one with the longest possible response first.

    What takes longest starts first, so that the last forwards are not left to a few sequences;
    among equals the longest prompt, so that prompts of a forward are about as long as each other,
    and several responses to one prompt come together. The order decides no token.

    Args:
        prompts: All prompts of a rollout.
        max_response_length: Tokens after which a response is cut.
    """

    def __init__(self, prompts: Sequence[Prompt], max_response_length: int) -> None:
        first_with: dict[bytes, int] = {}
        known = [prompt.known_ids for prompt in prompts]
        same = [first_with.setdefault(k.numpy().tobytes(), i) for i, k in enumerate(known)]

        def rank(request: int) -> tuple[int, int, int, int]:
            prompt, length = prompts[request], len(known[request])
            end = len(prompt.token_ids) + prompt.response_limit(max_response_length)
            return length - end, -length, same[request], request

        self._order = sorted(range(len(prompts)), key=rank)
        self._next = 0

    @property
    def may_have_more(self) -> bool:
        """Whether `first` may return a prompt: it does, or the queue has not been asked yet."""
        return self._next < len(self._order)

    def first(self) -> int | None:
        """Index of the next prompt, which stays in the queue; None without one."""
        return self._order[self._next] if self.may_have_more else None

    def pop(self) -> None:
        """The next prompt leaves the queue."""
        self._next += 1


class SharedPromptQueue(PromptQueue):
    """One queue for all replicas, each of which takes the next prompt when it has room for it.

    A prompt that `first` has returned is this replica's, as no other one gets it. All ranks of a
    replica make the same calls.

    Args:
        prompts: All prompts of a rollout, the same on all replicas.
        max_response_length: Tokens after which a response is cut.
        board: Shared with the other replicas, of this queue alone.
    """

    def __init__(
        self, prompts: Sequence[Prompt], max_response_length: int, board: ReplicaBoard
    ) -> None:
        super().__init__(prompts, max_response_length)
        self._board = board
        self._is_taken = False

    @property
    def may_have_more(self) -> bool:
        """See `PromptQueue`."""
        return bool(self._order) and (not self._is_taken or super().may_have_more)

    def first(self) -> int | None:
        """See `PromptQueue`; one request to the board for each prompt."""
        if not self._is_taken:
            self._next = self._board.agreed(self._board.draw_number)
            self._is_taken = True
        return super().first()

    def pop(self) -> None:
        """See `PromptQueue`."""
        self._is_taken = False
