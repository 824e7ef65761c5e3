"""Shipped recipes are the published runs, and fit the models and GPUs that they are for."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.real_shapes import REAL_SHAPES, qwen3
from megatron_dlm.config import Config, parse_config, validate, validate_architecture
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.rollout.curriculum import response_length
from megatron_dlm.training.branched_training import plan_branches
from tests.refusal import refusal
from tests.tiny import declare_diffusion_kind, save_random_model
from tests.unit_tests.published import (
    CODE,
    D_OPSD,
    FULL_VOCABULARY,
    GIVEN_RESPONSES,
    MATH,
    MATH_THINKING,
    RANDOM_STATES,
    RND1_PROBE,
    RND1_SETTINGS,
    TABLE_13,
    TOP_16,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

SHAPES = {**REAL_SHAPES, "qwen3_32b": qwen3(64, 5120, 64, 8, 25600, tied=False)}
PROMPTS = {"data/opdlm_train.jsonl": 61_816, "data/math_train.jsonl": 8_000}
"""Records of the published sets; of MATH's, the paper says 8K."""

GENERAL = {"objective": "opdlm", **TABLE_13, **CODE}
OURS = {"supervise_eos": True, "loss_normalization": "token"}
LARGE = {**GENERAL, **TOP_16}
OURS_LARGE = {**OURS, "divergence_tail": "bucket"}
TEACHER_32B = {
    **MATH,
    "teacher_load": "models/Qwen3-32B",
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
}
THINKING_32K = {**MATH_THINKING, "max_response_length": 32_768}
AT_8B = {
    "load": "models/Qwen3-8B",
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
}


@dataclass(frozen=True)
class Recipe:
    """A file in examples/.

    Attributes:
        expected: Options that are published, or that the file changes in its base.
        base: The file that it changes; its other options are all that one's.
        gpus: Numbers of processes that it is for, each with the flags that it then takes.
        teacher: Shape of a teacher that is not the student's.
    """

    expected: dict[str, Any]
    base: str | None = None
    gpus: tuple[tuple[int, dict[str, Any]], ...] = ((8, {}),)
    teacher: str | None = None


def changes(base: str, expected: dict[str, Any], **other: Any) -> Recipe:
    return Recipe(expected, base=base, **other)


