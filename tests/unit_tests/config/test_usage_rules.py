"""No option is silently ignored: refused in runs that do not use it, accepted in others."""

from typing import Any, NamedTuple

import pytest

from megatron_dlm.config import Config, validate
from megatron_dlm.config.rules import values
from megatron_dlm.config.rules.usage import is_used, uses
from tests.refusal import refusal
from tests.unit_tests.config.configurations import (
    D_OPSD,
    GROWING,
    NEXT_TOKEN,
    NEXT_TOKEN_ON_CORPUS,
    OFF_POLICY,
    OPDLM,
    OPDLM_OFF,
    SCP,
    SFT,
    SFT_ON_TEACHER,
    config_with,
)

Options = dict[str, Any]

STATIC = {**OPDLM, "remasking_strategy": "low_confidence_static"}
ENTROPY = {**OPDLM, "remasking_strategy": "entropy"}
ENTROPY_BOUNDED = {**OPDLM, "remasking_strategy": "entropy_bounded"}
GREEDY = {**OPDLM, "temperature": 0}
SERVED = {**OPDLM, "rollout_engine": "sglang", "rollout_engine_urls": ["http://host:30000"]}
BY_DISK = {**SERVED, "rollout_engine_weights": "disk"}
PARTIAL = {**OPDLM, "partial_rollouts": 0.75}
GROWS = {**OPDLM, **GROWING, "min_response_length": 4}
LOWERED = {**OPDLM, "dynamic_threshold_schedule": "cosine", "final_dynamic_threshold": 0.7}
BY_DOMAIN = {**SFT, "max_response_length_by_domain": {"a": 9}}
WITH_FOLDER = {**OPDLM, "save": "no_such_folder"}
MIXED = {**WITH_FOLDER, "teacher_response_fraction": 0.5}
FADING = {**MIXED, "teacher_response_fraction_schedule": "linear"}
CAUSAL = {**SCP, "attention_pattern": "causal"}
HELD_OUT = {**SCP, "valid_data_path": "held_out"}
EVALUATED = {**SFT, "eval_prompts": "e.jsonl"}
EVALUATED_STATIC = {**EVALUATED, "eval_decodings": ["static", "dynamic:0.7"]}
EVALUATED_CORPUS = {**SCP, "eval_prompts": "e.jsonl"}
EVALUATED_NEXT_TOKEN = {**NEXT_TOKEN, "eval_prompts": "e.jsonl"}
OWN_LENGTH = {**EVALUATED_CORPUS, "eval_max_response_length": 32}
OWN_TEMPERATURE = {**EVALUATED, "eval_temperature": 0.5}
TOP_16 = {**OPDLM, "divergence_top_k": 16}
ADAPTERS = {**OPDLM, "lora_rank": 8}
RECOMPUTED = {**OPDLM, "recompute_granularity": "full"}
CONSTANT = {**SCP, "lr_decay_style": "constant"}
RND1_GROUPS = {**SCP, "param_group_preset": "rnd1"}
OWN = {"lr": 1e-4, "min_lr": 1e-5, "weight_decay": 0.1}
ALL_GROUPED = {
    **SCP,
    "param_groups": [{"pattern": "attention", **OWN}, {"pattern": "default", **OWN}],
}
WITHOUT_DEFAULT = {**SCP, "param_groups": [{"pattern": "attention", **OWN}]}
WITHOUT_OWN = {**SCP, "param_groups": [{"pattern": "attention"}, {"pattern": "default", **OWN}]}

TOP_16_RANKS = {**TOP_16, "teacher_ranks": 2}
TOP_16_ELSEWHERE = {**TOP_16, "teacher_url": ["http://host:8100"]}

ANSWERED_ELSEWHERE = {**SFT_ON_TEACHER, "teacher_ranks": 1, "context_parallel_size": 2}

TWO_MODES = {**OPDLM, "context_attention": "causal"}
DRAFTED = {**TWO_MODES, "eval_prompts": "e.jsonl", "eval_decodings": ["speculative"]}

