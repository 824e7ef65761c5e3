"""Each rule refuses values that cannot work, naming flag and remedy, and accepts others."""

import math
from pathlib import Path

import pytest

from megatron_dlm.commands.train import format_length
from megatron_dlm.config import Config, ParameterGroup, parse_config, validate, validate_length
from megatron_dlm.config.fields import option_fields
from megatron_dlm.errors import UserError
from megatron_dlm.ranges import Range
from tests.refusal import refusal
from tests.unit_tests.config.configurations import (
    GROWING,
    NEXT_TOKEN,
    NEXT_TOKEN_ON_CORPUS,
    OFF_POLICY,
    OPDLM,
    OPDLM_OFF,
    SCP,
    SFT,
    SFT_ON_TEACHER,
    STORED,
    config_with,
)

REPOSITORY = Path(__file__).parents[3]

STATIC = {"remasking_strategy": "low_confidence_static"}


@pytest.mark.parametrize(
    "base",
    [
        OPDLM,
        OPDLM_OFF,
        OFF_POLICY,
        SFT,
        SFT_ON_TEACHER,
        SCP,
        NEXT_TOKEN,
        NEXT_TOKEN_ON_CORPUS,
        {**SCP, "valid_data_path": "c", "eval_interval": 5, "param_group_preset": "rnd1"},
        {**SCP, "lr_warmup_fraction": 0.02, "lr_decay_style": "constant"},
        {**SFT, "valid_data": "v.jsonl"},
    ],
)
def test_complete_configuration_passes(base: dict[str, object]) -> None:
    assert refusal(validate, config_with(base), 1) is None


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (64, {"context_parallel_size": 8, "rollout_batch_size": 128}),
        (4, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
        (2, {"micro_batch_size": 4, "global_batch_size": 8, "rollout_batch_size": 24}),
        (1, {"temperature": 0, "dynamic_threshold": 1.0, "clip_grad": 0}),
        (1, {**STATIC, "denoising_steps_per_block": 2, "block_size": 4}),
        (1, {"remasking_strategy": "entropy", "denoising_steps_per_block": 3, "block_size": 4}),
        (1, {**GROWING, "min_response_length": 1024}),
        (1, {"lr": 1e-8, "min_lr": 1e-6, "lr_decay_style": "constant"}),
        (1, {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 31}),
        (1, {"divergence": "forward_kl:0.5,jsd:0.5", "divergence_top_k": 16}),
        (1, {"param_groups": [{"pattern": "attention", "lr": 3e-4}, {"pattern": "mlp"}]}),
        (1, {"bf16": True, "device": "cpu", "attention_backend": "sdpa"}),
        (1, {"attention_backend": "flex", "device": "cuda"}),
        (1, {"save": "no_such_folder", "save_interval": 5, "keep_checkpoints": 2}),
    ],
)
def test_what_can_work_passes(world_size: int, changes: dict[str, object]) -> None:
    assert refusal(validate, config_with(OPDLM, **changes), world_size) is None


