"""`a2d-qwen3` and `rnd1` folders: their files, their logits, and importing them again."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.conversion.remote_code.configuration_a2d_qwen3 import A2DQwen3Config
from megatron_dlm.conversion.remote_code.configuration_rnd import RND1Config
from megatron_dlm.conversion.remote_code.modeling_a2d_qwen3 import A2DQwen3LMHeadModel
from megatron_dlm.conversion.remote_code.modeling_rnd import RND1LM
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_architecture, read_diffusion_kind
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.diffusion_kind import DiffusionKind
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.conversion.diffusion_models import padded
from tests.unit_tests.conversion.hf_models import hf_logits, random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

pytestmark = pytest.mark.usefixtures("single_process")

PROMPTS = [random_tokens(length, seed=length) for length in (3, 8, 1, 14)]
MAX_NEW_TOKENS = 13


def imported(folder):
    architecture = read_architecture(folder)
    model = build_model(architecture, Config())
    load_hf_weights(model, architecture, folder)
    return model, architecture


def stating(architecture, **values):
    """The architecture with another config.json."""
    return replace(architecture, hf_config=architecture.hf_config | values)


def full(architecture, shifted):
    return stating(architecture, attention_pattern="full", shifted=shifted)


@pytest.fixture(scope="module", params=["a2d-qwen3", "a2d-qwen3 shifted", "rnd1"])
def exported(request, tmp_path_factory, single_process):
    """Folder, our model, and the modelling code's with the folder's weights."""
    folder = tmp_path_factory.mktemp("exported")
    format, moe = request.param.split()[0], request.param == "rnd1"
    source = save_hf_model(random_hf_model(moe=moe, tied=not moe), folder / "source")
    model, architecture = imported(source)
    export_hf(
        model,
        full(architecture, shifted=request.param != "a2d-qwen3"),
        folder / "out",
        format=format,
        tokenizer_folder=save_tokenizer(folder / "tokenizer"),
        mask_token_id=MASK_TOKEN_ID,
    )
    config = json.loads((folder / "out" / "config.json").read_text())
    theirs = RND1LM(RND1Config(**config)) if moe else A2DQwen3LMHeadModel(A2DQwen3Config(**config))
    absent = theirs.load_state_dict(load_file(folder / "out" / "model.safetensors"), strict=False)
    assert not absent.unexpected_keys
    assert absent.missing_keys == ([] if moe else ["lm_head.weight"])
    theirs.tie_weights()
    return folder, model, theirs.eval()


def test_folder(exported):
    folder, model, theirs = exported
    config = json.loads((folder / "out" / "config.json").read_text())
    moe = config["model_type"] == "rnd1"
    if moe:
        assert config["architectures"] == ["RND1LM"]
        assert config["auto_map"] == {
            "AutoConfig": "configuration_rnd.RND1Config",
            "AutoModel": "modeling_rnd.RND1Model",
            "AutoModelForMaskedLM": "modeling_rnd.RND1LM",
        }
        assert config["num_diffusion_steps"] == 256
        assert config["num_experts"] == 4
    else:
        assert config["model_type"] == "a2d-qwen3"
        assert config["architectures"] == ["A2DQwen3LMHeadModel"]
    assert config["mask_token_id"] == MASK_TOKEN_ID
    assert config["rope_theta"] == 50000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}
    assert "block_size" not in config
    generation = json.loads((folder / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 0)
    for reference in config["auto_map"].values():
        assert (folder / "out" / f"{reference.split('.')[0]}.py").is_file()
    assert AutoTokenizer.from_pretrained(folder / "out").mask_token_id == MASK_TOKEN_ID
    expected = load_file(folder / "source" / "model.safetensors")
    found = load_file(folder / "out" / "model.safetensors")
    assert found.keys() == expected.keys()

    again, architecture = imported(folder / "out")
    assert architecture.is_moe == moe
    assert read_diffusion_kind(architecture.hf_config) == DiffusionKind(
        "full", theirs.config.shifted
    )
    for mine, read_back in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, read_back)


def test_logits_see_everything_and_equal_ours(exported):
    _, model, theirs = exported
    tokens = random_tokens()
    expected = megatron_logits(model, tokens, "full")[:, :VOCAB_SIZE]
    assert (hf_logits(theirs, tokens, attention_pattern="full") - expected).abs().max() < 1e-4


def test_padding_changes_nothing(exported):
    _, _, theirs = exported
    short, long = random_tokens(9), random_tokens(13, seed=2)
    rows = torch.stack((torch.cat((torch.zeros(4, dtype=torch.int64), short)), long))
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    with torch.no_grad():
        logits = theirs(rows, attention_mask=mask, attention_pattern="full").logits
    assert (logits[0, 4:] - hf_logits(theirs, short, attention_pattern="full")).abs().max() < 1e-4
    assert (logits[1] - hf_logits(theirs, long, attention_pattern="full")).abs().max() < 1e-4


def engine_responses(model, eos_token_id, **settings):
    engine = RolloutEngine(
        model,
        generation=GenerationConfig(
            attention_pattern="full",
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            max_running_requests=3,
            **settings,
        ),
        special_tokens=SpecialTokens(eos_token_id, 0, MASK_TOKEN_ID, vocab_size=VOCAB_SIZE),
        seed=0,
        groups=ParallelGroups(),
    )
    prompts = [Prompt(index, tokens) for index, tokens in enumerate(PROMPTS)]
    return [t.response_ids.tolist() for t in engine.generate(prompts, MAX_NEW_TOKENS)]


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        ("entropy", None),
        ("entropy", 2),
        ("entropy_bounded", None),
        ("low_confidence_static", 4),
        ("low_confidence_dynamic", None),
    ],
)
@pytest.mark.slow
def test_greedy_decoding_equals_the_rollout_engine(exported, strategy, steps, block_size):
    _, model, theirs = exported
    settings = {
        "block_size": block_size,
        "remasking_strategy": strategy,
        "dynamic_threshold": 0.3,
        "entropy_bound": 2.0,
    }

    def ours(eos_token_id):
        return engine_responses(
            model,
            eos_token_id,
            shifted=theirs.config.shifted,
            denoising_steps_per_block=steps,
            **settings,
        )

    # A token of a response serves as EOS, so that some responses end early.
    eos_token_id = ours(eos_token_id=VOCAB_SIZE + 1)[1][4]
    expected = ours(eos_token_id)
    lengths = {len(response) for response in expected}
    assert len(lengths) > 1

    rows, mask = padded(PROMPTS)
    longest = rows.shape[1]
    output = theirs.generate(
        rows,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        denoising_steps=steps,
        eos_token_id=eos_token_id,
        pad_token_id=VOCAB_SIZE - 2,
        **settings,
    )
    assert torch.equal(output[:, :longest], rows)
    for row, response in enumerate(expected):
        padding = [VOCAB_SIZE - 2] * (output.shape[1] - longest - len(response))
        assert output[row, longest:].tolist() == response + padding


def test_settings_that_cannot_work_are_refused(exported):
    _, _, theirs = exported
    with pytest.raises(ValueError, match="remasking_strategy"):
        theirs.generate(PROMPTS[0][None], remasking_strategy="random")
    with pytest.raises(ValueError, match="max_new_tokens"):
        theirs.generate(PROMPTS[0][None], max_new_tokens=0)
    if theirs.config.shifted:
        with pytest.raises(ValueError, match="a token to predict the first one from"):
            theirs.generate(torch.empty(1, 0, dtype=torch.int64))


BLOCKS = {"attention_pattern": "block_causal", "block_size": 4}
FULL = {"attention_pattern": "full"}
CAUSAL = {"attention_pattern": "causal", "shifted": True}


@pytest.mark.parametrize(
    ("format", "moe", "config", "message"),
    [
        ("sdar", False, FULL | {"shifted": True}, "shifted .* choose --target-format a2d-qwen3"),
        ("sdar", False, FULL, "whole sequence.* choose --target-format a2d-qwen3"),
        ("sdar", True, {"model_type": "rnd1"}, "shifted .* choose --target-format rnd1"),
        ("sdar", False, BLOCKS | {"shifted": True}, "shifted .* --target-format megatron"),
        ("sdar", True, FULL, "whole sequence.* keep it as --target-format megatron"),
        ("sdar", False, CAUSAL, "shifted .* choose --target-format autoregressive"),
        ("a2d-qwen3", False, CAUSAL, "attends causally; choose --target-format autoregressive"),
        ("rnd1", True, CAUSAL, "attends causally; choose --target-format autoregressive"),
        ("a2d-qwen3", False, {}, "autoregressive; choose --target-format autoregressive"),
        ("a2d-qwen3", False, BLOCKS | {"shifted": True}, "dllm .* --target-format megatron"),
        ("a2d-qwen3", True, {"model_type": "rnd1"}, "mixture of experts; .* rnd1"),
        ("rnd1", False, FULL | {"model_type": "a2d-qwen3"}, "is dense; choose .* a2d-qwen3"),
        ("rnd1", True, FULL, "not shifted.* keep it as --target-format megatron"),
        ("rnd1", True, {"model_type": "sdar_moe"}, "attends by blocks; choose .* sdar"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, format, moe, config, message):
    model, architecture = imported(save_hf_model(random_hf_model(moe=moe), tmp_path / "source"))
    with pytest.raises(UserError, match=message) as caught:
        export_hf(
            model,
            stating(architecture, **config),
            tmp_path / "out",
            format=format,
            tokenizer_folder=save_tokenizer(tmp_path / "tokenizer"),
            block_size=4,
            mask_token_id=MASK_TOKEN_ID,
        )
    assert f"--target-format = '{format}'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_block_size_to_decode_with_is_kept(tmp_path):
    model, architecture = imported(save_hf_model(random_hf_model(), tmp_path / "source"))
    export_hf(
        model,
        full(architecture, shifted=False),
        tmp_path / "out",
        format="a2d-qwen3",
        tokenizer_folder=save_tokenizer(tmp_path / "tokenizer"),
        block_size=8,
        mask_token_id=MASK_TOKEN_ID,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert A2DQwen3Config(**config).block_size == 8
    assert A2DQwen3Config().block_size is None
