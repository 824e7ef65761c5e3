"""Ranks that share sequences in a rollout: same tokens, a part of the cache each, bytes counted."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.context import CachedContext
from megatron_dlm.rollout.cutoff import Cutoff
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.pages import PAGE_SIZE
from megatron_dlm.rollout.replica_board import ReplicaBoard
from megatron_dlm.stop_agreement import ranks_in_step
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.distributed_tests.layouts import CP, EP, ETP, PP, SP, TP, VIRTUAL
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.unit_tests.rollout.tiny_models import (
    SPECULATIVE,
    fields,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
)

TOKENS = {"rollout_context_parallel": "tokens"}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CP2 DP2": ("dense", {CP: 2}),
    "CP4": ("dense", {CP: 4}),
    "TP2 CP2 SP": ("dense", {TP: 2, CP: 2, **SP}),
    "PP2 V2 CP2": ("dense", {PP: 2, VIRTUAL: 2, CP: 2}),
    "moe EP2 CP2 DP2": ("moe", {EP: 2, CP: 2}),
    "moe EP4 CP2 DP2": ("moe", {EP: 4, CP: 2}),
    "moe TP2 EP2 CP2 SP": ("moe", {TP: 2, EP: 2, ETP: 1, CP: 2, **SP}),
}
"""Of four processes."""
EVERY_KIND = ("CP2 DP2",)
"""Layouts that run every kind of decoding; the others sample, and take the most likely tokens."""
PARTIAL = ("CP2 DP2", "PP2 V2 CP2")
"""Layouts with a partial rollout."""
RESPONSE = 6
LAYERS, GROUPS, HEADS, HEAD_SIZE, ELEMENT = 4, 2, 4, 8, 4
"""Of the dense model of `save_tiny_model`; bytes of a number."""


def _prompts() -> list[Prompt]:
    """Two that share more than a page of four ranks, and shorter ones, down to one token."""
    long, like_it, *others = make_prompts([139, 135, 1, 37, 66])
    beginning = torch.cat((long.token_ids[:130], like_it.token_ids[130:]))
    return [long, dataclasses.replace(like_it, token_ids=beginning), *others]


KINDS: dict[str, dict[str, Any]] = {
    "sampled": dict(top_k=20, top_p=0.95, max_running_requests=3, chunked_prefill_size=48),
    "greedy": dict(temperature=0.0, decoding_groups=2),
    "speculative": {**SPECULATIVE, "draft_steps": 2},
}


def _responses(engine: RolloutEngine, prompts: list[Prompt]) -> list[Trajectory]:
    """Those of all replicas, which take every n-th prompt, in the order of the prompts."""
    groups = engine.groups.for_decoding()
    own = engine.generate(prompts[groups.replica :: groups.num_replicas], RESPONSE)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (groups.replica, own))
    by_replica: dict[int, list[Trajectory]] = {}
    for replica, trajectories in of_ranks:
        known = by_replica.setdefault(replica, trajectories)
        assert [*map(fields, known)] == [*map(fields, trajectories)]  # on all of its ranks
    everything = [t for part in by_replica.values() for t in part]
    return sorted(everything, key=lambda trajectory: trajectory.sample_index)


def _decoded(model: DiffusionGPTModel, every_kind: bool = True) -> dict[str, list[tuple]]:
    """What kinds of decoding answer, with the confidence of each token of one of them."""
    prompts, results = _prompts(), {}
    for name, changes in KINDS.items():
        if name == "speculative" and not every_kind:
            return results
        changes = {"max_running_requests": 5, **changes}
        engine = make_engine(model, keeps_confidence=name == "sampled", **changes)
        trajectories = _responses(engine, prompts)
        results[name] = [fields(trajectory) for trajectory in trajectories]
        if name == "sampled":
            results["confidence"] = [(t.confidence,) for t in trajectories]
    left_to_right = GenerationConfig.autoregressive(temperature=1.0, max_running_requests=5)
    engine = make_engine(model, left_to_right)
    results["autoregressive"] = [*map(fields, _responses(engine, prompts))]
    return results


def _partial(model: DiffusionGPTModel) -> list[tuple[int, bool]]:
    """A partial rollout of all replicas from one queue: who is finished, on one rank each."""
    engine = make_engine(model, max_running_requests=2)
    groups = engine.groups
    board = None if groups.replicas is None else ReplicaBoard(groups)
    cutoff, told = Cutoff(2, {4}, board), []
    held = engine.generate_together(
        _prompts(), 14, one_queue=True, cutoff=cutoff, on_finished=told.append
    )
    assert {t.sample_index for t in told} == {t.sample_index for t in held if t.is_finished}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    copies = 1 if groups.model is None else groups.model.size()
    dist.all_gather_object(of_ranks, [(t.sample_index, t.is_finished) for t in held])
    cutoff.close()
    everything = sorted(entry for part in of_ranks for entry in part)
    assert everything[::copies] == everything[copies - 1 :: copies]
    return everything[::copies]


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank gives to collectives of its layers in each forward, at most."""
    sent = {"gathered": 0, "exchanged": 0}
    gather, exchange = dist.all_gather_into_tensor, dist.all_to_all_single

    def counted_gather(output: Tensor, own: Tensor, group: Any) -> None:
        sent["gathered"] += own.nbytes
        gather(output, own, group=group)

    def counted_exchange(output: Tensor, own: Tensor, group: Any) -> None:
        sent["exchanged"] += own.nbytes
        exchange(output, own, group=group)

    with (
        mock.patch.object(dist, "all_gather_into_tensor", counted_gather),
        mock.patch.object(dist, "all_to_all_single", counted_exchange),
    ):
        yield sent