@pytest.mark.parametrize(
    ("world_size", "changes", "named"),
    [
        (3, {"tensor_model_parallel_size": 2}, ["parallel-size = 2", "3 processes", "1 or 3"]),
        (
            4,
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4},
            ["= 8", "1, 2 or 4", "multiple of 8"],
        ),
        (
            4,
            {"tensor_model_parallel_size": 2, "context_parallel_size": 4},
            ["context-parallel-size = 8", "1, 2 or 4", "multiple of 8"],
        ),
        (
            32,
            {"context_parallel_size": 4, "rollout_batch_size": 24},
            ["--rollout-batch-size = 24", "data 8 x context-parallel 4", "32, or --rollout-cont"],
        ),
        (2, {"expert_tensor_parallel_size": 4}, ["--expert-tensor-parallel-size", "1 or 2"]),
        (4, {"expert_model_parallel_size": 3}, ["--expert-model-parallel-size = 3", "1, 2 or 4"]),
        (2, {"micro_batch_size": 3}, ["--global-batch-size = 8", "multiple of 6"]),
        (64, {}, ["--global-batch-size = 8", "multiple of 64", "--lr-batch-size 8"]),
        (512, {}, ["--global-batch-size = 8", "--lr-batch-size 8", "context-parallel-size 64"]),
        (1, {"rollout_batch_size": 20}, ["--rollout-batch-size = 20", "multiple of 8"]),
        (1, {**STATIC, "denoising_steps_per_block": 3}, ["steps-per-block = 3", "1, 2 or 4"]),
        (
            1,
            {**GROWING, "min_response_length": 2000},
            ["--min-response-length = 2000", "1024 or less"],
        ),
        (1, GROWING, ["--min-response-length = None", "linear"]),
        (
            1,
            {"response_length_schedule": "cosine", "min_response_length": 8},
            ["--response-length-warmup-rollouts = 0", "1 or more"],
        ),
        (1, {"divergence": "forward_lk"}, ["forward_lk", "forward_kl, reverse_kl, jsd"]),
        (1, {"lr": 1e-7}, ["--min-lr = 1e-06", "0 to 1e-07"]),
        (1, {"lr_warmup_iters": 32}, ["--lr-warmup-iters = 32", "0 to 31"]),
        (1, {"lr_warmup_iters": 9, "lr_decay_iters": 9}, ["--lr-warmup-iters = 9", "0 to 8"]),
        (1, {"sequence_parallel": True}, ["--sequence-parallel", "--no-sequence-parallel"]),
        (1, {"attention_backend": "flex", "device": "cpu"}, ["flex", "CPU", "sdpa"]),
        (1, {"load": None}, ["--load", "opdlm"]),
        (1, {"prompts": None}, ["--prompts = None", "opdlm"]),
        (1, {"num_rollouts": None}, ["--num-rollouts = None", "opdlm"]),
        (1, {"save_interval": 5}, ["--save-interval = 5", "--save"]),
        (1, {"keep_checkpoints": 1}, ["--keep-checkpoints = 1", "--save"]),
        (1, {"save": __file__}, ["--save", "is a file"]),
        (1, {"param_groups": [{"pattern": "("}]}, ["[0].pattern", "regular expression"]),
        (1, {"param_groups": [{"pattern": "a"}] * 2}, ["[1].pattern", "twice"]),
        (1, {"param_groups": [{"pattern": "a", "lr": -1.0}]}, ["[0].lr = -1.0", "0"]),
        (1, {"param_groups": [{"pattern": "a", "min_lr": -1.0}]}, ["[0].min_lr = -1.0", "0"]),
        (1, {"param_groups": [{"pattern": "a", "lr": 1e-8}]}, ["[0].min_lr", "0 to 1e-08"]),
    ],
)
def test_what_cannot_work_is_named_with_a_remedy(
    world_size: int, changes: dict[str, object], named: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        validate(config_with(OPDLM, **changes), world_size)
    message = str(caught.value)
    assert "\n" not in message
    for words in named:
        assert words in message


MIXED = {"teacher_response_fraction": 0.5, "save": "no_such_folder"}
FADING = {**MIXED, "teacher_response_fraction_schedule": "linear"}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (OPDLM, {"state_selection": "all"}),
        (SFT, {"state_selection": "random", "loss_weighting": "none"}),
        (OPDLM, MIXED),
        (OPDLM_OFF, {**FADING, "final_teacher_response_fraction": 0.1}),
        (OPDLM, {**FADING, "save": None, "teacher_responses": "responses"}),
        (SFT, {"load": None, "model_config": "config.json"}),
        (SFT, {"save": None}),
        (OFF_POLICY, STORED),
        (OFF_POLICY, {**STORED, "divergence_tail": "ignore"}),
        (OFF_POLICY, {"offload_teacher": True}),
        (OPDLM, {"offload_teacher": True, "offload_optimizer": True}),
    ],
)
def test_what_an_objective_can_be_given(
    base: dict[str, object], changes: dict[str, object]
) -> None:
    assert refusal(validate, config_with(base, **changes), 1) is None


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (OFF_POLICY, {"prompts": None}, ["--prompts = None", "off_policy"]),
        (OFF_POLICY, {"train_iters": None}, ["--train-iters = None", "off_policy"]),
        (OFF_POLICY, {"load": None, "model_config": "c"}, ["--load = None", "off_policy"]),
        (SFT_ON_TEACHER, {"load": None, "model_config": "c"}, ["--load = None", "sft"]),
        (SFT, {"train_data": None}, ["--prompts = None", "or --train-data"]),
        (SFT, {"prompts": "prompts.jsonl"}, ["--prompts = 'prompts.jsonl'", "--train-data"]),
        (OPDLM, {"state_selection": "random"}, ["= 'random'", "per_block or", "opdlm_off"]),
        (SFT, {"state_selection": "per_block"}, ["= 'per_block'", "choose random", "opdlm"]),
        (NEXT_TOKEN, {"state_selection": "all"}, ["= 'all'", "leave it out", "opdlm"]),
        (OFF_POLICY, {"save": None}, ["--teacher-responses = None", "--save"]),
        (OPDLM, {**MIXED, "save": None}, ["--teacher-responses = None", "--save"]),
        (SCP, {"attention_annealing_iters": 101}, ["annealing-iters = 101", "100 or fewer"]),
    ],
)
def test_what_an_objective_cannot_be_given(
    base: dict[str, object], changes: dict[str, object], named: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        validate(config_with(base, **changes), world_size=1)
    for words in named:
        assert words in str(caught.value)


def test_what_follows_from_objective_and_data() -> None:
    bases = (OPDLM, OPDLM_OFF, OFF_POLICY, SFT, SFT_ON_TEACHER, NEXT_TOKEN)
    configs = [config_with(base) for base in bases]
    assert [config.response_source for config in configs] == [
        "rollout", "rollout", "teacher", "data", "teacher", "data"
    ]  # fmt: skip
    assert [config.needs_teacher for config in configs] == [True] * 3 + [False, True, False]
    assert [config.uses_teacher_responses for config in configs] == [
        False, False, True, False, True, False
    ]  # fmt: skip
    assert [config.state_selection for config in configs] == [
        "per_block", "random", "random", "random", "random", None
    ]  # fmt: skip
    mixed = config_with(OPDLM, **MIXED)
    assert mixed.uses_teacher_responses
    assert mixed.teacher_responses == str(Path("no_such_folder") / "teacher_responses")
    assert configs[2].rollout_batch_size == 8
    assert configs[2].updates_of(8) == 1
    assert configs[0].rollout_batch_size == 128


@pytest.mark.parametrize("missing", ["train_data", "train_iters", "load"])
def test_next_token_needs_data_duration_and_a_model(missing: str) -> None:
    config = config_with(NEXT_TOKEN, **{missing: None})
    with pytest.raises(UserError, match="--" + missing.replace("_", "-")):
        validate(config, world_size=1)


def test_next_token_starts_from_random_weights() -> None:
    config = config_with(NEXT_TOKEN, load=None, model_config="config.json")
    assert refusal(validate, config, 1) is None


def test_next_token_ignores_the_rollout_batch() -> None:
    config = config_with(NEXT_TOKEN, global_batch_size=12, rollout_batch_size=128)
    assert refusal(validate, config, 1) is None


NUMBERS = {n: o for n, o in option_fields(Config).items() if o.type in (int, float)}


def outside(allowed: Range) -> list[float]:
    """Numbers next to the ends of a range that are not in it."""
    values = [allowed.lowest if allowed.above_lowest else allowed.lowest - 1]
    if allowed.highest is not None:
        values.append(allowed.highest if allowed.below_highest else allowed.highest + 1)
    return values


OUT_OF_RANGE = [
    *((name, value) for name, o in NUMBERS.items() if o.range for value in outside(o.range)),
    *(("dynamic_threshold", value) for value in (0.0, 1.1)),
    *(("adam_beta1", value) for value in (-0.1, 1.0)),
    *(("jsd_beta", value) for value in (0.0, 1.0)),
    ("lr", 0),
    ("seed", -1),
    ("block_size", 0),
    ("teacher_response_fraction", 1.1),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_number_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^configuration: {name} = {value}:"):
        config_with(OPDLM, **{name: value})


def test_every_number_has_a_range() -> None:
    assert [name for name, option in NUMBERS.items() if option.range is None] == []


@pytest.mark.parametrize(
    ("allowed", "inside", "text"),
    [
        (Range(1), (1, 2), "1 or more"),
        (Range(0, above_lowest=True), (1e-9,), "above 0"),
        (Range(0, 1, above_lowest=True), (1e-9, 1), "(0, 1]"),
        (Range(0, 1, below_highest=True), (0, 0.999), "[0, 1)"),
        (Range(0, 1), (0, 1), "[0, 1]"),
    ],
)
def test_a_range_holds_its_numbers(allowed: Range, inside: tuple[float, ...], text: str) -> None:
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in (*outside(allowed), math.nan))
    assert str(allowed) == text


@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"transformer_impl": "transformer_engine"}, "transformer_engine"),
        ({"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}, "deep_ep"),
        ({"wandb_project": "study", "save": "no_such_folder"}, "wandb"),
    ],
)
def test_optional_package(
    changes: dict[str, object], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(OPDLM, **changes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"package {package} is not installed"):
        validate(config, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert refusal(validate, config, 2) is None


def test_the_student_starts_as_the_teacher() -> None:
    assert config_with(OPDLM).teacher_load == "weights"
    assert config_with(OPDLM, teacher_load="teacher").teacher_load == "teacher"


def test_derived_sizes() -> None:
    config = config_with(
        OPDLM,
        tensor_model_parallel_size=2,
        rollout_batch_size=32,
        global_batch_size=8,
        micro_batch_size=2,
        epochs_per_rollout=3,
    )
    assert config.updates_of(32) == 12
    assert config.train_iters == config.lr_decay_iters == 24
    assert config.expert_tensor_parallel_size == 2
    assert config_with(NEXT_TOKEN).train_iters == 10


@pytest.mark.parametrize(
    ("base", "options", "records", "rollouts", "updates", "last"),
    [
        # The paper's: one pass over 61,816 prompts.
        (OPDLM, {}, 61_816, 483, 7_727, 120),
        (OPDLM, {"epochs_per_rollout": 2}, 61_816, 483, 15_454, 120),
        (OPDLM, {"num_epochs": 3, "rollout_batch_size": 16}, 7, 2, 3, 5),
        (OPDLM, {"num_epochs": 2}, 64, 1, 16, 128),
        (OFF_POLICY, {"num_epochs": 2}, 13, 4, 4, 2),
        (SCP, {}, 8, 1, 1, 8),
    ],
)
def test_epochs_are_counted_when_the_data_have_been_read(
    base: dict[str, object],
    options: dict[str, object],
    records: int,
    rollouts: int,
    updates: int,
    last: int,
) -> None:
    length = {"num_rollouts": None, "train_iters": None, "num_epochs": 1, **options}
    unread = config_with(base, **length, lr_warmup_iters=updates)
    assert unread.train_iters == unread.num_samples == 0
    assert refusal(validate, unread, 1) is None
    config = unread.of_data(records)
    assert config.to_dict() == unread.to_dict()
    assert (config.num_rollouts, config.train_iters) == (rollouts, updates)
    assert config.lr_decay_iters == updates
    assert config.num_samples == (rollouts - 1) * config.rollout_batch_size + last
    assert config.num_samples == length["num_epochs"] * records  # type: ignore[operator]
    assert "--lr-warmup-iters" in (refusal(validate_length, config) or "")
    line = format_length(config)
    assert line.startswith("#")
    short = last < config.rollout_batch_size
    assert (f", the last of {last}" in line) == short, line


LOWERED = {"dynamic_threshold_schedule": "cosine", "final_dynamic_threshold": 0.7}


def test_a_changing_threshold_has_an_end_and_rollouts() -> None:
    message = refusal(validate, config_with(OPDLM, dynamic_threshold_schedule="linear"), 1) or ""
    assert "--final-dynamic-threshold = None" in message
    held = {**LOWERED, "dynamic_threshold_hold_rollouts": 2}
    message = refusal(validate, config_with(OPDLM, **held), 1) or ""
    assert "--dynamic-threshold-hold-rollouts = 2: leaves none of the 2 rollouts" in message
    assert refusal(validate, config_with(OPDLM, **held, num_rollouts=3), 1) is None
    epochs = config_with(OPDLM, **held, num_rollouts=None, num_epochs=1)
    assert refusal(validate, epochs, 1) is None
    assert "leaves none" in (refusal(validate_length, epochs.of_data(200)) or "")


def test_annealing_ends_within_epochs() -> None:
    scp = {**SCP, "train_iters": None, "num_epochs": 1, "attention_annealing_iters": 9}
    assert refusal(validate, config_with(scp), 1) is None
    assert refusal(validate_length, config_with(scp).of_data(72)) is None
    assert "after 8 updates" in (refusal(validate_length, config_with(scp).of_data(64)) or "")


def test_a_run_has_one_length() -> None:
    both = refusal(validate, config_with(OPDLM, num_epochs=1), 1) or ""
    assert "--num-epochs = 1: --num-rollouts 2" in both
    neither = refusal(validate, config_with(OPDLM, num_rollouts=None), 1) or ""
    assert "--num-epochs" in neither


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("next_token", 1),
        ("opdlm", 1),
        ("opdlm", 2),
        ("opdlm_off", 2),
        ("off_policy", 2),
        ("sft", 2),
    ],
)
def test_quickstart_configurations_are_valid(name: str, world_size: int, tmp_path: Path) -> None:
    file = REPOSITORY / "examples" / "tiny" / f"{name}.yaml"
    config = parse_config(["--config", str(file), "--save", str(tmp_path / name)])
    assert refusal(validate, config, world_size) is None


def test_parameter_group_may_freeze() -> None:
    group = ParameterGroup("embedding", lr=0.0, min_lr=0.0)
    assert config_with(OPDLM, param_groups=[group]).optimizer.param_groups == (group,)
    assert refusal(validate, config_with(OPDLM, param_groups=[group]), 1) is None
