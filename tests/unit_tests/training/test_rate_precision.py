"""Rates that bf16 hides are named, others are not; and the estimate holds for real updates."""

import pytest
import torch

from megatron_dlm.config import Config
from megatron_dlm.training.rate_precision import config_of_run, unseen_in_bf16

RND1 = {"objective": "scp", "param_group_preset": "rnd1", "train_iters": 14_901}


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (RND1, ["default"]),
        ({**RND1, "param_group_preset": None, "lr": 3e-4}, []),
        ({"prompts": "p", "num_rollouts": 482, "lr": 1e-5}, []),
        ({**RND1, "param_group_preset": None, "lr": 1e-8}, ["default"]),
        (
            {
                **RND1,
                "param_group_preset": None,
                "lr": 1e-4,
                "param_groups": [{"pattern": "norm", "lr": 1e-9}, {"pattern": "mlp", "lr": 0.0}],
            },
            ["norm"],
        ),
    ],
)
def test_groups_that_bf16_hides(options: dict[str, object], groups: list[str]) -> None:
    warnings = unseen_in_bf16(Config.from_dict(options), 0.02)
    assert [line.split("parameter group ")[1].split(":")[0] for line in warnings] == groups


def test_a_saved_configuration_with_more_keys_is_read() -> None:
    saved = Config.from_dict(RND1).to_dict() | {"data_fingerprint": "x"}
    assert config_of_run(saved) == Config.from_dict(RND1)


def test_the_estimate_holds_for_adam_with_random_gradients() -> None:
    torch.manual_seed(0)
    start = (0.02 * torch.randn(2000)).bfloat16().float()
    weight = torch.nn.Parameter(start.clone())
    lr, updates = 1e-8, 400
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.1)
    for _ in range(updates):
        weight.grad = torch.randn(2000)
        optimizer.step()
    drift = (weight.detach() - start).square().mean().sqrt()
    assert lr * updates**0.5 / 3 < drift < 3 * lr * updates**0.5
    usual = start.abs() > 0.01
    assert torch.equal(weight.detach().bfloat16().float()[usual], start[usual])
    assert not torch.equal(weight.detach()[usual], start[usual])
