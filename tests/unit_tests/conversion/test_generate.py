"""`generate` of exported models: what transformers' callers pass, in batches, against brute force.

The reference decodes one prompt by forwards of whole sequences, with attention masks made here.
"""

import pytest
import torch

from megatron_dlm.conversion.remote_code.configuration_a2d_qwen3 import A2DQwen3Config
from megatron_dlm.conversion.remote_code.configuration_rnd import RND1Config
from megatron_dlm.conversion.remote_code.configuration_sdar import SDARConfig
from megatron_dlm.conversion.remote_code.configuration_sdar_moe import SDARMoeConfig
from megatron_dlm.conversion.remote_code.modeling_a2d_qwen3 import A2DQwen3LMHeadModel
from megatron_dlm.conversion.remote_code.modeling_rnd import RND1LM
from megatron_dlm.conversion.remote_code.modeling_sdar import SDARForCausalLM
from megatron_dlm.conversion.remote_code.modeling_sdar_moe import SDARMoeForCausalLM

VOCAB_SIZE, MASK, PAD = 60, 59, 0
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mask_token_id": MASK,
    "eos_token_id": 7,
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
MAX_NEW_TOKENS = 11


def make_model(name):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def sdar():
    return make_model("sdar")


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(8, VOCAB_SIZE - 1, (length,), generator=generator)


PROMPTS = [prompt(length) for length in (5, 1, 12, 4, 7)]


def left_padded(prompts):
    width = max(map(len, prompts))
    rows = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(rows)
    for row, tokens in enumerate(prompts):
        rows[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return rows, mask


def responses(model, prompts, eos=(7,), **settings):
    """Responses to a padded batch, without what is behind their EOS."""
    rows, mask = left_padded(prompts)
    output = model.generate(
        rows, attention_mask=mask, eos_token_id=list(eos), pad_token_id=PAD, **settings
    )
    assert torch.equal(output[:, : rows.shape[1]], rows)
    found = []
    for response in output[:, rows.shape[1] :].tolist():
        ends = [i + 1 for i, token in enumerate(response) if token in eos]
        length = ends[0] if ends else len(response)
        assert set(response[length:]) <= {PAD}
        found.append(response[:length])
    return found


@torch.no_grad()
def brute_force(model, prompt, eos, *, strategy, block_size, threshold=0.9, steps=None):
    """The most likely tokens, by a forward of the whole sequence for every step."""
    full, shift = model.config.attention_pattern == "full", int(model.config.shifted)
    size = block_size or MAX_NEW_TOKENS
    end = len(prompt) + MAX_NEW_TOKENS
    sequence = prompt.tolist() + [MASK] * MAX_NEW_TOKENS
    start = len(prompt) // size * size if block_size else len(prompt)
    while start < end and not set(sequence[len(prompt) : start]) & set(eos):
        stop = start + size
        if not full:
            sequence = sequence[:start] + (sequence[start:stop] + [MASK] * size)[:size]
        todo = [i for i in range(start, min(stop, len(sequence))) if i >= len(prompt)]
        first_count, step = len(todo), 0
        while todo:
            step += 1
            block = torch.arange(len(sequence)) // size
            visible = torch.ones(len(sequence), len(sequence), dtype=torch.bool)
            if not full:
                visible = block[:, None] >= block
            logits = (
                model(torch.tensor([sequence]), attention_mask=visible[None]).logits[0].double()
            )
            logits[:, MASK] = -torch.inf
            probabilities = {i: logits[i - shift].softmax(-1) for i in todo}
            score = {i: float(probabilities[i].max()) for i in todo}
            if strategy == "low_confidence_dynamic":
                keep = [i for i in todo if score[i] > threshold] or [max(todo, key=score.get)]
            elif strategy == "low_confidence_static":
                keep = sorted(todo, key=score.get, reverse=True)[: size // steps]
            else:
                entropy = {i: -float(torch.special.entr(p).sum()) for i, p in probabilities.items()}
                count = len(todo) - first_count * max(steps - step, 0) // steps
                keep = sorted(todo, key=entropy.get, reverse=True)[: max(count, 1)]
            for i in keep:
                sequence[i] = int(probabilities[i].argmax())
            todo = [i for i in todo if i not in keep]
        start = stop
    response = sequence[len(prompt) : end]
    ends = [i + 1 for i, token in enumerate(response) if token in eos]
    return response[: ends[0]] if ends else response


@pytest.mark.parametrize(
    ("strategy", "block_size", "options"),
    [
        ("low_confidence_dynamic", 4, {"threshold": 0.2}),
        ("low_confidence_static", 4, {"steps": 2}),
        ("entropy", 8, {"steps": 3}),
        ("entropy", None, {"steps": 5}),
    ],
)
def test_padded_batches_decode_as_brute_force_does_each_prompt(
    model, strategy, block_size, options
):
    if block_size is None and model.config.attention_pattern != "full":
        block_size = 5
    eos = range(7, MASK, 5)

    expected = [
        brute_force(model, tokens, eos, strategy=strategy, block_size=block_size, **options)
        for tokens in PROMPTS
    ]
    assert len({len(response) for response in expected}) > 1
    settings = {
        "remasking_strategy": strategy,
        "block_size": block_size,
        "dynamic_threshold": options.get("threshold"),
        "denoising_steps": options.get("steps"),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    assert responses(model, PROMPTS, eos, **settings) == expected
    assert responses(model, PROMPTS, eos, **settings, use_cache=False) == expected
    assert responses(model, PROMPTS[:1], eos, **settings) == expected[:1]
