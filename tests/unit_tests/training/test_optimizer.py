"""Parameter groups: every parameter in the right one, rates and decay applied, patterns checked."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.training.optimizer import GROUPS, _pattern, learning_rates
from megatron_dlm.training.student import Student, build_student
from tests.tiny import save_random_model

pytestmark = pytest.mark.usefixtures("single_process")


def _student(folder: Path, moe: bool = False, **options: Any) -> Student:
    path = save_random_model(folder / "m", moe=moe, tie_word_embeddings=False)
    config = Config.from_dict(
        {"device": "cpu", "lr_warmup_iters": 4, "lr_decay_iters": 20, **options}
    )
    return build_student(build_model(read_architecture(path), config), config)


@pytest.mark.parametrize("moe", [False, True])
def test_named_groups_share_no_parameter_and_leave_none_out(tmp_path: Path, moe: bool) -> None:
    student = _student(tmp_path, moe)
    from megatron_dlm.config import ParameterGroup

    for name, _ in student.model.named_parameters():
        matching = [g for g in GROUPS if _pattern(ParameterGroup(pattern=g)).search(name)]
        assert len(matching) == 1, (name, matching)
        expected = {
            "q_layernorm": "norm",
            "linear_qkv": "attention",
            "linear_proj": "attention",
            "experts": "experts",
            "router": "router",
            "word_embeddings": "embedding",
            "output_layer": "output",
            "linear_fc": "mlp",
            "layernorm": "norm",
        }
        assert matching[0] == next(group for key, group in expected.items() if key in name)


def test_rates_and_decay_of_each_group(tmp_path: Path) -> None:
    student = _student(
        tmp_path,
        lr=1e-3,
        min_lr=1e-4,
        weight_decay=0.01,
        param_groups=[
            {"pattern": "attention", "lr": 4e-3, "weight_decay": 0.5},
            {"pattern": "embedding", "lr": 1e-8, "min_lr": 1e-8},
        ],
    )
    assert learning_rates(student.optimizer) == {"attention": 0.0, "embedding": 0.0, "default": 0.0}
    student.scheduler.step(increment=4)
    assert learning_rates(student.optimizer) == {
        "attention": 4e-3,
        "embedding": 1e-8,
        "default": 1e-3,
    }
    student.scheduler.step(increment=8)  # half of the decay
    middle = 0.5 * (math.cos(math.pi / 2) + 1)
    rates = learning_rates(student.optimizer)
    assert rates["attention"] == pytest.approx(1e-4 + middle * (4e-3 - 1e-4))
    assert rates["embedding"] == pytest.approx(1e-8)
    for name, value in _weight_decay(student).items():
        if "layernorm" in name:
            assert value == 0.0, name
        elif "self_attention.linear" in name:
            assert value == 0.5, name
        else:
            assert value == 0.01, name


def test_all_rates_grow_by_the_square_root_of_the_batch(tmp_path: Path) -> None:
    student = _student(
        tmp_path,
        lr=1e-3,
        min_lr=1e-4,
        global_batch_size=32,
        lr_batch_size=8,
        param_groups=[{"pattern": "attention", "lr": 4e-3, "min_lr": 4e-4}],
    )
    student.scheduler.step(increment=4)
    assert learning_rates(student.optimizer) == {"attention": 8e-3, "default": 2e-3}
    student.scheduler.step(increment=16)
    ended = learning_rates(student.optimizer)
    assert ended == pytest.approx({"attention": 8e-4, "default": 2e-4})


def _weight_decay(student: Student) -> dict[str, float]:
    by_id = {id(param): name for name, param in student.model.named_parameters()}
    return {
        by_id[id(param)]: group["weight_decay"]
        for group in student.optimizer.param_groups
        for param in group["params"]
    }


@pytest.mark.parametrize("moe", [False, True])
def test_the_preset_of_rnd1(tmp_path: Path, moe: bool) -> None:
    student = _student(tmp_path, moe, param_group_preset="rnd1", lr_decay_style="constant", lr=7.0)
    for _ in range(2):  # the end of the warm-up, and long after it
        student.scheduler.step(increment=4)
        assert learning_rates(student.optimizer) == {"attention": 3e-4, "default": 1e-8}
    rate = {
        id(param): group["lr"]
        for group in student.optimizer.param_groups
        for param in group["params"]
    }
    for name, param in student.model.named_parameters():
        projection = "linear_qkv.weight" in name or "linear_proj.weight" in name
        assert rate[id(param)] == (3e-4 if projection else 1e-8), name
    for name, decay in _weight_decay(student).items():
        assert decay == (0.0 if "layernorm" in name else 0.1), name


def test_a_warm_up_fraction_is_one_of_the_decay(tmp_path: Path) -> None:
    options = dict(lr=1.0, min_lr=0.0, lr_decay_style="constant", lr_decay_iters=40)
    by_fraction = _student(tmp_path, **options, lr_warmup_iters=0, lr_warmup_fraction=0.1)
    by_steps = _student(tmp_path, **options, lr_warmup_iters=4)
    for expected in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        for student in (by_fraction, by_steps):
            assert learning_rates(student.optimizer) == {"default": expected}
            student.scheduler.step(increment=1)


def test_a_constant_rate_may_be_below_the_default_end_of_a_decay(tmp_path: Path) -> None:
    student = _student(tmp_path, lr=1e-8, lr_decay_style="constant", lr_warmup_iters=0)
    student.scheduler.step(increment=40)
    assert learning_rates(student.optimizer) == {"default": 1e-8}


@pytest.mark.parametrize("pattern", ["router", "no_such_parameter", "("])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"param_groups"):
        _student(tmp_path, param_groups=[{"pattern": pattern, "lr": 1e-4, "min_lr": 0}])


def test_overlapping_patterns_are_an_error(tmp_path: Path) -> None:
    groups = [{"pattern": "mlp", "lr": 1e-4}, {"pattern": "linear_fc1", "lr": 1e-5}]
    with pytest.raises(UserError, match="disjoint"):
        _student(tmp_path, param_groups=groups, min_lr=0)


def test_a_tiny_rate_moves_fp32_master_weights_of_a_bf16_model(tmp_path: Path) -> None:
    student = _student(tmp_path, bf16=True, lr=1e-8, min_lr=0, lr_warmup_iters=0)
    weight = student.model.decoder.layers[0].mlp.linear_fc1.weight
    assert weight.dtype == torch.bfloat16
    before = weight.detach().clone()
    for param in student.model.parameters():
        param.main_grad.fill_(1.0)
    student.optimizer.step()
    master = weight.main_param
    assert master.dtype == torch.float32
    assert not torch.equal(master, before.float())
    assert torch.equal(weight, before)  # too small a step for the bf16 copy to show
