"""The special tokens of a run, resolved once."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that the algorithms need, all in 0..vocab_size-1.

    Attributes:
        eos_token_id: The tokenizer's EOS; appended to responses that lack one.
        pad_token_id: Fills positions that are never used; may equal `eos_token_id`.
        mask_token_id: Stands for a token that is not decoded yet; never equals the others.
        eos_token_ids: Each of them ends a response; `eos_token_id` is always among them, first.
        vocab_size: Ids from here on do not exist in the model, even if the tokenizer has them.
    """

    eos_token_id: int
    pad_token_id: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = field(kw_only=True)

    def __post_init__(self) -> None:
        """Put `eos_token_id` first among the ids that end a response, each once."""
        ids = dict.fromkeys((self.eos_token_id, *self.eos_token_ids))
        object.__setattr__(self, "eos_token_ids", tuple(ids))
