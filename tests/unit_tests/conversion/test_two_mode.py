"""`two-mode-<family>`: written, read back, and decoded by its own code as by our engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.conversion.remote_code.configuration_two_mode_qwen3 import TwoModeQwen3Config
from megatron_dlm.conversion.remote_code.modeling_two_mode_qwen3 import TwoModeQwen3LMHeadModel
from megatron_dlm.models.architecture import read_architecture, read_diffusion_kind
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.diffusion_kind import TWO_MODES
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.conversion.diffusion_models import padded
from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model, two_mode_logits
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer
from tests.unit_tests.rollout.autoregressive_reference import (
    FEW,
    FEW_SIZES,
    chi_square,
    enumerated,
)

BLOCK_SIZE, MAX_NEW_TOKENS, EOS = 4, 14, 1
PROMPTS = [random_tokens(length, seed=length) for length in (3, 8, 1, 5)]
SETTINGS: dict[str, dict[str, Any]] = {
    "dynamic": dict(remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.3),
    "speculative": dict(remasking_strategy="speculative"),
    "in two steps": dict(remasking_strategy="speculative", draft_steps=2),
}


def two_mode_folder(folder: Path, family: str = "qwen3", **stated: Any) -> Path:
    """What a run's checkpoint says of a model with a causal context."""
    save_tokenizer(save_hf_model(_random(family), folder))
    config = json.loads((folder / "config.json").read_text())
    config |= dict(attention_pattern="block_causal", shifted=False, block_size=BLOCK_SIZE)
    config |= dict(context_attention="causal", mask_token_id=MASK_TOKEN_ID) | stated
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random(family: str) -> PreTrainedModel:
    return random_hf_model(family=family, moe=family == "qwen3_moe", tied=True)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2", "llama"])
@pytest.mark.slow
def test_there_and_back(tmp_path: Path, convert: Any, family: str) -> None:
    """Every family is decoded by blocks, and Qwen3 in every setting."""
    source, exported = two_mode_folder(tmp_path / "run", family), tmp_path / "exported"
    assert convert("--load", source, "--save", exported) == (0, "")
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == f"two-mode-{family}"
    assert config["context_attention"] == "causal"
    assert config["block_size"] == BLOCK_SIZE
    card = " ".join((exported / "README.md").read_text().split())
    assert "an autoregressive one in the same weights" in card
    assert 'remasking_strategy="speculative"' in card
    assert "Do not decode it with code for autoregressive models" not in card
    architecture = read_architecture(exported)
    assert read_diffusion_kind(architecture.hf_config) == TWO_MODES

    reference = _random(family)
    before = load_file(source / "model.safetensors")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, before[name])
    remote = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokens, nothing = random_tokens(18), torch.zeros(18, dtype=torch.bool)
    with torch.no_grad():
        clean = remote(input_ids=tokens[None]).logits[0]
        torch.testing.assert_close(clean, reference(tokens[None]).logits[0], rtol=0, atol=2e-5)
        tokens[[5, 6, 16]] = MASK_TOKEN_ID
        noisy = nothing.clone()
        noisy[4:8] = noisy[16:] = True
        found = remote(input_ids=tokens[None]).logits[0]
    expected = two_mode_logits(reference, tokens, noisy, BLOCK_SIZE)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with initialized(Config()):
        model = build_model(architecture, Config())
        load_hf_weights(model, architecture, exported)
        rows, mask = padded(PROMPTS)
        for name, setting in SETTINGS.items():
            if family != "qwen3" and name != "speculative":
                continue
            expected = engine_responses(model, **setting)
            options = dict(setting, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=EOS, pad_token_id=0)
            if "draft_steps" not in setting and "dynamic_threshold" not in setting:
                assert expected == engine_responses(model)  # from left to right
            for use_cache in (True, False):
                output = remote.generate(rows, attention_mask=mask, use_cache=use_cache, **options)
                for row, response in enumerate(expected):
                    written = output[row, rows.shape[1] :].tolist()
                    assert written[: len(response)] == response, name
                    assert not any(written[len(response) :])
            alone = remote.generate(PROMPTS[1][None], **options)
            assert alone[0, len(PROMPTS[1]) :].tolist() == expected[1]


