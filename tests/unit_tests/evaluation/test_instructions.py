"""Every kind of IFEval's instructions, followed and not; verdicts are by hand."""

import pytest

from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.evaluation.rewards.instructions import (
    KINDS,
    count_sentences,
    follows,
)

# Kind, arguments, responses that follow, responses that do not.
EXAMPLES = [
    ("keywords:existence", {"keywords": ["sea", "salt"]}, ["Salt of the SEA"], ["the sea"]),
    (
        "keywords:frequency",
        {"keyword": "go", "frequency": 2, "relation": "at least"},
        ["Go, go!", "go go go"],
        ["go", ""],
    ),
    (
        "keywords:frequency",
        {"keyword": "go", "frequency": 2, "relation": "less than"},
        ["go", "stay"],
        ["go and go"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["art"]}, ["a party"], ["Art!"]),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 3, "let_relation": "at least"},
        ["Zzz"],
        ["zz"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist ein kurzer deutscher Satz über das Wetter."],
        ["This is a short English sentence about the weather."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ["Dr. Lee came. He left at 3.5 p.m. sharp."],
        ["One. Two! Three?"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["one two, three - four"],
        ["one two three"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["first\n***\nsecond", "***\nfirst *** second\n***"],
        ["first\n\nsecond", "a *** b *** c", "a *** *** b"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        ['It is.\n\n"So, there!'],
        ["So it is.\n\nThere", "It is.\n\nSolely", "a\n\nso\n\nc"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name], [address]"],
        ["[name]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. call me", "p. s. more"],
        ["PS call me"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S more", "P. P. S. x"],
        ["P.S. more"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "- one\n  - two"],
        ["* one", "**one**\n* two", "- 1\n- 2\n- 3"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is maybe."],
        ["Maybe.", "My answer is maybe"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*"],
        ["*one*", "* \n*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "Section one. Section two."],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```"],
        ["{'a': 1}", 'Here: {"a": 1}'],
    ),
    ("detectable_format:title", {}, ["<<joy>>\ntext"], ["<joy>", "<<>>", "<< >>"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo"],
        ["one", "a ****** a", "a******b******c"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "What is it?"},
        ["what is it?\nA cat."],
        ["A cat. What is it?"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Is that all?"},
        ['Yes. "Is that all?"', "is that all?"],
        ["Is that all? No."],
    ),
    ("startend:quotation", {}, ['"all of it"'], ['"', 'say "it"', '"say" it']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I am HERE", "A-B and NATO"],
        ["I am here"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THE WEATHER IS VERY GOOD TODAY, SAID HE."],
        ["The weather is good.", "DAS WETTER IST HEUTE WIRKLICH SEHR SCHÖN UND WARM."],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["the weather is very good today, said he."],
        ["The weather is good."],
    ),
    ("punctuation:no_comma", {}, ["one and two"], ["one, two"]),
]


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, *_ in EXAMPLES} == set(KINDS)
    assert len(KINDS) == 25


@pytest.mark.parametrize(("kind", "arguments", "right", "wrong"), EXAMPLES)
def test_instructions(
    kind: str, arguments: dict[str, object], right: list[str], wrong: list[str]
) -> None:
    # The published files give each instruction all arguments that there are, most of them null.
    given = {name: None for _, names in KINDS.values() for name in names} | arguments
    record = {"instruction_id_list": [kind], "kwargs": [given]}
    check(record)
    assert [text for text in right if not follows(record, text)[0]] == []
    assert [text for text in wrong if follows(record, text)[0]] == []


def check(record: dict[str, object]) -> None:
    prompts = PromptDataset(RecordsInMemory([{"prompt": "?", **record}], "p.jsonl"), TokenTable())
    REWARDS["instructions"].check(prompts)


def test_a_response_is_right_if_it_follows_all() -> None:
    record = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, None],
    }
    texts = ['"all of it"', '"all, of it"', "all, of it", "", '<think>a, b</think>"all"']
    assert REWARDS["instructions"].rate([record] * 5, texts) == [1.0, 0.5, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two", 2),
        ("It costs 3.50 dollars. Mr. Lee pays, e.g. in cash!", 2),
        ('"Why?" he asked. (It was late.) She left...', 4),
        ("A heading\n\nA sentence.", 2),
        ("一。二。", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({}, '"instruction_id_list" = None: is not a list'),
        ({"instruction_id_list": [], "kwargs": []}, "there are 0 instructions"),
        ({"instruction_id_list": ["sing"], "kwargs": [{}]}, "instruction = 'sing': is unknown"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]},
            "lacks keywords",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "go"}]},
            "\"keywords\" = 'go': is not a list of texts",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": "4", "relation": "at least"}],
            },
            "\"num_words\" = '4': is not a whole number",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 4.0, "relation": "at most"}],
            },
            "\"relation\" = 'at most': is not 'less than' or 'at least'",
        ),
    ],
)
def test_records_that_cannot_be_rated_are_refused(record: dict[str, object], error: str) -> None:
    with pytest.raises(UserError, match=rf"^p.jsonl:1: .*{error}"):
        check(record)
