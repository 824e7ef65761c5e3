"""Every parallel layout trains like one process: rollout, teacher, loss, gradient, update."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dlm.training.run import Run
from tests.distributed_tests.layouts import (
    CP,
    DISTRIBUTED_OPTIMIZER,
    EP,
    ETP,
    OVERLAP,
    PP,
    RECOMPUTATION,
    SP,
    TP,
    VIRTUAL,
    Layout,
)
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.families import OTHER_FAMILIES
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

PROMPTS = 16

LAYOUTS: dict[str, Layout] = {
    "TP2": Layout(2, "dense", {TP: 2}),
    "TP2 SP": Layout(2, "dense", {TP: 2, **SP}, variants=True),
    "PP2": Layout(2, "dense", {PP: 2}, variants=True),
    "PP2 recomputation": Layout(2, "dense", {PP: 2, **RECOMPUTATION}),
    "CP2": Layout(2, "dense", {CP: 2}),
    "DP2 distributed optimizer": Layout(2, "dense", DISTRIBUTED_OPTIMIZER, variants=True),
    "moe DP2": Layout(2, "moe", {}),
    "moe EP2": Layout(2, "moe", {EP: 2}, variants=True),
    "moe EP2 distributed optimizer": Layout(2, "moe", {EP: 2, **DISTRIBUTED_OPTIMIZER}),
    "moe TP2 SP": Layout(2, "moe", {TP: 2, **SP}),
    "TP2 PP2 SP": Layout(4, "dense", {TP: 2, PP: 2, **SP}, variants=True),
    "moe EP2 PP2": Layout(4, "moe", {PP: 2, EP: 2}, variants=True),
    "moe EP2 TP2 SP": Layout(4, "moe", {TP: 2, EP: 2, **SP}),
}
OTHER_TEACHER_LAYOUTS: dict[str, Layout] = {
    "moe EP2 ETP1": Layout(2, "moe", {EP: 2, ETP: 1}),
    "EP2": Layout(2, "dense", {EP: 2}),
    "TP2": Layout(2, "dense", {TP: 2}),
}
SHARING_LAYOUTS: dict[str, Layout] = {
    "DP4": Layout(4, "dense", {}),
    "moe EP2 DP2": Layout(4, "moe", {EP: 2}),
}
OBJECTIVES = ("opdlm", "opdlm_off", "off_policy", "sft", "scp", "next_token", "d_opsd")
"""One run of three updates an objective, under every layout; test_adapter_layouts.py has more of
`d_opsd`. The other runs, of two updates, run once under each kind of parallelism."""

CONTEXT_LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "CP2 tokens": (
        Layout(2, "dense", {CP: 2, "rollout_context_parallel": "tokens"}),
        (
            "budget",
            "off_policy_stored",
            "opdlm_all",
            "opdlm_bigger_teacher",
            "opdlm_causal_context",
            "opdlm_offloaded",
            "opdlm_partial",
            "mixture",
            "d_opsd",
        ),
    ),
    "CP4 recomputation": (Layout(4, "dense", {CP: 4, **RECOMPUTATION}), OBJECTIVES),
    "TP2 CP2 SP": (Layout(4, "dense", {TP: 2, CP: 2, **SP}), ("opdlm", "sft", "scp", "d_opsd")),
    "PP2 CP2 recomputation": (
        Layout(4, "dense", {PP: 2, CP: 2, **DISTRIBUTED_OPTIMIZER, **RECOMPUTATION}),
        ("opdlm_off", "off_policy", "scp"),
    ),
    "moe EP2 CP2 DP2": (
        Layout(4, "moe", {EP: 2, CP: 2, **OVERLAP}),
        ("opdlm", "off_policy", "next_token"),
    ),
}
"""Context parallelism beside the runs of `LAYOUTS`, with the runs of each."""
VIRTUAL_RUNS = ("opdlm_partial", "opdlm_fp8", "budget", "sft", "d_opsd")
VIRTUAL_LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "PP2 V2": (Layout(2, "deep", {PP: 2, VIRTUAL: 2}), VIRTUAL_RUNS),
    "PP2 V2 CP2": (Layout(4, "deep", {PP: 2, VIRTUAL: 2, CP: 2}), ("opdlm_partial", "sft")),
    "moe PP2 V2 EP2": (
        Layout(4, "moe_deep", {PP: 2, VIRTUAL: 2, EP: 2}),
        ("opdlm_partial", "sft"),
    ),
}
"""Virtual stages need four layers. Of two updates of `budget` one has fewer rows than stages."""
GROUPS = [
    {"pattern": "embedding", "lr": 1e-2},
    {"pattern": r"layers\.1\.", "lr": 0.0, "min_lr": 0.0},
]
"""By name and by number: tied embeddings are on two stages, layers and experts on any rank."""

SHORT: dict[str, Any] = dict(rollout_batch_size=8, max_response_length=8)
TWO_ROLLOUTS: dict[str, Any] = dict(SHORT, rollout_batch_size=4, num_rollouts=2)
FIVE: dict[str, Any] = dict(SHORT, num_rollouts=None, num_epochs=1, prompts="five.jsonl")
GIVEN: dict[str, Any] = dict(train_iters=2, num_rollouts=None, max_response_length=8)
RUNS: dict[str, dict[str, Any]] = {
    "opdlm": dict(rollout_batch_size=12, max_response_length=8),
    "opdlm_global": dict(SHORT, state_selection="global"),
    "opdlm_all": dict(
        SHORT,
        state_selection="all",
        loss_normalization="row_mean",
        eval_prompts="five.jsonl",
        eval_decodings=("dynamic:0.3", "static:2@8"),
        eval_max_response_length=4,
    ),
    "opdlm_causal_context": dict(
        SHORT, context_attention="causal", micro_batch_size=2, recompute_granularity="full"
    ),
    "opdlm_bigger_teacher": SHORT,
    "opdlm_smaller_teacher": SHORT,
    "opdlm_other_teacher": SHORT,
    "opdlm_offloaded": dict(
        TWO_ROLLOUTS, offload_teacher=True, offload_optimizer=True, shared_rollout_queue=False
    ),
    "opdlm_partial": dict(
        TWO_ROLLOUTS,
        max_response_length=16,
        dynamic_threshold=0.2,
        partial_rollouts=0.5,
        max_running_requests=2,
    ),
    "mixture": dict(SHORT, teacher_response_fraction=0.5, micro_batch_size=2),
    "short": dict(FIVE, micro_batch_size=2),
    "budget": dict(FIVE, max_tokens_per_micro_batch=150),
    "opdlm_off": dict(max_response_length=8, rollout_batch_size=12, objective="opdlm_off"),
    "off_policy": dict(GIVEN, train_iters=3, objective="off_policy"),
    "off_policy_stored": dict(
        GIVEN, objective="off_policy", divergence_top_k=6, cache_teacher_targets=True
    ),
    "sft": dict(objective="sft", train_iters=3, param_groups=GROUPS),
    "sft_of_teacher": dict(GIVEN, objective="sft", train_data=None, prompts="prompts.jsonl"),
    # One update under annealed attention, two under full attention.
    "scp": dict(
        objective="scp", train_iters=3, attention_annealing_iters=2, eval_interval=2, eval_iters=2
    ),
    "next_token": dict(objective="next_token", train_iters=3),
    "d_opsd": dict(
        objective="d_opsd",
        rollout_batch_size=12,
        max_response_length=8,
        lora_rank=2,
        lora_dropout=0.2,
        lora_target_modules=("linear_qkv", "linear_proj"),  # experts split by TP have no adapters
    ),
}

VARIANTS = tuple(run for run in RUNS if run not in OBJECTIVES)
FOUR_PROCESS_VARIANTS = ("opdlm_all", "opdlm_partial", "short")
"""Those that run under products of kinds as well: four processes are slow on few cores."""

OF_TEACHER = ("mixture", "off_policy", "off_policy_stored", "sft_of_teacher")
"""Runs on the teacher's responses, which must be the same under every layout too."""

