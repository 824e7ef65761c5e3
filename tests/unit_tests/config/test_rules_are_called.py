"""Every rule is called, and each can refuse a configuration."""

import importlib
import inspect
import pkgutil
import traceback
from dataclasses import dataclass, field

import pytest

from megatron_dlm.config import (
    rules,
    validate,
    validate_architecture,
    validate_inference,
    validate_length,
)
from megatron_dlm.config.rules import RULES, Rule, Stage, Subject
from megatron_dlm.config.rules import values as values_module
from megatron_dlm.errors import UserError
from megatron_dlm.types.model_sizes import ModelSizes
from tests.unit_tests.config.configurations import (
    D_OPSD,
    GROWING,
    OFF_POLICY,
    OPDLM,
    SCP,
    SFT,
    SHORT,
    STORED,
    architecture,
    config_with,
)


@dataclass(frozen=True)
class Broken:
    """A configuration that one rule refuses and all before it accept."""

    changes: dict[str, object]
    base: dict[str, object] = field(default_factory=lambda: SHORT)
    world_size: int = 1
    is_moe: bool = False


BROKEN = {
    "check_ranges": Broken({"top_p": 0}),
    "check_divergence": Broken({"divergence": "forward_lk"}),
    "check_objective_inputs": Broken({"load": None}),
    "check_response_source": Broken({"prompts": "prompts.jsonl"}, SFT),
    "check_validation": Broken({"valid_data": "held_out.jsonl"}),
    "check_state_selection": Broken({"state_selection": "random"}),
    "check_nothing_is_ignored": Broken({"temperature": 0, "top_k": 5}),
    "check_strategy_option": Broken(
        {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 3}
    ),
    "check_response_length_schedule": Broken(GROWING),
    "check_learning_rates": Broken({"lr": 1e-7}),
    "check_parameter_groups": Broken({"param_groups": [{"pattern": "("}]}),
    "check_sequence_parallel": Broken({"sequence_parallel": True}),
    "check_attention_backend": Broken({"attention_backend": "flex", "device": "cpu"}),
    "check_optional_packages": Broken({"moe_token_dispatcher_type": "flex"}),
    "check_lora": Broken({"lora_rank": 8, "lora_target_modules": []}),
    "check_self_distillation": Broken({"lora_rank": None}, D_OPSD),
    "check_something_to_learn": Broken({"temperature": 0}, D_OPSD),
    "check_empty_mask": Broken({"empty_mask": "mask_one"}, SFT),
    "check_teacher_responses": Broken({"save": None}, OFF_POLICY),
    "check_cache_teacher_targets": Broken({"cache_teacher_targets": True}, OFF_POLICY),
    "check_offloading": Broken({**STORED, "offload_teacher": True}, OFF_POLICY),
    "check_on_divergence": Broken({"on_divergence": "skip"}),
    "check_save": Broken({"save_interval": 5}),
    "check_processes": Broken({"tensor_model_parallel_size": 2}, world_size=3),
    "check_rollout_batch": Broken({"rollout_batch_size": 20}),
    "check_global_batch": Broken({"micro_batch_size": 3}, world_size=2),
    "check_attention_annealing": Broken({"attention_annealing_iters": 101}, SCP),
    "check_dynamic_threshold_schedule": Broken({"dynamic_threshold_schedule": "linear"}),
    "check_schedule_length": Broken({"lr_warmup_iters": 32}),
    "check_experts_exist": Broken({"expert_model_parallel_size": 2}, world_size=2),
    "check_parts_of_model": Broken({"pipeline_model_parallel_size": 4}, world_size=4),
    "check_moe_sequence_parallel": Broken(
        {"tensor_model_parallel_size": 2}, world_size=2, is_moe=True
    ),
    "check_recompute_layers": Broken(
        {"recompute_granularity": "full", "recompute_num_layers": 7}, SHORT
    ),
    "check_sequence_length": Broken({}, OPDLM),
    "check_divergence_top_k": Broken({"divergence_top_k": 101}),
    "check_teacher_top_k": Broken({**SHORT, "teacher_top_k": 100}, D_OPSD),
    "check_expert_adapters": Broken({"lora_rank": 4, "lora_dropout": 0.1}, is_moe=True),
}
"""What each rule refuses, by its name: a new rule has a row here."""

FITS_ANYTHING = ModelSizes(
    num_layers=720720,
    num_attention_heads=720720,
    num_query_groups=720720,
    ffn_hidden_size=720720,
    vocab_size=720720,
    max_position_embeddings=720720,
)


def check(subject: Subject, broken: Broken) -> None:
    """Do all checks that a run does of a subject."""
    config = config_with(broken.base, **broken.changes)
    model = architecture(is_moe=broken.is_moe)
    if subject == "inference":
        validate_inference(config, broken.world_size, model)
        return
    validate(config, broken.world_size)
    if subject == "teacher":
        validate_architecture(config, FITS_ANYTHING, model)
    else:
        validate_architecture(config, model)


def refused_by(error: BaseException) -> set[str]:
    """Names of the rules that an error, or the one that it says more of, was raised in."""
    codes = {rule.check.__code__: rule.check.__name__ for rule in RULES}
    errors = [error, *([error.__context__] if error.__context__ else [])]
    frames = [frame.f_code for e in errors for frame, _ in traceback.walk_tb(e.__traceback__)]
    return {codes[code] for code in frames if code in codes}


@pytest.mark.parametrize(
    ("rule", "subject"),
    [(rule, subject) for rule in RULES for subject in rule.subjects],
    ids=lambda value: value.check.__name__ if isinstance(value, Rule) else value,
)
def test_each_rule_refuses_what_breaks_it(
    rule: Rule, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values_module, "_is_installed", lambda package: False)
    with pytest.raises(UserError) as caught:
        check(subject, BROKEN[rule.check.__name__])
    assert refused_by(caught.value) == {rule.check.__name__}, caught.value


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.stage is Stage.LENGTH])
def test_rules_about_the_length_are_checked_again(rule: Rule) -> None:
    broken = BROKEN[rule.check.__name__]
    with pytest.raises(UserError) as caught:
        validate_length(config_with(broken.base, **broken.changes))
    assert refused_by(caught.value) == {rule.check.__name__}


def test_a_function_that_checks_is_a_rule() -> None:
    names = [module.name for module in pkgutil.iter_modules(rules.__path__)]
    modules = [importlib.import_module(f"{rules.__name__}.{name}") for name in names]
    written = {
        function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("check_")
        and function.__module__ == module.__name__
        and not module.__name__.endswith("registry")
    }
    assert written == {rule.check for rule in RULES}
    assert BROKEN.keys() == {function.__name__ for function in written}
    assert len(RULES) == len(written)
