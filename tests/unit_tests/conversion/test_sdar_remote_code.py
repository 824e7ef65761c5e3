"""The modelling code of exported folders gives the results of our model and rollout engine."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.conversion.remote_code.configuration_sdar import SDARConfig
from megatron_dlm.conversion.remote_code.configuration_sdar_moe import SDARMoeConfig
from megatron_dlm.conversion.remote_code.modeling_sdar import SDARForCausalLM
from megatron_dlm.conversion.remote_code.modeling_sdar_moe import SDARMoeForCausalLM
from megatron_dlm.conversion.remote_code.token_draws import draw_tokens
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.conversion.diffusion_models import padded
from tests.unit_tests.conversion.hf_models import hf_logits, random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

pytestmark = pytest.mark.usefixtures("single_process")

PROMPTS = [random_tokens(length, seed=length) for length in (3, 8, 1, 14)]
MAX_NEW_TOKENS = 18


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, tmp_path_factory, single_process):
    """Our model and the exported one, with equal weights."""
    folder = tmp_path_factory.mktemp(request.param)
    moe = request.param == "moe"
    save_hf_model(random_hf_model(moe=moe, tied=not moe), folder / "source")
    architecture = read_architecture(folder / "source")
    model = build_model(architecture, Config())
    load_hf_weights(model, architecture, folder / "source")
    export_hf(
        model,
        architecture,
        folder / "out",
        tokenizer_folder=save_tokenizer(folder / "tokenizer"),
        block_size=4,
        mask_token_id=MASK_TOKEN_ID,
    )
    config = json.loads((folder / "out" / "config.json").read_text())
    exported = (
        SDARMoeForCausalLM(SDARMoeConfig(**config))
        if moe
        else SDARForCausalLM(SDARConfig(**config))
    )
    exported.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    return model, exported.eval()


@pytest.mark.parametrize("block_size", [1, 4, 5, 64])
def test_logits_are_block_causal_and_equal_ours(models, block_size):
    model, exported = models
    tokens = random_tokens()
    expected = megatron_logits(model, tokens, "block_causal", block_size)[:, :VOCAB_SIZE]
    with torch.no_grad():
        logits = exported(tokens[None], block_size=block_size).logits[0]
    assert (logits - expected).abs().max() < 1e-4


def test_block_size_of_the_config_is_the_default(models):
    _, exported = models
    tokens = random_tokens()
    with torch.no_grad():
        explicit = exported(tokens[None], block_size=4).logits[0]
    assert torch.equal(hf_logits(exported, tokens, attention_pattern="block_causal"), explicit)


def test_padding_changes_nothing(models):
    _, exported = models
    short, long = random_tokens(9), random_tokens(13, seed=2)
    rows = torch.stack((torch.cat((torch.zeros(4, dtype=torch.int64), short)), long))
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    with torch.no_grad():
        logits = exported(rows, attention_mask=mask, block_size=4).logits
    assert (
        logits[0, 4:] - hf_logits(exported, short, attention_pattern="block_causal")
    ).abs().max() < 1e-4
    assert (
        logits[1] - hf_logits(exported, long, attention_pattern="block_causal")
    ).abs().max() < 1e-4


def test_cached_blocks_equal_the_full_forward(models):
    _, exported = models
    tokens = random_tokens(16)
    with torch.no_grad():
        cache = exported(tokens[None, :8], use_cache=True, block_size=4).past_key_values
        parts = [
            exported(tokens[None, start : start + 4], past_key_values=cache, block_size=4).logits[0]
            for start in (8, 12)
        ]
    full = hf_logits(exported, tokens, attention_pattern="block_causal")
    assert (torch.cat(parts) - full[8:]).abs().max() < 1e-4


def engine_responses(model, eos_token_id, **settings):
    engine = RolloutEngine(
        model,
        generation=GenerationConfig(
            temperature=0.0, top_k=0, top_p=1.0, max_running_requests=3, **settings
        ),
        special_tokens=SpecialTokens(eos_token_id, 0, MASK_TOKEN_ID, vocab_size=VOCAB_SIZE),
        seed=0,
        groups=ParallelGroups(),
    )
    prompts = [Prompt(index, tokens) for index, tokens in enumerate(PROMPTS)]
    return [t.response_ids.tolist() for t in engine.generate(prompts, MAX_NEW_TOKENS)]


STRATEGIES = [
    ("low_confidence_static", 4, 4, 0.9),
    ("low_confidence_static", 4, 2, 0.9),
    ("low_confidence_dynamic", 4, 4, 0.3),
    ("low_confidence_dynamic", 8, 8, 0.2),
]


@pytest.mark.parametrize(("strategy", "block_size", "steps", "threshold"), STRATEGIES)
def test_greedy_decoding_equals_the_rollout_engine(models, strategy, block_size, steps, threshold):
    model, exported = models

    def ours(eos_token_id):
        return engine_responses(
            model,
            eos_token_id,
            block_size=block_size,
            remasking_strategy=strategy,
            denoising_steps_per_block=steps,
            dynamic_threshold=threshold,
        )

    # A token in the middle of a response serves as EOS, so that some responses end early.
    eos_token_id = ours(eos_token_id=VOCAB_SIZE + 1)[1][6]
    expected = ours(eos_token_id)
    lengths = {len(response) for response in expected}
    assert MAX_NEW_TOKENS in lengths
    assert len(lengths) > 1

    rows, mask = padded(PROMPTS)
    longest = rows.shape[1]
    settings = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "block_size": block_size,
        "denoising_steps": steps,
        "remasking_strategy": strategy,
        "dynamic_threshold": threshold,
        "eos_token_id": eos_token_id,
        "pad_token_id": VOCAB_SIZE - 2,
    }
    output = exported.generate(rows, attention_mask=mask, **settings)
    assert torch.equal(output[:, :longest], rows)
    for row, response in enumerate(expected):
        padding = [VOCAB_SIZE - 2] * (output.shape[1] - longest - len(response))
        assert output[row, longest:].tolist() == response + padding
    alone = exported.generate(PROMPTS[0][None], **settings)
    assert alone[0, len(PROMPTS[0]) :].tolist() == expected[0]


def test_mask_is_never_generated(models):
    _, exported = models
    generator = torch.Generator().manual_seed(0)
    output = exported.generate(
        PROMPTS[1][None],
        max_new_tokens=200,
        min_new_tokens=100,
        do_sample=True,
        temperature=50.0,
        top_k=0,
        generator=generator,
    )
    response = output[0, len(PROMPTS[1]) :]
    assert len(response.unique()) > 20
    assert MASK_TOKEN_ID not in response.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remasking_strategy": "random"}, "remasking_strategy"),
        (
            {"denoising_steps": 3, "remasking_strategy": "low_confidence_static"},
            "must divide the block 4",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(models, changes, message):
    with pytest.raises(ValueError, match=message):
        models[1].generate(PROMPTS[0][None], **changes)


def test_draws_follow_the_filtered_distribution():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    count = 20_000
    logits = probabilities.log().repeat(count, 1)

    def frequencies(temperature, top_k, top_p):
        tokens, confidence, entropy = draw_tokens(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=torch.arange(count) // 100,
            positions=torch.arange(count) % 100,
            steps=torch.ones(count, dtype=torch.int64),
        )
        # Confidence and entropy are those of the distribution before temperature and filters.
        assert torch.allclose(confidence, probabilities[tokens])
        assert torch.allclose(entropy, -(probabilities * probabilities.log()).sum())
        return torch.bincount(tokens, minlength=4) / count

    expected = {
        (1.0, 0, 1.0): probabilities,
        (0.5, 0, 1.0): probabilities.square() / probabilities.square().sum(),
        (1.0, 2, 1.0): torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]),
        (1.0, 0, 0.75): torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]),
        (0.0, 0, 1.0): torch.tensor([1.0, 0.0, 0.0, 0.0]),
    }
    for settings, distribution in expected.items():
        found = frequencies(*settings)
        assert ((found == 0) == (distribution == 0)).all()
        assert (found - distribution).abs().max() < 0.02
