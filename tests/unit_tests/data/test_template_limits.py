"""A chat template that does not end, or takes too much memory, is refused."""

import threading
import time
from pathlib import Path

import pytest

from megatron_dlm.data import template_limits
from megatron_dlm.data.chat import Chat
from megatron_dlm.data.chat_template import ChatTemplate
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import UserError
from tests.tiny import REPOSITORY

LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


def _render(template: str) -> str:
    tokenizer = load_tokenizer(REPOSITORY / "examples/tiny/qwen3")
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, {}).prompt(
        Chat([{"role": "user", "content": "hello"}]), "prompts.jsonl:3"
    )


def test_one_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    with pytest.raises(UserError, match=r"prompts.jsonl:3: the chat template .*does not end"):
        _render(LOOP)


@pytest.mark.slow
def test_one_that_takes_the_memory() -> None:
    with pytest.raises(UserError, match=r"jsonl:3: the chat template takes more than 2 GiB"):
        _render("{{ 'a' * 10**11 }}")
    assert len(bytearray(3 << 30)) == 3 << 30  # the limit is gone again


def test_the_time_is_bounded_in_the_main_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.01)
    ended = []

    def work() -> None:
        with template_limits.template_limits():
            time.sleep(0.1)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_the_limits_of_the_process_are_as_before() -> None:
    before = Path("/proc/self/limits").read_text()
    assert "hello" in _render("{{ messages[0]['content'] }}")
    assert Path("/proc/self/limits").read_text() == before
