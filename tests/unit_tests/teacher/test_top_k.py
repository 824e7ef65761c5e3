"""Training on the stored most likely tokens of a teacher, without it in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.data.top_k_store import TopKStore
from megatron_dlm.errors import UserError
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import initialized
from megatron_dlm.teacher import loading, top_k
from megatron_dlm.teacher.stored import StoredTeacher
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.run import Run, build_run
from megatron_dlm.types.trajectory import Trajectory
from tests.tiny import run_config, run_training, save_random_model, write_data

PROMPTS = 10
K = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("top_k")
    write_data(folder, PROMPTS)
    save_random_model(folder / "dense")
    return folder


def off_policy(folder: Path, save: Path, **options: Any) -> Config:
    options = dict(divergence_top_k=K, cache_teacher_targets=True) | options
    return run_config(folder, folder / "dense", objective="off_policy", save=str(save), **options)


def built(config: Config) -> Run:
    with initialized(config):
        return build_run(config, read_inputs(config))


def annotated(config: Config) -> list[Trajectory]:
    """All prompts, shuffled, with their responses and what the teacher said of them."""
    with initialized(config):
        run = build_run(config, read_inputs(config))
        trajectories = run.source.trajectories(run.sampler.samples(0, PROMPTS), 0)
        assert run.teacher is not None
        run.teacher.annotate(trajectories)
    return trajectories


def test_stored_targets_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    config = off_policy(folder, tmp_path)
    model = Qwen3ForCausalLM.from_pretrained(folder / "dense").double().eval()
    for trajectory in annotated(config):
        prompt = len(trajectory.prompt_ids)
        with torch.no_grad():
            logits = model(trajectory.token_ids[None]).logits[0, prompt - 1 : -1]
        log_p = logits.log_softmax(-1)
        values, ids = log_p.topk(K, dim=1)
        targets = trajectory.targets
        assert targets is not None
        assert torch.equal(targets.token_ids.long(), ids)
        torch.testing.assert_close(targets.log_probs.double(), values, rtol=1e-4, atol=1e-5)
        rest = (1 - values.exp().sum(1)).log()
        torch.testing.assert_close(targets.log_rest.double(), rest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.slow
def test_training_is_that_with_the_teacher_present(folder: Path, tmp_path: Path, tail: str) -> None:
    options = dict(divergence="forward_kl:0.5,reverse_kl", divergence_tail=tail)
    stored = run_training(off_policy(folder, tmp_path / "stored", **options))
    live = run_training(
        off_policy(folder, tmp_path / "live", **options, cache_teacher_targets=False)
    )
    assert len(stored) == 5
    for line, other in zip(stored, live, strict=True):
        assert line["supervised_tokens"] == other["supervised_tokens"]
        # Chunks of other tokens round their products otherwise.
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_the_teacher_is_gone_and_never_loaded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = off_policy(folder, tmp_path)
    built_teachers: list[weakref.ref[DiffusionGPTModel]] = []
    build = loading.build_frozen_model

    def watched(*args: Any) -> DiffusionGPTModel:
        model = build(*args)
        built_teachers.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "build_frozen_model", watched)
    assert isinstance(built(config).teacher, StoredTeacher)
    assert len(built_teachers) == 1
    gc.collect()
    assert built_teachers[0]() is None
    files = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert built(config).teacher is not None
    assert len(built_teachers) == 1
    assert files == {f.name: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}


def test_interrupted_computation_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = off_policy(folder, tmp_path, global_batch_size=2)
    monkeypatch.setattr(top_k.compute_missing, "__defaults__", (3, None))  # prompts a shard
    write, written = TopKStore.write, []

    def failing(self: TopKStore, shard: range, targets: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, targets)

    with monkeypatch.context() as patch:
        patch.setattr(TopKStore, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            built(config)
    assert written == [[0, 1], [2, 3, 4]]
    store = tmp_path / "teacher_responses" / f"top_{K}"
    kept = {file.name: file.read_bytes() for file in store.iterdir()}
    trajectories = annotated(config)
    now = {file.name: file.read_bytes() for file in store.iterdir()}
    assert kept.items() <= now.items()
    assert len(now) == 5  # header and four shards
    monkeypatch.undo()
    whole = annotated(off_policy(folder, tmp_path / "whole"))
    for trajectory, other in zip(trajectories, whole, strict=True):
        targets, expected = trajectory.targets, other.targets
        assert targets is not None
        assert expected is not None
        assert torch.equal(targets.token_ids, expected.token_ids)
        torch.testing.assert_close(targets.log_probs, expected.log_probs)


def test_a_teacher_that_moved_is_not_asked_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_model(tmp_path / "here")
    before = annotated(off_policy(folder, tmp_path, teacher_load=str(tmp_path / "here")))
    (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.setattr(loading, "build_frozen_model", None)  # cannot be called
    after = annotated(off_policy(folder, tmp_path, teacher_load=str(tmp_path / "moved")))
    assert len(after) == len(before) > 0
    for trajectory, other in zip(after, before, strict=True):
        targets, expected = trajectory.targets, other.targets
        assert targets is not None
        assert expected is not None
        assert torch.equal(targets.token_ids, expected.token_ids)
        assert torch.equal(targets.log_probs, expected.log_probs)


def test_targets_of_other_responses_are_refused(folder: Path, tmp_path: Path) -> None:
    config = off_policy(folder, tmp_path)
    built(config)
    responses = next((tmp_path / "teacher_responses").glob("*.jsonl"))
    text = responses.read_text()
    responses.write_text(text.replace('"response_ids": [', '"response_ids": [9, ', 1))
    with pytest.raises(UserError, match=r"top_6.*computed for other responses.*; delete it"):
        built(config)
