"""Rules between a configuration and the sizes of its models, the teacher's too."""

import re

import pytest

from megatron_dlm.config import (
    validate_architecture,
)
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import architecture_from_hf
from tests.refusal import refusal
from tests.unit_tests.config.configurations import (
    SHORT,
    architecture,
    config_with,
)

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("is_moe", "changes"),
    [
        (False, {}),
        (False, {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3}),
        (False, {"recompute_granularity": "full", "recompute_num_layers": 6}),
        (False, {"divergence_top_k": 100}),
        (True, {"expert_model_parallel_size": 3, "expert_tensor_parallel_size": 4}),
        (True, TP2_SP),
    ],
)
def test_layout_that_divides_the_model_passes(is_moe: bool, changes: dict[str, object]) -> None:
    config = config_with(SHORT, **changes)
    assert refusal(validate_architecture, config, architecture(is_moe=is_moe)) is None


@pytest.mark.parametrize(
    ("is_moe", "changes", "named"),
    [
        (False, {"tensor_model_parallel_size": 3}, ["= 3", "4 query groups", "1, 2 or 4"]),
        (False, {"tensor_model_parallel_size": 8}, ["= 8", "12 attention heads", "1, 2 or 4"]),
        (False, {"pipeline_model_parallel_size": 4}, ["= 4", "6 layers", "1, 2, 3 or 6"]),
        (
            False,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            ["--num-virtual-stages-per-pipeline-rank = 4", "6 layers", "1, 2, 3 or 6"],
        ),
        (False, {"expert_model_parallel_size": 2}, ["= 2", "no experts", "choose 1"]),
        (False, {"expert_tensor_parallel_size": 1}, ["= 1", "no experts", "leave it out"]),
        (True, {"expert_model_parallel_size": 4}, ["= 4", "6 experts", "1, 2, 3 or 6"]),
        (True, {"expert_tensor_parallel_size": 5}, ["= 5", "48 units", "1, 2, 3, 4, 6"]),
        (True, {"tensor_model_parallel_size": 2}, ["add --sequence-parallel"]),
        (
            False,
            {
                "recompute_granularity": "full",
                "recompute_num_layers": 4,
                "pipeline_model_parallel_size": 2,
            },
            ["--recompute-num-layers = 4", "1 to 3"],
        ),
        (False, {"max_response_length": 129}, ["--max-response-length = 129", "choose 128"]),
        (
            False,
            {"block_size": 5, "max_response_length": 128},
            ["--max-response-length = 128", "choose 127"],
        ),
        (False, {"max_prompt_length": 256}, ["--max-prompt-length = 256", "less than 256"]),
        (False, {"divergence_top_k": 101}, ["--divergence-top-k = 101", "100"]),
        (
            False,
            {"objective": "off_policy", "train_iters": 1, "max_response_length": 129},
            ["--max-response-length = 129", "choose 128"],
        ),
    ],
)
def test_layout_that_does_not_fit_the_model(
    is_moe: bool, changes: dict[str, object], named: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        validate_architecture(config_with(SHORT, **changes), architecture(is_moe=is_moe))
    message = str(caught.value)
    for words in named:
        assert words in message


def test_feed_forward_units_are_split_too() -> None:
    odd = architecture_from_hf({**architecture().hf_config, "intermediate_size": 90})
    with pytest.raises(UserError, match="90 feed-forward units; choose 1 or 2"):
        validate_architecture(config_with(SHORT, tensor_model_parallel_size=4), odd)


EP2 = {"expert_model_parallel_size": 2}
LORA = {"lora_rank": 4, "teacher_load": "big"}


@pytest.mark.parametrize(
    ("student_is_moe", "teacher_is_moe", "changes"),
    [
        (True, False, EP2),
        (False, True, EP2),
        (False, True, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
        # A teacher has no adapters, and none of its experts is trained.
        (False, True, {**TP2_SP, **LORA}),
        (False, True, {"tensor_model_parallel_size": 2, **LORA}),
    ],
)
def test_a_teacher_of_another_kind_fits(
    student_is_moe: bool, teacher_is_moe: bool, changes: dict[str, object]
) -> None:
    student, teacher = (architecture(is_moe=is_moe) for is_moe in (student_is_moe, teacher_is_moe))
    assert refusal(validate_architecture, config_with(SHORT, **changes), student, teacher) is None


@pytest.mark.parametrize(
    ("changes", "sizes", "named"),
    [
        ({"tensor_model_parallel_size": 4}, {"num_key_value_heads": 2}, ["= 4", "2 query groups"]),
        ({"pipeline_model_parallel_size": 3}, {"num_hidden_layers": 4}, ["= 3", "4 layers"]),
        ({"expert_model_parallel_size": 4}, {"num_experts": 6}, ["= 4", "6 experts"]),
        ({"expert_tensor_parallel_size": 5}, {"num_experts": 6}, ["= 5", "48 units"]),
        ({}, {"max_position_embeddings": 128}, ["--max-prompt-length = 128", "128 positions"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(
    changes: dict[str, object], sizes: dict[str, int], named: list[str]
) -> None:
    is_moe = "num_experts" in sizes
    hf_config = architecture(is_moe=is_moe).hf_config
    teacher = architecture_from_hf({**hf_config, **sizes})
    student = architecture_from_hf(
        {**architecture(is_moe=is_moe).hf_config, "num_experts": 8, "moe_intermediate_size": 80}
    )
    config = config_with(SHORT, teacher_load="big", **changes)
    assert refusal(validate_architecture, config, student) is None
    message = refusal(validate_architecture, config, student, teacher) or ""
    assert message.startswith("--teacher-load big: --")
    assert all(words in message for words in named), message


RECORDED = {"rollout_graphs": "on"}
ANSWERS = {"objective": "off_policy", "num_rollouts": None, "train_iters": 1, "save": "no_folder"}
ON_RANKS = {"teacher_ranks": 2, "teacher_tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("student_is_moe", "teacher_is_moe", "changes", "named"),
    [
        (False, True, {}, None),  # only the student decodes
        (True, False, {}, "experts"),
        (True, False, ANSWERS, None),
        (True, False, {**ANSWERS, "eval_prompts": "e.jsonl"}, "experts"),
        (False, True, ANSWERS, "--teacher-load big: --rollout-graphs = 'on': .* experts"),
        (False, True, {**ANSWERS, "teacher_url": ["http://host:1"]}, None),
        (False, False, {"tensor_model_parallel_size": 2, **ANSWERS, "teacher_ranks": 1}, None),
        (False, False, {**ANSWERS, **ON_RANKS}, "between the 2 processes"),
        (False, False, {"fp8_format": "hybrid"}, "FP8 keeps converted weights"),
        (False, False, {"fp8_format": "hybrid", **ANSWERS}, None),
    ],
)
def test_only_models_that_decode_are_recorded(
    student_is_moe: bool, teacher_is_moe: bool, changes: dict[str, object], named: str | None
) -> None:
    student, teacher = (architecture(is_moe=is_moe) for is_moe in (student_is_moe, teacher_is_moe))
    config = config_with(SHORT, teacher_load="big", **changes)
    assert refusal(validate_architecture, config, student, teacher) is None
    message = refusal(validate_architecture, config.changed(**RECORDED), student, teacher)
    assert message is None if named is None else re.search(named, message or ""), message


def test_a_teacher_on_ranks_of_its_own_has_no_virtual_stages() -> None:
    stages = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    student = config_with(SHORT, **stages)
    assert student.of_teacher().parallel.num_virtual_stages_per_pipeline_rank == 2
    apart = student.changed(teacher_ranks=1).of_teacher().parallel
    assert apart.pipeline_model_parallel_size == 1
    assert apart.num_virtual_stages_per_pipeline_rank == 1
