"""Equivalences of one update: recomputation, packing, micro-batches, teacher and loss weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dlm.config.rules import values
from megatron_dlm.models.lora_layers import LoRAColumnParallelLinear
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.training import loop
from megatron_dlm.training.run import Run
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    write_data(folder)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    return folder


@pytest.fixture(autouse=True)
def no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is saved: a checkpoint takes longer than an update."""
    monkeypatch.setattr(Run, "save", lambda *_, **__: None)


@pytest.fixture(scope="module")
def references() -> dict[str, list[dict[str, Any]]]:
    """Runs without further options, by model, as they are asked for."""
    return {}


def _reference(
    folder: Path, references: dict[str, list[dict[str, Any]]], model: str = "dense"
) -> list[dict[str, Any]]:
    if model not in references:
        references[model] = _run(folder, folder / f"reference_{model}", model)
    return references[model]


def _run(
    folder: Path, tmp_path: Path, model: str = "dense", **options: Any
) -> list[dict[str, Any]]:
    if "objective" not in options:
        options = {"rollout_batch_size": 8, **options}
    return run_training(run_config(folder, folder / model, save=str(tmp_path / "run"), **options))


def _check(lines: list[dict[str, Any]], reference: list[dict[str, Any]], rel: float) -> None:
    assert len(lines) == len(reference) > 0
    for line, expected in zip(lines, reference, strict=True):
        assert line["supervised_tokens"] == expected["supervised_tokens"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=rel)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=rel)


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize(
    "options",
    [
        dict(recompute_granularity="full", recompute_method="uniform"),
        dict(recompute_granularity="full", recompute_method="block"),
        dict(recompute_granularity="selective"),
        dict(recompute_granularity="selective", recompute_modules=("mlp",)),
    ],
    ids=["full uniform", "full block", "selective", "selective parts"],
)
def test_recomputation_changes_nothing(
    folder: Path,
    references: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    model: str,
    options: dict[str, Any],
) -> None:
    if model == "moe" and "recompute_modules" in options:
        options = {**options, "recompute_modules": ("core_attn", "moe")}
    recomputed = _run(folder, tmp_path / "on", model, **options)
    _check(recomputed, _reference(folder, references, model), rel=1e-6)


@pytest.mark.slow
def test_two_modes_train_alike_however_it_is_computed(folder: Path, tmp_path: Path) -> None:
    options = dict(context_attention="causal", causal_loss_weight=0.5, num_rollouts=1)
    lines = _run(folder, tmp_path / "plain", **options)
    for name, changes in (
        ("recomputed", dict(recompute_granularity="full")),
        ("packed", dict(micro_batch_size=4)),
    ):
        others = _run(folder, tmp_path / name, **options, **changes)
        _check(others, lines, rel=1e-5)
        for line, other in zip(lines, others, strict=True):
            # The student begins as the teacher: at first there is nothing but rounding.
            assert other["causal_loss"] == pytest.approx(line["causal_loss"], rel=1e-5, abs=1e-7)
            assert other["loss_by_position"] == pytest.approx(line["loss_by_position"], rel=1e-5)
    # The first update: the mean over positions in a block is that of the MASKs alone.
    without = _run(folder, tmp_path / "without", **{**options, "causal_loss_weight": 0.0})
    assert without[0]["causal_loss"] is None
    assert lines[0]["loss_by_position"] == pytest.approx(without[0]["loss_by_position"], rel=1e-5)
    assert lines[0]["student_entropy"] > 0
    # The second update: the first one's second loss had no gradient, so the weights are the same.
    assert lines[1]["causal_loss"] > 1e-3
    second = lines[1]["loss"] - without[1]["loss"]
    assert second == pytest.approx(0.5 * lines[1]["causal_loss"], rel=0.05)


