"""A teacher behind a server, and on ranks of its own: runs are those with the teacher at hand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import pytest
import torch

from megatron_dlm.config import Config
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.teacher.answering import TextTeacher
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.teacher.remote_weights import url_client
from megatron_dlm.teacher.wire import TARGETS_PATH, TeacherIdentity, TeacherText, pack_texts
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.model_source import open_model_source
from megatron_dlm.training.run import Run
from megatron_dlm.types.teacher_targets import TopKTargets
from tests.distributed_tests.layouts import CP, PP, SP, TP
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.faults.jobs import free_port
from tests.functional_tests.entry_points import lines, options, run_ranks
from tests.functional_tests.server_process import ServerProcess
from tests.tiny import run_config, run_training, save_random_model, write_data

K = 6
WHOLE: dict[str, Any] = {"divergence_top_k": 0}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pp": ("top_k", {PP: 2}),
    "cp": ("top_k", {CP: 2}),
    "tp whole": ("whole", {TP: 2, **SP, **WHOLE}),
    "tp fp8": ("fp8", {TP: 2, **SP, "teacher_precision": "fp8"}),
}
"""Of two ranks, each with the run that it is compared with; fp8 has the teacher in memory."""
BIGGER = dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_data(folder, 16)
    save_random_model(folder / "dense")
    save_random_model(folder / "bigger", moe=True, seed=1, **BIGGER)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    load = ("--load", folder / "bigger")
    server = ServerProcess(folder / "log", "serve-teacher", *load)
    yield server
    assert server.stop() == 0, server.output


def of_run(folder: Path, save: str, **changes: Any) -> Config:
    values = dict(rollout_batch_size=8, num_rollouts=2, divergence_top_k=K) | changes
    return run_config(folder, folder / "dense", save=str(folder / save), **values)


@pytest.fixture(scope="module")
def in_memory(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs with the teacher in memory: of few tokens, of all, and in less precision."""
    teacher = str(folder / "bigger")
    options: dict[str, dict[str, Any]] = {
        "top_k": {},
        "whole": {"divergence_top_k": 0},
        "fp8": {"teacher_precision": "fp8", "offload_teacher": True},
    }
    return {
        name: run_training(of_run(folder, f"in_memory_{name}", teacher_load=teacher, **changes))
        for name, changes in options.items()
    }


def check_same(run: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(run) == len(other) == 4
    for line, expected in zip(run, other, strict=True):
        assert line["supervised_tokens"] == expected["supervised_tokens"]
        # Chunks of other tokens, and parts of a sum, round otherwise.
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)


FROM_JSON = TeacherIdentity.from_json


def fp8_identity(values: dict[str, Any]) -> TeacherIdentity:
    return FROM_JSON({**values, "precision": "fp8"})


def test_a_run_with_servers_is_that_with_the_teacher_in_memory(
    folder: Path, server: ServerProcess, in_memory: dict[str, list[dict[str, Any]]]
) -> None:
    config = of_run(folder, "served", teacher_url=(server.url,))
    inputs = read_inputs(config)
    assert inputs.teacher is not None
    source = open_model_source(str(folder / "bigger"), "--load")
    assert inputs.teacher.fingerprint == source.fingerprint()
    sent: list[bytes] = []
    asked: list[bytes] = []
    send, ask = TeacherClient.send_ahead, TeacherClient.begin

    def sending(self: TeacherClient, text: TeacherText, k: int) -> None:
        sent.append(text.digest)
        send(self, text, k)

    def asking(self: TeacherClient, texts: list[TeacherText], k: int) -> Any:
        # All of a rollout were on their way before it had ended.
        assert {text.digest for text in texts} <= set(sent)
        asked.extend(text.digest for text in texts)
        return ask(self, texts, k)

    with (
        mock.patch.object(TeacherClient, "send_ahead", sending),
        mock.patch.object(TeacherClient, "begin", asking),
    ):
        check_same(run_training(config), in_memory["top_k"])
    assert sorted(sent) == sorted(asked)
    assert len(sent) == 16
    # A server of the same weights in another precision is another teacher.
    with (
        mock.patch.object(TeacherIdentity, "from_json", fp8_identity),
        pytest.raises(UserError, match=f"--teacher-url.*precision.*{server.url}"),
    ):
        run_training(config.changed(num_rollouts=3, extend=True))
    # On resume the place of the teacher may change, as it is the same one.
    longer = dict(num_rollouts=3, extend=True)
    more = run_training(
        of_run(folder, "served", teacher_load=str(folder / "bigger")).changed(**longer)
    )
    assert len(more) == 6


def test_targets_are_those_of_the_model_bit_for_bit(folder: Path, server: ServerProcess) -> None:
    config = of_run(folder, "unused", teacher_load=str(folder / "bigger"))
    inputs = read_inputs(config)
    assert isinstance(inputs.data, PromptDataset)
    texts = [TeacherText(inputs.data.sample(i, i).token_ids, 3 * i) for i in range(5)]
    served = url_client(of_run(folder, "unused", teacher_url=(server.url,)))
    served.send_ahead(texts[0], K)
    targets = served.targets(texts, K)
    served.close()
    with initialized(config):
        model = load_teacher(open_model_source(str(folder / "bigger"), "--load"), config)
        own = TextTeacher(model, config, ParallelGroups(), None).targets(texts, K)
    for text, got, expected in zip(texts, targets, own, strict=True):
        assert len(got) == len(text) > 0
        assert isinstance(got, TopKTargets)
        for name, tensor in vars(expected).items():
            assert torch.equal(vars(got)[name], tensor)


def client(*urls: str, timeout_s: float = 0.6, key: str | None = None) -> TeacherClient:
    return TeacherClient(urls, field="--teacher-url", max_requests=2, timeout_s=timeout_s, key=key)


