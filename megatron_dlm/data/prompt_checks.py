"""Checks of tokenised prompts and responses; errors name file and line."""

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config.groups import LongPrompts
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.tokenizer import check_token_ids
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.types.special_tokens import SpecialTokens


def fitted(
    token_ids: list[int], where: str, max_prompt_length: int, long_prompts: LongPrompts
) -> list[int] | None:
    """The prompt, its last tokens if it is cut to the limit, or None if it is left out."""
    if len(token_ids) <= max_prompt_length:
        return token_ids
    if long_prompts == "error":
        raise bad_value(
            f"{where}: prompt length",
            len(token_ids),
            f"is over --max-prompt-length {max_prompt_length}",
            "shorten the prompt or, if the model has more positions, raise --max-prompt-length",
        )
    return token_ids[-max_prompt_length:] if long_prompts == "truncate" else None


def check_some_left(file: RecordSource, num_kept: int, max_prompt_length: int) -> None:
    """Check that at least one prompt is left."""
    if len(file) and not num_kept:
        raise bad_value(
            "--max-prompt-length",
            max_prompt_length,
            f"all prompts of {file.path} are longer, and --long-prompts drop leaves them out",
            "raise it",
        )


def check_limits(
    token_ids: list[int], where: str, max_response_length: int | None, limit: int | None
) -> None:
    """Check that the response is within the limits of the run and of its domain."""
    limits = {
        "--max-response-length": max_response_length,
        "--max-response-length-by-domain": limit,
    }
    for flag, longest in limits.items():
        if longest is not None and len(token_ids) > longest:
            raise bad_value(
                f"{where}: response length",
                len(token_ids),
                f"is over {flag} {longest}",
                f"shorten the response or raise {flag}",
            )


def check_prompt(
    token_ids: list[int],
    where: str,
    special_tokens: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Check that a prompt has tokens, all of the vocabulary and none of them MASK."""
    if not token_ids:
        raise UserError(f"{where}: the prompt has no tokens; write a text or remove the line")
    _check_ids(token_ids, f"{where}: the prompt", special_tokens, tokenizer)


def check_response(
    token_ids: list[int],
    where: str,
    special_tokens: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Check that a response ends at its EOS and has only tokens of the vocabulary, no MASK."""
    ends = (token_id for token_id in token_ids[:-1] if token_id in special_tokens.eos_token_ids)
    if (end := next(ends, None)) is not None:
        raise UserError(
            f"{where}: the response goes on after the EOS token (id {end}); end it there"
        )
    _check_ids(token_ids, f"{where}: the response", special_tokens, tokenizer)


def _check_ids(
    token_ids: list[int],
    what: str,
    special_tokens: SpecialTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    check_token_ids(
        token_ids,
        what,
        tokenizer,
        mask_token_id=special_tokens.mask_token_id,
        vocab_size=special_tokens.vocab_size,
    )