TP2: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {}),
    (16, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
)
LONG: tuple[tuple[int, dict[str, Any]], ...] = ((8, {}), (64, {}))
RECIPES: dict[str, Recipe] = {
    "qwen3_0.6b/opdlm": Recipe({**GENERAL, **FULL_VOCABULARY}),
    "qwen3_0.6b/opdlm_ours": changes("opdlm", OURS),
    "qwen3_0.6b/opdlm_teacher_4b": changes(
        "opdlm", {"teacher_load": "models/Qwen3-4B"}, teacher="qwen3_4b"
    ),
    "qwen3_1.7b/opdlm": Recipe({**GENERAL, **FULL_VOCABULARY}),
    "qwen3_1.7b/opdlm_ours": changes("opdlm", OURS),
    "qwen3_1.7b/opdlm_teacher_8b": changes(
        "opdlm",
        {"teacher_load": "models/Qwen3-8B", "recompute_granularity": "full"},
        teacher="qwen3_8b",
    ),
    "qwen3_4b/opdlm": Recipe(LARGE, gpus=TP2),
    "qwen3_4b/opdlm_ours": changes("opdlm", OURS_LARGE),
    "qwen3_4b/opdlm_block8": changes("opdlm", {"block_size": 8}),
    "qwen3_4b/opdlm_block16": changes("opdlm", {"block_size": 16}),
    "qwen3_4b/opdlm_math": changes("opdlm", MATH),
    "qwen3_4b/opdlm_math_thinking": changes("opdlm", MATH_THINKING),
    "qwen3_4b/opdlm_math_thinking_32k": changes("opdlm", THINKING_32K, gpus=LONG),
    "qwen3_4b/opdlm_math_teacher_32b": changes("opdlm", TEACHER_32B, teacher="qwen3_32b"),
    "qwen3_4b/opdlm_off": changes("opdlm", {"objective": "opdlm_off", **RANDOM_STATES}),
    "qwen3_4b/off_policy": Recipe(
        {"objective": "off_policy", **GIVEN_RESPONSES, **RANDOM_STATES, **TOP_16}
        | {"divergence": "forward_kl"}
    ),
    "qwen3_4b/sft": Recipe({"objective": "sft", **GIVEN_RESPONSES, **OURS}),
    "qwen3_4b/scp": Recipe(RND1_PROBE, gpus=((8, {}), (64, {}))),
    **{
        f"qwen3_4b/scp_setting{setting}": changes(
            "scp",
            {"lr": rest, "weight_decay": decay}
            | ({"mask_embedding_init": "mean"} if attention != rest else {}),
        )
        for setting, (attention, rest, decay) in RND1_SETTINGS.items()
        if setting > 1  # which is scp.yaml
    },
    "qwen3_4b/scp_random": changes(
        "scp",
        {
            "load": None,
            "model_config": "models/Qwen3-4B/config.json",
            "tokenizer": "models/Qwen3-4B",
        },
    ),
    "qwen3_4b/scp_causal": changes("scp", {"attention_pattern": "causal", "train_iters": 954}),
    "qwen3_4b/scp_graft": changes("scp", {"load": "runs/qwen3_4b/scp_causal", "finetune": True}),
    "qwen3_4b/scp_annealing": changes("scp", {"attention_annealing_iters": 954}),
    "qwen3_4b/scp_critical_batch": changes(
        "scp", {"train_iters": 2384, "lr_warmup_fraction": 0.01}
    ),
    "qwen3_8b/opdlm": Recipe(
        LARGE, gpus=((8, {}), (16, {}), (16, {"tensor_model_parallel_size": 4}))
    ),
    "qwen3_8b/opdlm_ours": changes("opdlm", OURS_LARGE),
    "qwen3_8b/opdlm_math": changes("opdlm", MATH),
    "qwen3_8b/opdlm_math_thinking": changes("opdlm", MATH_THINKING),
    "qwen3_8b/opdlm_math_thinking_32k": changes("opdlm", THINKING_32K, gpus=LONG),
    "qwen3_8b/opdlm_math_teacher_32b": changes("opdlm", TEACHER_32B, teacher="qwen3_32b"),
    "qwen3_8b/opdlm_off": changes("opdlm", {"objective": "opdlm_off", **RANDOM_STATES}),
    "qwen3_8b/off_policy": changes("../qwen3_4b/off_policy", AT_8B),
    "qwen3_8b/d_opsd": Recipe({"objective": "d_opsd", **D_OPSD}),
    "qwen3_30b_a3b/opdlm": Recipe(LARGE, gpus=((8, {}), (16, {"pipeline_model_parallel_size": 2}))),
    "qwen3_30b_a3b/opdlm_ours": changes("opdlm", OURS_LARGE),
    "qwen3_30b_a3b/opdlm_64_gpus": changes(
        "opdlm",
        {"global_batch_size": 64, "lr_batch_size": 8, "lr_warmup_iters": 10},
        gpus=((64, {}),),
    ),
    "qwen3_30b_a3b/opdlm_512_gpus": changes(
        "opdlm",
        {"global_batch_size": 512, "lr_batch_size": 8, "lr_warmup_iters": 2}
        | {"rollout_batch_size": 512, "response_length_warmup_rollouts": 25},
        gpus=((512, {}),),
    ),
    "qwen3_30b_a3b/scp": Recipe(
        {"objective": "scp", "param_group_preset": "rnd1", "lr_warmup_fraction": 0.02},
        gpus=((64, {}),),
    ),
    **{
        f"qwen3_30b_a3b/scp_setting{setting}": changes(
            "scp",
            {"param_group_preset": None, "lr": rest, "weight_decay": decay, "train_iters": 3576}
            | ({"mask_embedding_init": "mean"} if attention != rest else {}),
            gpus=((64, {}),),
        )
        for setting, (attention, rest, decay) in RND1_SETTINGS.items()
        if setting < 4  # which is scp.yaml
    },
}
NOT_COMPARED = {
    "save",
    "save_interval",
    "keep_checkpoints",
    "distributed_timeout_minutes",
    "context_parallel_size",
}
"""Options of a changed recipe that say nothing of what is trained."""


@functools.cache
def values_of(name: str) -> dict[str, Any]:
    return parse_config(["--config", str(EXAMPLES / f"{name}.yaml")]).to_dict()


def load(name: str, **options: Any) -> Config:
    return Config.from_dict({**values_of(name), **options})


def plain(value: Any) -> Any:
    """A value as `Config.to_dict` has it."""
    return list(value) if isinstance(value, tuple) else value


