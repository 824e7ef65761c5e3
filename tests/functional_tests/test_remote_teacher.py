"""A teacher behind a server, and on ranks of its own: runs are those with the teacher at hand."""

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import pytest
import torch
import yaml
from safetensors.torch import load, save

from megatron_dlm.config import Config
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.response_store import ResponseStore
from megatron_dlm.entry import PREEMPTED_STATUS
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.teacher_requests import ResponsesRequest
from megatron_dlm.stop_request import TIME_IS_UP, StopRequest, StopRequested
from megatron_dlm.teacher import remote_stores
from megatron_dlm.teacher.answering import TextTeacher
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.teacher.remote_weights import url_client
from megatron_dlm.teacher.wire import (
    RESPONSES_PATH,
    TARGETS_PATH,
    Drawing,
    TeacherIdentity,
    TeacherPrompt,
    TeacherRow,
    TeacherText,
    pack_texts,
    prompts_to_json,
)
from megatron_dlm.training.inputs import joined_ranks, read_inputs
from megatron_dlm.training.model_source import open_model_source
from megatron_dlm.training.run import Run
from megatron_dlm.types.teacher_targets import TopKTargets
from tests.distributed_tests.layouts import CP, PP, SP, TP
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.faults.jobs import free_port
from tests.functional_tests.entry_points import command_on_rank, lines, options, run_ranks
from tests.functional_tests.server_process import ServerProcess
from tests.tiny import TOKENIZER, run_config, run_training, save_random_model, write_data

K = 6
WHOLE: dict[str, Any] = {"divergence_top_k": 0, "teacher_response_fraction": 0.5}
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
        "whole": WHOLE,
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


RECIPE = Config.from_dict(yaml.safe_load((TOKENIZER.parent / "opdlm.yaml").read_text()))


def recipe(folder: Path, save: str, **changes: Any) -> Config:
    """The shipped recipe, of few samples: half of the responses are the teacher's at first."""
    values = dict(
        load=str(folder / "dense"),
        prompts=str(folder / "prompts.jsonl"),
        save=str(folder / save),
        max_prompt_length=128,
        max_response_length=12,
        num_rollouts=2,
        rollout_batch_size=16,
        # Texts of a row by number: under a budget a server lays them into rows of its own.
        global_batch_size=4,
        micro_batch_size=2,
        max_tokens_per_micro_batch=None,
        lr_warmup_iters=0,
        tensorboard=False,
        measure_machine=False,
        device="cpu",
    )
    return RECIPE.changed(**values | changes)


def test_the_shipped_recipe_has_the_losses_of_a_teacher_in_memory_bit_for_bit(
    folder: Path, server: ServerProcess
) -> None:
    teacher = {"teacher_load": str(folder / "bigger")}
    served = {"teacher_load": None, "teacher_url": (server.url,)}
    expected = run_training(recipe(folder, "recipe_in_memory", **teacher))
    found = run_training(recipe(folder, "recipe", **served))
    assert len(found) == len(expected) == 8
    for name in ("loss", "grad_norm", "supervised_tokens", "response_length"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    folders = [folder / run / "teacher_responses" for run in ("recipe", "recipe_in_memory")]
    stored = [[lines(file) for file in sorted(f.glob("*.jsonl"))] for f in folders]
    assert stored[0] == stored[1] != []
    # Some of them are there when it is asked to stop: the same command, with the teacher at hand or
    # not, goes on with these.
    request, write = StopRequest(), ResponseStore.write

    def stopping(self: ResponseStore, *arguments: Any) -> None:
        write(self, *arguments)
        request._handle(15, None)

    with (
        mock.patch.object(ResponseStore, "write", stopping),
        mock.patch.object(remote_stores, "PROMPTS_PER_SHARD", 3),
        pytest.raises(StopRequested),
    ):
        run_training(recipe(folder, "stopped", **served, max_running_requests=3), request)
    assert list((folder / "stopped" / "teacher_responses").glob("*.jsonl"))
    resumed = run_training(recipe(folder, "stopped", **teacher, max_running_requests=3))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in expected]


def test_other_objectives_on_responses_of_a_server(folder: Path, server: ServerProcess) -> None:
    """Cross entropy on them, and distillation from distributions that are stored beside them."""
    given: dict[str, Any] = {"prompts": str(folder / "prompts.jsonl"), "train_data": None}
    stored = {"divergence_top_k": K, "cache_teacher_targets": True}
    for name, changes in (("sft", {}), ("off_policy", stored)):
        found = []
        for place in ({"teacher_load": str(folder / "bigger")}, {"teacher_url": (server.url,)}):
            save = str(folder / f"{name}_{len(found)}")
            options = given | place | changes | {"objective": name, "train_iters": 2}
            config = run_config(folder, folder / "dense", save=save, **options)
            found.append(run_training(config))
        for line, expected in zip(*found, strict=True):
            # Chunks of other tokens round otherwise.
            rel = 2e-6 if changes else 0.0
            assert line["loss"] == pytest.approx(expected["loss"], rel=rel, abs=0.0)
        assert len(found[0]) == 2


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

    def sending(self: TeacherClient, row: TeacherRow, k: int) -> None:
        sent.append(row.digest)
        send(self, row, k)

    def asking(self: TeacherClient, rows: list[TeacherRow], k: int) -> Any:
        # All of a rollout were on their way before it had ended.
        assert {row.digest for row in rows} <= set(sent)
        asked.extend(row.digest for row in rows)
        return ask(self, rows, k)

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
    rows = [TeacherRow((text,)) for text in texts[:3]] + [TeacherRow(tuple(texts[3:]))]
    served = url_client(of_run(folder, "unused", teacher_url=(server.url,)))
    served.send_ahead(rows[0], K)
    targets = served.targets(rows, K)
    served.close()
    with initialized(config):
        model = load_teacher(open_model_source(str(folder / "bigger"), "--load"), config)
        own = TextTeacher(model, config, ParallelGroups(), None).targets(rows, K)
    for row, got, expected in zip(rows, targets, own, strict=True):
        assert len(got) == len(row) > 0
        assert isinstance(got, TopKTargets)
        for name, tensor in vars(expected).items():
            assert torch.equal(vars(got)[name], tensor)


