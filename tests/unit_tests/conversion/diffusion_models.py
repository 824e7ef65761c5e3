"""Tiny random models of all exported formats, made by their modelling code."""

import torch

from megatron_dlm.conversion.remote_code.configuration_a2d_qwen3 import A2DQwen3Config
from megatron_dlm.conversion.remote_code.configuration_rnd import RND1Config
from megatron_dlm.conversion.remote_code.configuration_sdar import SDARConfig
from megatron_dlm.conversion.remote_code.configuration_sdar_moe import SDARMoeConfig
from megatron_dlm.conversion.remote_code.modeling_a2d_qwen3 import A2DQwen3LMHeadModel
from megatron_dlm.conversion.remote_code.modeling_rnd import RND1LM
from megatron_dlm.conversion.remote_code.modeling_sdar import SDARForCausalLM
from megatron_dlm.conversion.remote_code.modeling_sdar_moe import SDARMoeForCausalLM

VOCAB_SIZE, MASK, PAD, EOS = 60, 59, 0, 7
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "sdar": lambda: SDARForCausalLM(SDARConfig(**SIZES)),
    "sdar_moe": lambda: SDARMoeForCausalLM(SDARMoeConfig(**SIZES, **EXPERTS)),
    "a2d-qwen3": lambda: A2DQwen3LMHeadModel(A2DQwen3Config(**SIZES)),
    "a2d-qwen3 by blocks": lambda: A2DQwen3LMHeadModel(
        A2DQwen3Config(**SIZES, attention_pattern="block_causal", block_size=4)
    ),
    "rnd1": lambda: RND1LM(RND1Config(**SIZES, **EXPERTS)),
}


def random_diffusion_model(name):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_prompt(length, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(8, VOCAB_SIZE - 1, (length,), generator=generator)


def padded(prompts, side="left"):
    """Rows of equal width, and which of their tokens are no padding."""
    width = max(map(len, prompts))
    rows = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(rows)
    for row, tokens in enumerate(prompts):
        start = width - len(tokens) if side == "left" else 0
        rows[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    return rows, mask


def batch_responses(model, prompts, eos=(EOS,), side="left", **settings):
    """Responses to a padded batch, up to their EOS; only padding may follow it."""
    rows, mask = padded(prompts, side)
    output = model.generate(
        rows, attention_mask=mask, eos_token_id=list(eos), pad_token_id=PAD, **settings
    )
    copies = settings.get("num_return_sequences", 1)
    assert torch.equal(output[:, : rows.shape[1]], rows.repeat_interleave(copies, dim=0))
    found = []
    for response in output[:, rows.shape[1] :].tolist():
        ends = [i + 1 for i, token in enumerate(response) if token in eos]
        length = ends[0] if ends else len(response)
        assert set(response[length:]) <= {PAD}
        found.append(response[:length])
    return found
