"""Requests to servers that are slow, silent, busy or at work."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_dlm import server_requests
from megatron_dlm.api_key import API_KEY_VARIABLE
from megatron_dlm.config import Config
from megatron_dlm.conversion.weight_transfer import BEGIN, END, GroupTransfer
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.remote import RemoteTeacher
from megatron_dlm.teacher.remote_weights import remote_weights
from megatron_dlm.teacher.wire import Drawing, TeacherIdentity, TeacherPrompt
from tests.tiny import save_random_model

PROMPT = TeacherPrompt(0, torch.tensor([1, 2]), 4)
DRAWING = Drawing(0.0, 0, 1.0, 0, (9,), 9, 8, 10)
TEACHER = TeacherIdentity("f", "teacher", "fp32", {}, {}, None)

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """The address of a server that does this with every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        listening.block_on_close = False
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def send(handler: BaseHTTPRequestHandler, status: int, value: Any) -> None:
    content = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@contextmanager
def teacher(*urls: str, timeout_s: float) -> Iterator[TeacherClient]:
    client = TeacherClient(urls, field="--teacher-url", max_requests=1, timeout_s=timeout_s)
    vars(client)["identity"] = TEACHER
    yield client
    client.close()


def responses(client: TeacherClient) -> list[list[int]]:
    asked = client.begin_responses([PROMPT], DRAWING, 1)
    while not asked.has_ended:
        asked.wait(0.2)
    return asked.result()


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """A byte of the answer now and then, without end: no pause is as long as a limit."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        return


def test_a_request_ends_in_time_however_the_answer_comes() -> None:
    with server(trickle) as url:
        with pytest.raises(UserError) as refused:
            RolloutServer(url, 0.3, 0).get("/server_info")
        assert f"--rollout-engine-urls = '{url}'" in str(refused.value)
        assert "nothing in 0.3 s" in str(refused.value)
        with teacher(url, timeout_s=0.3) as client, pytest.raises(UserError) as refused:
            responses(client)
        assert f"--teacher-url = '{url}': no answer in 0.3 s" in str(refused.value)
        assert "--teacher-timeout-s" in str(refused.value)


@pytest.mark.parametrize(
    ("status", "fragment"),
    [
        (503, "no answer in 30 s and 1 try: status 503: not now"),
        (401, f"status 401: not now; set {API_KEY_VARIABLE}"),
    ],
)
def test_what_is_wrong_is_said_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, status: int, fragment: str
) -> None:
    """An answer takes 20 s of a clock that nobody waits for: of 30 s less is left than a pause."""
    clock = SimpleNamespace(monotonic=lambda: 20.0 * requests)
    monkeypatch.setattr(server_requests, "time", clock)
    monkeypatch.setattr(server_requests, "FIRST_PAUSE_SECONDS", 15.0)
    requests = 0

    def answer(handler: BaseHTTPRequestHandler) -> None:
        nonlocal requests
        requests += 1
        send(handler, status, {"error": {"message": "not now"}})

    with server(answer) as url, teacher(url, timeout_s=30.0) as client:
        with pytest.raises(UserError, match=fragment):
            responses(client)
        vars(client).pop("identity")
        with pytest.raises(UserError, match=fragment):
            _ = client.identity


@pytest.mark.parametrize(("status", "requests"), [(400, 3), (401, 1), (503, 1)])
def test_only_an_update_that_is_open_is_ended_and_begun_again(status: int, requests: int) -> None:
    paths = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        paths.append(handler.path)
        is_first = len(paths) == 1
        send(handler, status if is_first else 200, {"success": not is_first})

    transfer = GroupTransfer(torch.nn.Linear(1, 1), cast(Any, None), "sdar", lambda: 0)
    fails = nullcontext() if requests == 3 else pytest.raises(UserError, match=str(status))
    with server(answer) as url, fails:
        transfer._begin([RolloutServer(url, 5.0, 0)])
    assert paths == [BEGIN, END, BEGIN][:requests]


def test_a_server_at_work_is_waited_for_as_long_as_it_comes_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every answer takes 20 s of a clock that nobody waits for, and 30 s are the limit."""
    clock = SimpleNamespace(monotonic=lambda: 20.0 * polls)
    monkeypatch.setattr(server_requests, "time", clock)
    monkeypatch.setattr(server_requests, "FIRST_PAUSE_SECONDS", 0.0)
    polls = 0

    def working(handler: BaseHTTPRequestHandler) -> None:
        nonlocal polls
        polls += 1
        if polls % 3 == 0:
            send(handler, 503, {"error": {"message": "busy"}})
        elif polls < 12:
            send(handler, 202, {"progress": polls})
        else:
            send(handler, 200, {"responses": [[3, 9]]})

    def stuck(handler: BaseHTTPRequestHandler) -> None:
        nonlocal polls
        polls += 1
        send(handler, 202, {"progress": 7})

    with server(working) as url, teacher(url, timeout_s=30.0) as client:
        assert responses(client) == [[3, 9]]
    with (
        server(stuck) as url,
        teacher(url, timeout_s=30.0) as client,
        pytest.raises(UserError, match="has come no further in 30 s"),
    ):
        responses(client)


def test_a_wish_to_stop_ends_the_questions_who_a_teacher_is_and_for_its_head(
    tmp_path: Path,
) -> None:
    """Of a server that never answers, long before the time is up."""
    asked, over = threading.Event(), threading.Event()

    def silent(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        over.wait(30)

    def stopping() -> StopRequest:
        request = StopRequest()
        asked.clear()

        def stop() -> None:
            asked.wait(30)
            request._handle(15, None)

        threading.Thread(target=stop, daemon=True).start()
        return request

    config = Config.from_dict({"device": "cpu"})
    sizes = read_architecture(save_random_model(tmp_path / "dense"))
    with server(silent) as url, initialized(config):
        with teacher(url, timeout_s=600.0) as client, pytest.raises(StopRequested):
            remote_weights(config.changed(teacher_url=(url,)), client, request=stopping())
        groups = ParallelGroups.from_parallel_state()
        with (
            teacher(url, timeout_s=600.0) as client,
            StopAgreement(stopping(), groups) as stop,
            pytest.raises(StopRequested),
        ):
            RemoteTeacher(client, 0, sizes, groups, stop).annotate([])
        over.set()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"responses": []},
        {"responses": [[]]},
        {"responses": [[1, 1, 1, 1, 1]]},
        {"responses": [[1, "2"]]},
        {"responses": [[8]]},
        {"responses": [[10]]},
    ],
)
def test_an_answer_that_is_none_names_the_server_and_the_field(answer: Any) -> None:
    with (
        server(lambda handler: send(handler, 200, answer)) as url,
        teacher(url, timeout_s=5.0) as client,
        pytest.raises(UserError) as refused,
    ):
        responses(client)
    assert url in str(refused.value)
    assert "responses" in str(refused.value)


def test_both_kinds_of_server_get_the_key_and_no_proxy_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    keys = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        keys.append(handler.headers["Authorization"])
        send(handler, 200, {"responses": [[3, 9]]})

    with server(answer) as url:
        RolloutServer(url, 5.0, 0).get("/server_info")
        with teacher(url, timeout_s=5.0) as client:
            responses(client)
    assert keys == ["Bearer secret"] * 2
