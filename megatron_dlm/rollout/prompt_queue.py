"""Queue of prompts that wait for a slot."""

from collections.abc import Sequence

from megatron_dlm.types.trajectory import Prompt


class PromptQueue:
    """Prompts in order, handed out under a limit of tokens per forward.

    Args:
        prompts: All prompts of a rollout.
        max_prefill_tokens: Most prompt tokens for one forward; a first prompt may be longer.
    """

    def __init__(self, prompts: Sequence[Prompt], max_prefill_tokens: int) -> None:
        self._prompts = prompts
        self._max_prefill_tokens = max_prefill_tokens
        self._next = 0
        self._prefill_tokens = 0

    def begin_forward(self) -> None:
        """Reset the limit for the next forward."""
        self._prefill_tokens = 0

    def pop(self) -> int | None:
        """Index of the next prompt; None if none is left or it has to wait for the next forward."""
        if self._next == len(self._prompts):
            return None
        total = self._prefill_tokens + len(self._prompts[self._next].token_ids)
        if self._prefill_tokens and total > self._max_prefill_tokens:
            return None
        self._prefill_tokens = total
        self._next += 1
        return self._next - 1
