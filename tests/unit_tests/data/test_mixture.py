"""A mixture has the records that its file says, in an order that only the file decides."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.domains import Domains
from megatron_dlm.data.mixture import SourceEntry, kept_indices
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import read_prompts
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.refusal import refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("math", 10), ("code", 6)):
        rows = ({"question": f"{name} {i}?", "meta": {"right": i}} for i in range(size))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write(folder: Path, *sources: dict[str, Any], **keys: Any) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": list(sources), **keys}))
    return path


MATH: dict[str, Any] = {"path": "math.jsonl", "domain": "math"}
CODE: dict[str, Any] = {"path": "code.jsonl", "domain": "code"}


def test_sources_with_caps_weights_domains_and_fields(folder: Path) -> None:
    mapped = {"prompt": "question", "answer": "meta.right"}
    path = write(folder, MATH | {"max_samples": 4, "weight": 2.5}, CODE | {"fields": mapped})
    records = open_records(path, "--prompts")
    assert len(records) == 10 + 6
    math = [records.record(i) for i in range(10)]
    counts = Counter(record["meta"]["right"] for record in math)
    assert sorted(counts.values()) == [2, 2, 3, 3]
    assert {record["domain"] for record in math} == {"math"}
    code = [records.record(i) for i in range(10, 16)]
    expected = [{"prompt": f"code {i}?", "answer": i, "domain": "code"} for i in range(6)]
    assert code == expected
    assert records.where(15) == f"{folder / 'code.jsonl'}:6"


def test_only_prompts_are_left_of_chats_and_answers(folder: Path) -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [
        {"messages": [user, answer, user, answer], "id": 1},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"question": "a", "answer": "4"},
        {"prompt": "a", "response": "b"},
    ]
    (folder / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(write(folder, MATH | {"only_prompts": True}), "--prompts")
    assert [record for _, record in records.records()] == [
        {"messages": [user, answer, user], "id": 1, "domain": "math"},
        {"messages": [user], "domain": "math"},
        {"messages": [user], "answer": "4", "domain": "math"},
        {"prompt": "a", "domain": "math"},
    ]


@given(
    n=st.integers(1, 50),
    cap=st.none() | st.integers(1, 60),
    weight=st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]),
    seed=st.integers(0, 5),
)
def test_each_record_is_seen_as_often_as_its_weight(
    n: int, cap: int | None, weight: float, seed: int
) -> None:
    entry = SourceEntry(path="p", max_samples=cap, weight=weight)
    indices = kept_indices(n, entry, seed, 1).tolist()
    counts = Counter(indices)
    kept = min(n, cap or n)
    assert indices == sorted(indices)
    assert set(counts.values()) <= {int(weight), int(weight) + 1}
    assert len(counts) == (kept if weight >= 1 else round(weight * kept))
    assert len(indices) == int(weight) * kept + round((weight % 1) * kept)
    once = set(kept_indices(n, SourceEntry(path="p", max_samples=cap), seed, 1).tolist())
    assert set(counts) <= once, "a cap keeps the same records at any weight"


def test_the_fingerprint_follows_what_decides_the_records(folder: Path) -> None:
    def fingerprint(*sources: dict[str, Any], **keys: Any) -> str:
        return open_records(write(folder, *sources, **keys), "--prompts").fingerprint

    capped = MATH | {"max_samples": 4}
    same = fingerprint(capped, CODE)
    (folder / "moved.jsonl").write_bytes((folder / "code.jsonl").read_bytes())
    assert fingerprint(capped, CODE | {"path": "moved.jsonl"}) == same
    others = [
        fingerprint(CODE, capped),
        fingerprint(MATH, CODE),
        fingerprint(capped, CODE | {"weight": 2}),
        fingerprint(capped, CODE | {"domain": "chat"}),
        fingerprint(capped, CODE | {"fields": {"prompt": "question"}}),
        fingerprint(capped, CODE, seed=1),
    ]
    (folder / "code.jsonl").write_text('{"question": "changed"}\n')
    assert len({same, fingerprint(capped, CODE), *others}) == 8


def test_suffixes_go_by_the_domain_of_the_source(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, folder: Path
) -> None:
    path = write(folder, MATH, CODE)
    domains = Domains(name="kind", prompt_suffix={"math": " 7", "code": ""})
    prompts = read_prompts(path, tokenizer, special_tokens, 100, domains=domains)
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for index, content in ((0, "math 0? 7"), (10, "code 0?")):
        expected = tokenizer.encode(text.format(content), add_special_tokens=False)
        assert prompts[index].token_ids.tolist() == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sources: []", "mixture.yaml: sources = []: list should have at least 1 item"),
        ("[1]", "is not a mapping"),
        ("a: [", "mixture.yaml:1': is not YAML"),
        ("sources: [{path: math.jsonl, wieght: 2}]", "sources[0].wieght = 2: is no key of a"),
        ("seeds: 1\nsources: [{path: a}]", "seeds = 1: is no key of a mixture; use seed, sources"),
        ("sources: [{domain: a}]", "sources[0] = {'domain': 'a'}: names both or neither of path"),
        ("sources: [{path: a, revision: b}]", "which are for hub"),
        ("sources: [{path: math.jsonl, weight: 0}]", "sources[0].weight = 0: input should be gre"),
        ("sources: [{path: math.jsonl, max_samples: x}]", "sources[0].max_samples = 'x': input sh"),
        ("sources: [{path: no.jsonl}]", "sources[0].path = '{folder}/no.jsonl': cannot be read"),
        ("sources: [{path: math.jsonl, split: a}]", "files have no splits; leave it out"),
        ("sources: [{path: math.jsonl, weight: .01}]", "keeps no record"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_named(content: str, words: str, folder: Path) -> None:
    (folder / "mixture.yaml").write_text(content)
    error = str(refusal(open_records, folder / "mixture.yaml", "--prompts"))
    assert words.replace("{folder}", str(folder)) in error
    assert "mixture.yaml" in error


def test_a_field_that_a_record_lacks_is_named(folder: Path) -> None:
    records = open_records(write(folder, MATH | {"fields": {"prompt": "meta.left"}}), "--prompts")
    assert refusal(records.record, 3) == (
        f"{folder / 'math.jsonl'}:4: fields = 'meta.left': is not in the record;"
        " it has question, meta"
    )
