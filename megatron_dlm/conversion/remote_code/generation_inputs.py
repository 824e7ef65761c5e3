"""What `generate` makes of its arguments and the config, for plain transformers.

B: sequences; P: tokens of a prompt.
"""

from typing import NamedTuple

from torch import Tensor
from transformers import PretrainedConfig


class SpecialTokens(NamedTuple):
    """Token ids that decoding treats in a way of their own.

    Attributes:
        mask: Stands for a token that is not known yet.
        eos: Each of them ends a response.
        fill: Behind responses that are shorter than the longest one.
    """

    mask: int
    eos: list[int]
    fill: int


def special_tokens(
    config: PretrainedConfig,
    mask_token_id: int | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
) -> SpecialTokens:
    """The given ids, each by default the config's; without padding token the EOS fills up."""
    mask = config.mask_token_id if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError("mask_token_id is neither given nor in the config")
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = [token for token in (eos if isinstance(eos, list) else [eos]) if token is not None]
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    return SpecialTokens(mask, eos, pad if pad is not None else (eos[0] if eos else 0))


def check_generation_arguments(
    remasking_strategy: str, strategies: tuple[str, ...], max_new_tokens: int
) -> None:
    """Raise ValueError for a strategy that the model does not know, or no tokens to decode."""
    if remasking_strategy not in strategies:
        raise ValueError(f"remasking_strategy must be one of {', '.join(strategies)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")


def prompts_without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The B prompts of input_ids [B, P], without what attention_mask [B, P] calls padding."""
    if attention_mask is None:
        return list(input_ids)
    return [prompt[mask.bool()] for prompt, mask in zip(input_ids, attention_mask, strict=True)]
