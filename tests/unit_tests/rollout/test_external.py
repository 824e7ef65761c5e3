"""Servers that decode rollouts: settings compared, requests tried again, groups met."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_dlm import server_requests
from megatron_dlm.errors import UserError
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.external.flight import Flight
from megatron_dlm.rollout.external.responses import request, trajectory_of
from megatron_dlm.rollout.external.settings import check_settings, described
from megatron_dlm.rollout.external.weight_group import (
    Bucket,
    flattened,
    open_store,
    unflattened,
    weight_group,
)
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.config.configurations import architecture

TOKENS = SpecialTokens(5, 6, 7, vocab_size=100)
MASKS = SpecialTokens(5, 6, 151669, vocab_size=151936)


def generation(**changes: Any) -> GenerationConfig:
    values: dict[str, Any] = dict(
        block_size=4, temperature=0.0, top_k=0, top_p=1.0, max_running_requests=3
    )
    return GenerationConfig(**values | changes)


def of_run(is_moe: bool = False, **changes: Any) -> dict[str, Any]:
    return described(architecture(is_moe=is_moe), generation(**changes), MASKS, torch.float32)


@pytest.fixture
def sglang(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a server tells of itself, to be changed; the fields are those of SGLang 0.5.23."""
    (tmp_path / "dllm.yaml").write_text("block_size: 4\nthreshold: 0.9\n")
    info = {
        "/server_info": {
            "dllm_algorithm": "LowConfidence",
            "dllm_algorithm_config": str(tmp_path / "dllm.yaml"),
            "model_path": str(tmp_path),
            "context_length": None,
            "tp_size": 1,
            "dp_size": 1,
        },
        "/model_info": {"architectures": ["SDARForCausalLM"], "weight_version": "default"},
    }
    with mock.patch.object(RolloutServer, "get", lambda _, path: info[path]):
        yield info


SERVER = RolloutServer("http://host:1", 5.0, 0)


def test_a_server_of_sglang_that_fits_is_taken(sglang: dict[str, Any]) -> None:
    assert check_settings(SERVER, of_run(), 0.0, 200) is False
    sglang["/model_info"]["architectures"] = ["SDARMoeForCausalLM"]
    assert check_settings(SERVER, of_run(is_moe=True), 0.0, 200) is False
    one = of_run(remasking_strategy="low_confidence_static")
    Path(sglang["/server_info"]["dllm_algorithm_config"]).write_text("threshold: 1.0\n")
    sglang["/model_info"]["architectures"] = ["SDARForCausalLM"]
    assert check_settings(SERVER, one, 0.0, 200) is False


@pytest.mark.parametrize(
    ("run", "theirs", "temperature", "named"),
    [
        ({"block_size": 8}, {}, 0.0, "block_size is 4 there and 8 in the run; start the server"),
        ({"dynamic_threshold": 0.8}, {}, 0.0, "threshold is 0.9 there and 0.8 in the run; write"),
        ({}, {"dllm_algorithm_config": None}, 0.0, "threshold is 0.95 there and 0.9 in the run"),
        ({}, {"dllm_algorithm_config": "/no/file"}, 0.0, "this machine cannot read"),
        ({}, {"dllm_algorithm": "JointThreshold"}, 0.0, "'JointThreshold', and the run decodes as"),
        ({}, {}, 0.7, "the run has --temperature 0.7; choose --temperature 0"),
        ({}, {"context_length": 128}, 0.0, "context_length is 128, and the run's longest"),
        ({"remasking_strategy": "entropy"}, {}, 0.0, "'entropy' in the run, and SGLang has no"),
        (
            {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 2},
            {},
            0.0,
            "the run keeps 2 tokens a step, SGLang one",
        ),
    ],
)
def test_a_setting_of_sglang_that_differs_is_named(
    sglang: dict[str, Any],
    run: dict[str, Any],
    theirs: dict[str, Any],
    temperature: float,
    named: str,
) -> None:
    sglang["/server_info"] |= theirs
    with pytest.raises(UserError) as refused:
        check_settings(SERVER, of_run(**run), temperature, 200)
    assert str(refused.value).startswith("--rollout-engine-urls = 'http://host:1': ")
    assert named in str(refused.value)


