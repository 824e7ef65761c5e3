"""Training and evaluation of the study: its sizes, and one row of a table per recipe.

A recipe is a shipped example with a few options changed, so retuning the example retunes the study.
All recipes see the same prompts equally often and take the same number of updates, unless their
titles say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from benchmarks.environment import REPOSITORY

TEACHER = "examples/tiny/qwen3"
ROLLOUT_RECIPE = "examples/tiny/opdlm.yaml"
SCP_RECIPE = "benchmarks/study/scp.yaml"
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
        documents: Documents of the corpus that SCP is pretrained on.
        heldout: Held-out problems that each setting is evaluated on.
        pretraining_heldout: The same of each kind after SCP; fewer, as it decodes without a cache.
    """

    seeds: int = 3
    best_seeds: int = 3
    rollouts: int = 80
    best_rollouts: int = 160
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
        options: Changes of its options.
        evaluations: Evaluations after training.
        seeds: Number of runs.
        rollouts: Length of training, as `Sizes.rollouts`.
        documents: Documents of its corpus, 0 where it trains on prompts.
    """

    name: str
    title: str
    example: str | None
    evaluations: tuple[Evaluation, ...]
    seeds: int
    rollouts: int = 0
    documents: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """Its objective; for the teacher, which is not trained, `opdlm`, as it is decoded."""
        return str({"objective": "opdlm", **self._example_options(), **self.options}["objective"])

    @property
    def mixes_teacher_responses(self) -> bool:
        """Whether some of its rollouts are answered by the teacher."""
        options = {**self._example_options(), **self.options}
        return float(options.get("teacher_response_fraction", 0)) > 0

    def _example_options(self) -> dict[str, Any]:
        return {} if self.example is None else read_yaml(self.example)

    @property
    def num_prompts(self) -> int:
        """Prompts in its file: each rollout takes new ones."""
        return self.rollouts * int(read_yaml(ROLLOUT_RECIPE)["rollout_batch_size"])

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        rollout_recipe = read_yaml(ROLLOUT_RECIPE)
        visits = self.num_prompts * int(rollout_recipe.get("epochs_per_rollout", 1))
        return visits // int(rollout_recipe["global_batch_size"])

    def training_options(self, seed: int) -> dict[str, Any] | None:
        """All options of training but paths."""
        if self.example is None:
            return None
        options = read_yaml(self.example)
        for path in ("save", "prompts", "teacher_responses"):
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
    options = yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))
    assert isinstance(options, dict), path
    return options


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
        path = f"examples/tiny/{example}.yaml"
        return Recipe(name, title, path, blocks, sizes.seeds, sizes.rollouts, options=options)

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
            options,
        )

    attention = float(read_yaml(SCP_RECIPE)["lr"])
    rnd1_groups = [{"pattern": "default", "lr": attention * RND1_RATIO}, {"pattern": "attention"}]
    return [
        Recipe(
            "teacher",
            "AR teacher, not converted",
            None,
            (*_AUTOREGRESSIVE, _BLOCKS[TRAINED_BLOCK_SIZE]),
            seeds=1,
        ),
        # As in the paper's table 11: cross entropy on the responses that off-policy distils.
        conversion("sft", "SFT on the teacher's responses", "off_policy", objective="sft"),
        conversion("off_policy", "off-policy distillation", "off_policy"),
        conversion("opdlm_off", "OPDLM, random states", "opdlm_off"),
        conversion("opdlm", "OPDLM, states per block", "opdlm", **on_policy),
        conversion(
            "opdlm_global",
            "OPDLM, global states",
            "opdlm",
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
        pretraining("scp_one_lr", "SCP, one learning rate"),
        pretraining(
            "scp_rnd1_groups",
            "SCP, RND1's rates by parameter group",
            param_groups=rnd1_groups,
        ),
    ]
