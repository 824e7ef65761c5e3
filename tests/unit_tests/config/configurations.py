"""Complete configurations and an architecture for the tests of rules."""

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture, architecture_from_hf

OPDLM = {"load": "weights", "prompts": "prompts.jsonl", "num_rollouts": 2}
NEXT_TOKEN = {
    "objective": "next_token",
    "load": "weights",
    "train_data": "train.jsonl",
    "train_iters": 10,
}
OPDLM_OFF = {**OPDLM, "objective": "opdlm_off"}
OFF_POLICY = {
    "objective": "off_policy",
    "load": "weights",
    "prompts": "prompts.jsonl",
    "train_iters": 10,
    "save": "no_such_folder",
}
SFT = {**NEXT_TOKEN, "objective": "sft"}
SCP = {"objective": "scp", "load": "weights", "data_path": "corpus", "train_iters": 100}
NEXT_TOKEN_ON_CORPUS = {**SCP, "objective": "next_token"}
SFT_ON_TEACHER = {**OFF_POLICY, "objective": "sft"}
D_OPSD = {**OPDLM, "objective": "d_opsd", "lora_rank": 8}
STORED = {"cache_teacher_targets": True, "divergence_top_k": 16}
GROWING = {"response_length_schedule": "linear", "response_length_warmup_rollouts": 3}


def config_with(base: dict[str, object], **changes: object) -> Config:
    return Config.from_dict({**base, **changes})


def architecture(*, is_moe: bool = False) -> Architecture:
    """6 layers, 12 heads, 4 query groups, FFN of 96, 6 experts of 48, 256 positions."""
    return architecture_from_hf(
        {
            "model_type": "qwen3_moe" if is_moe else "qwen3",
            "num_hidden_layers": 6,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "vocab_size": 100,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        }
    )


SHORT = {**OPDLM, "max_prompt_length": 128, "max_response_length": 128}