FAMILY_RUNS = {"opdlm_self_teacher": SHORT, "opdlm_bigger_teacher": SHORT}
"""What other families run: the model's own weights as teacher, and those of a larger one."""
DEEP_RUNS = {"opdlm_fp8": dict(SHORT, teacher_precision="fp8")}
"""What only a model of four layers runs."""
FAMILY_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {TP: 2, **SP},
    "PP2": {PP: 2},
    "CP2": {CP: 2},
}
"""Of two processes."""

TEACHERS: dict[str, dict[str, Any]] = {
    "bigger": dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=8),
    "smaller": dict(hidden_size=16, num_attention_heads=2),
    "other": {},
}
"""By name; `other` is dense beside a mixture of experts and the reverse."""


KEYS = (
    "supervised_tokens",
    "response_tokens_total",
    "trained_tokens_total",
    "flops_total",
    "tokens_per_forward",
    "eos_rate",
    "staleness",
)


def _options(folder: Path, model: str, run: str) -> dict[str, Any]:
    """What a run is started with besides its layout."""
    options = dict((RUNS | FAMILY_RUNS | DEEP_RUNS)[run])
    for name in {"prompts", "eval_prompts"} & options.keys():
        options[name] = str(folder / options[name])
    size = run.removeprefix("opdlm_").removesuffix("_teacher")
    if size in TEACHERS:
        options["teacher_load"] = str(folder / f"{model}_{size}")
    if run == "d_opsd":
        options["load"] = str(folder / f"{model}_diffusion")
    return options


