"""Target format `sdar` / `sdar_moe`: a block-diffusion model as SGLang and lmdeploy serve it.

Both engines choose their code by `architectures` and `model_type`, put the block grid at token 0
and expect unshifted logits. Tensor names are Qwen3's. The folder brings its own modelling code for
plain transformers (`trust_remote_code`).
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
    unfit_for_sdar,
    write_remote_code,
    write_tokenizer,
)
from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import SGLANG_CONFIG_FILE


def write_sdar(request: ExportRequest, folder: Path) -> None:
    """Write everything but the weights.

    Raises:
        UserError: The model's attention is full, its logits are shifted, its layers are not
            Qwen3's, or block size, MASK or tokenizer are missing.
    """
    _check(request)
    is_moe = request.architecture.is_moe
    module, name = ("sdar_moe", "SDARMoe") if is_moe else ("sdar", "SDAR")
    config = network_config(request) | {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{name}Config",
            "AutoModel": f"modeling_{module}.{name}Model",
            "AutoModelForCausalLM": f"modeling_{module}.{name}ForCausalLM",
        },
        "block_size": request.block_size,
        # The public modelling code requires it.
        "fuse_cross_entropy": True,
        "mask_token_id": request.mask_token_id,
        "model_type": module,
    }
    write_json(folder / "config.json", config)
    write_generation_config(request, folder)
    write_remote_code(module, folder)
    (folder / SGLANG_CONFIG_FILE).write_text(
        "# SGLang: --dllm-algorithm LowConfidence --dllm-algorithm-config "
        f"{SGLANG_CONFIG_FILE}\n"
        f"block_size: {request.block_size}\n"
        f"threshold: {request.dynamic_threshold}\n"
    )
    write_tokenizer(request, folder)


def _check(request: ExportRequest) -> None:
    kind = request.diffusion_kind
    if kind is not None and kind.shifted:
        raise bad_value(
            "--target-format",
            "sdar",
            "the logits of this model are shifted (position i predicts token i + 1), and engines "
            "that serve sdar take them for unshifted ones: every token would be one place off",
            suitable_format(request),
        )
    if kind is not None and kind.attention_pattern == "full":
        raise bad_value(
            "--target-format",
            "sdar",
            "this model attends to the whole sequence, and engines that serve sdar show it "
            "finished blocks only",
            suitable_format(request),
        )
    if problem := unfit_for_sdar(request.architecture):
        raise bad_value("--target-format", "sdar", problem, suitable_format(request))
    check_block_size(request, "sdar")
    check_mask_and_tokenizer(request, "sdar")