@pytest.mark.slow
def test_dropout_of_adapters_is_the_same_however_it_is_computed(
    folder: Path, tmp_path: Path
) -> None:
    options = dict(lora_rank=3, lora_dropout=0.4, rollout_batch_size=12, lr=1e-2)
    dropped = _run(folder, tmp_path / "dropped", **options)
    recomputed = _run(folder, tmp_path / "again", recompute_granularity="full", **options)
    _check(recomputed, dropped, rel=1e-6)
    _check(_run(folder, tmp_path / "packed", micro_batch_size=4, **options), dropped, rel=1e-5)
    whole = _run(folder, tmp_path / "whole", **{**options, "lora_dropout": 0.0})
    # The rollout is that of the whole model, and B is still zero in the first update.
    assert whole[0]["tokens_per_forward"] == dropped[0]["tokens_per_forward"]
    assert whole[0]["loss"] == pytest.approx(dropped[0]["loss"], rel=1e-6)
    assert whole[0]["grad_norm"] != pytest.approx(dropped[0]["grad_norm"], rel=1e-2)
    assert whole[2]["loss"] != pytest.approx(dropped[2]["loss"], rel=1e-4)


UPDATES_OF: dict[str, dict[str, Any]] = {
    "opdlm": {},
    "opdlm causal context": dict(context_attention="causal"),
    "opdlm all": dict(state_selection="all", loss_normalization="row_mean"),
    "opdlm_off": {},
    "off_policy": dict(train_iters=1),
    "sft": dict(train_iters=1),
    "scp": dict(train_iters=1),
    "next_token": dict(train_iters=1),
    "d_opsd": dict(lora_rank=2, loss_normalization="row_mean"),
}
"""One update of each objective."""


