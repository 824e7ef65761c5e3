"""Settings of `generate` from its arguments, the folder's defaults and the config.

B: sequences; P: tokens of a prompt, padding included.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import logging

from megatron_dlm.ranges import AT_LEAST_ONE, AT_LEAST_ZERO, PROBABILITY, TEMPERATURE, Range
from megatron_dlm.rollout.strategies import STRATEGIES

DEFAULT_MAX_NEW_TOKENS = 256

STRATEGY_OPTIONS = {strategy.option for strategy in STRATEGIES.values() if strategy.option}
DIFFUSION_OPTIONS = (
    "block_size",
    "mask_token_id",
    "remasking_strategy",
    *sorted(option.generate_argument for option in STRATEGY_OPTIONS),
)

# Fields of transformers' GenerationConfig that would change what is generated, or what is returned
# with it, and have no counterpart here. None, False, 0 and 1 turn each of them off.
UNSUPPORTED_OPTIONS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "dola_layers",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
    "token_healing",
    "use_mtp",
    "watermarking_config",
)
UNSUPPORTED_FILTERS = ("epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "typical_p")


class DecodingSettings(NamedTuple):
    """Decoding settings of a call.

    Attributes:
        is_full: Whether every forward sees the whole canvas and not only its block and those
            before.
        has_causal_context: Whether tokens of finished blocks see only those before them.
        is_shifted: Whether logits at position i predict token i + 1.
        block_size: Blocks count from token 0; None: the response is one block.
        remasking_strategy: One of `STRATEGIES`.
        strategy_value: Value of the strategy's option; None where it has none.
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        max_new_tokens: Longest response.
        min_new_tokens: EOS is not drawn before this many tokens.
        vocab_size: Size of the vocabulary.
        mask_token_id: Stands for a token that is not known yet; never drawn.
        eos_token_ids: Each of them ends a response.
        use_cache: Whether keys of finished blocks are cached; false under full attention.
    """

    is_full: bool
    has_causal_context: bool
    is_shifted: bool
    block_size: int | None
    remasking_strategy: str
    strategy_value: Any
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    min_new_tokens: int
    vocab_size: int
    mask_token_id: int
    eos_token_ids: list[int]
    use_cache: bool


def check_support(config: GenerationConfig, logits_processor: Any) -> None:
    """Raise ValueError for arguments of transformers that diffusion decoding does not support."""
    names = UNSUPPORTED_OPTIONS + (UNSUPPORTED_FILTERS if config.do_sample else ())
    for name in names:
        value = getattr(config, name, None)
        if value is True or value not in (None, False, 0, 1):
            raise ValueError(
                f"`{name}` (={value}) is not supported: tokens are denoised in blocks, not drawn "
                f"one after the other. Leave `{name}` out."
            )
    if logits_processor:
        raise ValueError("`logits_processor` is not supported: tokens are denoised in blocks")


def checked_number(
    name: str, value: Any, kind: type[int] | type[float], allowed: Range, remedy: str = ""
) -> Any:
    """A number of an argument, as `kind`.

    Raises:
        ValueError: It is no such number, or outside the range.
    """
    try:
        number = kind(value)
        is_number = not isinstance(value, bool) and bool(number == value)
    except (TypeError, ValueError, OverflowError):
        is_number = False
    remedy = remedy or allowed.remedy
    if not is_number:
        noun = "whole number" if kind is int else "number"
        raise ValueError(f"`{name}` (={value!r}) is not a {noun}; {remedy}")
    if number not in allowed:
        raise ValueError(f"`{name}` (={value}) {allowed.problem}; {remedy}")
    return number


def new_tokens_allowed(
    config: GenerationConfig, prompt_length: int, has_default_max_length: bool
) -> int:
    """Longest response, from `max_new_tokens` or `max_length`, which counts the prompt."""
    if config.max_new_tokens is not None:
        if not has_default_max_length:
            logging.get_logger(__name__).warning(
                f"Both `max_new_tokens` (={config.max_new_tokens}) and `max_length` (="
                f"{config.max_length}) seem to have been set. `max_new_tokens` takes precedence."
            )
        return checked_number("max_new_tokens", config.max_new_tokens, int, AT_LEAST_ONE)
    if has_default_max_length:
        return DEFAULT_MAX_NEW_TOKENS
    if config.max_length <= prompt_length:
        raise ValueError(
            f"Input length of input_ids is {prompt_length}, but `max_length` is set to "
            f"{config.max_length}. Increase `max_length` or, better, set `max_new_tokens`."
        )
    return config.max_length - prompt_length


def decoding_settings(
    config: GenerationConfig,
    model_config: PretrainedConfig,
    options: dict[str, Any],
    max_new_tokens: int,
    prompt_length: int,
) -> DecodingSettings:
    """Settings of a call, checked.

    Args:
        config: transformers' generation config with the values of the call and the folder.
        model_config: The model's config.
        options: `DIFFUSION_OPTIONS` of the call; those left out are taken from `config`, else from
            `model_config`.
        max_new_tokens: Longest response.
        prompt_length: P.

    Raises:
        ValueError: A setting that cannot work.
    """

    def option(name: str, default: Any = None) -> Any:
        for value in (options.get(name), getattr(config, name, None)):
            if value is not None:
                return value
        return default

    def require(is_fine: bool, name: str, value: Any, remedy: str) -> None:
        if not is_fine:
            raise ValueError(f"`{name}` (={value}) {remedy}")

    is_full = model_config.attention_pattern == "full"
    has_causal_context = not is_full and model_config.context_attention == "causal"
    name = option("remasking_strategy", "entropy" if is_full else "low_confidence_dynamic")
    block_size = option("block_size", model_config.block_size)
    if block_size is not None:
        block_size = checked_number("block_size", block_size, int, AT_LEAST_ONE)
    size = block_size or max_new_tokens
    mask_token_id = option("mask_token_id", model_config.mask_token_id)
    if mask_token_id is not None:
        ids = Range(0, model_config.vocab_size, below_highest=True)
        mask_token_id = checked_number("mask_token_id", mask_token_id, int, ids)
    eos = config.eos_token_id if config.eos_token_id is not None else model_config.eos_token_id
    temperature, top_k, top_p = 0.0, 0, 1.0
    if config.do_sample:
        # None if neither the call nor the folder sets it: off, the default.
        if config.temperature is not None:
            positive = dataclasses.replace(TEMPERATURE, above_lowest=True)
            remedy = f"{positive.remedy}; do_sample=False takes the most likely tokens"
            temperature = checked_number("temperature", config.temperature, float, positive, remedy)
        else:
            temperature = 1.0
        if config.top_k is not None:
            top_k = checked_number("top_k", config.top_k, int, AT_LEAST_ZERO, "0 is off")
        if config.top_p is not None:
            top_p = checked_number("top_p", config.top_p, float, PROBABILITY, "1 is off")
    require(
        name in STRATEGIES,
        "remasking_strategy",
        name,
        f"must be one of {', '.join(STRATEGIES)}",
    )
    require(mask_token_id is not None, "mask_token_id", None, "must be in the config or given")
    require(block_size is not None or is_full, "block_size", None, "must be at least 1")
    strategy, strategy_value = STRATEGIES[name], None
    require(
        has_causal_context or not strategy.verifies,
        "remasking_strategy",
        name,
        "verifies drafts with the autoregressive mode of models with a causal context; choose "
        "another one",
    )
    require(
        size > 1 or not strategy.verifies, "block_size", size, "leaves nothing to draft; choose 2"
    )
    if strategy.option is not None:
        # An option without a default counts the steps of a block.
        default, argument = strategy.option.default, strategy.option.generate_argument
        if default is None:
            default = model_config.num_diffusion_steps or size
        given, range = option(argument, default), strategy.option.range
        strategy_value = checked_number(argument, given, strategy.option.type, range)
        require(
            strategy.fits_block(strategy_value, None if is_full else size),
            argument,
            strategy_value,
            f"must divide the block {size}",
        )
    min_new_tokens = config.min_new_tokens
    if min_new_tokens is None:
        min_new_tokens = max((config.min_length or 0) - prompt_length, 0)
    min_new_tokens = checked_number("min_new_tokens", min_new_tokens, int, AT_LEAST_ZERO)
    return DecodingSettings(
        is_full=is_full,
        has_causal_context=has_causal_context,
        is_shifted=bool(model_config.shifted),
        block_size=block_size,
        remasking_strategy=name,
        strategy_value=strategy_value,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        vocab_size=model_config.vocab_size,
        mask_token_id=mask_token_id,
        eos_token_ids=[id for id in list_of_ids(eos) if 0 <= id < model_config.vocab_size],
        use_cache=not is_full and config.use_cache is not False,
    )


def list_of_ids(token_ids: Any) -> list[int]:
    """A list of ids from None, one id, several ids or a tensor."""
    if token_ids is None:
        return []
    return torch.as_tensor(token_ids).reshape(-1).tolist()


def checked_attention_mask(
    input_ids: Tensor, attention_mask: Tensor | None, pad: int | None, eos: list[int]
) -> Tensor:
    """Which of input_ids [B, P] are tokens and not padding, bool.

    Without a mask, as in transformers, an id is padding if it is the padding token and not EOS.
    """
    if attention_mask is None:
        if pad is None or pad in eos:
            return torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` passed to `generate` must be 2D, with the shape of the prompts "
            f"{tuple(input_ids.shape)}, but has the shape {tuple(attention_mask.shape)}."
        )
    return attention_mask.to(input_ids.device).bool()
