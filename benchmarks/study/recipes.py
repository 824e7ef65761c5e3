"""Training and evaluation of the study: its sizes, and one row of a table per recipe.

A recipe is a shipped example, or a file of the study, with a few options changed.
All recipes see the same prompts equally often and take the same number of updates, unless their
titles say otherwise. A recipe can start from models that others have trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import yaml

from benchmarks.environment import REPOSITORY

TEACHER = "examples/tiny/qwen3"
ROLLOUT_RECIPE = "benchmarks/study/opdlm.yaml"
OFF_POLICY = "examples/tiny/off_policy.yaml"
RANDOM_STATES = "examples/tiny/opdlm_off.yaml"
SCP_RECIPE = "benchmarks/study/scp.yaml"
NEXT_TOKEN = "examples/tiny/next_token.yaml"
RND1_RATIO = 1e-8 / 3e-4
"""RND1's learning rate of all other parameters over that of attention."""
TRAINED_BLOCK_SIZE = 4
BLOCK_SIZES = (4, 8, 16)
THRESHOLDS = (0.9, 0.8, 0.7)
SETTINGS = ("static", *(f"dynamic_{threshold:g}" for threshold in THRESHOLDS))
"""Decoding settings by the names that `tools/evaluate.py` writes."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and evaluated, which decides how long the study takes.

    Attributes:
        seeds: Runs of each recipe.
        best_seeds: Runs of the long recipe.
        rollouts: Rollouts of each run; prompts and updates of every recipe follow from them.
        best_rollouts: Rollouts of the long recipe, on as many more prompts.
        single_seeds: Runs of other block sizes and of other teachers.
        cold_start_seeds: Runs of each try against the cold start.
        cold_start_rollouts: Rollouts of those tries, which then stop.
        self_rollouts: Rollouts of self-distillation.
        teacher_updates: Updates of an autoregressive model of another size.
        documents: Documents of the corpus that SCP is pretrained on.
        heldout: Held-out problems that each setting is evaluated on.
        pretraining_heldout: The same of each kind after SCP; fewer, as it decodes without a cache.
    """

    seeds: int = 3
    best_seeds: int = 3
    rollouts: int = 80
    best_rollouts: int = 160
    single_seeds: int = 1
    cold_start_seeds: int = 2
    cold_start_rollouts: int = 25
    self_rollouts: int = 20
    teacher_updates: int = 1_000
    documents: int = 20_000
    heldout: int = 250
    pretraining_heldout: int = 64


