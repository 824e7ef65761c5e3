"""`a2d-<family>`: either attention, and MASK under the name that dllm looks it up by."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.data.tokenizer import SpecialTokens, load_tokenizer, resolve_special_tokens
from megatron_dlm.data.tokenizer_builder import build_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.options import InferenceArguments, InferenceConfig, resolve_inference
from megatron_dlm.models.architecture import read_architecture, read_diffusion_kind
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, DiffusionKind
from megatron_dlm.types.trajectory import Prompt
from tests.families import OTHER_FAMILIES
from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

BLOCK_SIZE = 4
PROMPTS = [random_tokens(length, seed=length) for length in (3, 8, 1)]
MAX_NEW_TOKENS = 18
FULL = DiffusionKind("full", shifted=False)


def dllm_folder(folder: Path, family: str = "qwen3", **stated: Any) -> Path:
    """What dllm saves: the model type, and no word on attention or blocks."""
    hf_model = random_hf_model(family=family, tied=True)
    save_tokenizer(save_hf_model(hf_model, folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    name = type(hf_model).__name__.removesuffix("ForCausalLM")
    config |= {
        "model_type": f"a2d-{name.lower()}",
        "architectures": [f"A2D{name}LMHeadModel"],
        **stated,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dllm_mask_token_id(folder: Path) -> int:
    """As dllm's own loader finds it."""
    # Without remote code it is the model type that dllm makes known, which is in no other package.
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", trust_remote_code=True)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    assert len(tokenizer) == size, "dllm adds a token whose row nothing has trained"
    return tokenizer.mask_token_id


@torch.no_grad()
def hf_logits(
    model: PreTrainedModel, folder: Path, tokens: torch.Tensor, block_size: int
) -> torch.Tensor:
    """A model of transformers on the folder's weights, under a dense block-causal mask."""
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"], **weights})
    block = torch.arange(len(tokens)) // block_size
    hidden = torch.where(block[:, None] >= block, 0.0, float("-inf"))
    return model(input_ids=tokens[None], attention_mask=hidden[None, None]).logits[0]


