"""The server as OpenAI's own client sees it; results are those of the command generate."""

import asyncio
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from megatron_dlm.commands import main
from tests.chat_templates import PLAIN
from tests.functional_tests.entry_points import GENERATE, Call, lines
from tests.functional_tests.server_process import ServerProcess
from tests.tiny import declare_diffusion_kind, save_random_model

KEY = "a-key"
LENGTH = 12
LONG = 240
"""Tokens of responses that are still running when the next request comes."""

MESSAGES = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many?"}]
TEXTS = ["Tom has 3 apples.", "Five pens cost", "What is"]


class Server(ServerProcess):
    """A running server, with OpenAI's client.

    Args:
        folder: Of its log.
        arguments: Of the command.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        super().__init__(folder / "log", "serve", *arguments)
        # One try: what is refused shall be seen.
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path)

    def metric(self, name: str) -> float:
        found = re.search(rf"^megatron_dlm_{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def chat(self, **fields: Any) -> Any:
        values = {"model": "tiny", "messages": MESSAGES, "max_tokens": LENGTH, **fields}
        return self.client.chat.completions.create(**values)

    def complete(self, **fields: Any) -> Any:
        values = {"model": "tiny", "prompt": TEXTS[0], "max_tokens": LENGTH, **fields}
        return self.client.completions.create(**values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random_model(tmp_path_factory.mktemp("model") / "tiny")
    declare_diffusion_kind(folder, "block_causal", shifted=False)
    (folder / "chat_template.jinja").write_text(PLAIN)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    limits = {"max-running-requests": 3, "max-waiting-requests": 2, "max-request-bytes": 20000}
    flags = [part for name, value in limits.items() for part in (f"--{name}", value)]
    server = Server(
        tmp_path_factory.mktemp("server"), "--load", model, "--api-key", KEY, *flags, "--seed", 5
    )
    yield server
    server.process.kill()


@pytest.fixture
def generated(call: Call, model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """What the command answers to records."""

    def answer(records: list[dict[str, Any]], **options: object) -> list[str]:
        prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = {"max_response_length": LENGTH, **options}
        flags = [part for n, v in options.items() for part in ("--" + n.replace("_", "-"), v)]
        arguments = ("--load", model, "--prompts", prompts, "--output", output, "--device", "cpu")
        outcome = call(GENERATE, *arguments, *flags)
        assert outcome.status == 0, outcome.stderr
        return [record["response"] for record in lines(output)]

    return answer


def test_the_model_is_listed(server: Server) -> None:
    [listed] = server.client.models.list().data
    assert listed.id == "tiny"
    assert server.client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError) as refused:
        server.client.models.retrieve("gpt")
    assert refused.value.code == "model_not_found"
    assert server.get("/health").status_code == 200


def test_a_chat_is_answered_as_by_generate(server: Server, generated) -> None:
    quiet = {"enable_thinking": False}
    records = [{"messages": MESSAGES}, {"messages": MESSAGES, "chat_template_kwargs": quiet}]
    greedy, without_thinking = generated(records)
    assert greedy != without_thinking
    answer = server.chat()
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", greedy)
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == LENGTH
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + LENGTH
    # One token a forward at least, and at most the prompt's rest in the first block more.
    assert LENGTH / 4 <= answer.usage.forwards <= LENGTH + 4
    extra = {"chat_template_kwargs": quiet}
    assert server.chat(extra_body=extra).choices[0].message.content == without_thinking
    assert server.chat(max_tokens=None, max_completion_tokens=LENGTH).choices == answer.choices


def test_draws_with_a_seed_are_those_of_generate(server: Server, generated) -> None:
    """The responses to the texts of one request are those to the lines of a file."""
    options = {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "seed": 7}
    decoding = {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 2}
    expected = generated([{"prompt": text} for text in TEXTS], **options, **decoding)
    extra = {"top_k": options.pop("top_k"), **decoding}
    answer = server.complete(prompt=TEXTS, extra_body=extra, **options)
    assert [choice.text for choice in answer.choices] == expected
    again = server.complete(prompt=TEXTS, extra_body=extra, **options)
    assert again.choices == answer.choices
    other = server.complete(prompt=TEXTS, extra_body=extra, **{**options, "seed": 8})
    assert other.choices != answer.choices
    # Several responses to each text are those of --num-responses.
    expected = generated(
        [{"prompt": text} for text in TEXTS[:2]], seed=7, temperature=1.0, num_responses=2
    )
    several = server.complete(prompt=TEXTS[:2], n=2, seed=7, temperature=1.0)
    assert [choice.text for choice in several.choices] == expected
    assert len(set(expected)) == 4
    more = server.complete(n=3, seed=7, temperature=1.0)
    assert [choice.text for choice in more.choices[:2]] == expected[:2]
    drawn = {server.complete(temperature=1.0).choices[0].text for _ in range(3)}
    assert len(drawn) > 1, "requests without a seed have different ones"


def test_token_ids_are_a_prompt(server: Server, model: Path) -> None:
    from transformers import AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(model)(TEXTS[0])["input_ids"]
    by_ids = server.complete(prompt=[token_ids, token_ids])
    assert [choice.text for choice in by_ids.choices] == [server.complete().choices[0].text] * 2
    assert by_ids.usage.prompt_tokens == 2 * len(token_ids)
    assert server.complete(prompt=token_ids).choices == server.complete().choices


def test_what_is_decoded_beside_a_request_changes_nothing(server: Server) -> None:
    requests = [
        {"seed": 1, "temperature": 1.0, "n": 2},
        {"seed": 2, "temperature": 0.7, "extra_body": {"dynamic_threshold": 0.1}},
        {"temperature": 0.0, "max_tokens": 7},
        {"extra_body": {"remasking_strategy": "entropy_bounded", "entropy_bound": 1.0}},
    ]
    alone = [server.chat(**fields) for fields in requests]
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

    async def together() -> list[Any]:
        values = {"model": "tiny", "messages": MESSAGES, "max_tokens": LENGTH}
        create = client.chat.completions.create
        return await asyncio.gather(*(create(**{**values, **fields}) for fields in requests))

    for one, other in zip(alone, asyncio.run(together()), strict=True):
        assert one.choices == other.choices
        assert one.usage == other.usage


def streamed(chunks: Any, num_choices: int) -> tuple[list[str], list[str | None], Any]:
    """Texts, reasons and usage of a stream of completions or chats."""
    texts, reasons, usage = [""] * num_choices, [None] * num_choices, None
    for chunk in chunks:
        assert usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] += text or ""
            reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_a_stream_is_the_response_in_pieces(server: Server) -> None:
    fields = {"n": 2, "seed": 3, "temperature": 1.0}
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = server.chat(**fields)
    chunks = list(server.chat(**fields, **with_usage))
    texts, reasons, usage = streamed(chunks, 2)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    with_text = [c for chunk in chunks for c in chunk.choices if c.delta.content]
    assert len(with_text) > 4, "blocks come one by one"
    whole = server.complete(**fields)
    texts, _, usage = streamed(server.complete(**fields, stream=True), 2)
    assert texts == [choice.text for choice in whole.choices]
    assert usage is None


def test_stop_strings_cut_and_end_a_response(server: Server) -> None:
    whole = server.complete(max_tokens=40)
    text = whole.choices[0].text
    stop = text[9:14]  # over the ends of tokens and of a block
    expected = text[: text.index(stop)]
    cut = server.complete(max_tokens=40, stop=["never", stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop")
    assert cut.usage.completion_tokens < whole.usage.completion_tokens
    assert cut.usage.forwards < whole.usage.forwards
    chunks = list(server.complete(max_tokens=40, stop=stop, stream=True))
    texts, reasons, _ = streamed(chunks, 1)
    assert (texts, reasons) == ([expected], ["stop"])
    unmet = server.complete(max_tokens=40, stop=text + "!")
    assert (unmet.choices, unmet.usage) == (whole.choices, whole.usage)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -1.0}, "temperature = -1.0: is outside [0, 100]"),
    "top_p": ({"top_p": 2.0}, "top_p = 2.0"),
    "max_tokens": ({"max_tokens": 0}, "greater than or equal to 1"),
    "max_completion_tokens": ({"max_completion_tokens": 300}, "over the server's limit of 255"),
    "n": ({"n": 17}, "17 responses"),
    "seed": ({"seed": "x"}, "valid integer"),
    "stop": ({"stop": [""]}, "neither a string of 1 to"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "is for streams"),
    "stream_options obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "input should be False",
    ),
    "messages": ({"messages": []}, "is empty"),
    "messages answered": (
        {"messages": [*MESSAGES, {"role": "assistant", "content": "7"}]},
        "the last one is the assistant's; end with a user's",
    ),
    "messages role": ({"messages": [{"role": "robot", "content": ""}]}, 'messages[0]["role"]'),
    "messages long": ({"messages": [{"role": "user", "content": "many " * 300}]}, "more than"),
    "messages mask": ({"messages": [{"role": "user", "content": "<|MASK|>"}]}, "MASK"),
    "logprobs": ({"logprobs": True}, "is not supported"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "is not supported"),
    "treshold": ({"extra_body": {"treshold": 1}}, "is unknown"),
    "dynamic_threshold": ({"extra_body": {"dynamic_threshold": "1"}}, "is no number"),
    "dynamic_threshold huge": ({"extra_body": {"dynamic_threshold": 10**400}}, "is too large"),
    "entropy_bound": ({"extra_body": {"entropy_bound": 1}}, "has no use for it"),
    "denoising_steps_per_block": (
        {
            "extra_body": {
                "remasking_strategy": "low_confidence_static",
                "denoising_steps_per_block": 3,
            }
        },
        "does not divide the block size 4",
    ),
    "remasking_strategy": ({"extra_body": {"remasking_strategy": "x"}}, "is unknown"),
    "chat_template_kwargs": ({"extra_body": {"chat_template_kwargs": {"tools": 1}}}, "tools"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_that_cannot_work_is_named(server: Server, case: str) -> None:
    fields, text = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as refused:
        server.chat(**fields)
    assert refused.value.param == case.split()[0]
    assert refused.value.type == "invalid_request_error"
    assert text in refused.value.body["message"]


def test_fields_that_ask_for_nothing_are_accepted(server: Server) -> None:
    fields = {"user": "me", "presence_penalty": 0, "logprobs": False, "tools": []}
    assert server.chat(**fields).choices == server.chat().choices


def test_other_refusals_have_openais_form(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        server.chat(model="gpt")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    for key in ("none", f"{KEY}-"):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"

    def post(content: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return httpx2.post(f"{server.url}/v1/completions", content=content, headers=headers)

    large = json.dumps({"model": "tiny", "prompt": "x" * 30000}).encode()

    def nested(depth: int) -> bytes:
        lists = b"[" * depth + b"]" * depth
        return b'{"model": "tiny", "prompt": "x", "max_tokens": 1, "metadata": ' + lists + b"}"

    in_pieces = (large[i : i + 9000] for i in range(0, len(large), 9000))
    for content, status, text in (
        (large, 413, "more than 20000 bytes"),
        (in_pieces, 413, "more than 20000 bytes"),
        (b"{", 400, "no JSON object"),
        (b"[]", 400, "no JSON object"),
        (b'{"model": "\xff"}', 400, "the body cannot be read"),
        (
            b'{"model": "tiny", "prompt": "", "seed": ' + b"9" * 9000 + b"}",
            400,
            "the body cannot be read",
        ),
        (nested(9000), 400, "the body cannot be read"),
        (nested(400), 200, None),
        (b'{"model": "tiny", "prompt": "x", "user": "\\ud800"}', 400, "user: half of a"),
        (b'{"model": "tiny", "prompt": ["x", ""]}', 400, "prompt: the list, or a part"),
        (b'{"model": "tiny", "prompt": ""}', 400, "prompt: the text is empty; write a text"),
        (b'{"model": "tiny"}', 400, "prompt: is missing"),
        (b'{"model": "tiny", "prompt": 4}', 400, "prompt: is neither"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"model": "\\ud800", "prompt": ""}', 404, "does not exist"),
        (b'{"model": "tiny", "prompt": []}', 400, "is empty"),
        (b'{"model": "tiny", "prompt": [-1]}', 400, "negative"),
        (b'{"model": "tiny", "prompt": [511]}', 400, "MASK"),
        (b'{"model": "tiny", "prompt": [99999]}', 400, "99999"),
    ):
        response = post(content)
        assert response.status_code == status
        assert text is None or text in response.json()["error"]["message"]
    assert server.get("/v2").json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_refuses_and_a_client_that_leaves_makes_room(server: Server) -> None:
    before = server.metric("forwards_total")
    running = server.complete(max_tokens=LONG, n=5, stream=True)
    next(iter(running))
    with pytest.raises(openai.RateLimitError) as refused:
        server.complete()
    assert refused.value.code == "queue_full"
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert server.metric("running_responses") == 3
    assert server.metric("waiting_responses") == 2
    running.close()
    server.wait_until(lambda: server.metric("running_responses") == 0)
    assert server.metric("waiting_responses") == 0
    assert server.complete().choices
    assert server.metric("forwards_total") - before < LONG, "the rest was decoded for nobody"
    # The same for a client that waits for the whole.
    with pytest.raises(openai.APITimeoutError):
        server.complete(max_tokens=LONG, n=5, timeout=0.3)
    server.wait_until(lambda: server.metric("running_responses") == 0)
    assert server.metric("forwards_total") - before < 2 * LONG


def test_metrics_count_what_was_answered(server: Server) -> None:
    names = ("completion_tokens_total", "response_forwards_total", "tokens_per_forward_count")
    before = [server.metric(name) for name in names]
    usage = server.complete(n=2).usage
    after = [server.metric(name) for name in names]
    counted = [new - old for new, old in zip(after, before, strict=True)]
    assert counted == [usage.completion_tokens, usage.forwards, 2]
    text = server.get("/metrics").text
    assert 'requests_total{path="/v1/completions",status="429"}' in text


def test_what_runs_is_finished_before_the_server_ends(server: Server) -> None:
    """The last test of this server."""
    whole = server.complete(max_tokens=40).choices
    answers = []

    def ask() -> None:
        answers.append(server.complete(max_tokens=LONG))

    thread = threading.Thread(target=ask)
    thread.start()
    server.wait_until(lambda: server.metric("running_responses") == 1)
    os.kill(server.process.pid, signal.SIGTERM)
    server.wait_until(lambda: server.get("/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as refused:
        server.complete()
    assert refused.value.status_code == 503
    assert refused.value.code == "server_stopping"
    thread.join()
    [answer] = answers
    assert answer.usage.completion_tokens == LONG
    assert answer.choices[0].text.startswith(whole[0].text)
    assert server.end() == 0
    assert "SIGTERM: finishing what runs" in server.output
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()


def begun(ask: Callable[[], Any]) -> Any:
    """A stream whose first part came within a second; asked for again where it took longer."""
    for _ in range(10):
        asked = time.monotonic()
        stream = ask()
        try:
            next(stream)
        except openai.APIError as error:
            if "too long" not in str(error):
                raise
        else:
            if time.monotonic() - asked < 1:
                return stream
            stream.close()
    raise AssertionError("no stream has begun in time")


def test_late_requests_and_an_impatient_end(model: Path, tmp_path: Path) -> None:
    """An autoregressive model, whose steps are tokens, without a key."""
    server = Server(
        tmp_path,
        *("--load", model, "--decoding", "autoregressive", "--served-model-name", "other"),
        *("--request-timeout-s", 3, "--shutdown-timeout-s", 0, "--max-response-length", 200),
        *("--max-running-requests", 1),
    )
    with pytest.raises(openai.NotFoundError):
        server.complete(max_tokens=2)
    short = server.complete(model="other", max_tokens=3)
    assert short.usage.forwards == short.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="left to right"):
        server.complete(model="other", extra_body={"dynamic_threshold": 0.5})
    late: dict[str, Any] = {"model": "other", "max_tokens": 200, "n": 16}
    with pytest.raises(openai.InternalServerError) as refused:
        server.complete(**late)
    assert (refused.value.status_code, refused.value.code) == (504, "timeout")
    server.wait_until(lambda: server.metric("running_responses") == 0)
    stream = begun(lambda: server.complete(**late, stream=True))
    os.kill(server.process.pid, signal.SIGINT)
    with pytest.raises(openai.APIError, match="is stopping"):
        list(stream)
    assert server.end() == 0


def test_what_cannot_be_served_is_said_at_once(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*arguments: object) -> str:
        assert main(["serve", "--device", "cpu", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    load = ("--load", model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port = {port}: 127.0.0.1 cannot be listened at" in refusal(*load, "--port", port)
    assert "--host = 'nowhere.invalid'" in refusal(*load, "--host", "nowhere.invalid")
    assert "--api-key = ''" in refusal(*load, "--api-key", "")
    assert "there is no model" in refusal()
    suffix = json.dumps({"default": "x"})
    assert "a request has no domain" in refusal(*load, "--prompt-suffix-by-domain", suffix)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refusal(*load)
