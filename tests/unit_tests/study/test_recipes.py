"""The study's recipes are runnable, and differ only in what is compared."""

import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from benchmarks.environment import REPOSITORY
from benchmarks.study.problems import HELDOUT, heldout_path, training_data, write_problems
from benchmarks.study.recipes import (
    BLOCK_SIZES,
    ROLLOUT_RECIPE,
    SETTINGS,
    TEACHER,
    Recipe,
    Sizes,
    read_yaml,
    recipes,
)
from megatron_dlm.config import Config, ParallelConfig, validate
from megatron_dlm.evaluation.options import (
    InferenceArguments,
    InferenceConfig,
    resolve_inference,
)

SIZES = Sizes()
TINY = Sizes(rollouts=1, best_rollouts=2, self_rollouts=1, teacher_updates=2)
TRAINED = [recipe for recipe in recipes(SIZES) if recipe.example is not None]
COMPARED = {"sft", "off_policy", "opdlm_off", "opdlm", "opdlm_global"}
MAY_DIFFER = {
    # what is compared
    "objective",
    "state_selection",
    # how an objective says how long it trains; compared by `train_iters`
    "num_rollouts",
    "epochs_per_rollout",
    # where teacher responses are, not what they are
    "prompts",
    "save",
}


def config_of(recipe: Recipe, folder: Path = Path("run")) -> Config:
    options = recipe.training_options(seed=1)
    assert options is not None
    data = {name: str(path) for name, path in training_data(folder, recipe).items()}
    models = dict.fromkeys(recipe.models, TEACHER)
    return Config.from_dict({**options, **data, **models, "save": str(folder)})


def test_the_papers_objectives_are_there() -> None:
    assert {recipe.name for recipe in TRAINED} >= COMPARED
    assert SIZES.seeds >= 3


