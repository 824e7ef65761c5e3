"""Target formats of this project's code: `a2d-<family>`, `two-mode-<family>`, `rnd1`.

Tensor names are the family's and Qwen3-MoE's. The folder brings its own modelling code for plain
transformers (`trust_remote_code`); its logits are returned as the network has them, and config.json
says whether they are shifted. An `rnd1` folder has full attention; dllm's `a2d-<family>` folders
may have either, and ours say which. A `two-mode-<family>` folder has a causal context, for which no
other code has a name: it is decoded by blocks, from left to right, or speculatively.
"""

from pathlib import Path

from megatron_dlm.conversion.formats.autoregressive import (
    network_config,
    write_generation_config,
    write_json,
)
from megatron_dlm.conversion.formats.diffusion_files import (
    check_block_size,
    check_mask_and_tokenizer,
    suitable_format,
    write_remote_code,
    write_tokenizer,
)
from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.data.tokenizer import DLLM_MASK_TOKEN
from megatron_dlm.errors import bad_value
from megatron_dlm.models.families import FAMILIES, model_types

NUM_DIFFUSION_STEPS = 256
"""Default denoising steps in an `rnd1` folder, as in the published one."""


def write_a2d(request: ExportRequest, folder: Path, family: str) -> None:
    """Write everything but the weights of an `a2d-<family>` folder.

    The modelling code is written for Qwen3: for another family its name is replaced, and
    config.json states how its layers differ.

    Args:
        request: What to write.
        folder: Folder to write.
        family: Family that the format is for.

    Raises:
        UserError: The model is not a dense diffusion model of the family, or block size, MASK or
            tokenizer are missing.
    """
    format, architecture = f"a2d-{family}", request.architecture
    if architecture.family != family:
        problem = f"this is a {architecture.family} model"
        raise bad_value("--target-format", format, problem, suitable_format(request))
    _check(
        request,
        format,
        ("full", "block_causal"),
        "is a mixture of experts",
        not architecture.is_moe,
    )
    kind = request.diffusion_kind
    assert kind is not None
    if kind.has_causal_context:
        problem = "its context is causal, and dllm lets tokens of finished blocks see each other"
        raise bad_value("--target-format", format, problem, suitable_format(request))
    is_block_causal = kind.attention_pattern == "block_causal"
    if is_block_causal and kind.shifted:
        raise bad_value(
            "--target-format",
            format,
            "the logits of this block-causal model are shifted, and dllm takes them for unshifted",
            suitable_format(request),
        )
    if is_block_causal:
        check_block_size(request, format)
    name = _name_in_classes(family)
    configuration, model = (
        f"configuration_a2d_{family}.A2D{name}",
        f"modeling_a2d_{family}.A2D{name}",
    )
    _write(
        request,
        folder,
        # dllm looks MASK up by this name; without it, it adds a token whose row is untrained.
        DLLM_MASK_TOKEN,
        {
            "architectures": [f"A2D{name}LMHeadModel"],
            "auto_map": {
                "AutoConfig": f"{configuration}Config",
                "AutoModel": f"{model}Model",
                # For pipelines and evaluation tools that generate text.
                "AutoModelForCausalLM": f"{model}LMHeadModel",
                "AutoModelForMaskedLM": f"{model}LMHeadModel",
            },
            "model_type": format,
            "qk_norm": architecture.qk_norm,
            "qkv_bias": architecture.qkv_bias,
            "use_cache": is_block_causal,
        },
    )
    write_remote_code("a2d_qwen3", folder, renamed=("Qwen3", name))


