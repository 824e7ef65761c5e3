"""A rollout's tokens are the same under every parallel layout."""

import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.errors import UserError
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import ParallelGroups, initialize
from megatron_dlm.rollout.cutoff import Cutoff
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.replica_board import ReplicaBoard
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.training.rollout_selection import Leftovers, selected_and_shared
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.distributed_tests.layouts import EP, ETP, PP, SP, TP, VIRTUAL, Layout
from tests.distributed_tests.spawn import run_distributed
from tests.unit_tests.rollout.tiny_models import (
    EOS,
    FULL_ATTENTION,
    SPECULATIVE,
    VOCAB_SIZE,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
    several_ends,
)

# The second share is empty: a data-parallel rank without any work has to keep step.
LENGTHS = [5, 1, 8, 13, 2, 4, 11]
SHARES = {1: [7], 2: [7, 0], 4: [4, 0, 1, 2]}
TOGETHER = ("one queue", "partial")
STATIC = {"remasking_strategy": "low_confidence_static"}
DRAFTED = {**SPECULATIVE, "draft_steps": 2, "top_k": 20, "top_p": 0.95}
BY_BLOCKS = {"block_size": 4, "remasking_strategy": "low_confidence_dynamic"}
LAYOUTS: dict[str, Layout] = {
    "TP2": Layout(2, "dense", {TP: 2}),
    "TP2 SP": Layout(2, "dense", {TP: 2, **SP}),
    "PP2": Layout(2, "dense", {PP: 2}),
    "PP2 V2": Layout(2, "dense", {PP: 2, VIRTUAL: 2}),
    "PP4": Layout(4, "dense", {PP: 4}),
    "DP2": Layout(2, "dense", {}),
    "TP2 PP2": Layout(4, "dense", {TP: 2, PP: 2}),
    "moe EP2": Layout(2, "moe", {EP: 2}),
    "moe EP2 PP2": Layout(4, "moe", {EP: 2, PP: 2}),
    "moe TP2 EP2 SP": Layout(4, "moe", {TP: 2, EP: 2, ETP: 1, **SP}),
    "moe TP2 EP4 SP": Layout(4, "moe", {TP: 2, EP: 4, ETP: 1, **SP}),
}


def check_unknown_ids(model: DiffusionGPTModel) -> None:
    """An id that is padding of the embedding, or nowhere in it, is an error and no vector."""
    ids = torch.tensor([0, VOCAB_SIZE - 1, VOCAB_SIZE])
    layout = clean_layout([3], "causal", 1)
    forward_hidden(model, [Row(ids[:2], torch.arange(2), layout[:, :2])])
    for unknown in (VOCAB_SIZE, 1000, -1):
        ids[2] = unknown
        with pytest.raises(RuntimeError, match="token ids outside the vocabulary"):
            forward_hidden(model, [Row(ids, torch.arange(3), layout)])


def summary(trajectory: Trajectory) -> tuple:
    return (
        trajectory.sample_index,
        trajectory.response_ids.tolist(),
        trajectory.unmask_step.tolist(),
        trajectory.tail_ids.tolist(),
        trajectory.finish_reason,
        # Of what was drafted, in a rollout that keeps it.
        trajectory.rounds,
        trajectory.rounds and [round(value, 2) for value in trajectory.confidence.tolist()],
    )


def decoded_together(model: DiffusionGPTModel) -> dict[str, list[tuple]]:
    """A partial rollout of all replicas: what each decoded, what it trains on, what all leave."""
    prompts, ends = make_prompts(LENGTHS), several_ends((EOS, 3))
    engine = make_engine(model, special_tokens=ends, max_running_requests=2)
    groups = engine.groups
    board = None if groups.replicas is None else ReplicaBoard(groups)
    cutoff = Cutoff(3, {6}, board)
    held = engine.generate_together(prompts, 14, one_queue=True, cutoff=cutoff)
    rolled_out = selected_and_shared(
        held,
        Leftovers({}, {6}),
        4,
        block_size=4,
        groups=groups,
        prompt_of=prompts.__getitem__,
    )
    cutoff.close()
    for trajectory in rolled_out.leftovers:
        assert trajectory.prompt_ids is prompts[trajectory.sample_index].token_ids
    return {
        "one queue": [(trajectory.sample_index,) for trajectory in held],
        "partial": [*map(summary, rolled_out.trajectories[: rolled_out.num_own])],
        "left": [*map(summary, rolled_out.leftovers)],
    }


def check_one_that_does_not_fit(model: DiffusionGPTModel) -> None:
    """One replica has it, and the ones that share its experts give up too, not waiting for it."""
    groups = ParallelGroups.from_parallel_state()
    prompts = make_prompts([50] if groups.replica == 0 else [5])
    engine = make_engine(
        model,
        GenerationConfig.autoregressive(
            temperature=1.0, max_running_requests=2, max_total_tokens=32
        ),
    )
    in_step = groups.lockstep or groups.model
    replicas = [groups.replica] * (1 if in_step is None else in_step.size())
    if in_step is not None:
        torch.distributed.all_gather_object(replicas, groups.replica, group=in_step)
    if 0 not in replicas:  # it has experts of its own
        assert len(engine.generate(prompts, 6)) == 1
        return
    with pytest.raises(UserError, match=r"holds 32 tokens.* need 64"):
        engine.generate(prompts, 6)