def _train(rank: int, folder: Path, runs: list[tuple[str, Path, dict[str, Any]]]) -> Any:
    results = {}
    for name, model, options in runs:
        save = str(folder / name.replace(" ", "_"))
        if "eval_interval" in options:
            options = {**options, "valid_data_path": str(folder / "corpus_heldout")}
        config = run_config(folder, model, **{"save": save, **options})
        # One checkpoint a layout says enough; writing it takes longer than a short run.
        saving = nullcontext() if name.endswith(" opdlm") else mock.patch.object(Run, "save")
        with saving, reward_every_third():
            results[name] = run_training(config)
        rejoin_world()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    prompts, _ = write_data(folder, PROMPTS)
    # A rollout of 5: the second update is on one sample, which only one replica has.
    lines = prompts.read_text().splitlines(keepends=True)
    (folder / FIVE["prompts"]).write_text("".join(lines[:5]))
    for model, moe in (("dense", False), ("moe", True)):
        save_random_model(folder / model, moe=moe)
        diffusion = save_random_model(folder / f"{model}_diffusion", moe=moe)
        declare_diffusion_kind(diffusion, "block_causal", shifted=False)
        for seed, (size, changes) in enumerate(TEACHERS.items(), start=1):
            of_experts = moe != (size == "other")
            save_random_model(folder / f"{model}_{size}", moe=of_experts, seed=seed, **changes)
    save_random_model(folder / "moe_deep", moe=True, num_hidden_layers=4)
    for name in ("deep", "deep_diffusion"):
        save_random_model(folder / name, num_hidden_layers=4)
    declare_diffusion_kind(folder / "deep_diffusion", "block_causal", shifted=False)
    for family in OTHER_FAMILIES:
        save_random_model(folder / family, family=family)
        bigger = folder / f"{family}_bigger"
        save_random_model(bigger, family=family, seed=1, **TEACHERS["bigger"])
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs = [
        (f"single {model} {run}", folder / model, _options(folder, model, run))
        for model in ("dense", "moe")
        for run in RUNS
    ]
    deep = [
        (f"single {model} {run}", folder / model, _options(folder, model, run))
        for model, of_model in (("deep", VIRTUAL_RUNS), ("moe_deep", ("opdlm_partial", "sft")))
        for run in of_model
    ]
    runs += deep + _family_runs(folder, "single", {})
    return run_distributed(_train, 1, folder, runs, timeout_seconds=600)[0]


def _family_runs(
    folder: Path, name: str, layout: dict[str, Any]
) -> list[tuple[str, Path, dict[str, Any]]]:
    """What other families run under a layout."""
    return [
        (f"{name} {family} {run}", folder / family, {**_options(folder, family, run), **layout})
        for family in OTHER_FAMILIES
        for run in FAMILY_RUNS
    ]


def _responses(folder: Path, name: str) -> list[str]:
    """Lines of all shards of a run's teacher responses, in the order of the prompts."""
    shards = sorted((folder / name.replace(" ", "_") / "teacher_responses").glob("*.jsonl"))
    return [line for shard in shards for line in shard.read_text().splitlines()]


def _answers(folder: Path, name: str) -> str:
    """What a run answers to held-out prompts."""
    file = folder / name.replace(" ", "_") / "evaluation_samples.jsonl"
    return file.read_text() if "opdlm_all" in name else ""


