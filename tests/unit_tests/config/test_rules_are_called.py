"""Every rule is called, and each can refuse a configuration."""

import ast
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from megatron_dlm.config import (
    validate,
    validate_architecture,
    validate_inference,
    validate_length,
    validation,
)
from megatron_dlm.config.rules import model, objective, teacher, usage, values
from megatron_dlm.errors import UserError
from megatron_dlm.types.model_sizes import ModelSizes
from tests.unit_tests.config.configurations import (
    D_OPSD,
    GROWING,
    NEXT_TOKEN_ON_CORPUS,
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


RND1 = {"param_group_preset": "rnd1", "param_groups": [{"pattern": "mlp"}]}
LOWERED = {"dynamic_threshold_schedule": "linear", "final_dynamic_threshold": 0.7}
FIVE = {"rollout_batch_size": 40, "global_batch_size": 10}
ELSEWHERE = {"teacher_url": ["http://host:8100"], "divergence_top_k": 16}
ADAPTED = {"lora_rank": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}

SERVED = {**SHORT, "rollout_engine": "sglang", "rollout_engine_urls": ["http://host:30000"]}
SERVED_TO_SEVERAL = {
    **SERVED,
    "context_parallel_size": 2,
    "eval_prompts": "prompts.jsonl",
}

BROKEN = [
    # Data, weights and duration.
    Broken({"prompts": None}),
    Broken({"num_rollouts": None}),
    Broken({"num_epochs": 1}),
    Broken({"load": None, "model_config": "config.json"}),
    Broken({"load": None}, SFT),
    Broken({"state_selection": "random"}),
    Broken({"temperature": 0, "top_k": 5}),
    # What an objective combines.
    Broken({"lora_rank": 8, "lora_target_modules": []}),
    Broken({"lora_rank": 8, "transformer_impl": "transformer_engine"}),
    Broken({"lora_rank": None}, D_OPSD),
    Broken({"temperature": 0}, D_OPSD),
    Broken({"context_attention": "causal", "remasking_strategy": "speculative"}),
    Broken({"block_size": 256}, {**SHORT, **D_OPSD}),
    Broken({"empty_mask": "mask_one"}, SFT),
    Broken({"save": None}, OFF_POLICY),
    Broken({"partial_rollouts": 0.8, "teacher_response_fraction": 0.5}),
    Broken(STORED),
    Broken({"cache_teacher_targets": True}, OFF_POLICY),
    Broken({**STORED, "offload_teacher": True}, OFF_POLICY),
    Broken({"offload_teacher": True}, D_OPSD),
    # Servers that decode rollouts.
    Broken({"rollout_engine_urls": []}, SERVED),
    Broken({"rollout_engine_urls": ["ftp://host"]}, SERVED),
    Broken({"rollout_engine_urls": ["http://host:1", "http://host:1"]}, SERVED),
    Broken({"partial_rollouts": 0.5}, SERVED),
    Broken({**LOWERED, "num_rollouts": 4}, SERVED),
    Broken({"lora_rank": 4}, SERVED),
    Broken({"max_rollout_staleness": 3}, {**D_OPSD, **SERVED}),
    Broken({"rollout_engine_weights": "disk"}, SERVED),
    Broken({"rollout_context_parallel": "tokens"}, SERVED_TO_SEVERAL, world_size=2),
    # A teacher that other processes hold.
    Broken({**ELSEWHERE, "teacher_ranks": 1}, world_size=2),
    Broken({**ELSEWHERE, "offload_teacher": True}),
    Broken({**ELSEWHERE, "teacher_url": ["host:8100"]}),
    Broken({"teacher_precision": "fp8", "transformer_impl": "transformer_engine"}),
    Broken({"teacher_ranks": 2, "divergence_top_k": 16}, world_size=2),
    # Values that do not go together.
    Broken({"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 3}),
    Broken({"max_total_tokens": 128}),
    Broken(GROWING),
    Broken({**GROWING, "min_response_length": 129}),
    Broken({"response_length_schedule": "linear", "min_response_length": 4}),
    Broken({"lr": 1e-7}),
    Broken(RND1),
    Broken({"param_groups": [{"pattern": "("}]}),
    Broken({"param_groups": [{"pattern": "mlp"}, {"pattern": "mlp"}]}),
    Broken({"param_groups": [{"pattern": "mlp", "lr": 1e-8}]}),
    Broken({"sequence_parallel": True}),
    Broken({"overlap_param_gather": True}),
    Broken({"attention_backend": "flex", "device": "cpu"}),
    Broken({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}),
    Broken({"transformer_impl": "transformer_engine"}),
    Broken({"fp8_format": "hybrid"}),
    Broken({"moe_token_dispatcher_type": "flex"}),
    Broken({"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}, world_size=2),
    Broken({"save": __file__}),
    Broken({"on_divergence": "skip"}),
    # Processes, batches and length.
    Broken({"tensor_model_parallel_size": 2}, world_size=3),
    Broken({"expert_tensor_parallel_size": 2}, world_size=3),
    Broken({"expert_model_parallel_size": 3}, world_size=4),
    Broken({"rollout_batch_size": 20}),
    Broken({"micro_batch_size": 3}, world_size=2),
    Broken({"attention_annealing_iters": 101}, SCP),
    Broken(
        {"attention_pattern": "full", "eval_prompts": "prompts.jsonl", "rollout_graphs": "on"}, SCP
    ),
    Broken({"dynamic_threshold_schedule": "linear"}),
    Broken({**LOWERED, "dynamic_threshold_hold_rollouts": 2}),
    Broken({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.5}),
    Broken({"lr_warmup_fraction": 1.0}),
    Broken({"lr_warmup_iters": 32}),
    # Models.
    Broken({"expert_model_parallel_size": 2}, world_size=2),
    Broken({"expert_tensor_parallel_size": 1}),
    Broken({"pipeline_model_parallel_size": 4}, world_size=4),
    Broken({**FIVE, "tensor_model_parallel_size": 5}, world_size=5),
    Broken({"expert_model_parallel_size": 4}, world_size=4, is_moe=True),
    Broken({**FIVE, "expert_tensor_parallel_size": 5}, world_size=5, is_moe=True),
    Broken({"tensor_model_parallel_size": 2}, world_size=2, is_moe=True),
    Broken({"recompute_granularity": "full", "recompute_num_layers": 7}),
    Broken({"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    Broken({"seq_length": 257}, NEXT_TOKEN_ON_CORPUS),
    Broken({}, OPDLM),
    Broken({"max_response_length": 129}),
    Broken({"divergence_top_k": 101}),
    Broken({**SHORT, "num_rollouts": None, **STORED, "divergence_top_k": 100}, OFF_POLICY),
    Broken({**SHORT, "teacher_top_k": 100}, D_OPSD),
    Broken({"lora_rank": 4, "lora_dropout": 0.1}, is_moe=True),
    Broken(ADAPTED, world_size=2, is_moe=True),
    Broken({"rollout_graphs": "on"}, is_moe=True),
    Broken({"rollout_graphs": "on", "tensor_model_parallel_size": 2}, world_size=2),
]
"""What each rule refuses: a new rule has a row here."""

BROKEN_WITHOUT_TRAINING = [
    Broken({"context_parallel_size": 2}, world_size=2),
    Broken({"rollout_context_parallel": "tokens"}),
]
"""What is refused only of a model that is loaded."""

CHECK = validation._refuse.__code__

FITS_ANYTHING = ModelSizes(
    num_layers=720720,
    num_attention_heads=720720,
    num_query_groups=720720,
    ffn_hidden_size=720720,
    vocab_size=720720,
    max_position_embeddings=720720,
)


def check(subject: str, broken: Broken) -> None:
    """Do all checks of a model that is trained, of its teacher, or of one that is only loaded."""
    config = config_with(broken.base, **broken.changes)
    sizes = architecture(is_moe=broken.is_moe)
    if subject == "inference":
        validate_inference(config, broken.world_size, sizes)
        return
    validate(config, broken.world_size)
    if subject == "teacher":
        validate_architecture(config, FITS_ANYTHING, sizes)
    else:
        validate_architecture(config, sizes)


Place = tuple[str, int]
"""File and line of a rule's `yield`."""
MODULES = (model, objective, teacher, usage, values)


def is_helper(code: str) -> bool:
    """Whether a function states what many rules have in common."""
    return code.startswith("_")


def places_of(source: Callable[..., object] | ModuleType) -> set[Place]:
    """Where a function of rules, or any of a file, refuses."""
    lines, start = inspect.getsourcelines(source)
    tree = ast.parse("".join(lines))
    found = set()
    for function in ast.walk(tree):
        if (
            not isinstance(function, ast.FunctionDef)
            or ast.unparse(function.returns or function.args) != "Refusals"
            or is_helper(function.name)
        ):
            continue
        for node in ast.walk(function):
            rule = isinstance(node, ast.Yield) or (
                isinstance(node, ast.YieldFrom)
                and isinstance(node.value, ast.Call)
                and is_helper(ast.unparse(node.value.func))
            )
            if rule:
                found.add((str(inspect.getsourcefile(source)), node.lineno + max(start - 1, 0)))
    return found


def refused_at(error: UserError) -> Place:
    """Where the rule stands that refused: where its function waits for the next value."""
    errors = [error, *([error.__context__] if error.__context__ else [])]
    frames = [frame for e in errors for frame, _ in traceback.walk_tb(e.__traceback__)]
    (rules,) = [frame.f_locals["rules"] for frame in frames if frame.f_code is CHECK]
    waiting = [r for r in rules if inspect.getgeneratorstate(r) == inspect.GEN_SUSPENDED]
    (generator,) = waiting
    place = None
    while generator is not None and not is_helper(generator.__name__):
        frame = generator.gi_frame
        place, generator = (frame.f_code.co_filename, frame.f_lineno), generator.gi_yieldfrom
    assert place is not None
    return place


def refusing(subject: str, broken: Broken) -> Place:
    with pytest.raises(UserError) as caught:
        check(subject, broken)
    return refused_at(caught.value)


@pytest.fixture(autouse=True)
def nothing_optional_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_is_missing", lambda package: True)


def test_each_rule_refuses_what_breaks_it() -> None:
    refused = {refusing("training", broken) for broken in BROKEN}
    refused |= {refusing("inference", broken) for broken in BROKEN_WITHOUT_TRAINING}
    assert refused == set().union(*(places_of(module) for module in MODULES))


@pytest.mark.parametrize(
    ("subject", "functions"),
    [
        ("teacher", (model.parts, model.positions)),
        (
            "inference",
            (
                values.sequence_parallel,
                model.processes,
                model.experts_exist,
                model.parts,
                model.graphs,
            ),
        ),
    ],
)
def test_rules_of_other_models_refuse_the_same(
    subject: str, functions: tuple[Callable[..., object], ...]
) -> None:
    for function in functions:
        broken = [b for b in BROKEN if refusing("training", b) in places_of(function)]
        assert {refusing(subject, b) for b in broken} == places_of(function)


def test_rules_about_the_length_are_checked_again() -> None:
    for broken in BROKEN:
        place = refusing("training", broken)
        if place in places_of(values.length):
            with pytest.raises(UserError) as caught:
                validate_length(config_with(broken.base, **broken.changes))
            assert refused_at(caught.value) == place