def client(*urls: str, timeout_s: float = 0.6, key: str | None = None) -> TeacherClient:
    return TeacherClient(urls, field="--teacher-url", max_requests=2, timeout_s=timeout_s, key=key)


def row_of(token_ids: torch.Tensor, first: int = 0) -> TeacherRow:
    return TeacherRow((TeacherText(token_ids, first),))


GREEDY = Drawing(0.0, 0, 1.0, 0, (510,), 508, 511, 512)
TEXT = row_of(torch.tensor([5, 6, 7]), 1)


def test_what_a_server_cannot_answer_is_refused_in_one_line(
    server: ServerProcess, folder: Path
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    for urls, text, k, fragments in (
        ((nobody,), TEXT, K, (nobody, "no answer in 0.6 s", "Connect", "--teacher-timeout-s")),
        ((server.url,), row_of(torch.tensor([600])), K, ("outside the vocabulary of 512",)),
        ((server.url,), row_of(torch.zeros(300).long()), K, ("256 positions", "change what")),
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
    tensors = load(pack_texts([TEXT], K))
    deep = save({**tensors, "lengths": tensors["lengths"][None]})
    flat = save({**tensors, "k": tensors["k"][0]})
    outside = pack_texts([row_of(torch.tensor([5, 6, 7]), 3)], K)
    for body in (b"", b"no safetensors", deep, flat, outside):
        assert httpx2.post(server.url + TARGETS_PATH, content=body).status_code == 400
    unclear = httpx2.post(server.url + TARGETS_PATH, params={"ahead": "x"}, content=b"")
    assert unclear.status_code == 400
    assert "ahead" in str(unclear.json()["error"])
    good = prompts_to_json([TeacherPrompt(0, torch.tensor([5]), 8)], GREEDY)
    for part, changes, named in (
        ("prompts", {"token_ids": [512]}, "prompts.0.token_ids"),
        ("prompts", {"token_ids": []}, "token_ids"),
        ("prompts", {"token_ids": [2**70]}, "token_ids"),
        ("prompts", {"max_response_length": 300}, "256 positions"),
        ("drawing", {"temperature": -1.0}, "temperature"),
        ("drawing", {"eos_token_ids": [600]}, "drawing.eos_token_ids"),
        ("drawing", {"vocab_size": 513}, "drawing.vocab_size"),
    ):
        body = json.loads(json.dumps(good))
        (body["prompts"][0] if part == "prompts" else body["drawing"]).update(changes)
        refused = httpx2.post(server.url + RESPONSES_PATH, json=body)
        assert refused.status_code == 400
        assert named in str(refused.json()["error"]), refused.text
    # What is longer than the cache never reaches a batch with others.
    read = ResponsesRequest(**good).read
    assert len(read(512, 256, 9)[0]) == 1
    with pytest.raises(ApiError, match=r"of 9 tokens .* cache of 8, the server's --max-total"):
        read(512, 256, 8)
    # Who waits no longer than this hears that it is at work, or has the answer.
    early = httpx2.post(server.url + RESPONSES_PATH, params={"wait_s": 0}, json=good)
    assert early.status_code == 202
    assert early.json()["progress"] > 0
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
    rows = [row_of(torch.tensor([5, 6, last]), 1) for last in range(8)]
    found = zip(both.targets(rows, K), partly.targets(rows, K), strict=True)
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


def _end_together(rank: int, folder: Path, port: int, silent: str, refusing: str) -> list[Any]:
    """How three runs end on a rank: only rank 0 is asked to stop, or is refused."""
    config = of_run(folder, "unused", teacher_url=(silent,), teacher_timeout_s=20.0)
    with pytest.raises(StopRequested) as stopped:
        read_inputs(config, None, joined_ranks(), StopRequest(0.01 if rank == 0 else None))
    refused = config.changed(teacher_url=(refusing,)) if rank == 0 else config
    with pytest.raises(UserError) as error:
        read_inputs(refused, None, joined_ranks())
    own = options(folder, teacher_url=silent, teacher_timeout_s=20, exit_duration_in_mins=0.01)
    outcome = command_on_rank(rank, 2, port, ["train", *own])
    return [stopped.value.code, str(error.value), outcome.status, outcome.stderr]


def test_ranks_that_wait_for_a_server_end_together(folder: Path, server: ServerProcess) -> None:
    """With a folder of the run and, in the command, without one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:  # which never answers
        silent = f"http://127.0.0.1:{listening.getsockname()[1]}"
        found = run_distributed(
            _end_together, 2, folder, free_port(), silent, f"{server.url}/no", timeout_seconds=60
        )
    for code, error, status, stderr in found:
        assert code == TIME_IS_UP
        assert f"{server.url}/no" in error
        assert (status, stderr) == (PREEMPTED_STATUS, "")


def test_ranks_of_the_teacher_and_another_layout_on_resume(
    folder: Path, in_memory: dict[str, list[dict[str, Any]]]
) -> None:
    common = dict(
        save=folder / "ranks",
        teacher_load=folder / "bigger",
        teacher_response_fraction=0.5,
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