def engine_responses(model: torch.nn.Module, pattern: str) -> list[list[int]]:
    """The most likely tokens of our own engine."""
    engine = RolloutEngine(
        model,
        generation=GenerationConfig(
            attention_pattern=pattern,
            block_size=BLOCK_SIZE,
            denoising_steps_per_block=None,
            remasking_strategy="low_confidence_dynamic",
            dynamic_threshold=0.3,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            max_running_requests=3,
        ),
        special_tokens=SpecialTokens(1, 0, MASK_TOKEN_ID, vocab_size=VOCAB_SIZE),
        seed=0,
        groups=ParallelGroups(),
    )
    prompts = [Prompt(index, tokens) for index, tokens in enumerate(PROMPTS)]
    return [t.response_ids.tolist() for t in engine.generate(prompts, MAX_NEW_TOKENS)]


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("qwen3", "block_causal"),
        ("qwen3", "full"),
        ("qwen3_yarn", "block_causal"),
        ("qwen2", "full"),
        ("llama", "block_causal"),
        ("mistral", "full"),
    ],
)
@pytest.mark.slow
def test_there_and_back_from_dllm(tmp_path, convert, family, pattern):
    source, exported = dllm_folder(tmp_path / "dllm", family), tmp_path / "exported"
    format = json.loads((source / "config.json").read_text())["model_type"]
    tokens = random_tokens()
    tokens[::3] = MASK_TOKEN_ID
    stated = ("--attention-pattern", pattern, "--block-size", BLOCK_SIZE)
    target = ("--save", exported, "--target-format", format)
    assert convert("--load", source, *stated, *target) == (0, "")

    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["attention_pattern"]) == (format, pattern)
    assert config["block_size"] == BLOCK_SIZE
    before = load_file(source / "model.safetensors")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, before[name])
    assert dllm_mask_token_id(exported) == config["mask_token_id"] == MASK_TOKEN_ID

    size = BLOCK_SIZE if pattern == "block_causal" else len(tokens)
    expected = hf_logits(random_hf_model(family=family, tied=True), exported, tokens, size)
    remote = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    with torch.no_grad():
        found = remote(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    architecture = read_architecture(exported)
    kind = BLOCK_DIFFUSION if pattern == "block_causal" else FULL
    assert read_diffusion_kind(architecture.hf_config) == kind
    with initialized(Config()):
        model = build_model(architecture, Config())
        load_hf_weights(model, architecture, exported)
        ours = megatron_logits(model, tokens, pattern, BLOCK_SIZE)
        responses = engine_responses(model, pattern)
    torch.testing.assert_close(ours[:, :VOCAB_SIZE], expected, rtol=0, atol=2e-5)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        generated = remote.generate(
            prompt[None],
            max_new_tokens=MAX_NEW_TOKENS,
            remasking_strategy="low_confidence_dynamic",
            dynamic_threshold=0.3,
        )
        assert generated[0, len(prompt) :].tolist() == response


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_the_default_format_is_the_family_s(tmp_path, convert, family):
    """`sdar` where engines compute the model, else what does."""
    source, out = dllm_folder(tmp_path / "dllm", family, block_size=BLOCK_SIZE), tmp_path / "out"
    assert convert("--load", source, "--save", out) == (0, "")
    found = json.loads((out / "config.json").read_text())["model_type"]
    assert found == ("sdar" if family == "qwen3_yarn" else f"a2d-{family}")


def test_a_network_that_engines_do_not_compute_is_not_written_as_sdar(tmp_path, convert):
    target = ("--save", tmp_path / "new", "--target-format", "sdar")
    source = dllm_folder(tmp_path / "qwen2", "qwen2", block_size=BLOCK_SIZE)
    line = _refusal(convert, "--load", source, *target)
    assert "this is a qwen2 model; choose --target-format a2d-qwen2" in line
    scaled = dllm_folder(tmp_path / "yarn", "qwen3_yarn", block_size=BLOCK_SIZE)
    file = scaled / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["attention_factor"] = 1.5
    file.write_text(json.dumps(config))
    line = _refusal(convert, "--load", scaled, *target)
    assert "attention_factor = 1.5 of rope_scaling; choose --target-format a2d-qwen3" in line
    other = ("--save", tmp_path / "new", "--target-format", "a2d-llama")
    line = _refusal(convert, "--load", source, *other)
    assert "this is a qwen2 model; choose --target-format a2d-qwen2" in line


def test_a_block_causal_folder_is_served_as_sdar(tmp_path, convert):
    source, sdar = dllm_folder(tmp_path / "dllm"), tmp_path / "sdar"
    stated = ("--attention-pattern", "block_causal", "--block-size", 8)
    assert convert("--load", source, "--save", sdar, *stated)[0] == 0
    config = json.loads((sdar / "config.json").read_text())
    assert (config["model_type"], config["block_size"]) == ("sdar", 8)
    # And back: what says its attention needs no flag.
    target = ("--save", tmp_path / "a2d", "--target-format", "a2d-qwen3")
    assert convert("--load", sdar, *target) == (0, "")
    assert read_architecture(tmp_path / "a2d").hf_config["attention_pattern"] == "block_causal"
    assert dllm_mask_token_id(tmp_path / "a2d") == MASK_TOKEN_ID


# What dllm does: classes of its own under the model type, no remote code, MASK by its name, and
# attention that its sampler hands over with the positions. Arguments: folder, block size, results.
AS_DLLM_LOADS = """
import sys, torch, transformers
from safetensors.torch import save_file

class A2DQwen3Config(transformers.Qwen3Config):
    model_type = "a2d-qwen3"

class A2DQwen3LMHeadModel(transformers.Qwen3ForCausalLM):
    config_class = A2DQwen3Config

transformers.AutoConfig.register("a2d-qwen3", A2DQwen3Config)
transformers.AutoModelForMaskedLM.register(A2DQwen3Config, A2DQwen3LMHeadModel)
folder, block_size, results = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
assert type(model) is A2DQwen3LMHeadModel
tokens = torch.tensor([[5, 6, tokenizer.mask_token_id, 7, 8, *[tokenizer.mask_token_id] * 3]])
positions = torch.arange(tokens.shape[1])
block = positions // int(block_size)
mask = (block[:, None] >= block)[None, None]
with torch.no_grad():
    logits = model(tokens, attention_mask=mask, position_ids=positions[None]).logits
save_file({"tokens": tokens, "logits": logits}, results)
"""


@pytest.mark.slow
def test_dllm_loads_a_block_causal_folder(tmp_path, convert):
    source, exported = dllm_folder(tmp_path / "dllm"), tmp_path / "exported"
    stated = ("--attention-pattern", "block_causal", "--block-size", BLOCK_SIZE)
    target = ("--save", exported, "--target-format", "a2d-qwen3")
    assert convert("--load", source, *stated, *target) == (0, "")
    arguments = (str(exported), str(BLOCK_SIZE), str(tmp_path / "results.safetensors"))
    subprocess.run([sys.executable, "-c", AS_DLLM_LOADS, *arguments], check=True)
    results = load_file(tmp_path / "results.safetensors")
    remote = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = remote(input_ids=results["tokens"]).logits
    torch.testing.assert_close(results["logits"], expected, rtol=0, atol=2e-5)


def _refusal(convert, *arguments) -> str:
    status, error = convert(*arguments)
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


def test_the_model_type_does_not_say_the_attention(tmp_path, convert):
    source, new = dllm_folder(tmp_path / "dllm"), tmp_path / "new"
    arguments = ("--load", source, "--save", new, "--target-format")
    line = _refusal(convert, *arguments, "a2d-qwen3")
    assert line.startswith(f"error: {source}/config.json: model_type = 'a2d-qwen3' does not say")
    assert "--attention-pattern" in line
    blocks = ("--attention-pattern", "block_causal")
    assert "--block-size = None" in _refusal(convert, *arguments, "a2d-qwen3", *blocks)
    for stated in ({"attention_pattern": "full"}, {"attention_pattern": "full", "block_size": 4}):
        dllm_folder(source, **stated)
        line = _refusal(convert, *arguments, "sdar", "--block-size", 4, *blocks)
        assert "config.json states full attention" in line
    # A block size alone says it.
    dllm_folder(source, block_size=4)
    assert convert(*arguments, "sdar")[0] == 0


def test_an_autoregressive_model_has_no_attention_to_state(tmp_path, convert):
    source = save_tokenizer(save_hf_model(random_hf_model(), tmp_path / "qwen3"))
    options = ("--attention-pattern", "full", "--target-format", "a2d-qwen3")
    line = _refusal(convert, "--load", source, "--save", tmp_path / "new", *options)
    assert "states an autoregressive model" in line


def test_generation_takes_the_stated_attention(tmp_path):
    source = str(dllm_folder(tmp_path / "dllm"))

    def resolve(**options: Any) -> Any:
        return resolve_inference(InferenceArguments(InferenceConfig(load=source, **options)), 1)

    with pytest.raises(UserError, match="does not say the attention"):
        resolve(block_size=4)
    setup = resolve(block_size=4, attention_pattern="block_causal")
    assert (setup.diffusion_kind, setup.block_size) == (BLOCK_DIFFUSION, 4)
    assert resolve(attention_pattern="full").diffusion_kind == FULL


def _declared(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def _in_the_vocabulary(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """MASK is an entry of the model's vocabulary too, and named among other special tokens."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        content["model"]["vocab"][token["content"]] = token["id"]
    file.write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<|MASK|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("save", [_declared, _in_the_vocabulary])
def test_mask_is_renamed_and_nothing_else(tmp_path, convert, save):
    source = save_hf_model(random_hf_model(vocab_size=512), tmp_path / "source")
    tokenizer = build_tokenizer()
    save(tokenizer, source)
    file = source / "config.json"
    stated = {"attention_pattern": "block_causal", "block_size": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    target = ("--save", tmp_path / "out", "--target-format", "a2d-qwen3")
    assert convert("--load", source, *target)[0] == 0

    assert dllm_mask_token_id(tmp_path / "out") == tokenizer.mask_token_id
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = dict(tokenizer.get_vocab())
    expected["<|mask|>"] = expected.pop("<|MASK|>")
    assert exported.get_vocab() == expected
    text = "Tom has 12 cards.<|im_end|>"
    assert exported(text)["input_ids"] == tokenizer(text)["input_ids"]
    # Read back, the id is found under its new name, declared or not.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for declared in (True, False):
        loaded = load_tokenizer(tmp_path / "out")
        if not declared:
            loaded.mask_token = None
            config.pop("mask_token_id")
        special = resolve_special_tokens(loaded, config, "out")
        assert special.mask_token_id == tokenizer.mask_token_id


def test_two_masks_are_not_chosen_between(tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    tokenizer.add_tokens(["<|MASK|>", "<|mask|>"], special_tokens=True)
    config = {"vocab_size": VOCAB_SIZE}
    with pytest.raises(
        UserError, match=r"'<\|MASK\|>' as 30 and '<\|mask\|>' as 31; set mask_token"
    ):
        resolve_special_tokens(tokenizer, config, "here")
    for token_id in (30, 31):
        stated = config | {"mask_token_id": token_id}
        assert resolve_special_tokens(tokenizer, stated, "here").mask_token_id == token_id
    tokenizer.mask_token = "<|mask|>"
    assert resolve_special_tokens(tokenizer, config, "here").mask_token_id == 31


def test_a_name_that_is_taken_is_refused(tmp_path, convert):
    """Both names are there, and the trained one is not dllm's."""
    source = save_tokenizer(save_hf_model(random_hf_model(), tmp_path / "source"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_pattern": "full"}))
    target = ("--save", tmp_path / "out", "--target-format", "a2d-qwen3")
    assert "has <|mask|> as 31" in _refusal(convert, "--load", source, *target)