def write_two_mode(request: ExportRequest, folder: Path, family: str) -> None:
    """Write everything but the weights of a `two-mode-<family>` folder.

    Args:
        request: What to write.
        folder: Folder to write.
        family: Family that the format is for.

    Raises:
        UserError: The model is no diffusion model of the family with a causal context, or block
            size, MASK or tokenizer are missing.
    """
    format, architecture = f"two-mode-{family}", request.architecture
    if architecture.family != family:
        problem = f"this is a {architecture.family} model"
        raise bad_value("--target-format", format, problem, suitable_format(request))
    is_moe = architecture.is_moe
    model_type = f"{format}_moe" if is_moe else format
    _check(request, format, ("block_causal",), "has experts", model_type in model_types())
    kind = request.diffusion_kind
    assert kind is not None
    if not kind.has_causal_context:
        problem = "tokens of finished blocks see each other, so it has no autoregressive mode"
        raise bad_value("--target-format", format, problem, suitable_format(request))
    check_block_size(request, format)
    name, module = _name_in_classes(family), f"two_mode_{family}"
    if is_moe:
        name, module = f"{name}Moe", f"{module}_moe"
    model = f"modeling_{module}.TwoMode{name}"
    _write(
        request,
        folder,
        None,
        {
            "architectures": [f"TwoMode{name}LMHeadModel"],
            "auto_map": {
                "AutoConfig": f"configuration_{module}.TwoMode{name}Config",
                "AutoModel": f"{model}Model",
                "AutoModelForCausalLM": f"{model}LMHeadModel",
            },
            "context_attention": kind.context_attention,
            "model_type": model_type,
            "qk_norm": architecture.qk_norm,
            "qkv_bias": architecture.qkv_bias,
            "use_cache": True,
        },
    )
    if is_moe:
        write_remote_code(module, folder)
    else:
        write_remote_code("two_mode_qwen3", folder, renamed=("Qwen3", name))


def _name_in_classes(family: str) -> str:
    """Of a family, in transformers' names of classes: `Qwen3`."""
    architecture = FAMILIES[family].autoregressive_type(is_moe=False).architecture
    assert architecture is not None
    return architecture.removesuffix("ForCausalLM")


def write_rnd1(request: ExportRequest, folder: Path) -> None:
    """Write everything but the weights of an `rnd1` folder.

    Raises:
        UserError: The model is not a mixture of experts of full attention with shifted logits, or
            MASK or tokenizer are missing.
    """
    _check(request, "rnd1", ("full",), "is dense", request.architecture.is_moe)
    kind = request.diffusion_kind
    assert kind is not None
    if not kind.shifted:
        raise bad_value(
            "--target-format",
            "rnd1",
            "the logits of this model are not shifted, and whatever reads rnd1 takes those at "
            "position i for token i + 1",
            suitable_format(request),
        )
    _write(
        request,
        folder,
        None,
        {
            "architectures": ["RND1LM"],
            "auto_map": {
                "AutoConfig": "configuration_rnd.RND1Config",
                "AutoModel": "modeling_rnd.RND1Model",
                "AutoModelForMaskedLM": "modeling_rnd.RND1LM",
            },
            "model_type": "rnd1",
            "num_diffusion_steps": NUM_DIFFUSION_STEPS,
            "use_cache": False,
        },
    )
    write_remote_code("rnd", folder)


def _check(
    request: ExportRequest, format: str, patterns: tuple[str, ...], otherwise: str, is_fit: bool
) -> None:
    kind = request.diffusion_kind
    problem = None
    if kind is None:
        problem = "this model is autoregressive"
    elif kind.attention_pattern == "causal":
        problem = "this model attends causally"
    elif kind.attention_pattern not in patterns:
        is_by_blocks = kind.attention_pattern == "block_causal"
        problem = f"this model attends {'by blocks' if is_by_blocks else 'to the whole sequence'}"
    elif not is_fit:
        problem = f"this model {otherwise}"
    if problem is not None:
        raise bad_value("--target-format", format, problem, suitable_format(request))
    check_mask_and_tokenizer(request, format)


def _write(
    request: ExportRequest, folder: Path, mask_token: str | None, identity: dict[str, object]
) -> None:
    kind = request.diffusion_kind
    assert kind is not None
    config = network_config(request) | identity
    config |= {
        "attention_pattern": kind.attention_pattern,
        "mask_token_id": request.mask_token_id,
        "shifted": kind.shifted,
    }
    if request.block_size is not None:
        config["block_size"] = request.block_size
    write_json(folder / "config.json", config)
    write_generation_config(request, folder)
    write_tokenizer(request, folder, mask_token)