@dataclass(frozen=True)
class Evaluation:
    """One call of `tools/evaluate.py`.

    Attributes:
        name: Key of its results in the cell's file.
        settings: Decoding settings, as `--settings` takes them.
        data: Name of a file of held-out problems (`problems.HELDOUT`).
        block_size: Tokens denoised together; None leaves it to the model.
    """

    name: str
    settings: tuple[str, ...]
    data: str = "heldout"
    block_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One row of the study.

    Attributes:
        name: Key, and name of its files.
        title: Its name in the report.
        example: YAML file that training starts from; None trains nothing.
        evaluations: Evaluations after training.
        seeds: Number of runs.
        rollouts: Length of training, as `Sizes.rollouts`.
        documents: Documents of its corpus, 0 where it trains on prompts.
        corpus: Kind of the problems in its corpus (`problems.HELDOUT`).
        options: Changes of the example's options.
        models: Recipes whose trained models it starts from, by option (`load`, `teacher_load`).
        train_iters: Updates where no rollouts say so.
        kept: Whether its trained model stays, as other recipes start from it.
    """

    name: str
    title: str
    example: str | None
    evaluations: tuple[Evaluation, ...]
    seeds: int
    rollouts: int = 0
    documents: int = 0
    corpus: str = "seen"
    options: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Recipe] = field(default_factory=dict)
    train_iters: int = 0
    kept: bool = False

    @property
    def objective(self) -> str:
        """Its objective; for the teacher, which is not trained, `opdlm`, as it is decoded."""
        return str({"objective": "opdlm", **self._example_options(), **self.options}["objective"])

    @property
    def mixes_teacher_responses(self) -> bool:
        """Whether some of its rollouts are answered by the teacher."""
        options = {**self._example_options(), **self.options}
        return float(options.get("teacher_response_fraction", 0)) > 0

    def with_models(self) -> Iterator[Recipe]:
        """All recipes that it needs, itself last."""
        for recipe in self.models.values():
            yield from recipe.with_models()
        yield self

    def _example_options(self) -> dict[str, Any]:
        return {} if self.example is None else read_yaml(self.example)

    def _rollout_options(self) -> dict[str, Any]:
        """Of its own rollouts; of those that it is compared with where it has none."""
        own = self._example_options()
        return own if "rollout_batch_size" in own else read_yaml(ROLLOUT_RECIPE)

    @property
    def num_prompts(self) -> int:
        """Prompts in its file: each rollout, or each update without any, takes new ones."""
        if self.train_iters:
            return self.train_iters * int(self._example_options()["global_batch_size"])
        return self.rollouts * int(self._rollout_options()["rollout_batch_size"])

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        options = self._rollout_options()
        visits = self.num_prompts * int(options.get("epochs_per_rollout", 1))
        return self.train_iters or visits // int(options["global_batch_size"])

    @property
    def block_size(self) -> int:
        """Tokens of a block in training."""
        return int(self.options.get("block_size", TRAINED_BLOCK_SIZE))

    def training_options(self, seed: int) -> dict[str, Any] | None:
        """All options of training but paths."""
        if self.example is None:
            return None
        options = read_yaml(self.example)
        for path in ("save", "prompts", "teacher_responses", "train_data", *self.models):
            options.pop(path, None)
        duration = (
            {"num_rollouts": self.rollouts}
            if "num_rollouts" in options
            else {"train_iters": self.updates}
        )
        # A quick look at a few updates has no room for the example's warm-up.
        warmup = min(options.get("lr_warmup_iters", 0), self.updates // 10)
        return {
            **options,
            **duration,
            "lr_warmup_iters": warmup,
            "seed": seed,
            "tensorboard": False,
            **self.options,
        }


def read_yaml(path: str) -> dict[str, Any]:
    """A flat recipe of the repository."""
    options = _read_yaml(path)
    assert isinstance(options, dict), path
    return copy.deepcopy(options)


@cache
def _read_yaml(path: str) -> Any:
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


def max_response_length() -> int:
    """Longest response in tokens, in training and in evaluation."""
    return int(read_yaml(ROLLOUT_RECIPE)["max_response_length"])


_BLOCK_SETTINGS = ("static", *(f"dynamic:{threshold:g}" for threshold in THRESHOLDS))
_BLOCKS = {
    size: Evaluation(f"block_{size}", _BLOCK_SETTINGS, block_size=size) for size in BLOCK_SIZES
}
_AUTOREGRESSIVE = (
    Evaluation("autoregressive", ("autoregressive",)),
    Evaluation("seen_autoregressive", ("autoregressive",), "seen"),
    Evaluation("unseen_autoregressive", ("autoregressive",), "unseen"),
)
_FORGETTING = (
    Evaluation("seen", ("static",), "seen", TRAINED_BLOCK_SIZE),
    Evaluation("unseen", ("static",), "unseen", TRAINED_BLOCK_SIZE),
    *_AUTOREGRESSIVE[1:],
)


def recipes(sizes: Sizes) -> list[Recipe]:
    """All recipes, in the order of the report."""
    blocks = tuple(_BLOCKS.values())
    # The shipped recipe begins with the teacher's responses: a row of its own.
    on_policy = {
        "teacher_response_fraction": 0.0,
        "teacher_response_fraction_schedule": "constant",
    }

    def conversion(name: str, title: str, example: str, **options: Any) -> Recipe:
        return Recipe(name, title, example, blocks, sizes.seeds, sizes.rollouts, options=options)

    def pretraining(name: str, title: str, **options: Any) -> Recipe:
        return Recipe(
            name,
            title,
            SCP_RECIPE,
            _FORGETTING,
            sizes.seeds,
            # Half as many updates as the others': a pass over its corpus.
            max(1, sizes.rollouts // 2),
            sizes.documents,
            options=options,
        )

    def annealed(name: str, title: str, corpus: str) -> Recipe:
        """The same eight times as long, from causal to full attention and with a falling rate."""
        whole = replace(
            pretraining(name, title),
            seeds=sizes.single_seeds,
            rollouts=max(1, sizes.rollouts * 4),
            documents=8 * sizes.documents,
            corpus=corpus,
        )
        options = {
            "attention_annealing_iters": whole.updates * 3 // 10,
            "lr": 1e-3,
            "min_lr": 2e-5,
            "lr_decay_style": "cosine",
        }
        return replace(whole, options=options)

    # Begins with one block, which a prompt alone decides, and is as long as it can be after 5/16.
    growth = {
        **on_policy,
        "response_length_schedule": "linear",
        "response_length_warmup_rollouts": max(1, sizes.rollouts * 5 // 16),
        "micro_batch_size": 16,
    }

    def growing(name: str, title: str, **changes: Any) -> Recipe:
        """On-policy distillation whose responses grow, with some options changed."""
        size = int(changes.get("block_size", TRAINED_BLOCK_SIZE))
        options = {**growth, "min_response_length": size, **changes}
        return Recipe(
            name,
            title,
            ROLLOUT_RECIPE,
            (_BLOCKS[size],),
            sizes.single_seeds,
            sizes.rollouts,
            options=options,
        )

    def larger_blocks(name: str, title: str, size: int, load: Recipe) -> Recipe:
        """Half as long as others, with larger blocks, from a student that decodes smaller ones."""
        return Recipe(
            name,
            title,
            ROLLOUT_RECIPE,
            (_BLOCKS[size],),
            sizes.single_seeds,
            max(1, sizes.rollouts // 2),
            options={**on_policy, "block_size": size, "micro_batch_size": 16, "finetune": True},
            models={"load": load},
        )

    def beginning(recipe: Recipe, rollouts: int, **changes: Any) -> Recipe:
        """The first rollouts of a longer run, with its learning rates, or as `changes` say."""
        whole = recipe.training_options(1) or {}
        schedule = {"lr_decay_iters": recipe.updates, "lr_warmup_iters": whole["lr_warmup_iters"]}
        options = {**recipe.options, **schedule, **changes}
        return replace(recipe, rollouts=max(1, min(rollouts, recipe.rollouts)), options=options)

    def cold_start(name: str, title: str, **options: Any) -> Recipe:
        """The beginning of `opdlm` with an option changed."""
        whole = replace(opdlm, name=name, title=title, evaluations=blocks[:1])
        short = beginning(whole, sizes.cold_start_rollouts, micro_batch_size=16, **options)
        return replace(short, seeds=sizes.cold_start_seeds)

    def autoregressive(name: str) -> Recipe:
        """A next-token model of another size, of the configuration with its name."""
        return Recipe(
            name,
            f"AR model {name}, not converted",
            NEXT_TOKEN,
            _AUTOREGRESSIVE[:1],
            sizes.single_seeds,
            train_iters=sizes.teacher_updates,
            options={"model_config": f"benchmarks/study/{name}.json"},
            kept=True,
        )

    attention = float(read_yaml(SCP_RECIPE)["lr"])
    rnd1_groups = [{"pattern": "default", "lr": attention * RND1_RATIO}, {"pattern": "attention"}]
    opdlm = conversion("opdlm", "OPDLM, states per block", ROLLOUT_RECIPE, **on_policy)
    grown = replace(
        growing("opdlm_grown", "OPDLM, responses grow from one block"),
        seeds=sizes.seeds,
        kept=True,
    )
    eights = replace(
        larger_blocks("blocks_8_after_4", "OPDLM, blocks of 8 after those of 4", 8, grown),
        kept=True,
    )
    sixteens = larger_blocks(
        "blocks_16_after_8", "OPDLM, blocks of 16 after those of 8", 16, eights
    )
    small, middle = autoregressive("qwen3_64"), autoregressive("qwen3_96")
    return [
        Recipe(
            "teacher",
            "AR teacher, not converted",
            None,
            (*_AUTOREGRESSIVE, _BLOCKS[TRAINED_BLOCK_SIZE]),
            seeds=1,
        ),
        # As in the paper's table 11: cross entropy on the responses that off-policy distils.
        conversion("sft", "SFT on the teacher's responses", OFF_POLICY, objective="sft"),
        conversion("off_policy", "off-policy distillation", OFF_POLICY),
        conversion("opdlm_off", "OPDLM, random states", RANDOM_STATES),
        opdlm,
        conversion(
            "opdlm_global",
            "OPDLM, global states",
            ROLLOUT_RECIPE,
            state_selection="global",
            **on_policy,
        ),
        Recipe(
            "best",
            "OPDLM, teacher's responses first, long run",
            ROLLOUT_RECIPE,
            blocks,
            sizes.best_seeds,
            sizes.best_rollouts,
        ),
        grown,
        cold_start("half_rate", "OPDLM, half the learning rate", lr=5e-4, min_lr=5e-5),
        cold_start(
            "long_warm_up",
            "OPDLM, five times the warm-up",
            lr_warmup_iters=max(1, opdlm.updates // 5),
        ),
        cold_start("cool", "OPDLM, temperature 0.5", temperature=0.5),
        growing("blocks_8", "OPDLM, growing, blocks of 8", block_size=8),
        growing("blocks_16", "OPDLM, growing, blocks of 16", block_size=16),
        eights,
        sixteens,
        Recipe(
            "d_opsd",
            "d-OPSD after growing responses",
            "examples/tiny/d_opsd.yaml",
            blocks[:1],
            sizes.seeds,
            sizes.self_rollouts,
            models={"load": grown},
        ),
        small,
        middle,
        *(
            replace(
                growing(
                    f"{student.name}_from_{teacher}",
                    f"OPDLM, {student.name}, teacher {teacher}",
                    finetune=True,  # its own run begins with the loaded weights
                ),
                models={"load": student, **models},
            )
            for student in (small, middle)
            for teacher, models in (
                (small.name, {"teacher_load": small}),
                (middle.name, {"teacher_load": middle}),
                ("qwen3", {}),
            )
            # A teacher that solves less than its student has nothing to give.
            if (student, teacher) != (middle, small.name)
        ),
        pretraining("scp_one_lr", "SCP, one learning rate"),
        pretraining(
            "scp_rnd1_groups",
            "SCP, RND1's rates by parameter group",
            param_groups=rnd1_groups,
        ),
        replace(
            pretraining("scp_long", "SCP, one learning rate, four times as long"),
            seeds=sizes.single_seeds,
            rollouts=max(1, sizes.rollouts * 2),
            documents=4 * sizes.documents,
        ),
        annealed("scp_annealed", "SCP, attention annealed, eight times as long", "seen"),
        annealed("scp_annealed_all", "SCP, annealed, all kinds in the corpus", "heldout"),
    ]