def base_of(name: str) -> str:
    base = RECIPES[name].base
    assert base is not None
    return (EXAMPLES / name).parent.joinpath(base).resolve().relative_to(EXAMPLES).as_posix()


def test_every_recipe_is_covered() -> None:
    shipped = {
        file.relative_to(EXAMPLES).with_suffix("").as_posix()
        for file in EXAMPLES.glob("qwen3*/*.yaml")
    }
    assert shipped == set(RECIPES)


def test_the_list_of_recipes_names_them_all() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for name in RECIPES:
        assert f"`{name.split('/')[1]}.yaml`" in listed


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_model_and_gpus(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    shape = architecture_from_hf(SHAPES[name.split("/")[0]])
    for gpus, flags in recipe.gpus:
        config = load(name, save=str(tmp_path / "run"), **flags)
        records = PROMPTS.get(config.data.prompts or "")
        teacher = None
        if config.needs_teacher:
            teacher = architecture_from_hf(SHAPES[recipe.teacher or name.split("/")[0]])
        assert refusal(validate, config, gpus) is None
        assert refusal(validate_architecture, config, shape, teacher) is None
        if config.training.num_epochs is not None:
            assert records is not None
            assert refusal(validate, config.of_data(records), gpus) is None


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_published_one(name: str) -> None:
    recipe, values = RECIPES[name], values_of(name)
    expected = {key: plain(value) for key, value in recipe.expected.items()}
    assert {key: values[key] for key in expected} == expected
    assert values["save"] == f"runs/{name}"


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.base])
def test_recipe_changes_nothing_else_of_its_base(name: str) -> None:
    values, base = values_of(name), values_of(base_of(name))
    changed = {key for key in values if values[key] != base[key]} - NOT_COMPARED
    stated = {key for key, value in RECIPES[name].expected.items() if plain(value) != base[key]}
    assert changed - {"prompts", "param_groups"} == stated


@pytest.mark.parametrize("name", RECIPES)
def test_long_responses_are_shared_by_ranks(name: str) -> None:
    """Rows of 8k to 32k tokens, twice that with their noisy streams, are the thinking recipes'."""
    config = load(name)
    ranks = config.parallel.context_parallel_size
    assert (ranks > 1) == ("thinking" in name)
    assert config.longest_response <= 16_384 * ranks


@pytest.mark.parametrize("name", [n for n in RECIPES if n.endswith("/opdlm")])
def test_one_epoch_is_483_rollouts_with_a_short_last_one(name: str) -> None:
    config = load(name).of_data(61_816)
    assert config.num_rollouts == 483
    assert config.num_samples - 482 * 128 == 120
    assert config.train_iters == config.lr_decay_iters == 61_816 // 8
    assert config.lr_warmup_iters == 5 * config.updates_of(128)
    lengths = [response_length(config, rollout) for rollout in (0, 50, 99, 100, 482)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-2], lengths[-1]) == (100, 4000, 4000)


@pytest.mark.parametrize("gpus", [64, 512])
def test_more_gpus_have_more_samples_and_larger_rates(gpus: int) -> None:
    few = load("qwen3_30b_a3b/opdlm").of_data(61_816)
    many = load(f"qwen3_30b_a3b/opdlm_{gpus}_gpus").of_data(61_816)
    assert many.lr_scale == pytest.approx((gpus / 8) ** 0.5)
    assert few.lr_scale == 1.0
    assert many.num_samples == few.num_samples
    for config in (few, many):
        rollouts, warmup = config.rollout, config.lr_warmup_iters
        ramp = rollouts.response_length_warmup_rollouts * rollouts.rollout_batch_size
        assert ramp == 12_800
        assert 0.01 < warmup / config.train_iters < 0.02


