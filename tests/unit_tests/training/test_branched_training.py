"""Branches differ in the batch size only, aligned in tokens; the critical one is found."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config import Config, validate
from megatron_dlm.errors import UserError
from megatron_dlm.training.branched_training import (
    Branch,
    BranchResult,
    critical_batch_size,
    plan_branches,
)
from tests.tiny import REPOSITORY, declare_diffusion_kind

MODEL = REPOSITORY / "examples" / "tiny" / "qwen3"
BASE: dict[str, Any] = dict(
    objective="scp",
    load="elsewhere",
    data_path="corpus",
    valid_data_path="held_out",
    seq_length=100,
    train_iters=1000,
    global_batch_size=8,
    eval_interval=16,
    eval_iters=4,
    param_group_preset="rnd1",
    lr_decay_style="constant",
    lr_warmup_fraction=0.01,
)


def plan(sizes: list[int], budget: int, load: Path = MODEL, **changes: Any) -> list[Branch]:
    base = Config.from_dict({**BASE, **changes})
    return plan_branches(base, load=str(load), save="study", batch_sizes=sizes, token_budget=budget)


def test_branches_are_aligned_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    branches = plan([32, 2, 8], 32 * 100 * 200)
    assert [branch.batch_size for branch in branches] == [2, 8, 32]
    for branch in branches:
        config, size = branch.config, branch.batch_size
        validate(config, 1)
        assert config.train_iters * size == 6400
        assert config.lr_warmup_iters * size == 64
        assert config.held_out.eval_interval * size == 128
        assert config.held_out.eval_iters * size == 32
        attention, rest = config.param_groups
        assert attention.lr == pytest.approx(3e-4 * (size / 8) ** 0.5)
        assert rest.lr == pytest.approx(1e-8 * (size / 8) ** 0.5)
        assert attention.weight_decay == 0.1
        assert config.mask_embedding_init == "mean"  # as the preset has it
        assert (config.model.load, config.model.finetune) == (str(MODEL), True)
        assert branch.folder == Path(f"study/batch_{size}")
        assert not branch.is_finished
    # Nothing else differs.
    told_apart = {
        "global_batch_size",
        "train_iters",
        "param_groups",
        "eval_interval",
        "eval_iters",
        "save",
    }
    first, last = branches[0].config.to_dict(), branches[-1].config.to_dict()
    assert {name for name in first if first[name] != last[name]} == told_apart


@pytest.mark.parametrize("changes", [{}, {"mask_embedding_init": "mean"}])
def test_a_diffusion_model_keeps_its_mask(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    declare_diffusion_kind(model, "full", shifted=True)
    [branch] = plan([8], 800, load=model, **changes)
    assert branch.config.model.mask_embedding_init is None


def test_steps_of_warm_up_and_decay_are_tokens_too() -> None:
    small, base = plan(
        [4, 8],
        6400 * 100,
        lr_warmup_fraction=None,
        lr_warmup_iters=10,
        lr_decay_iters=500,
        lr_decay_style="cosine",
        min_lr=1e-9,
    )
    assert (small.config.lr_warmup_iters, small.config.lr_decay_iters) == (20, 1000)
    assert (base.config.lr_warmup_iters, base.config.lr_decay_iters) == (10, 500)


@pytest.mark.parametrize(
    ("sizes", "budget", "changes", "message"),
    [
        ([8, 16], 100, {}, r"--token-budget = 100: .*multiple of 1600"),
        ([8, 12], 1600, {}, r"--token-budget = 1600: .*multiple of 2400"),
        ([8, 8], 1600, {}, "--batch-sizes"),
        ([], 1600, {}, "--batch-sizes"),
        ([64], 6400, {}, r"--batch-sizes = 64: does not divide the 32 held-out samples"),
        ([8], 800, {"load": Path("nowhere")}, "--load = 'nowhere'"),
        ([8], 800, {"objective": "sft", "train_data": "x"}, "--training-config = 'sft'"),
    ],
)
def test_what_cannot_be_compared(
    sizes: list[int], budget: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(sizes, budget, **changes)


def result(batch_size: int, loss: float, held_out: float | None) -> BranchResult:
    return BranchResult(batch_size, batch_size * 100, 1e-3, 10, 1000, loss, held_out)


@pytest.mark.parametrize(
    ("losses", "tolerance", "critical"),
    [
        ([2.0, 1.9, 1.95, 2.5], 0.0, 2),
        ([2.0, 1.9, 1.91, 2.5], 0.01, 4),
        ([2.0, 1.9, 1.8, 1.7], 0.0, 8),
        ([2.0, 2.1, 2.2, 2.3], 0.06, 2),
    ],
)
def test_the_largest_batch_within_the_tolerance(
    losses: list[float], tolerance: float, critical: int
) -> None:
    by_validation = [result(2**i, 9.0 - i, loss) for i, loss in enumerate(losses)]
    by_training = [result(2**i, loss, None) for i, loss in enumerate(losses)]
    for results in (by_validation, by_training):
        assert critical_batch_size(results, tolerance).batch_size == critical
