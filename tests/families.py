"""Random transformers models of every family, the oracle of what is imported and exported."""

from typing import Any

import torch

# Short of the texts that tests run on, so that a scaled embedding is past its first training.
_ORIGINAL = 16
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "original_max_position_embeddings": _ORIGINAL,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": _ORIGINAL,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {}),
    "qwen3_yarn": ("Qwen3", {"rope_parameters": _YARN}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
}
"""By name: class of transformers, and what its configuration says beside the sizes."""

UNKNOWN = {"phi3": ("Phi3", {})}
"""Families that tests make known."""

OTHER_FAMILIES = ("qwen3_yarn", "qwen2", "llama", "mistral")
"""Those that a test runs beside Qwen3 and Qwen3-MoE."""


def random_family_model(family: str, seed: int, sizes: dict[str, Any]) -> Any:
    """A transformers model whose biases are random too; not loaded above: it takes long."""
    import transformers

    name, changes = (FAMILIES | UNKNOWN)[family]
    changes = {key: dict(v) if isinstance(v, dict) else v for key, v in changes.items()}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.float()
