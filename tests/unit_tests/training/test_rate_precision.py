"""Rates that bf16 hides are named, others are not; and the estimate holds for real updates."""

import pytest
import torch

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture, architecture_from_hf
from megatron_dlm.training.rate_precision import config_of_run, unseen_in_bf16
from tests.tiny import DENSE

RND1 = {"objective": "scp", "param_group_preset": "rnd1", "train_iters": 14_901}


# examples/qwen3_8b/d_opsd.yaml: its adapters move visibly, what they are merged into does not.
LORA = {"objective": "d_opsd", "num_rollouts": 16, "lr": 5e-6, "lora_rank": 128}


def architecture(hidden_size: int) -> Architecture:
    sizes = {**DENSE, "hidden_size": hidden_size, "initializer_range": 0.02, "rope_theta": 1e4}
    return architecture_from_hf({"model_type": "qwen3", **sizes})


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (RND1, ["default"]),
        ({**RND1, "param_group_preset": None, "lr": 3e-4}, []),
        ({"prompts": "p", "num_rollouts": 482, "lr": 1e-5}, []),
        ({**LORA, "lora_alpha": 64}, ["default"]),
        ({**LORA, "lora_alpha": 6400}, []),
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
    warnings = unseen_in_bf16(Config.from_dict(options), architecture(4096))
    assert [line.split("parameter group ")[1].split(":")[0] for line in warnings] == groups


def test_the_estimate_holds_for_merged_adapters() -> None:
    torch.manual_seed(0)
    rank, alpha, inputs, lr, updates = 8, 4, 256, 1e-6, 400
    a = torch.nn.Parameter((2 * torch.rand(rank, inputs) - 1) / inputs**0.5)
    b = torch.nn.Parameter(torch.zeros(64, rank))
    optimizer = torch.optim.AdamW([a, b], lr=lr)
    for _ in range(updates):
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        optimizer.step()
    moved = float((alpha / rank * b @ a).detach().square().mean().sqrt())
    options = {"lr": lr, "lora_rank": rank, "lora_alpha": alpha, "global_batch_size": 4}
    config = Config.from_dict({**options, "num_rollouts": updates, "rollout_batch_size": 4})
    [warning] = unseen_in_bf16(config, architecture(inputs))
    assert f"{updates} updates at 1e-06 move a merged weight" in warning
    estimate = float(warning.split("by about ")[1].split(",")[0])
    assert estimate / 3 < moved < 3 * estimate


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
