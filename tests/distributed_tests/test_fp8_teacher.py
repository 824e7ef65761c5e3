"""A teacher in 8-bit floats on several ranks: the rounded weights are those of one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.config import Config
from megatron_dlm.models.forward import clean_row, forward_hidden
from megatron_dlm.models.fp8_weights import E4M3
from megatron_dlm.models.model import head_weight
from megatron_dlm.parallel import initialized
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.training.model_source import open_model_source
from tests.distributed_tests.layouts import EP, SP, TP
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.tiny import save_random_model

TOKENS = torch.arange(3, 64)
SIZES: dict[str, Any] = dict(
    initializer_range=0.09,
    hidden_size=128,
    intermediate_size=256,
    head_dim=32,
    moe_intermediate_size=64,
)
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ep": ("moe", {EP: 2}),
    "tp sp": ("moe", {TP: 2, **SP}),
    "dense tp": ("dense", {TP: 2}),
    "dense tp sp": ("dense", {TP: 2, **SP}),
}
"""Of two ranks; "moe" shares experts, or (under TP) splits each of them."""


def _teacher(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Hidden states [S, h], and what the rounded layers hold: values and scales, by name."""
    config = Config.from_dict({"teacher_precision": "fp8", "device": "cpu", **layout})
    with initialized(config):
        model = load_teacher(open_model_source(str(folder), "--teacher-load"), config)
        [hidden] = forward_hidden(model, [clean_row([TOKENS], "causal")]) or []
        found = {name: tensor.float() for name, tensor in model.named_buffers()}
        assert any(tensor.dtype == E4M3 for tensor in model.buffers())
        return {"hidden": hidden, "head": head_weight(model), "weights": found}


def _on_rank(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (kind, layout) in LAYOUTS.items():
        found[name] = _teacher(folder / kind, layout)
        rejoin_world()
    return found


def _log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    return (hidden.double() @ head.double().T).log_softmax(-1)


def test_layouts_have_the_weights_of_one_process_and_say_the_same(tmp_path: Path) -> None:
    for kind in ("dense", "moe"):
        save_random_model(tmp_path / kind, moe=kind == "moe", **SIZES)
    alone = {kind: _teacher(tmp_path / kind, {}) for kind in ("dense", "moe")}
    ranks = run_distributed(_on_rank, 2, tmp_path)
    for name, (kind, layout) in LAYOUTS.items():
        one = alone[kind]
        expected = _log_probs(one["hidden"], one["head"])
        for rank, found in enumerate(of_rank[name] for of_rank in ranks):
            log_q = _log_probs(found["hidden"], one["head"])
            divergence = float((expected.exp() * (expected - log_q)).sum(-1).mean())
            # fp8 itself is up to 2e-2 from float32: this is rounding in bf16 alone.
            assert abs(divergence) < 1e-3, name
            for weight, tensor in found["weights"].items():
                if not weight.endswith((".values", ".scale")):
                    continue
                whole = one["weights"][weight]
                if EP in layout and ".experts." in weight:
                    half = len(whole) // 2
                    whole = whole[rank * half : (rank + 1) * half]
                for axis in range(whole.dim()):
                    if tensor.shape[axis] != whole.shape[axis] and axis == whole.dim() - 1:
                        # Parts of the inputs lie end to end, under one scale of the whole output.
                        whole = whole.chunk(2, axis)[rank]
                if tensor.shape == whole.shape:
                    assert torch.equal(tensor, whole), (name, weight)
                else:  # outputs are dealt out group by group: all of these rows are among those
                    rows = whole.flatten(0, -2)
                    for row in tensor.flatten(0, -2):
                        assert bool((rows == row).all(-1).any()), (name, weight)
