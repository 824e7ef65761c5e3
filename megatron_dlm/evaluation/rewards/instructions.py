"""Instructions that a program can check: the 25 kinds of IFEval (arXiv 2311.07911).

A record has `instruction_id_list` (names of kinds) and `kwargs` (an object for each, with what the
instruction asks for), as in the published file. The reward is the share of instructions that the
response follows, by the strict measure of the paper.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards.base import Record, RuleReward, field_of, unrated
from megatron_dlm.extras import check_installed

Arguments = Mapping[str, Any]
"""What an instruction asks for, by the published names."""

Rule = Callable[[str, Arguments], bool]
"""Whether a response follows an instruction."""

KINDS: dict[str, tuple[Rule, tuple[str, ...]]] = {}
"""Rule of each kind, and the arguments that it needs."""


def _kind(name: str, *arguments: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        KINDS[name] = (rule, arguments)
        return rule

    return register


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


_ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|e\.g|i\.e|Inc|Ltd|Co|No|approx|a\.m|p\.m|U\.S|[A-Z])\."
    r"(?=\s+\S)"
)


_WIDE_ENDS = "\N{IDEOGRAPHIC FULL STOP}\N{FULLWIDTH EXCLAMATION MARK}\N{FULLWIDTH QUESTION MARK}"


def count_sentences(text: str) -> int:
    """Sentences: what ends with . ! or ? before a blank, and what is left."""
    text = _ABBREVIATIONS.sub(lambda found: found[0].replace(".", ""), text)
    parts = re.split(rf"""(?<=[.!?])["')\]*]*\s+|[{_WIDE_ENDS}]+\s*|\n\s*\n""", text)
    return sum(bool(re.search(r"\w", part)) for part in parts)


def _language_of(text: str) -> str | None:
    """The language, as ISO 639-1; None where it cannot be told."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # or short texts get another answer each time
    try:
        return str(detect(text))
    except LangDetectException:
        return None


@_kind("keywords:existence", "keywords")
def _existence(text: str, given: Arguments) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in given["keywords"])


@_kind("keywords:frequency", "keyword", "frequency", "relation")
def _frequency(text: str, given: Arguments) -> bool:
    count = len(re.findall(re.escape(given["keyword"]), text, re.IGNORECASE))
    return _compare(count, given["relation"], given["frequency"])


@_kind("keywords:forbidden_words", "forbidden_words")
def _forbidden(text: str, given: Arguments) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
        for word in given["forbidden_words"]
    )


@_kind("keywords:letter_frequency", "letter", "let_frequency", "let_relation")
def _letter_frequency(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["letter"].lower())
    return _compare(count, given["let_relation"], given["let_frequency"])


@_kind("language:response_language", "language")
def _language(text: str, given: Arguments) -> bool:
    return _language_of(text) in (None, given["language"])


@_kind("length_constraints:number_sentences", "num_sentences", "relation")
def _number_sentences(text: str, given: Arguments) -> bool:
    return _compare(count_sentences(text), given["relation"], given["num_sentences"])


@_kind("length_constraints:number_words", "num_words", "relation")
def _number_words(text: str, given: Arguments) -> bool:
    return _compare(len(_words(text)), given["relation"], given["num_words"])


@_kind("length_constraints:number_paragraphs", "num_paragraphs")
def _number_paragraphs(text: str, given: Arguments) -> bool:
    parts = _inner(re.split(r"\s?\*\*\*\s?", text))
    return all(part.strip() for part in parts) and len(parts) == given["num_paragraphs"]


def _inner(parts: list[str]) -> list[str]:
    """Without an empty first and last part: separators may stand around the text too."""
    if parts and not parts[0].strip():
        parts = parts[1:]
    return parts[:-1] if parts and not parts[-1].strip() else parts


@_kind(
    "length_constraints:nth_paragraph_first_word", "num_paragraphs", "nth_paragraph", "first_word"
)
def _nth_paragraph(text: str, given: Arguments) -> bool:
    parts = text.split("\n\n")
    number = int(given["nth_paragraph"])
    if sum(bool(part.strip()) for part in parts) != given["num_paragraphs"] or number > len(parts):
        return False
    words = parts[number - 1].split()
    first = re.split(r"""[.,?!'"]""", words[0].lstrip("'\"").lower())[0] if words else ""
    return first == given["first_word"].lower()