def test_the_model_of_sglang_is_compared(sglang: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 100}))
    with pytest.raises(UserError, match=r"hidden_size in .* is 64 there and 48 in the run"):
        check_settings(SERVER, of_run(), 0.0, 200)
    with pytest.raises(UserError, match="architectures is 'SDARForCausalLM' there and 'SDARMoe"):
        check_settings(SERVER, of_run(is_moe=True), 0.0, 200)
    masked_otherwise = described(architecture(), generation(), TOKENS, torch.float32)
    with pytest.raises(UserError, match="mask_token_id is 151669 there and 7 in the run"):
        check_settings(SERVER, masked_otherwise, 0.0, 200)


def test_the_precision_of_a_server_is_compared(sglang: dict[str, Any]) -> None:
    sglang["/server_info"]["megatron_dlm"] = of_run() | {"dtype": "bfloat16"}
    with pytest.raises(
        UserError, match=r"dtype is 'bfloat16' there and 'float32' in the run; .*bf16"
    ):
        check_settings(SERVER, of_run(), 0.0, 200)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_schema_of_sglang_takes_requests(temperature: float) -> None:
    schema = pytest.importorskip("sglang.api.v1.api_types")
    prompt = Prompt(3, torch.tensor([1, 2, 3]))
    body = request(prompt, 16, generation(temperature=temperature), TOKENS, seed=1)
    assert schema.GenerateRequest.from_json_value(body)


@contextmanager
def answering(reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """A server that answers each POST as `reply` says; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, value = reply(json.loads(body))
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def answer(ids: list[int], reason: str = "stop", version: str = "3") -> dict[str, Any]:
    meta = {"finish_reason": {"type": reason}, "weight_version": version}
    return {"output_ids": ids, "meta_info": meta}


def test_what_fails_or_is_aborted_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two servers, one refuses each request once, the other aborts it once."""
    monkeypatch.setattr(server_requests, "FIRST_PAUSE_SECONDS", 0.0)
    seen: dict[int, int] = {}
    lock = threading.Lock()

    def reply(fails: tuple[int, Any]) -> Callable[[dict[str, Any]], tuple[int, Any]]:
        def of(body: dict[str, Any]) -> tuple[int, Any]:
            first = body["input_ids"][0]
            with lock:
                seen[first] = seen.get(first, 0) + 1
                count = seen[first]
            return fails if count == 1 else (200, answer([first, 5]))

        return of

    busy, aborted = (503, {"error": "busy"}), (200, answer([], "abort"))
    with answering(reply(busy)) as one, answering(reply(aborted)) as other:
        for retries, fails in ((1, False), (0, True)):
            seen.clear()
            servers = [RolloutServer(url, 5.0, retries) for url in (one, other)]
            prompts = [Prompt(i, torch.tensor([i + 10]), max_response_length=4) for i in range(6)]
            bodies = [{"input_ids": prompt.token_ids.tolist()} for prompt in prompts]

            def read(server: RolloutServer, number: int, value: dict[str, Any]) -> Any:
                return trajectory_of(server, value, prompts[number], 4, TOKENS, 3)  # noqa: B023

            flight = Flight(servers, bodies, read, 2)
            flight.wait(30)
            if fails:
                assert isinstance(flight.error, UserError)
                assert "is not answered" in str(flight.error)
                continue
            assert flight.error is None
            ids = [t.response_ids.tolist() for t in flight.trajectories()]
            assert ids == [[i + 10, 5] for i in range(6)]
            assert all(t.weight_version == 3 for t in flight.trajectories())


STEPS: dict[str, Any] = {
    "unmask_step": [0, 1],
    "tail_ids": [9],
    "tail_unmask_step": [1],
    "denoising_forwards": 2,
    "total_forwards": 2,
}


def steps(**changes: Any) -> dict[str, Any]:
    """An answer with steps; None leaves a field of these out."""
    given = answer([9, 5])
    left = {name: value for name, value in (STEPS | changes).items() if value is not None}
    given["meta_info"]["denoising"] = left
    return given


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (answer([9, 5], version="2"), "is of the weights '2', and 3 were sent"),
        (answer([5, 9]), "goes on after its end"),
        (answer([9, 9], "length"), "ends after 2 of 4 tokens without EOS"),
        (answer([9, 9, 9, 9, 9]), "has 5 tokens, and at most 4"),
        (answer([7, 5]), "has the token 7, MASK or not in the vocabulary"),
        ({"meta_info": {"weight_version": "3"}}, "has no output_ids"),
        ({"output_ids": [5]}, "has no meta_info"),
        (steps(unmask_step=None), "denoising.unmask_step that is no list of 2 steps"),
        (steps(unmask_step=[0]), "denoising.unmask_step that is no list of 2 steps"),
        (steps(unmask_step=[0, "1"]), "denoising.unmask_step that is no list of 2 steps"),
        (steps(tail_ids=3), "has no meta_info.denoising.tail_ids"),
        (steps(tail_ids=[7]), "has the token 7 in meta_info.denoising.tail_ids"),
        (steps(tail_unmask_step=[]), "denoising.tail_unmask_step that is no list of 1 steps"),
        (steps(total_forwards=None), "denoising.total_forwards = None, no number"),
        (steps(denoising_forwards=True), "denoising.denoising_forwards = True, no number"),
    ],
)
def test_an_answer_that_is_no_response_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as refused:
        trajectory_of(SERVER, given, Prompt(0, torch.tensor([1])), 4, TOKENS, 3)
    assert named in str(refused.value)
    assert str(refused.value).startswith(f"--rollout-engine-urls = '{SERVER.url}': ")