def _check(name: str, lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(lines) == len(reference) == (3 if name.split()[-1] in OBJECTIVES else 2)
    for line, expected in zip(lines, reference, strict=True):
        # Equal token counts at every update: the same tokens were drawn in the same steps.
        for key in KEYS:
            assert line[key] == expected[key], (name, key)
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name
        assert (line["causal_loss"] is None) == ("causal_context" not in name)
        if line["causal_loss"] is not None:
            # The student begins as the teacher: at first there is nothing but rounding.
            causal_loss = pytest.approx(expected["causal_loss"], rel=1e-4, abs=1e-6)
            assert line["causal_loss"] == causal_loss, name
        is_due = "scp" in name and line["step"] in (2, 3)
        assert (line["validation_loss"] is not None) == is_due, name
        if is_due:
            held_out = pytest.approx(expected["validation_loss"], rel=1e-4)
            assert line["validation_loss"] == held_out, name
        assert line.get("evaluation") == expected.get("evaluation"), name
        assert ("evaluation" in line) == ("opdlm_all" in name and line["step"] == 2)
        idle = {k: v for k, v in line["throughput"].items() if k.endswith("_stage_idle")}
        assert all(share is None or 0 < share < 1 for share in idle.values()), name
        assert (idle["student_stage_idle"] is not None) == ("PP" in name), name
        assert idle["rollout_stage_idle"] is None or "PP" in name


def _check_layout(
    folder: Path,
    single: dict[str, list[dict[str, Any]]],
    name: str,
    layout: Layout,
    runs: Sequence[str],
) -> None:
    model = folder / layout.model
    started = [
        (f"{name} {run}", model, {**_options(folder, layout.model, run), **layout.options})
        for run in runs
    ]
    results = run_distributed(_train, layout.processes, folder, started, timeout_seconds=500)[0]
    for run in runs:
        of_layout, reference = f"{name} {run}", f"single {layout.model} {run}"
        _check(of_layout, results[of_layout], single[reference])
        responses = _responses(folder, of_layout)
        assert responses == _responses(folder, reference), of_layout
        assert bool(responses) == (run in OF_TEACHER), of_layout
        assert _answers(folder, of_layout) == _answers(folder, reference), of_layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(folder: Path, single: dict[str, Any], name: str) -> None:
    layout = LAYOUTS[name]
    more = VARIANTS if layout.processes == 2 else FOUR_PROCESS_VARIANTS
    runs = (*OBJECTIVES, *(more if layout.variants else ()))
    _check_layout(folder, single, name, layout, runs)


@pytest.mark.parametrize("name", VIRTUAL_LAYOUTS)
def test_virtual_stages_train_like_one_process(
    folder: Path, single: dict[str, Any], name: str
) -> None:
    layout, runs = VIRTUAL_LAYOUTS[name]
    _check_layout(folder, single, name, layout, runs)


@pytest.mark.parametrize("name", CONTEXT_LAYOUTS)
def test_shared_rows_train_like_whole_ones(folder: Path, single: dict[str, Any], name: str) -> None:
    layout, runs = CONTEXT_LAYOUTS[name]
    _check_layout(folder, single, name, layout, runs)


def test_overlap_trains_like_one_process(folder: Path, single: dict[str, Any]) -> None:
    """Runs that read the weights between updates too: for rollouts, and for validation losses."""
    layout = Layout(2, "dense", OVERLAP)
    _check_layout(folder, single, "DP2 overlap", layout, ("opdlm", "opdlm_offloaded", "scp"))


@pytest.mark.parametrize("name", SHARING_LAYOUTS)
def test_updates_are_shared_by_cost(folder: Path, single: dict[str, Any], name: str) -> None:
    """Of the second update, three of four replicas have nothing."""
    _check_layout(folder, single, name, SHARING_LAYOUTS[name], ("budget",))


@pytest.mark.parametrize("name", FAMILY_LAYOUTS)
def test_other_families_train_like_one_process(
    folder: Path, single: dict[str, Any], name: str
) -> None:
    started = _family_runs(folder, name, FAMILY_LAYOUTS[name])
    results = run_distributed(_train, 2, folder, started, timeout_seconds=500)[0]
    for of_layout, lines in results.items():
        _check(of_layout, lines, single[of_layout.replace(name, "single")])


@pytest.mark.parametrize("name", OTHER_TEACHER_LAYOUTS)
def test_a_teacher_of_another_kind(folder: Path, single: dict[str, Any], name: str) -> None:
    """Experts of either model are spread, and the other model has no part in that."""
    layout = OTHER_TEACHER_LAYOUTS[name]
    _check_layout(folder, single, name, layout, ("opdlm_other_teacher",))