@_kind("detectable_content:number_placeholders", "num_placeholders")
def _placeholders(text: str, given: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= given["num_placeholders"]


@_kind("detectable_content:postscript", "postscript_marker")
def _postscript(text: str, given: Arguments) -> bool:
    marker = given["postscript_marker"]
    letters = [re.escape(letter) for letter in marker.replace(" ", "").lower().split(".") if letter]
    form = r"\.\s?".join(letters) if marker in ("P.S.", "P.P.S") else re.escape(marker.lower())
    return re.search(form + (r"\." if marker == "P.S." else ""), text.lower()) is not None


@_kind("detectable_format:number_bullet_lists", "num_bullets")
def _bullets(text: str, given: Arguments) -> bool:
    starred = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(starred) + len(dashed) == given["num_bullets"]


@_kind("detectable_format:constrained_response")
def _constrained(text: str, _: Arguments) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@_kind("detectable_format:number_highlighted_sections", "num_highlights")
def _highlights(text: str, given: Arguments) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= given["num_highlights"]


@_kind("detectable_format:multiple_sections", "section_spliter", "num_sections")
def _sections(text: str, given: Arguments) -> bool:
    found = re.findall(rf"\s?{re.escape(given['section_spliter'])}\s?\d+\s?", text)
    return len(found) >= given["num_sections"]


@_kind("detectable_format:json_format")
def _json(text: str, _: Arguments) -> bool:
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner.strip())
    except (ValueError, RecursionError):
        return False
    return True


@_kind("detectable_format:title")
def _title(text: str, _: Arguments) -> bool:
    titles = re.findall(r"<<[^\n]+>>", text)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


@_kind("combination:two_responses")
def _two_responses(text: str, _: Arguments) -> bool:
    parts = [part.strip() for part in _inner(text.split("******"))]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


@_kind("combination:repeat_prompt", "prompt_to_repeat")
def _repeat(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


@_kind("startend:end_checker", "end_phrase")
def _end(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


@_kind("startend:quotation")
def _quotation(text: str, _: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_kind("change_case:capital_word_frequency", "capital_frequency", "capital_relation")
def _capital_words(text: str, given: Arguments) -> bool:
    words = re.findall(r"\w+(?:[-'\N{RIGHT SINGLE QUOTATION MARK}]\w+)*", text)
    count = sum(word.isupper() for word in words)
    return _compare(count, given["capital_relation"], given["capital_frequency"])


@_kind("change_case:english_capital")
def _capitals(text: str, _: Arguments) -> bool:
    return text.isupper() and _language_of(text) in (None, "en")


@_kind("change_case:english_lowercase")
def _lowercase(text: str, _: Arguments) -> bool:
    return text.islower() and _language_of(text) in (None, "en")


@_kind("punctuation:no_comma")
def _no_comma(text: str, _: Arguments) -> bool:
    return "," not in text


_NEED_LANGUAGE = (
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
)


def follows(record: Record, response: str) -> list[bool]:
    """Whether a response follows each instruction of a record; an empty one follows none."""
    given = zip(record["instruction_id_list"], record["kwargs"], strict=True)
    return [
        bool(response.strip()) and KINDS[name][0](response, arguments or {})
        for name, arguments in given
    ]


_LISTS = ("keywords", "forbidden_words")
_NUMBERS = re.compile("num_.*|nth_.*|.*frequency")


def _kind_of(argument: str) -> str:
    """What an argument has to be, in an error's words."""
    if argument in _LISTS:
        return "a list of texts"
    if argument.endswith("relation"):
        return "'less than' or 'at least'"
    return "a whole number" if _NUMBERS.fullmatch(argument) else "a text"


def _is_of_its_kind(argument: str, value: Any) -> bool:
    if argument in _LISTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if argument.endswith("relation"):
        return value in ("less than", "at least")
    if _NUMBERS.fullmatch(argument):
        # Tables that have nulls in a column write its numbers as 3.0.
        return type(value) is int or (type(value) is float and value.is_integer())
    return isinstance(value, str)


def _check(record: Record, where: str) -> None:
    names = field_of(record, "instruction_id_list", list, where, "a list of instructions")
    arguments = field_of(record, "kwargs", list, where, "a list of objects")
    if not names or len(names) != len(arguments):
        problem = f"there are {len(names)} instructions and arguments for {len(arguments)}"
        raise unrated(where, problem)
    for name, given in itertools.zip_longest(names, arguments):
        if name not in KINDS:
            raise bad_value(
                f"{where}: instruction", name, "is unknown", f"choose one of {', '.join(KINDS)}"
            )
        missing = [needed for needed in KINDS[name][1] if (given or {}).get(needed) is None]
        if missing:
            raise unrated(where, f"instruction {name} lacks {', '.join(missing)}")
        for needed in KINDS[name][1]:
            if not _is_of_its_kind(needed, given[needed]):
                kind = _kind_of(needed)
                field = f'{where}: instruction {name}: "{needed}"'
                raise bad_value(field, given[needed], f"is not {kind}", f"write {kind}")
        if name in _NEED_LANGUAGE:
            check_installed("langdetect", f"{where}: instruction", name)


def _rate(record: Record, response: str) -> float:
    verdicts = follows(record, response)
    return sum(verdicts) / len(verdicts)


INSTRUCTIONS = RuleReward("instructions", _rate, _check)
