"""Files that all diffusion formats have: a tokenizer with MASK, and modelling code."""

from pathlib import Path

from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.self_contained_code import self_contained_code
from megatron_dlm.conversion.tokenizer_files import copy_tokenizer, register_mask_token
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import (
    Architecture,
    read_diffusion_kind,
    states_attention,
)
from megatron_dlm.models.rotary import attention_factor


def check_mask_and_tokenizer(request: ExportRequest, format: str) -> None:
    """Check that the folder can state the MASK token.

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
            "name a folder with tokenizer.json and tokenizer_config.json, or with tokenizer.model",
        )


def check_block_size(request: ExportRequest, format: str) -> None:
    """Check that the folder of a block-causal model can state the block size.

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
    """Copy the tokenizer and add MASK to it; checked by `check_mask_and_tokenizer`.

    Args:
        request: With the tokenizer's folder and the id of MASK.
        folder: Folder to write.
        mask_token: Required text of MASK; see `register_mask_token`.

    Raises:
        UserError: Its files are missing or have no place for MASK.
    """
    assert request.tokenizer_folder is not None
    assert request.mask_token_id is not None
    copy_tokenizer(request.tokenizer_folder, folder)
    register_mask_token(folder, request.mask_token_id, mask_token)


def write_remote_code(name: str, folder: Path, renamed: tuple[str, str] | None = None) -> None:
    """Write the two files of modelling code that `auto_map` refers to, for `trust_remote_code`.

    Args:
        name: Of the modules `configuration_<name>` and `modeling_<name>`.
        folder: Folder to write.
        renamed: A name in these modules to replace, as in class names, and its replacement; its
            lower-case form is replaced too, also in the names of the files.
    """

    def rename(text: str) -> str:
        if renamed is None:
            return text
        old, new = renamed
        return text.replace(old, new).replace(old.lower(), new.lower())

    configuration, modeling = f"configuration_{name}", f"modeling_{name}"
    for module, kept in ((configuration, None), (modeling, configuration)):
        text = rename(self_contained_code(module, kept))
        (folder / f"{rename(module)}.py").write_text(text, encoding="utf-8")


def has_two_modes(architecture: Architecture) -> bool:
    """Whether a model's context is causal, so that it has an autoregressive mode too."""
    kind = (
        read_diffusion_kind(architecture.hf_config)
        if states_attention(architecture.hf_config)
        else None
    )
    return kind is not None and kind.has_causal_context


def unfit_for_sdar(architecture: Architecture) -> str | None:
    """What code that serves `sdar` would ignore in a network; None: nothing.

    That code has Qwen3's layers. It scales rotary embeddings as config.json says, but SGLang does
    not read YaRN's `attention_factor` and uses the default.
    """
    if has_two_modes(architecture):
        return (
            "code that serves it lets the tokens of a finished block see each other, and this "
            "model's context is causal"
        )
    if not architecture.qk_norm or architecture.qkv_bias:
        return f"code that serves it has Qwen3's layers, and this is a {architecture.family} model"
    scaling = architecture.rope_scaling or {}
    stated = {key: value for key, value in scaling.items() if key != "attention_factor"}
    if attention_factor(scaling or None) != attention_factor(stated or None):
        return f"SGLang ignores attention_factor = {scaling['attention_factor']} of rope_scaling"
    return None


def suitable_format(request: ExportRequest) -> str:
    """The remedy for a model that a format cannot express: the format that can."""
    kind, is_moe = request.diffusion_kind, request.architecture.is_moe
    a2d = f"choose --target-format a2d-{request.architecture.family}"
    if kind is None:
        return "choose --target-format autoregressive"
    if kind.attention_pattern == "causal":
        return "choose --target-format autoregressive, which decodes it from left to right"
    if kind.has_causal_context:
        return f"choose --target-format two-mode-{request.architecture.family}"
    if kind.attention_pattern == "full" and not is_moe:
        return a2d
    if kind.attention_pattern == "full" and kind.shifted:
        return "choose --target-format rnd1"
    if kind.attention_pattern == "block_causal" and not kind.shifted:
        if unfit_for_sdar(request.architecture) is None:
            return "choose --target-format sdar"
        if not is_moe:
            return a2d
    return "keep it as --target-format megatron: no published format can express it"
