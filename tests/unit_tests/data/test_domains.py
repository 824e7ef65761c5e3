"""Suffixes and limits by the domain of a record."""

from typing import Any

import pytest

from megatron_dlm.config import Config
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.records import prompt_source
from tests.refusal import refusal

PUBLISHED = Domains.from_config(
    Config.from_dict(
        {
            "max_response_length_by_domain": {"math": 4096, "code": 2048, "science": 1024},
            "prompt_suffix_by_domain": '{"math": "\\nBox it.", "default": ""}',
        }
    )
)


@pytest.mark.parametrize(("domain", "limit"), [("math", 4096), ("code", 2048), ("science", 1024)])
def test_limits(domain: str, limit: int) -> None:
    assert PUBLISHED.response_limit({"domain": domain}, "f:1") == limit


@pytest.mark.parametrize("record", [{}, {"domain": "chat"}, {"domain": None}, {"domain": ["math"]}])
def test_a_domain_without_entry_is_refused_unless_there_is_a_default(record: Any) -> None:
    message = refusal(PUBLISHED.response_limit, record, "f.jsonl:7") or ""
    assert message.startswith('f.jsonl:7: "domain" = ')
    assert "--max-response-length-by-domain, which names math, code, science" in message
    assert "one for default" in message
    assert Domains(max_response_length={"math": 9, "default": 5}).response_limit(record, "") == 5
    assert Domains().response_limit(record, "") is None
    assert PUBLISHED.with_suffix("a", record, "") == "a"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "4"}
TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a"}, {"prompt": "a\nBox it."}),
        ({"messages": [user("a")]}, {"messages": [user("a\nBox it.")]}),
        (
            {"messages": [user("a"), ANSWER, user("b"), ANSWER]},
            {"messages": [user("a"), ANSWER, user("b\nBox it."), ANSWER]},
        ),
        (
            {"messages": [user([TEXT])]},
            {"messages": [user([TEXT, {"type": "text", "text": "\nBox it."}])]},
        ),
    ],
)
def test_the_suffix_ends_the_last_user_message(
    record: dict[str, Any], expected: dict[str, Any]
) -> None:
    before, source = repr(record), prompt_source(record, "f:1")
    suffixed = PUBLISHED.with_suffix(source, {"domain": "math"}, "f:1")
    assert suffixed == prompt_source(expected, "f:1")
    assert repr(record) == before  # what a reward and the exported record see
    assert PUBLISHED.with_suffix(source, {"domain": "chat"}, "f:1") == source


def test_a_chat_without_a_user_has_nothing_to_append_to() -> None:
    source = prompt_source({"messages": [{"role": "system", "content": "a"}]}, "f:3")
    message = refusal(PUBLISHED.with_suffix, source, {"domain": "math"}, "f:3") or ""
    assert message.startswith("f:3: no message has role")


def test_another_field_may_name_the_domain() -> None:
    domains = Domains("subject", max_response_length={"math": 9})
    assert domains.response_limit({"subject": "math", "domain": "code"}, "") == 9