@pytest.mark.parametrize("recipe", TRAINED, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("sizes", [SIZES, TINY], ids=["full", "tiny"])
def test_recipe_is_a_valid_configuration(recipe: Recipe, sizes: Sizes, tmp_path: Path) -> None:
    [same] = [each for each in recipes(sizes) if each.name == recipe.name]
    config = config_of(same, tmp_path / "run")
    validate(config, world_size=1)
    assert config.train_iters == same.updates


CONVERSIONS = [r for r in TRAINED if r.objective in {"sft", "off_policy", "opdlm", "opdlm_off"}]


@pytest.mark.parametrize("recipe", CONVERSIONS, ids=lambda recipe: recipe.name)
def test_every_prompt_is_visited_equally_often(recipe: Recipe) -> None:
    config = config_of(recipe)
    visits = config.train_iters * config.training.global_batch_size
    assert visits == read_yaml(ROLLOUT_RECIPE)["epochs_per_rollout"] * recipe.num_prompts


def test_compared_recipes_differ_in_their_objective_only() -> None:
    configs = {r.name: config_of(r) for r in TRAINED if r.name in COMPARED}
    assert len({config.train_iters for config in configs.values()}) == 1
    reference = configs["opdlm"].to_dict()
    for name, config in configs.items():
        flat = config.to_dict()
        different = {key for key in reference if flat[key] != reference[key]}
        rollout_only = {"rollout_batch_size", "train_iters"} if not config.uses_rollouts else set()
        assert different <= MAY_DIFFER | rollout_only, name


def test_tries_against_the_cold_start_change_one_thing_and_begin_as_the_whole_run() -> None:
    configs = {r.name: config_of(r).to_dict() for r in TRAINED}
    whole, stops = configs["opdlm"], {"num_rollouts", "lr_decay_iters", "prompts"}
    changed = {
        "half_rate": {"lr", "min_lr"},
        "long_warm_up": {"lr_warmup_iters"},
        "cool": {"temperature"},
    }
    for name, options in changed.items():
        config = configs[name]
        different = {key for key in whole if config[key] != whole[key]}
        assert different == options | stops | {"micro_batch_size"}
        assert config["lr_decay_iters"] == 1280
    growth = {"min_response_length", "response_length_schedule", "response_length_warmup_rollouts"}
    grown = configs["opdlm_grown"]
    different = {key for key in whole if grown[key] != whole[key]}
    assert different == growth | {"micro_batch_size"}


def test_models_that_recipes_start_from_are_rows_and_kept() -> None:
    rows = {recipe.name: recipe for recipe in TRAINED}
    sources = {r.name: r for recipe in TRAINED for r in recipe.models.values()}
    assert set(sources) == {"opdlm_grown", "blocks_8_after_4", "qwen3_64", "qwen3_96"}
    for name, source in sources.items():
        assert source == rows[name]
        assert source.kept
    assert sum(recipe.kept for recipe in TRAINED) == len(sources)


def test_a_seed_changes_nothing_else() -> None:
    for recipe in TRAINED:
        one, two = recipe.training_options(1), recipe.training_options(2)
        assert one is not None
        assert two == {**one, "seed": 2}


@pytest.mark.parametrize("recipe", recipes(SIZES), ids=lambda recipe: recipe.name)
def test_settings_are_what_evaluation_calls_them(recipe: Recipe) -> None:
    for evaluation in recipe.evaluations:
        options = InferenceConfig(load=str(REPOSITORY / TEACHER), block_size=evaluation.block_size)
        arguments = InferenceArguments(options, parallel=ParallelConfig(device="cpu"))
        setup = resolve_inference(arguments, 1)
        names = tuple(setup.setting(text).setting_name() for text in evaluation.settings)
        if evaluation.block_size is None:
            assert names == ("autoregressive",)
        elif recipe.documents:
            assert set(names) <= set(SETTINGS)
            assert evaluation.data in HELDOUT
        else:
            assert names == SETTINGS
            assert evaluation.name == f"block_{evaluation.block_size}"
            assert evaluation.block_size in BLOCK_SIZES


def responses(path: Path) -> list[str]:
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


def test_problems_of_each_kind(tmp_path: Path) -> None:
    write_problems(tmp_path, 20, ())
    assert len(responses(heldout_path(tmp_path, "heldout"))) == 20
    seen, unseen = (responses(heldout_path(tmp_path, name)) for name in ("seen", "unseen"))
    assert len(seen) == len(unseen) == 20
    assert not any("*" in response for response in seen)
    assert all("*" in response for response in unseen)


def test_a_longer_run_begins_with_the_prompts_of_a_shorter_one(tmp_path: Path) -> None:
    small = {r.name: r for r in recipes(Sizes(rollouts=1, best_rollouts=2))}
    write_problems(tmp_path, 1, [small["opdlm"], small["best"]])
    short, long = (
        responses(training_data(tmp_path, small[name])["prompts"]) for name in ("opdlm", "best")
    )
    assert len(short) == small["opdlm"].num_prompts
    assert len(long) == 2 * len(short)
    assert long[: len(short)] == short


@pytest.mark.parametrize(
    ("option", "multiplies"), [("data_path", False), ("valid_data_path", True)]
)
def test_a_corpus_fills_its_canvas_and_is_of_one_kind(
    option: str, multiplies: bool, tmp_path: Path
) -> None:
    [recipe] = [r for r in recipes(Sizes(documents=30)) if r.name == "scp_one_lr"]
    write_problems(tmp_path, 30, [recipe])
    documents = IndexedDataset(str(training_data(tmp_path, recipe)[option]))
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / TEACHER)
    assert len(documents) == 30
    for ids in documents:
        text = tokenizer.decode(ids.tolist())
        assert (" * " in text) is multiplies
        _, _, answer = text.partition("<|im_start|>assistant\n")
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 40
        assert answer.partition("<|im_end|>")[2].replace("<|im_end|>", "") == ""


def test_a_corpus_of_both_kinds_mixes_them(tmp_path: Path) -> None:
    [recipe] = [r for r in recipes(Sizes(documents=4)) if r.name == "scp_annealed_all"]
    write_problems(tmp_path, 2, [recipe])
    documents = IndexedDataset(str(training_data(tmp_path, recipe)["data_path"]))
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / TEACHER)
    multiplying = sum(" * " in tokenizer.decode(ids.tolist()) for ids in documents)
    assert len(documents) == 32
    assert 0 < multiplying < 32


def test_pretraining_differs_in_learning_rates_only() -> None:
    pair = ("scp_one_lr", "scp_rnd1_groups")
    one, groups = (config_of(r).to_dict() for r in TRAINED if r.name in pair)
    different = {name for name in one if one[name] != groups[name]}
    assert different == {"param_groups"}
