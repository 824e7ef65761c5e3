import pytest

from megatron_dlm.config import Config, validate, validate_architecture
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import architecture_from_hf
from tests.refusal import refusal
from tests.tiny import DENSE, MOE

COPY = {
    "objective": "d_opsd",
    "load": "weights",
    "teacher_load": "weights",
    "prompts": "prompts.jsonl",
    "num_rollouts": 2,
}
ADAPTERS = {**COPY, "teacher_load": None, "lora_rank": 8}
OPDLM = {"load": "weights", "prompts": "prompts.jsonl", "num_rollouts": 2}
ROPE = {"rope_theta": 1000.0}


@pytest.mark.parametrize(
    "values",
    [
        COPY,
        ADAPTERS,
        {**ADAPTERS, "teacher_load": "weights"},
        {**ADAPTERS, "lora_alpha": 4, "lora_target_modules": "linear_qkv,linear_proj"},
        {**ADAPTERS, "reward": "math_verify", "max_tries": 1, "reveal_fraction": 0},
        {**ADAPTERS, "temperature": 0, "max_tries": 1},
        {**ADAPTERS, "top_k": 1, "max_tries": 1},
        {**ADAPTERS, "max_prompt_length": 16, "max_response_length": 17, "block_size": 32},
        {**OPDLM, "lora_rank": 8},
        {**OPDLM, "temperature": 0},
        {**OPDLM, "max_prompt_length": 16, "max_response_length": 16, "block_size": 32},
    ],
)
def test_complete_configurations_pass(values: dict[str, object]) -> None:
    assert refusal(validate, Config.from_dict(values), 1) is None


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({**COPY, "teacher_load": None}, ["--teacher-load", "--lora-rank"]),
        ({**ADAPTERS, "lora_target_modules": []}, ["--lora-target-modules", "linear_qkv"]),
        ({**ADAPTERS, "lora_target_modules": ["q_proj"]}, ["lora_target_modules", "linear_qkv"]),
        ({**OPDLM, "lora_alpha": 4}, ["--lora-alpha = 4", "--lora-rank"]),
        ({**OPDLM, "max_tries": 2}, ["--max-tries = 2", "d_opsd"]),
        ({**OPDLM, "reward": "math_verify"}, ["--reward = 'math_verify'", "d_opsd"]),
        ({**OPDLM, "reveal_fraction": 0.5}, ["--reveal-fraction = 0.5", "d_opsd"]),
        ({**COPY, "divergence": "jsd"}, ["--divergence = 'jsd'", "--teacher-top-k"]),
        ({**COPY, "teacher_response_fraction": 0.5}, ["--teacher-response-fraction = 0.5"]),
        ({**COPY, "temperature": 0}, ["--temperature = 0", "all 8 tries", "--max-tries 1"]),
        ({**COPY, "top_k": 1, "max_tries": 2}, ["--top-k = 1", "all 2 tries", "--max-tries 1"]),
        (
            {**COPY, "max_prompt_length": 16, "max_response_length": 16, "block_size": 32},
            ["--block-size = 32", "(32 tokens)", "less than 32", "--max-response-length"],
        ),
        ({**COPY, "state_selection": "global"}, ["--state-selection = 'global'", "all"]),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, object], fragments: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        validate(Config.from_dict(values), world_size=1)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_rules_about_the_model() -> None:
    dense = architecture_from_hf({"model_type": "qwen3", **DENSE, **ROPE})
    moe = architecture_from_hf({"model_type": "qwen3_moe", **MOE, **ROPE})
    short = {"max_prompt_length": 64, "max_response_length": 16}
    validate_architecture(Config.from_dict({**ADAPTERS, **short}), dense)
    with pytest.raises(UserError, match=r"--teacher-top-k = 512: .*vocabulary of 512; .*511"):
        validate_architecture(Config.from_dict({**ADAPTERS, **short, "teacher_top_k": 512}), dense)
    split = {**ADAPTERS, **short, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    validate_architecture(Config.from_dict(split), dense)
    with pytest.raises(UserError, match=r"--lora-target-modules.*--expert-tensor-parallel-size 1"):
        validate_architecture(Config.from_dict(split), moe)
    validate_architecture(Config.from_dict({**split, "expert_tensor_parallel_size": 1}), moe)
    attention = {**split, "lora_target_modules": ["linear_qkv"]}
    validate_architecture(Config.from_dict(attention), moe)
    dropped = {"expert_tensor_parallel_size": 1, "lora_dropout": 0.1}
    with pytest.raises(UserError, match=r"--lora-dropout = 0.1: .*--lora-target-modules"):
        validate_architecture(Config.from_dict({**split, **dropped}), moe)
    validate_architecture(Config.from_dict({**attention, **dropped}), moe)
    validate_architecture(Config.from_dict({**split, "lora_dropout": 0.1}), dense)
