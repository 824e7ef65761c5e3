"""Queue of prompts that wait for a slot."""

from collections.abc import Sequence

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
        same = [
            first_with.setdefault(p.token_ids.numpy().tobytes(), i) for i, p in enumerate(prompts)
        ]

        def rank(request: int) -> tuple[int, int, int, int]:
            prompt = prompts[request]
            limit = prompt.response_limit(max_response_length)
            return -limit, -len(prompt.token_ids), same[request], request

        # From the last to the first: the next one is taken off the end.
        self._waiting = sorted(range(len(prompts)), key=rank, reverse=True)

    def __len__(self) -> int:
        return len(self._waiting)

    def first(self) -> int:
        """Index of the next prompt, which stays in the queue."""
        return self._waiting[-1]

    def pop(self) -> int:
        """Index of the next prompt, which leaves the queue."""
        return self._waiting.pop()