class AskedLater(StopRequest):
    """A process that is asked to stop at some look at its wish; 0: never."""

    def __init__(self, look: int) -> None:
        super().__init__()
        self._left = look

    @property
    def code(self) -> int:
        self._left -= 1
        return signal.SIGTERM if self._left == 0 else 0


def check_stop_in_flight(model: DiffusionGPTModel) -> None:
    """Asked once, on the last stage alone, with forwards in flight: all leave at the same one."""
    prompts = make_prompts(LENGTHS)
    groups = ParallelGroups.from_parallel_state()
    for number in (1, 4):
        request = AskedLater(6 if groups.is_last_stage else 0)
        with StopAgreement(request, groups) as stop:
            engine = make_engine(model, decoding_groups=number, max_running_requests=6, stop=stop)
            with pytest.raises(StopRequested):
                engine.generate(prompts, 6)
        forwards: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(forwards, len(engine.work.take().tokens))
        assert len(set(forwards)) == 1
        assert forwards[0] <= 6 + number


def in_groups(model: DiffusionGPTModel, prompts: list[Prompt]) -> dict[str, list[tuple]]:
    """Responses under all kinds of decoding, with few groups or many, in flight or not."""
    results = {}
    for name, changes in (
        ("sampled", dict(top_k=20, top_p=0.95, decoding_groups=1)),
        ("sampled", dict(top_k=20, top_p=0.95, decoding_groups=3)),
        ("static", dict(STATIC, decoding_groups=4, max_running_requests=5)),
        ("speculative", dict(DRAFTED, decoding_groups=4, keeps_confidence=True)),
    ):
        engine = make_engine(model, **changes)
        results[f"{name} {len(results)}"] = [*map(summary, engine.generate(prompts, 6))]
    return results


def rollout(rank: int, folder: Path, parallel: dict[str, Any]) -> dict[str, list[tuple]]:
    initialize(Config(parallel=ParallelConfig(device="cpu", **parallel)))
    model = load_model(folder, **parallel)
    if parallel in ({}, {TP: 2}):
        check_unknown_ids(model)
    shares = SHARES[parallel_state.get_data_parallel_world_size()]
    mine = parallel_state.get_data_parallel_rank()
    first = sum(shares[:mine])
    prompts = make_prompts(LENGTHS[first : first + shares[mine]], first_sample=first)
    results: dict[str, list[tuple]] = {"data_parallel_rank": [(mine,)]}
    for name, engine in (
        ("sampled", make_engine(model, top_k=20, top_p=0.95)),
        ("static", make_engine(model, **STATIC)),
        (
            "autoregressive",
            make_engine(
                model, GenerationConfig.autoregressive(temperature=1.0, max_running_requests=3)
            ),
        ),
        ("speculative", make_engine(model, **DRAFTED, keeps_confidence=True)),
        ("greedy speculative", make_engine(model, **SPECULATIVE, temperature=0.0)),
        ("whole", make_engine(model, FULL_ATTENTION, shifted=True, denoising_steps_per_block=5)),
        ("canvas", make_engine(model, FULL_ATTENTION, **BY_BLOCKS)),
    ):
        results[name] = [summary(trajectory) for trajectory in engine.generate(prompts, 6)]
    if PP in parallel or not parallel:
        results |= in_groups(model, prompts)
    if parallel in ({PP: 2}, {PP: 2, VIRTUAL: 2}):
        check_stop_in_flight(model)
    if EP in parallel:
        check_one_that_does_not_fit(model)
    return results | decoded_together(model)


class Reference(NamedTuple):
    """A checkpoint folder and what one process rolls out with it."""

    folder: Path
    results: dict[str, list[tuple]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    made = {}
    for model in ("dense", "moe"):
        folder = tmp_path_factory.mktemp(model)
        save_tiny_model(folder, moe=model == "moe", layers=2 if model == "moe" else 4)
        made[model] = Reference(folder, run_distributed(rollout, 1, folder, {})[0])
    return made


def test_groups_decide_no_token(references: dict[str, Reference]) -> None:
    for reference in references.values():
        names = [name for name in reference.results if name[-1].isdecimal()]
        assert len(names) == 4
        for name in names:
            assert reference.results[name] == reference.results[name[:-2]], name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_rolls_out_like_one_process(references: dict[str, Reference], name: str) -> None:
    layout = LAYOUTS[name]
    reference = references[layout.model]
    per_rank = run_distributed(
        rollout, layout.processes, reference.folder, layout.options, timeout_seconds=300
    )
    for run in per_rank[0].keys() - {"data_parallel_rank"}:
        by_replica: dict[int, list[tuple]] = {}
        for results in per_rank:
            replica = results["data_parallel_rank"][0][0]
            # All model-parallel ranks hold the same trajectories.
            assert by_replica.setdefault(replica, results[run]) == results[run]
        if run == "left":
            assert all(results == reference.results[run] for results in by_replica.values()), run
            continue
        together = [result for replica in sorted(by_replica) for result in by_replica[replica]]
        if run in TOGETHER:  # on any replica, but on one only
            together.sort()
        assert together == reference.results[run], run
