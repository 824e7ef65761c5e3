"""Responses for transformers' stopping criteria and streamers: token by token, all rows at once.

R: rows; P: tokens of a prompt, padding included.
"""

from typing import Any

import torch
from torch import Tensor


class ResponseColumns:
    """Passes columns of tokens to criteria and a streamer, one after the other.

    A column is passed on once its token is known in all rows that have not ended; ended rows have
    padding in it. Criteria are called after each column and may end rows there.

    Args:
        prompts: [R, P], as they were given.
        max_new_tokens: Columns of the response.
        fill: Padding token.
        criteria: Stopping criteria, called as one; may be empty.
        streamer: None, or a streamer.

    Attributes:
        lengths: [R], tokens of each response passed on so far; its length where `has_ended`.
        has_ended: [R] bool.
    """

    def __init__(
        self, prompts: Tensor, max_new_tokens: int, fill: int, criteria: Any, streamer: Any
    ) -> None:
        self._fill, self._criteria, self._streamer = fill, criteria, streamer
        responses = prompts.new_full((len(prompts), max_new_tokens), fill)
        self._sequences = torch.cat((prompts, responses), dim=1)
        self._width, self._column = prompts.shape[1], 0
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device)
        self.has_ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        if streamer is not None:
            streamer.put(prompts.cpu())

    def tell(self, responses: Tensor, known: Tensor, is_complete: Tensor) -> None:
        """Pass on all columns up to the first that is not known.

        Args:
            responses: [R, at least `max_new_tokens`], from the first token of each response.
            known: [R], leading tokens of each that are final.
            is_complete: [R] bool, whether they are the whole response.
        """
        while True:
            self.has_ended = self.has_ended | (is_complete & (known <= self._column))
            goes_on = ~self.has_ended
            if not goes_on.any() or (known[goes_on] <= self._column).any():
                return
            tokens = responses[:, self._column].masked_fill(self.has_ended, self._fill)
            self._column += 1
            self._sequences[:, self._width + self._column - 1] = tokens
            self.lengths[goes_on] = self._column
            if self._streamer is not None:
                self._streamer.put(tokens.cpu())
            if self._criteria:
                sequences = self._sequences[:, : self._width + self._column]
                self.has_ended = self.has_ended | self._criteria(sequences, None)

    def finish(self) -> None:
        """Tell the streamer that all rows have ended."""
        if self._streamer is not None:
            self._streamer.end()