def _batch(model: DiffusionGPTModel, lengths: list[int], **changes: Any) -> DecodingBatch:
    generation = make_engine(model, **changes)
    return generation.open(len(lengths), lengths, RESPONSE)


def _memory_and_bytes(model: DiffusionGPTModel) -> dict[str, int]:
    """Bytes of the cache for two sequences of 256 positions, and of one denoising step of one."""
    batch = _batch(model, [256, 256])
    [group] = batch._slot_groups
    assert isinstance(group.context, CachedContext)
    cache = group.context._cache
    # The null page apart, which is there once.
    kept = sum(layer[:, PAGE_SIZE:].nbytes for layer in cache._layers.values())
    [prompt] = make_prompts([64])
    batch.admit(0, prompt)
    batch.step()  # prefilled with the first step; the second one has a block only
    with _counted() as sent:
        batch.step()
    return {"cache": kept, **sent}


def _budget(model: DiffusionGPTModel) -> bool:
    """Whether a sequence of 160 positions is decoded with a budget of 96 a rank."""
    try:
        _batch(model, [160], max_total_tokens=96)
    except UserError:
        return False
    return True


def _on_four(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for name, (kind, layout) in LAYOUTS.items():
        with initialized(Config().changed(device="cpu", **layout, **TOKENS)):
            model = load_model(folder / kind, **layout)
            results[name] = {"decoded": _decoded(model, name in EVERY_KIND)}
            if name in PARTIAL:
                results[name]["partial"] = _partial(model)
            if set(layout) == {CP}:
                results[name] |= {"bytes": _memory_and_bytes(model), "fits": _budget(model)}
            in_step = ranks_in_step(ParallelGroups.from_parallel_state(), None)
            assert in_step is not None
            results[name]["in step"] = in_step.size()
        rejoin_world()
    return results


def _on_one(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for kind in ("dense", "moe"):
        with initialized(Config().changed(device="cpu")):
            model = load_model(folder / kind)
            results[kind] = {"decoded": _decoded(model), "partial": _partial(model)}
            if kind == "dense":
                results[kind] |= {"bytes": _memory_and_bytes(model), "fits": _budget(model)}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By layout, and of one process by model."""
    folder = tmp_path_factory.mktemp("shared")
    for kind, layers in (("dense", LAYERS), ("moe", 2)):
        (folder / kind).mkdir()
        save_tiny_model(folder / kind, moe=kind == "moe", layers=layers)
    return run_distributed(_on_one, 1, folder)[0] | run_distributed(_on_four, 4, folder)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_sequences_are_decoded_like_whole_ones(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    expected, found = results[LAYOUTS[name][0]], results[name]
    assert len(found["decoded"]) == (5 if name in EVERY_KIND else 3)
    for kind, own in found["decoded"].items():
        if kind == "confidence":
            for (confidence,), (other,) in zip(expected["decoded"][kind], own, strict=True):
                assert torch.allclose(confidence, other, rtol=0, atol=1e-5)
        else:
            assert own == expected["decoded"][kind], kind
    if name in PARTIAL:
        assert found["partial"] == expected["partial"]
    assert found["in step"] == (2 if name in ("CP2 DP2", "moe EP2 CP2 DP2") else 4)


@pytest.mark.parametrize(("name", "ranks"), [("CP2 DP2", 2), ("CP4", 4)])
def test_a_rank_keeps_its_part_and_sends_a_block(
    results: dict[str, dict[str, Any]], name: str, ranks: int
) -> None:
    whole, own = results["dense"]["bytes"], results[name]["bytes"]
    assert whole["cache"] == LAYERS * 2 * 2 * 256 * GROUPS * HEAD_SIZE * ELEMENT
    assert own["cache"] * ranks == whole["cache"]
    tokens = 4 // ranks  # of a block
    # Queries, keys and values of its tokens to all; for the draws the hidden states, and their
    # results.
    projected = LAYERS * tokens * (HEADS + 2 * GROUPS) * HEAD_SIZE * ELEMENT
    hidden, drawn = tokens * HEADS * HEAD_SIZE * ELEMENT, tokens * 3 * 8
    assert projected + hidden < own["gathered"] <= projected + hidden + drawn
    # Contexts and log-sum-exp of the block.
    assert own["exchanged"] == LAYERS * 4 * HEADS * (HEAD_SIZE + 1) * ELEMENT
    assert whole["gathered"] == whole["exchanged"] == 0


def test_a_sequence_that_no_rank_has_room_for(results: dict[str, dict[str, Any]]) -> None:
    assert not results["dense"]["fits"]
    assert results["CP2 DP2"]["fits"]
    assert results["CP4"]["fits"]