ON_EXAMPLES = (SFT, NEXT_TOKEN)
ON_CORPUS = (SCP, NEXT_TOKEN_ON_CORPUS)
ON_ROLLOUTS = (OPDLM, OPDLM_OFF, D_OPSD)
ON_TEACHER = (OFF_POLICY, SFT_ON_TEACHER)
GIVEN = (*ON_EXAMPLES, *ON_CORPUS)
NOT_ROLLOUTS = (*GIVEN, *ON_TEACHER)
UNTAUGHT = (*GIVEN, SFT_ON_TEACHER)
OTHER_DISTILLATION = (OPDLM, OFF_POLICY, SCP)


class Case(NamedTuple):
    """A value of an option, runs that have no use for it, and runs that have."""

    name: str
    value: Any
    unused: tuple[Options, ...]
    used: tuple[Options, ...]
    processes: int = 1


CASES = [
    Case(
        "context_attention",
        "causal",
        (SCP, NEXT_TOKEN, D_OPSD),
        (OPDLM, OPDLM_OFF, OFF_POLICY, SFT, SFT_ON_TEACHER),
    ),
    Case(
        "causal_loss_weight", 0.5, (OPDLM, SCP), (TWO_MODES, {**SFT, "context_attention": "causal"})
    ),
    Case("draft_steps", 2, (OPDLM, STATIC, *NOT_ROLLOUTS), (DRAFTED,)),
    Case("prompts", "p.jsonl", (*ON_CORPUS, NEXT_TOKEN), (*ON_ROLLOUTS, *ON_TEACHER)),
    Case("train_data", "t.jsonl", (SCP, OFF_POLICY, *ON_ROLLOUTS), ON_EXAMPLES),
    Case("valid_data", "v.jsonl", (SCP, OFF_POLICY, *ON_ROLLOUTS), ON_EXAMPLES),
    Case("valid_data_path", "v", (SFT, OFF_POLICY, *ON_ROLLOUTS), ON_CORPUS),
    Case("train_on", "all", (*ON_CORPUS, *ON_TEACHER, *ON_ROLLOUTS), ON_EXAMPLES),
    Case("data_path", "c", (SFT, OFF_POLICY, *ON_ROLLOUTS), ON_CORPUS),
    Case("seq_length", 64, (*ON_EXAMPLES, *ON_TEACHER, *ON_ROLLOUTS), ON_CORPUS),
    Case(
        "max_prompt_length",
        64,
        ON_CORPUS,
        (*ON_EXAMPLES, *ON_TEACHER, *ON_ROLLOUTS, EVALUATED_CORPUS),
    ),
    Case(
        "max_response_length",
        64,
        (*ON_CORPUS, OWN_LENGTH),
        (*ON_EXAMPLES, *ON_TEACHER, *ON_ROLLOUTS, EVALUATED_CORPUS),
    ),
    Case("long_prompts", "drop", ON_CORPUS, (*ON_EXAMPLES, *ON_TEACHER, *ON_ROLLOUTS)),
    Case("data_cache_path", "d", ON_CORPUS, (*ON_EXAMPLES, *ON_TEACHER, *ON_ROLLOUTS)),
    Case("max_response_length_by_domain", {"a": 9}, ON_CORPUS, (SFT, *ON_TEACHER, *ON_ROLLOUTS)),
    Case("prompt_suffix_by_domain", {"a": "b"}, ON_CORPUS, (SFT, *ON_TEACHER, *ON_ROLLOUTS)),
    Case(
        "domain_field",
        "subject",
        (OPDLM, SCP),
        ({**OPDLM, "prompt_suffix_by_domain": {"a": "b"}}, BY_DOMAIN),
    ),
    Case("chat_template_kwargs", {"enable_thinking": False}, ON_CORPUS, (SFT, OFF_POLICY, OPDLM)),
    Case("supervise_eos", False, (*ON_CORPUS, D_OPSD), (*ON_EXAMPLES, *ON_TEACHER, OPDLM)),
    Case("block_size", 32, (*ON_CORPUS, NEXT_TOKEN), (SFT, *ON_TEACHER, *ON_ROLLOUTS)),
    Case("temperature", 0.5, (*GIVEN, OWN_TEMPERATURE), (*ON_TEACHER, *ON_ROLLOUTS, EVALUATED)),
    Case("top_k", 5, (*GIVEN, GREEDY), (*ON_TEACHER, *ON_ROLLOUTS, EVALUATED)),
    Case(
        "top_p",
        0.5,
        (*GIVEN, GREEDY),
        (*ON_TEACHER, *ON_ROLLOUTS, {**GREEDY, "eval_prompts": "e.jsonl", "eval_temperature": 0.5}),
    ),
    Case("max_running_requests", 7, (*GIVEN, SERVED), (*ON_TEACHER, *ON_ROLLOUTS, EVALUATED)),
    Case("max_total_tokens", 10**6, (*GIVEN, SERVED), (*ON_TEACHER, *ON_ROLLOUTS, EVALUATED)),
    Case("chunked_prefill_size", 512, (*GIVEN, SERVED), (*ON_TEACHER, *ON_ROLLOUTS, EVALUATED)),
    Case("rollout_graphs", "off", (*GIVEN, SERVED), (*ON_TEACHER, *ON_ROLLOUTS, EVALUATED)),
    Case("num_rollouts", 3, NOT_ROLLOUTS, ON_ROLLOUTS),
    Case("rollout_batch_size", 16, NOT_ROLLOUTS, ON_ROLLOUTS),
    Case("shared_rollout_queue", False, (*GIVEN, *ON_TEACHER, SERVED), (*ON_ROLLOUTS, EVALUATED)),
    Case("partial_rollouts", 0.8, (*NOT_ROLLOUTS, D_OPSD), (OPDLM, PARTIAL)),
    Case("max_response_rollouts", 2, (OPDLM,), (PARTIAL,)),
    Case("epochs_per_rollout", 2, NOT_ROLLOUTS, ON_ROLLOUTS),
    Case("response_length_schedule", "linear", NOT_ROLLOUTS, (GROWS,)),
    Case("min_response_length", 8, (*NOT_ROLLOUTS, OPDLM), (GROWS,)),
    Case("response_length_warmup_rollouts", 2, (*NOT_ROLLOUTS, OPDLM), (GROWS,)),
    Case(
        "remasking_strategy",
        "entropy",
        (*NOT_ROLLOUTS, EVALUATED_STATIC, EVALUATED_NEXT_TOKEN),
        (*ON_ROLLOUTS, EVALUATED, EVALUATED_CORPUS),
    ),
    Case(
        "denoising_steps_per_block",
        2,
        (*NOT_ROLLOUTS, OPDLM, ENTROPY_BOUNDED, EVALUATED),
        (STATIC, ENTROPY, EVALUATED_STATIC),
    ),
    Case(
        "dynamic_threshold",
        0.5,
        (*NOT_ROLLOUTS, STATIC, ENTROPY, ENTROPY_BOUNDED, EVALUATED_STATIC, EVALUATED_NEXT_TOKEN),
        (*ON_ROLLOUTS, EVALUATED),
    ),
    Case("dynamic_threshold_schedule", "linear", (*NOT_ROLLOUTS, STATIC, ENTROPY), (LOWERED,)),
    Case("final_dynamic_threshold", 0.6, (*NOT_ROLLOUTS, OPDLM, STATIC), (LOWERED,)),
    Case("dynamic_threshold_hold_rollouts", 1, (*NOT_ROLLOUTS, OPDLM, STATIC), (LOWERED,)),
    Case("dynamic_threshold_rollouts", 3, (*NOT_ROLLOUTS, OPDLM, STATIC), (LOWERED,)),
    Case("entropy_bound", 0.5, (*NOT_ROLLOUTS, OPDLM, STATIC, ENTROPY), (ENTROPY_BOUNDED,)),
    Case("teacher_response_fraction", 0.5, (*NOT_ROLLOUTS, D_OPSD), (WITH_FOLDER, FADING)),
    Case("final_teacher_response_fraction", 0.1, (*NOT_ROLLOUTS, OPDLM, MIXED), (FADING,)),
    Case(
        "teacher_response_fraction_schedule",
        "cosine",
        (*NOT_ROLLOUTS, OPDLM, D_OPSD),
        (MIXED, {**WITH_FOLDER, "final_teacher_response_fraction": 0.1}),
    ),
    Case("teacher_response_fraction_rollouts", 3, (*NOT_ROLLOUTS, OPDLM, MIXED), (FADING,)),
    Case("rollout_engine", "sglang", NOT_ROLLOUTS, ()),  # used: where servers are named
    Case("rollout_engine_urls", ["http://host:1"], (OPDLM, *NOT_ROLLOUTS), (SERVED,)),
    Case("rollout_engine_weights", "disk", (OPDLM, SCP), ({**SERVED, "save": "no_such_folder"},)),
    Case("rollout_engine_weights_path", "folder", (SERVED, OPDLM), (BY_DISK,)),
    Case("rollout_engine_concurrency", 3, (OPDLM, SCP), (SERVED,)),
    Case("rollout_engine_timeout_s", 3.0, (OPDLM,), (SERVED,)),
    Case("rollout_engine_retries", 3, (OPDLM,), (SERVED,)),
    Case("max_rollout_staleness", 3, (OPDLM,), (SERVED,)),
    Case("train_iters", 3, ON_ROLLOUTS, NOT_ROLLOUTS),
    Case("eval_interval", 3, (SCP, SFT, NEXT_TOKEN, OPDLM), (HELD_OUT,)),
    Case("eval_iters", 3, (SCP, SFT, NEXT_TOKEN, OPDLM), (HELD_OUT,)),
    Case("eval_prompts_interval", 3, (OPDLM, HELD_OUT), (EVALUATED, EVALUATED_CORPUS)),
    Case("eval_decodings", ["static:2"], (OPDLM, HELD_OUT), (EVALUATED, EVALUATED_NEXT_TOKEN)),
    Case("eval_num_prompts", 3, (OPDLM, HELD_OUT), (EVALUATED,)),
    Case("eval_temperature", 0.0, (OPDLM, HELD_OUT), (EVALUATED,)),
    Case("eval_max_response_length", 9, (OPDLM, HELD_OUT), (EVALUATED,)),
    Case("attention_pattern", "full", (*ON_ROLLOUTS, SFT, NEXT_TOKEN_ON_CORPUS), (SCP,)),
    Case("stall_minutes", 2.0, ({**OPDLM, "watch_ranks": False},), (OPDLM,)),
    Case("attention_annealing_iters", 2, (OPDLM, NEXT_TOKEN_ON_CORPUS, CAUSAL), (SCP,)),
    Case("loss_weighting", "none", (*ON_ROLLOUTS, OFF_POLICY, NEXT_TOKEN), (SFT, SCP)),
    Case(
        "empty_mask",
        "mask_one",
        (OPDLM, SCP, D_OPSD, NEXT_TOKEN),
        ({**SFT, "loss_weighting": "none"}, OFF_POLICY, OPDLM_OFF, MIXED),
    ),
    Case("mask_embedding_init", "mean", (NEXT_TOKEN, D_OPSD), (SCP, SFT, OFF_POLICY, OPDLM)),
    Case("teacher_load", "t", (*GIVEN, TOP_16_ELSEWHERE), (*ON_TEACHER, *ON_ROLLOUTS)),
    Case("teacher_responses", "folder", (*GIVEN, *ON_ROLLOUTS), (*ON_TEACHER, MIXED)),
    Case("cache_teacher_targets", True, UNTAUGHT, ({**OFF_POLICY, "divergence_top_k": 16},)),
    Case("offload_teacher", True, UNTAUGHT, (OFF_POLICY, OPDLM)),
    Case("teacher_ranks", 1, (*GIVEN, D_OPSD), (TOP_16, SFT_ON_TEACHER), 2),
    Case("teacher_url", ["http://host:8100"], (*GIVEN, D_OPSD), (TOP_16, OFF_POLICY)),
    Case("teacher_precision", "fp8", (*GIVEN, D_OPSD, TOP_16_ELSEWHERE), (OFF_POLICY, OPDLM)),
    Case("teacher_max_requests", 2, (OPDLM,), (TOP_16_ELSEWHERE,)),
    Case("teacher_timeout_s", 5.0, (OPDLM,), (TOP_16_ELSEWHERE,)),
    Case("teacher_tensor_model_parallel_size", 2, (TOP_16,), (TOP_16_RANKS,), 3),
    Case("teacher_pipeline_model_parallel_size", 2, (TOP_16,), (TOP_16_RANKS,), 3),
    Case("teacher_expert_model_parallel_size", 2, (TOP_16,), (TOP_16_RANKS,), 3),
    Case("teacher_expert_tensor_parallel_size", 2, (TOP_16,), (TOP_16_RANKS,), 3),
    Case("offload_optimizer", True, UNTAUGHT, (OFF_POLICY, *ON_ROLLOUTS)),
    Case("divergence", "jsd", (*UNTAUGHT, D_OPSD), (OFF_POLICY, OPDLM)),
    Case(
        "jsd_beta",
        0.1,
        (*UNTAUGHT, D_OPSD, OPDLM),
        ({**OPDLM, "divergence": "forward_kl:0.5,jsd"}, {**OFF_POLICY, "divergence": "jsd"}),
    ),
    Case("divergence_top_k", 16, (*UNTAUGHT, D_OPSD), (OFF_POLICY, OPDLM)),
    Case("divergence_tail", "ignore", (*UNTAUGHT, D_OPSD, OPDLM), (TOP_16,)),
    Case("reveal_fraction", 0.5, OTHER_DISTILLATION, (D_OPSD,)),
    Case("micro_batch_size", 2, ({**OPDLM, "max_tokens_per_micro_batch": 64},), (OPDLM,)),
    Case("positions_per_state", 3, OTHER_DISTILLATION, (D_OPSD,)),
    Case("position_ranking", "logit", OTHER_DISTILLATION, (D_OPSD,)),
    Case("teacher_top_k", 9, OTHER_DISTILLATION, (D_OPSD,)),
    Case("divergence_term_limit", 0.2, OTHER_DISTILLATION, (D_OPSD,)),
    Case("reward", "math_verify", OTHER_DISTILLATION, (D_OPSD, EVALUATED)),
    Case("unsafe_code_execution", True, (OPDLM, D_OPSD), ({**D_OPSD, "reward": "code_tests"},)),
    Case("max_tries", 2, OTHER_DISTILLATION, (D_OPSD,)),
    Case("keep_checkpoint_every", 4, (WITH_FOLDER,), ({**WITH_FOLDER, "keep_checkpoints": 3},)),
    Case(
        "keep_best_checkpoint",
        True,
        ({**WITH_FOLDER, "keep_checkpoints": 3}, {**HELD_OUT, "save": "no_such_folder"}),
        (
            {**HELD_OUT, "save": "no_such_folder", "keep_checkpoints": 3},
            {**EVALUATED, "save": "no_such_folder", "keep_checkpoints": 3},
        ),
    ),
    Case(
        "recompute_modules", ["mlp"], (OPDLM,), ({**OPDLM, "recompute_granularity": "selective"},)
    ),
    Case("fp8_recipe", "tensorwise", (OPDLM,), ({**OPDLM, "fp8_format": "hybrid"},)),
    Case("decoding_groups", 4, (OPDLM,), ()),  # used: with processes for the stages
    Case("num_virtual_stages_per_pipeline_rank", 2, (OPDLM,), ()),
    Case(
        "rollout_context_parallel", "tokens", (OPDLM, SFT, ANSWERED_ELSEWHERE), ()
    ),  # used: with processes for it
    Case("async_save", False, (OPDLM,), (WITH_FOLDER,)),
    Case("save_interval", 5, (OPDLM,), (WITH_FOLDER,)),
    Case("save_interval_minutes", 5.0, (OPDLM,), (WITH_FOLDER,)),
    Case("keep_checkpoints", 3, (OPDLM,), (WITH_FOLDER,)),
    Case("wandb_project", "study", (OPDLM,), ()),  # used: where wandb is installed
    Case("lora_dropout", 0.05, (OPDLM,), (ADAPTERS,)),
    Case("lora_alpha", 4, (OPDLM,), (ADAPTERS,)),
    Case("lora_target_modules", ["linear_qkv"], (OPDLM,), (ADAPTERS,)),
    Case("recompute_method", "block", (OPDLM,), (RECOMPUTED,)),
    Case(
        "recompute_num_layers",
        2,
        (OPDLM, {**OPDLM, "recompute_granularity": "selective"}),
        (RECOMPUTED,),
    ),
    Case("lr", 1e-3, (RND1_GROUPS, ALL_GROUPED), (SCP, CONSTANT, WITHOUT_DEFAULT, WITHOUT_OWN)),
    Case(
        "min_lr",
        5e-6,
        (RND1_GROUPS, ALL_GROUPED, CONSTANT),
        (SCP, WITHOUT_DEFAULT, WITHOUT_OWN),
    ),
    Case(
        "weight_decay",
        0.7,
        (RND1_GROUPS, ALL_GROUPED),
        (SCP, CONSTANT, WITHOUT_DEFAULT, WITHOUT_OWN),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_option_without_a_use_is_refused(case: Case) -> None:
    flag = "--" + case.name.replace("_", "-")
    for run in case.unused:
        message = refusal(validate, config_with(run, **{case.name: case.value}), 1) or ""
        assert message.startswith(f"{flag} = "), (run, message)
        assert f" has no use for it; drop {flag}" in message
        assert not is_used(config_with(run), case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_option_with_a_use_is_accepted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_fp8", lambda config: iter(()))  # needs a GPU
    for run in case.used:
        config = config_with(run, **{case.name: case.value})
        assert refusal(validate, config, case.processes) is None, run
        assert is_used(config, case.name)


def test_every_rule_has_a_case() -> None:
    rules = [set(use.names.split()) for use in uses(Config())]
    assert set().union(*rules) == {case.name for case in CASES}
    refusing = {
        index
        for case in CASES
        for run in case.unused
        for index, use in enumerate(uses(config_with(run)))
        if not use.condition and case.name in use.names.split()
    }
    assert refusing == set(range(len(rules)))


@pytest.mark.parametrize(
    ("run", "changes", "named"),
    [
        (SCP, {"denoising_steps_per_block": 3}, ["--objective scp"]),
        (OPDLM, {"denoising_steps_per_block": 2}, ["entropy or low_confidence_static"]),
        (OPDLM, {"entropy_bound": 0.5}, ["low_confidence_dynamic", "choose", "entropy_bounded"]),
        (GREEDY, {"top_k": 5}, ["--temperature 0", "choose --temperature above 0"]),
        (OPDLM, {"min_response_length": 2000}, ["schedule constant", "choose", "linear or cosine"]),
        (MIXED, {"final_teacher_response_fraction": 0.1}, ["linear or cosine"]),
        (OPDLM, {"jsd_beta": 0.1}, ["--divergence forward_kl", "choose --divergence jsd"]),
        (OPDLM, {"divergence_tail": "ignore"}, ["--divergence-top-k 0", "--divergence-top-k 16"]),
        (D_OPSD, {"divergence": "jsd"}, ["--objective d_opsd", "--teacher-top-k"]),
        (OPDLM, {"reward": "choice"}, ["choose --objective d_opsd, or add --eval-prompts"]),
        (OPDLM, {"eval_prompts_interval": 2}, ["a run without --eval-prompts", "add --eval-pr"]),
        (OPDLM, {"max_tries": 2}, ["--objective opdlm", "choose --objective d_opsd"]),
        (OPDLM, {"lora_alpha": 4}, ["a run without --lora-rank", "add --lora-rank"]),
        # Not that it is above a rate that nothing takes either.
        (RND1_GROUPS, {"min_lr": 1e-4}, ["--param-group-preset rnd1", "names no min_lr"]),
        (ALL_GROUPED, {"lr": 1e-7}, ["--param-groups has no use", "names no lr"]),
    ],
)
def test_the_refusal_says_why_and_what_would_use_it(
    run: Options, changes: Options, named: list[str]
) -> None:
    message = refusal(validate, config_with(run, **changes), 1) or ""
    assert all(part in message for part in named), message