def engine_responses(model: torch.nn.Module, **setting: Any) -> list[list[int]]:
    """The most likely tokens of our own engine; without a setting, from left to right."""
    generation = GenerationConfig.autoregressive(temperature=0.0, max_running_requests=3)
    if setting:
        generation = GenerationConfig(
            block_size=BLOCK_SIZE,
            context_attention="causal",
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            max_running_requests=3,
            **setting,
        )
    engine = RolloutEngine(
        model,
        generation=generation,
        special_tokens=SpecialTokens(EOS, 0, MASK_TOKEN_ID, vocab_size=VOCAB_SIZE),
        seed=0,
        groups=ParallelGroups(),
    )
    prompts = [Prompt(index, tokens) for index, tokens in enumerate(PROMPTS)]
    return [t.response_ids.tolist() for t in engine.generate(prompts, MAX_NEW_TOKENS)]


def test_its_second_mode_alone_is_an_autoregressive_model(tmp_path: Path, convert: Any) -> None:
    source, exported = two_mode_folder(tmp_path / "run"), tmp_path / "exported"
    target = ("--save", exported, "--target-format", "autoregressive")
    assert convert("--load", source, *target) == (0, "")
    assert read_diffusion_kind(read_architecture(exported).hf_config) is None
    tokens = random_tokens(9)
    plain = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        expected = random_hf_model(tied=True)(tokens[None]).logits
        torch.testing.assert_close(plain(tokens[None]).logits, expected, rtol=0, atol=2e-5)


def test_formats_whose_readers_show_finished_blocks_whole_are_refused(
    tmp_path: Path, convert: Any
) -> None:
    source, new = two_mode_folder(tmp_path / "run"), tmp_path / "new"

    def refusal(format: str) -> str:
        status, error = convert("--load", source, "--save", new, "--target-format", format)
        assert status == 2
        return str(error)

    for format, problem in (
        ("sdar", "lets the tokens of a finished block see each other, and this model's context is"),
        ("a2d-qwen3", "its context is causal, and dllm lets tokens of finished blocks see"),
        ("rnd1", "attends by blocks"),
    ):
        line = refusal(format)
        assert f"--target-format = '{format}'" in line
        assert problem in line
        assert "choose --target-format two-mode-qwen3" in line
    two_mode_folder(source, context_attention="block_causal")
    line = refusal("two-mode-qwen3")
    assert "it has no autoregressive mode; choose --target-format sdar" in line


def test_samples_of_the_modelling_code_are_the_autoregressive_ones() -> None:
    torch.manual_seed(3)
    sizes = dict(FEW_SIZES, rope_theta=10000.0)
    reference = Qwen3ForCausalLM(Qwen3Config(**sizes, initializer_range=0.4)).eval()
    ids = dict(mask_token_id=FEW.mask_token_id, eos_token_id=4, pad_token_id=0)
    model = TwoModeQwen3LMHeadModel(TwoModeQwen3Config(**sizes, **ids)).eval()
    model.load_state_dict(reference.state_dict())
    prompt = [1, 2, 1, 3, 3]
    expected = enumerated(reference, prompt, 3, (0.8, 4, 0.95))
    rows = model.generate(
        torch.tensor([prompt]),
        remasking_strategy="speculative",
        max_new_tokens=3,
        do_sample=True,
        temperature=0.8,
        top_k=4,
        top_p=0.95,
        num_return_sequences=2000,
        generator=torch.Generator().manual_seed(5),
    )
    responses = [row[: row.index(4) + 1] if 4 in row else row for row in rows[:, 5:].tolist()]
    assert abs(chi_square(responses, expected)) < 4


def test_a_block_causal_folder_has_nothing_to_verify_with() -> None:
    config = TwoModeQwen3Config(**FEW_SIZES, mask_token_id=5, context_attention="block_causal")
    model = TwoModeQwen3LMHeadModel(config)
    with pytest.raises(ValueError, match=r"`remasking_strategy` .*verifies drafts"):
        model.generate(torch.tensor([[1, 2]]), remasking_strategy="speculative", pad_token_id=0)