def test_steps_that_a_server_tells_are_those_of_the_trajectory() -> None:
    trajectory = trajectory_of(SERVER, steps(), Prompt(0, torch.tensor([1])), 4, TOKENS, 3)
    for name, value in STEPS.items():
        found = getattr(trajectory, name)
        assert value == (found.tolist() if isinstance(found, torch.Tensor) else found)


def test_a_bucket_goes_through_a_group_that_sglang_has_made() -> None:
    """The other rank makes its group by torch's own helper, with the prefixes that SGLang gives."""
    tensors = [
        ("a", torch.arange(4).reshape(2, 2)),
        ("b", torch.randn(3, 5)),
        ("c", torch.randn(7).bfloat16()),
    ]
    timeout = timedelta(seconds=60)
    store = open_store(timeout)
    received = torch.zeros(len(flattened(tensors)), dtype=torch.uint8)

    def server() -> None:
        met = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timeout)
        group, _ = c10d._new_process_group_helper(
            2,
            1,
            [],
            c10d.Backend("gloo"),
            dist.PrefixStore("weights", met),
            group_name="weights",
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
        group.broadcast(received, 0).wait()
        del c10d._world.pg_group_ranks[group]
        for held in (c10d._world.pg_map, c10d._world.pg_names, c10d._world.pg_backend_config):
            held.pop(group, None)

    thread = threading.Thread(target=server)
    thread.start()
    group = weight_group(store, "weights", rank=0, size=2, backend="gloo", timeout=timeout)
    group.begin_broadcast(flattened(tensors)).wait()
    thread.join()
    for (name, sent), (found, tensor) in zip(
        tensors, unflattened(received, Bucket.of(tensors)), strict=True
    ):
        assert name == found
        assert torch.equal(sent, tensor)
