"""What the papers' tables say, and the code of the published runs beside them: transcribed by hand.

Keys are options. A recipe in examples/ that drifts from these is a failing test.
"""

from typing import Any

Options = dict[str, Any]

TABLE_13: Options = {
    "num_epochs": 1,
    "rollout_batch_size": 128,
    "global_batch_size": 8,
    "lr": 1e-5,
    "min_lr": 1e-6,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 5 * 128 // 8,  # the table's 5 steps are rollouts
    "block_size": 4,
    "temperature": 1.0,
    "min_response_length": 100,
    "max_response_length": 4000,
    "remasking_strategy": "low_confidence_dynamic",
    "dynamic_threshold": 0.9,
    "divergence": "forward_kl",
}
"""OPDLM, general recipe, without the 10 rollouts to the final length: the code takes 100."""

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = (
    "\nPlease show your choice in the answer field with only the choice letter, "
    'e.g., "answer": "C".'
)

CODE: Options = {
    "response_length_schedule": "cosine",
    "response_length_warmup_rollouts": 100,
    "max_prompt_length": 2000,
    "long_prompts": "drop",
    "prompt_suffix_by_domain": {"math": BOXED, "science": LETTER, "default": ""},
    "max_response_length_by_domain": {
        "math": 4096,
        "code": 2048,
        "chat": 2048,
        "science": 1024,
        "default": 4096,  # above the 4,000 of the schedule: no cap
    },
    "chat_template_kwargs": {"enable_thinking": False},
    "state_selection": "per_block",
    "dynamic_threshold_schedule": "constant",
    "top_k": 0,
    "top_p": 1.0,
    "supervise_eos": False,
    "loss_normalization": "row_mean",
    "epochs_per_rollout": 1,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "clip_grad": 1.0,
}
"""Launchers and configuration of the published OPDLM runs, where the paper is silent or differs."""

FULL_VOCABULARY: Options = {"divergence_top_k": 0}
TOP_16: Options = {"divergence_top_k": 16, "divergence_tail": "ignore"}
"""Code: the full vocabulary at 0.6B and 1.7B and for MATH, the 16 likeliest tokens above."""

MATH: Options = {
    "num_epochs": 10,
    "max_response_length": 2000,
    "response_length_warmup_rollouts": 100,  # code; table 14: 10
    "prompt_suffix_by_domain": {"default": BOXED},
    "max_response_length_by_domain": {},
    "divergence_tail": "bucket",  # the default, where there is no tail
    **FULL_VOCABULARY,
}
"""Table 14, non-thinking."""

MATH_THINKING: Options = {
    **MATH,
    "chat_template_kwargs": {"enable_thinking": True},
    "max_response_length": 8000,
    "response_length_warmup_rollouts": 200,  # code; table 14: 20
}
"""Table 14, thinking."""

RANDOM_STATES: Options = {"state_selection": "random", "empty_mask": "mask_one"}
"""Random masks of the code: t uniform in each block, and one MASK by force where there is none."""

GIVEN_RESPONSES: Options = {
    key: value
    for key, value in {**TABLE_13, **CODE, "state_selection": "random"}.items()
    if key
    not in (
        "rollout_batch_size",
        "min_response_length",
        "remasking_strategy",
        "dynamic_threshold",
        "response_length_schedule",
        "response_length_warmup_rollouts",
        "divergence",
    )
}
"""Of both, what concerns runs on the teacher's responses (sections 5.3 and A.5)."""

RND1_PROBE: Options = {
    "objective": "scp",
    "seq_length": 2048,
    "global_batch_size": 1024,
    "lr": 3e-4,
    "weight_decay": 1e-4,
    "lr_decay_style": "constant",
    "lr_warmup_fraction": 0.02,
    "attention_pattern": None,
    "attention_annealing_iters": 0,
}
"""RND1 section 3.1 and figure 3.1."""

RND1_SETTINGS: dict[int, tuple[float, float, float]] = {
    1: (3e-4, 3e-4, 1e-4),
    2: (3e-4, 3e-4, 0.1),
    3: (1e-4, 1e-6, 0.1),
    4: (3e-4, 1e-8, 0.1),
}
"""RND1 section 4.2: peak rates of attention and of all else, weight decay. The caption of figure
4.1 has 3e-4 for the attention of setting 3."""

D_OPSD: Options = {
    "block_size": 32,
    "remasking_strategy": "low_confidence_static",
    "denoising_steps_per_block": 16,
    "temperature": 0.9,
    "max_tries": 8,
    "reveal_fraction": 0.25,
    "positions_per_state": 2,
    "position_ranking": "logit",
    "teacher_top_k": 20,
    "divergence_term_limit": 0.05,
    "lora_rank": 128,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "lr": 5e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "clip_grad": 0.2,
}
"""d-OPSD, paper and code."""