@pytest.mark.parametrize("name", UPDATES_OF)
@pytest.mark.slow
def test_a_budget_of_tokens_changes_no_gradient(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-6 in float32, elementwise; rows of several documents and of one that is longer."""
    lengths: list[list[int]] = []
    gradients: list[torch.Tensor] = []
    train_step = loop.train_step

    def watched(*arguments: Any) -> Any:
        result = train_step(*arguments)
        lengths.append([len(batch.row.token_ids) for batch in arguments[4]])
        parameters = [p for chunk in arguments[0] for p in chunk.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.main_grad.flatten() for p in parameters]))
        return result

    monkeypatch.setattr(loop, "train_step", watched)
    options = {"objective": name.split()[0], "global_batch_size": 8, **UPDATES_OF[name]}
    if "train_iters" not in options:
        options["rollout_batch_size"] = 8
    model = "dense"
    if name == "d_opsd":
        model = "full"
        if not (folder / model).exists():
            save_random_model(folder / model)
            declare_diffusion_kind(folder / model, "full", shifted=True)
    with reward_every_third():
        one = _run(folder, tmp_path / "one", model, **options)
        # Two documents fit together, eight do not; or a document is cut between its texts.
        budget = 100 if name == "d_opsd" else max(lengths[0]) + min(lengths[0])
        limits = dict(micro_batch_size=1, max_tokens_per_micro_batch=budget)
        packed = _run(folder, tmp_path / "packed", model, **options, **limits)
    _check(packed, one, rel=1e-6)
    alone, together = gradients
    assert float((together - alone).abs().max()) <= 1e-6 * float(alone.abs().max())
    assert sum(lengths[0]) == sum(lengths[1])
    assert len(lengths[0]) == 8
    assert len(lengths[1]) != 8


def test_packing_changes_nothing_and_row_mean_weighs_trajectories_equally(
    folder: Path, references: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    token = _run(folder, tmp_path / "token", micro_batch_size=2)
    _check(token, _reference(folder, references), rel=1e-5)
    rows = _run(folder, tmp_path / "row", micro_batch_size=2, loss_normalization="row_mean")
    split = _run(folder, tmp_path / "split", micro_batch_size=1, loss_normalization="row_mean")
    _check(rows, split, rel=1e-5)
    assert rows[0]["loss"] != pytest.approx(token[0]["loss"], rel=1e-3)


def test_bf16_stays_near_float32(folder: Path, tmp_path: Path) -> None:
    options = dict(objective="next_token", train_iters=3)  # the same tokens whatever the precision
    single = _run(folder, tmp_path / "fp32", **options)
    half = _run(folder, tmp_path / "bf16", bf16=True, **options)
    for line, expected in zip(half, single, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-2)


def test_epochs_draw_new_states_from_the_same_rollout(folder: Path, tmp_path: Path) -> None:
    lines = _run(folder, tmp_path / "epochs", epochs_per_rollout=2)
    assert [line["rollout"] for line in lines] == [1] * 4
    assert len({line["response_tokens_total"] for line in lines}) == 1
    # Each epoch trains on all of them.
    tokens = [line["trained_tokens_total"] for line in lines]
    assert tokens[1] == lines[0]["response_tokens_total"]
    assert tokens[3] == 2 * tokens[1] > tokens[2] > tokens[1] > tokens[0] > 0
    assert [lines[i]["supervised_tokens"] for i in (0, 1)] != [
        lines[i]["supervised_tokens"] for i in (2, 3)
    ]


@pytest.mark.parametrize(
    ("model", "options", "rule"),
    [
        ("dense", {}, 8),  # 6 for the student, 2 for the teacher, which is of the same size
        ("dense", {"objective": "next_token"}, 6),
        # Eight windows of 48 tokens an update, the last of all tokens left over.
        ("dense", {"objective": "scp", "global_batch_size": 8, "train_iters": 2}, 6),
    ],
)
def test_flops_are_counted_as_the_paper_does(
    folder: Path, tmp_path: Path, model: str, options: dict[str, Any], rule: int
) -> None:
    lines = _run(folder, tmp_path, model, **options)
    parameters = AutoModelForCausalLM.from_pretrained(folder / model).num_parameters()
    for line in lines:
        assert line["flops_total"] == rule * parameters * line["trained_tokens_total"]
    assert lines[-1]["trained_tokens_total"] == lines[-1]["response_tokens_total"] > 0
    if options.get("objective") == "scp":
        assert lines[-1]["trained_tokens_total"] == 2 * 8 * 48


def test_rollouts_follow_the_threshold_schedule(folder: Path, tmp_path: Path) -> None:
    lines = _run(
        folder,
        tmp_path,
        num_rollouts=3,
        dynamic_threshold=1.0,
        final_dynamic_threshold=1e-3,
        dynamic_threshold_schedule="linear",
        dynamic_threshold_hold_rollouts=1,
        dynamic_threshold_rollouts=1,
    )
    one_by_one, *at_once = [line["tokens_per_forward"] for line in lines[::2]]
    assert one_by_one <= 1.0
    assert min(at_once) > 2.0


def test_the_teacher_is_untouched_by_updates(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    annotate = FrozenTeacher.annotate

    def watched(self: FrozenTeacher, trajectories: Any) -> None:
        assert not self.model.training
        assert not any(parameter.requires_grad for parameter in self.model.parameters())
        annotate(self, trajectories)
        weights.append({name: p.clone() for name, p in self.model.named_parameters()})

    monkeypatch.setattr(FrozenTeacher, "annotate", watched)
    _run(folder, tmp_path, num_rollouts=2)  # two updates between the two phases
    first, second = weights
    assert len(first) > 10
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_products_in_fp8_have_whole_tiles_and_the_newest_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the products: layers here have no FP8, so results are those without it."""
    products: list[tuple[int, bool, bool]] = []
    linear = LoRAColumnParallelLinear
    forward = linear.forward

    def watched(self: Any, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.config.fp8 is not None:  # not the teacher
            products.append((len(rows), torch.is_grad_enabled(), self.is_first_microbatch))
            self.is_first_microbatch = False  # as layers of Transformer Engine do
        return forward(self, rows, *args, **kwargs)

    options = dict(num_rollouts=2, rollout_batch_size=8)
    reference = _run(folder, tmp_path / "without", **options)
    monkeypatch.setattr(values, "_fp8", lambda config: iter(()))
    monkeypatch.setattr(linear, "is_first_microbatch", True, raising=False)
    monkeypatch.setattr(linear, "forward", watched)
    _check(_run(folder, tmp_path / "with", fp8_format="hybrid", **options), reference, rel=1e-5)

    assert {rows % 16 for rows, *_ in products} == {0}
    layers = 4  # qkv and fc1 of two layers
    forwards = [products[i : i + layers] for i in range(0, len(products), layers)]
    trains = [forward[0][1] for forward in forwards]
    converts = [forward[0][2] for forward in forwards]
    assert all(product[1:] == forward[0][1:] for forward in forwards for product in forward)
    # Twice a rollout and two updates of 4 rows: weights are converted once whenever they are new.
    one = trains.index(True)
    two = trains.index(True, one + 8)
    assert [i for i, train in enumerate(trains) if train] == [
        *range(one, one + 8),
        *range(two, two + 8),
    ]
    first = {0, one, one + 4, one + 8, two, two + 4}
    assert {i for i, converted in enumerate(converts) if converted} == first