TEXT = TeacherText(torch.tensor([5, 6, 7]), 1)


def test_what_a_server_cannot_answer_is_refused_in_one_line(
    server: ServerProcess, folder: Path
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    for urls, text, k, fragments in (
        ((nobody,), TEXT, K, (nobody, "no answer in 0.6 s", "--teacher-timeout-s")),
        ((server.url,), TeacherText(torch.tensor([600]), 0), K, ("outside the vocabulary of 512",)),
        ((server.url,), TeacherText(torch.zeros(300).long(), 0), K, ("256 positions",)),
        ((server.url,), TEXT, 512, ("no proper part",)),
        ((f"{server.url}/no",), TEXT, K, ("404", "serve-teacher")),
        (("http://[::bad",), TEXT, K, ("http://[::bad",)),
    ):
        asking = client(*urls)
        with pytest.raises(UserError) as refused:
            asking.targets([text], k)
        asking.close()
        message = str(refused.value)
        assert "--teacher-url" in message
        assert all(fragment in message for fragment in fragments), message
    for body in (b"", b"no safetensors", pack_texts([TeacherText(TEXT.token_ids, 3)], K)):
        assert httpx2.post(server.url + TARGETS_PATH, content=body).status_code == 400
    unclear = httpx2.post(server.url + TARGETS_PATH, params={"ahead": "x"}, content=b"")
    assert unclear.status_code == 400
    assert "ahead" in str(unclear.json()["error"])
    # A server that was started again with other weights, or in another precision.
    for changes in ({"fingerprint": "other"}, {"precision": "fp8"}):
        stale = client(server.url)
        vars(stale)["identity"] = replace(stale.identity, **changes)
        with pytest.raises(UserError, match="another one"):
            stale.targets([TEXT], K)
        with pytest.raises(UserError, match="another one"):
            stale.head(0, 1, 64)
        stale.close()
    # One server of two does not answer: the other one does.
    both = client(server.url, server.url, timeout_s=30)
    identity = both.identity
    partly = client(nobody, server.url, timeout_s=30)
    vars(partly)["identity"] = identity
    texts = [TeacherText(torch.tensor([5, 6, last]), 1) for last in range(8)]
    found = zip(both.targets(texts, K), partly.targets(texts, K), strict=True)
    assert all(torch.equal(vars(a)["log_probs"], vars(b)["log_probs"]) for a, b in found)
    both.close()
    partly.close()


def test_another_tokenizer_is_found_before_anything_is_built(
    folder: Path, server: ServerProcess
) -> None:
    other = folder / "other_tokenizer"
    save_random_model(other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    config = of_run(folder, "unused", teacher_url=(server.url,), load=str(other))
    with pytest.raises(UserError, match="its tokenizer knows") as refused:
        read_inputs(config)
    assert f"--teacher-url = '{server.url}'" in str(refused.value)


def _train(rank: int, folder: Path, url: str) -> dict[str, list[dict[str, Any]]]:
    """Two updates under each layout of two ranks."""
    found = {}
    for name, (reference, layout) in LAYOUTS.items():
        teacher: dict[str, Any] = {"teacher_url": (url,)}
        if reference == "fp8":
            teacher = {"teacher_load": str(folder / "bigger")}
        length = {"num_rollouts": 1, "lr_decay_iters": 4}
        config = of_run(folder, name, **length, **teacher, **layout)
        with mock.patch.object(Run, "save"):
            found[name] = run_training(config)
        rejoin_world()
    return found


def test_a_teacher_in_less_precision_trains_nearly_the_same(
    in_memory: dict[str, list[dict[str, Any]]],
) -> None:
    exact, rounded = in_memory["top_k"][0], in_memory["fp8"][0]
    assert rounded["supervised_tokens"] == exact["supervised_tokens"]
    assert 0 < abs(rounded["loss"] - exact["loss"]) < 0.2 * exact["loss"]


def test_every_layout_of_the_student_gets_the_same_targets(
    folder: Path, server: ServerProcess, in_memory: dict[str, list[dict[str, Any]]]
) -> None:
    of_ranks = run_distributed(_train, 2, folder, server.url)
    for name, found in of_ranks[0].items():
        assert len(found) == 2
        for line, expected in zip(found, in_memory[LAYOUTS[name][0]], strict=False):
            assert line["supervised_tokens"] == expected["supervised_tokens"]
            # Partial sums of tensor-parallel ranks are in bf16 where the teacher computes in it.
            rel = 1e-2 if "fp8" in name else 1e-5
            assert line["loss"] == pytest.approx(expected["loss"], rel=rel)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * rel)


def test_ranks_of_the_teacher_and_another_layout_on_resume(
    folder: Path, in_memory: dict[str, list[dict[str, Any]]]
) -> None:
    common = dict(
        save=folder / "ranks",
        teacher_load=folder / "bigger",
        rollout_batch_size=8,
        max_response_length=16,
        max_running_requests=7,
        lr=1e-3,
        min_lr=1e-4,
        divergence_chunk_size=16,
        num_epochs=None,
    )
    first = options(folder, **common, teacher_ranks=2, teacher_tensor_model_parallel_size=2)
    outcome = run_ranks(3, "train", *first, "--lr-decay-iters", 4)
    assert outcome.status == 0, outcome.stderr
    more = dict(num_rollouts=2, teacher_ranks=2, teacher_expert_model_parallel_size=2)
    outcome = run_ranks(4, "train", *options(folder, **common | more), "--lr-decay-iters", 4)
    assert outcome.status == 0, outcome.stderr
    check_same(lines(folder / "ranks" / "metrics.jsonl"), in_memory["whole"])
