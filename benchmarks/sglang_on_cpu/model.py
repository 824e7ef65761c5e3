"""A tiny random model that SGLang's constants fit."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import REPOSITORY

VOCABULARY, MASK = 151936, 151669
"""Qwen3's, and SGLang's constant."""

TEXTS = 508
"""Ids below are tokens of the tiny tokenizer's texts; its special tokens follow."""

ENDS = (510, *range(60, 100))
"""Ids that end a response: so many that some end early."""

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": list(ENDS),
    "pad_token_id": 508,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def write_model(folder: Path, *, moe: bool) -> None:
    """Write an autoregressive Qwen3 (or Qwen3-MoE) folder with the tiny examples' tokenizer.

    Tokens of texts have larger embeddings than the rest of the vocabulary, so that confidences are
    spread over both sides of a threshold, and responses end.
    """
    import transformers

    torch.manual_seed(0)
    kind = "Qwen3Moe" if moe else "Qwen3"
    sizes = {**SIZES, **(EXPERTS if moe else {}), "tie_word_embeddings": not moe}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[[*range(TEXTS), 510]] *= 2.5
    model.generation_config.eos_token_id = list(ENDS)
    model.save_pretrained(folder)
    source = REPOSITORY / "examples/tiny/qwen3"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((source / name).read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<|MASK|>":
            token["id"] = MASK
        # Without an entry there, an added token gets the next free id instead of its own.
        tokenizer["model"]["vocab"][token["content"]] = token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
