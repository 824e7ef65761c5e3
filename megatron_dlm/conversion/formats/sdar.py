"""Target format `sdar` / `sdar_moe`: a block-diffusion model as SGLang and lmdeploy serve it.

Both engines choose their code by `architectures` and `model_type`, put the block grid at token 0
and expect unshifted logits. Tensor names are Qwen3's. The folder brings its own modelling code for
plain transformers (`trust_remote_code`).
"""

import shutil
from pathlib import Path

from megatron_dlm.conversion.formats.qwen3 import qwen3_config, write_json
from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.tokenizer_files import copy_tokenizer, register_mask_token
from megatron_dlm.errors import bad_value

_REMOTE_CODE = Path(__file__).parents[1] / "remote_code" / "sdar"
_DENSE_CODE = ("configuration_sdar.py", "modeling_sdar.py")
# The mixture of experts imports what it shares with the dense model.
_MOE_CODE = ("configuration_sdar_moe.py", "modeling_sdar_moe.py")

SGLANG_CONFIG_FILE = "dllm_config.yaml"


def write_sdar(request: ExportRequest, folder: Path) -> None:
    """Write everything but the weights.

    Raises:
        UserError: The model's logits are shifted, or block size, MASK or tokenizer are missing.
    """
    _check(request)
    is_moe = request.architecture.is_moe
    module, name = ("sdar_moe", "SDARMoe") if is_moe else ("sdar", "SDAR")
    config = qwen3_config(request) | {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{name}Config",
            "AutoModel": f"modeling_{module}.{name}Model",
            "AutoModelForCausalLM": f"modeling_{module}.{name}ForCausalLM",
        },
        "block_size": request.block_size,
        "mask_token_id": request.mask_token_id,
        "model_type": module,
    }
    write_json(folder / "config.json", config)
    for file in _DENSE_CODE + (_MOE_CODE if is_moe else ()):
        shutil.copyfile(_REMOTE_CODE / file, folder / file)
    (folder / SGLANG_CONFIG_FILE).write_text(
        "# SGLang: --dllm-algorithm LowConfidence --dllm-algorithm-config "
        f"{SGLANG_CONFIG_FILE}\n"
        f"block_size: {request.block_size}\n"
        f"threshold: {request.dynamic_threshold}\n"
    )
    assert request.tokenizer_folder is not None
    assert request.mask_token_id is not None
    copy_tokenizer(request.tokenizer_folder, folder)
    register_mask_token(folder, request.mask_token_id)


def _check(request: ExportRequest) -> None:
    if request.shifted or request.architecture.hf_config["model_type"] == "rnd1":
        raise bad_value(
            "--target-format",
            "sdar",
            "the logits of this model are shifted (position i predicts token i + 1), and engines "
            "that serve sdar take them for unshifted ones: every token would be one place off",
            "serve it as the shifted model that it is",
        )
    if request.block_size is None or request.block_size < 1:
        raise bad_value(
            "--block-size",
            request.block_size,
            "sdar needs the block size that the model was trained with",
            "give it",
        )
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
            "sdar needs the tokenizer",
            "name a folder with tokenizer.json and tokenizer_config.json",
        )