@pytest.mark.parametrize("model", ["qwen3_4b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("setting", RND1_SETTINGS)
def test_the_four_settings_are_rnd1s(model: str, setting: int) -> None:
    name = f"{model}/scp_setting{setting}"
    config = load(name if name in RECIPES else f"{model}/scp")
    attention, rest, decay = RND1_SETTINGS[setting]
    optimizer = config.optimizer
    default = (optimizer.lr, optimizer.weight_decay)
    groups = {group.pattern: (group.lr, group.weight_decay) for group in config.param_groups}

    def of(pattern: str) -> tuple[float, float]:
        lr, weight_decay = groups.get(pattern, (None, None))
        return (
            default[0] if lr is None else lr,
            default[1] if weight_decay is None else weight_decay,
        )

    assert set(groups) <= {"attention", "default"}
    assert of("attention") == (attention, decay)
    assert of("default") == (rest, decay)
    # A rate at which MASK stays what it starts from, in an autoregressive model untrained.
    assert config.mask_embedding_init == ("mean" if rest < attention else "keep")
    assert config.lr_warmup_iters == round(0.02 * config.train_iters)


@pytest.mark.parametrize(
    ("name", "batch_tokens", "tokens"),
    [
        ("qwen3_4b/scp", 2e6, 20e9),
        ("qwen3_4b/scp_graft", 2e6, 20e9),
        ("qwen3_4b/scp_causal", 2e6, 2e9),
        ("qwen3_4b/scp_critical_batch", 2e6, 5e9),
        ("qwen3_30b_a3b/scp", 33.5e6, 500e9),
        ("qwen3_30b_a3b/scp_setting1", 33.5e6, 120e9),
    ],
)
def test_tokens_of_pretraining(name: str, batch_tokens: float, tokens: float) -> None:
    config = load(name)
    batch = config.training.global_batch_size * config.data.seq_length
    assert batch == pytest.approx(batch_tokens, rel=0.05)
    assert batch * config.train_iters == pytest.approx(tokens, rel=0.001)


def test_checkpoints_of_the_settings_are_those_of_figure_4_1() -> None:
    config = load("qwen3_30b_a3b/scp_setting1")
    interval = config.logging.save_interval
    tokens = interval * config.training.global_batch_size * config.data.seq_length
    assert tokens == pytest.approx(30e9, rel=0.001)
    assert config.train_iters == 4 * interval
    assert config.logging.keep_checkpoints == 0


def test_critical_batch_recipe_has_the_papers_branches(tmp_path: Path) -> None:
    file = EXAMPLES / "qwen3_4b" / "scp_critical_batch.yaml"
    sizes, budget = (512, 1024, 2048, 4096), 4_999_610_368
    assert f"--batch-sizes {','.join(map(str, sizes))} --token-budget {budget}" in file.read_text()
    model = save_random_model(tmp_path / "model")
    declare_diffusion_kind(model, "full", shifted=True)
    branches = plan_branches(
        load("qwen3_4b/scp_critical_batch"),
        load=str(model),
        save=str(tmp_path / "study"),
        batch_sizes=sizes,
        token_budget=budget,
    )
    rates = [branch.config.optimizer.lr for branch in branches]
    assert rates == pytest.approx([3e-4 * (size / 1024) ** 0.5 for size in sizes])
    for branch in branches:
        config = branch.config
        assert config.train_iters * config.training.global_batch_size * 2048 == budget
        assert config.lr_warmup_iters == round(0.01 * config.train_iters)


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "8B", "30B-A3B"])
def test_memory_and_time_are_those_of_the_models(size: str) -> None:
    """The table of examples/README.md, with the parameters that transformers' models have."""
    readme = (EXAMPLES / "README.md").read_text()
    [cells] = re.findall(rf"^\| {re.escape(size)} \| (.*[0-9]) \|$", readme, flags=re.MULTILINE)
    layout, *numbers = cells.split(" | ")
    name = f"qwen3_{size.lower().replace('-', '_')}"
    with torch.device("meta"):
        shape = SHAPES[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    sizes = {n: p.numel() / 1e9 for n, p in model.named_parameters()}  # tied ones once
    experts = sum(count for n, count in sizes.items() if ".experts." in n)
    others = sum(sizes.values()) - experts
    config = load(f"{name}/opdlm")
    tp = config.parallel.tensor_model_parallel_size
    ep = config.parallel.expert_model_parallel_size
    dp = 8 // tp
    expected_layout = f"EP {ep} x DP {dp}" if ep > 1 else f"TP {tp} x DP {dp}" if tp > 1 else "DP 8"
    assert layout == expected_layout
    student = others / tp * (6 + 12 / dp) + experts / ep * (6 + 12 / (8 // ep))
    teacher = 2 * (others / tp + experts / ep)
    active = others + experts * shape.get("num_experts_per_tok", 0) / shape.get("num_experts", 1)
    seconds = 8 * active * 1e15 / (8 * 989e12 * 0.4)
    expected = (student, teacher, student + teacher, seconds)
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.06)
