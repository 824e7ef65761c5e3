"""What all diffusion formats have in common: a tokenizer with MASK, and modelling code."""

from pathlib import Path

from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.self_contained_code import self_contained_code
from megatron_dlm.conversion.tokenizer_files import copy_tokenizer, register_mask_token
from megatron_dlm.errors import bad_value


def check_mask_and_tokenizer(request: ExportRequest, format: str) -> None:
    """Check that the folder can say what MASK is.

    Raises:
        UserError: The id of MASK or the tokenizer is missing or unfit.
    """
    mask_token_id = request.mask_token_id
    if mask_token_id is None or not 0 <= mask_token_id < request.architecture.vocab_size:
        raise bad_value(
            "mask_token_id",
            mask_token_id,
            f"is no id of the vocabulary of {request.architecture.vocab_size}",
            "use a tokenizer with MASK, or one that leaves a free row of the embedding for it",
        )
    if request.tokenizer_folder is None:
        raise bad_value(
            "--tokenizer",
            None,
            f"{format} needs the tokenizer",
            "name a folder with tokenizer.json and tokenizer_config.json",
        )


def check_block_size(request: ExportRequest, format: str) -> None:
    """Check that the folder of a block-causal model can say how long its blocks are.

    Raises:
        UserError: There is no block size.
    """
    if request.block_size is None or request.block_size < 1:
        raise bad_value(
            "--block-size",
            request.block_size,
            f"{format} needs the block size that the model was trained with",
            "give it",
        )


def write_tokenizer(request: ExportRequest, folder: Path, mask_token: str | None = None) -> None:
    """Copy the tokenizer and make MASK known to it; checked by `check_mask_and_tokenizer`.

    Args:
        request: With the tokenizer's folder and the id of MASK.
        folder: Where to.
        mask_token: Text that MASK has to have; see `register_mask_token`.

    Raises:
        UserError: Its files are missing or have no place for MASK.
    """
    assert request.tokenizer_folder is not None
    assert request.mask_token_id is not None
    copy_tokenizer(request.tokenizer_folder, folder)
    register_mask_token(folder, request.mask_token_id, mask_token)


def write_remote_code(configuration: str, modeling: str, folder: Path) -> None:
    """Write the two files of modelling code that `auto_map` names, for `trust_remote_code`."""
    for module, kept in ((configuration, None), (modeling, configuration)):
        text = self_contained_code(module, kept)
        (folder / f"{module}.py").write_text(text, encoding="utf-8")


def suitable_format(request: ExportRequest) -> str:
    """The remedy for a model that a format cannot express: the format that can."""
    convention, is_moe = request.convention, request.architecture.is_moe
    if convention is None:
        return "choose --target-format autoregressive"
    if convention.attention_pattern == "causal":
        return "choose --target-format autoregressive, which decodes it from left to right"
    if convention.attention_pattern == "full" and not is_moe:
        return "choose --target-format a2d-qwen3"
    if convention.attention_pattern == "full" and convention.shifted:
        return "choose --target-format rnd1"
    if convention.attention_pattern == "block_causal" and not convention.shifted:
        return "choose --target-format sdar"
    return "keep it as --target-format megatron: no published format can express it"
