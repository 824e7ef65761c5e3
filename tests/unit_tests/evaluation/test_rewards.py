"""Rewards of every kind, and the prompts that they refuse."""

import json
from pathlib import Path

import pytest

from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.rewards import REWARDS, RIGHT, get_reward
from megatron_dlm.evaluation.rewards.base import without_thinking
from megatron_dlm.evaluation.rewards.code import code_of
from tests.sandboxed import isolated


def rate(name: str, record: dict[str, object], response: str) -> bool:
    (reward,) = REWARDS[name].rate([record], [response])
    assert 0 <= reward <= 1
    return reward >= RIGHT


def checked(name: str, **record: object) -> None:
    prompts = PromptDataset(RecordsInMemory([{"prompt": "?", **record}], "p.jsonl"), TokenTable())
    REWARDS[name].check(prompts)


@pytest.mark.parametrize(
    ("response", "answer", "exact", "by_value"),
    [
        ("3 + 4 = 7\n#### 7", "7", True, True),
        ("3 + 4 = 7\n#### 8", "7", False, False),
        ("#### 1,200", 1200, True, True),
        ("#### 1000", "1e3", True, True),
        ("#### 1e3", 1000, True, True),
        ("#### 1/2", "0.5", False, True),
        ("#### $x+1$", "1+x", False, True),
        (r"so it is \boxed{\frac{3}{4}}", "0.75", False, True),
        ("The answer is 12.", "12", False, True),
        (r"\boxed{2x}", "x^2", False, False),
        ("I do not know", "12", False, False),
        ("", "12", False, False),
        ("####", "12", False, False),
    ],
)
def test_verdicts(response: str, answer: object, exact: bool, by_value: bool) -> None:
    record = {"answer": answer}
    assert rate("exact_match", record, response) is exact
    assert rate("math_verify", record, response) is by_value


GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
@pytest.mark.parametrize(
    ("response", "is_right"), [("#### 72", True), ("so 24\n#### 72.0", True), ("#### 24", False)]
)
def test_a_reference_may_come_with_the_way_to_it(name: str, response: str, is_right: bool) -> None:
    record = {"question": "How many clips did Natalia sell altogether?", "answer": GSM8K}
    assert rate(name, record, response) is is_right
    REWARDS[name].check(
        PromptDataset(RecordsInMemory([{"prompt": "?", **record}], "p.jsonl"), TokenTable())
    )


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
def test_a_way_without_an_answer_is_refused_at_the_start(name: str) -> None:
    record = {"prompt": "?", "answer": "48 + 24 = 72\n####"}
    prompts = PromptDataset(RecordsInMemory([record], "p.jsonl"), TokenTable())
    with pytest.raises(UserError, match=r'p.jsonl:1: "answer" = .48 \+ 24'):
        REWARDS[name].check(prompts)


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
def test_a_prompt_without_answer_is_refused_at_the_start(name: str) -> None:
    prompts = PromptDataset(RecordsInMemory([{"prompt": "2 + 2?"}], "prompts.jsonl"), TokenTable())
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "answer" = None'):
        REWARDS[name].check(prompts)


@pytest.mark.parametrize("answer", ["x+", r"\frac{1}{", "???", "", "$"])
def test_a_reference_without_a_value_is_refused_at_the_start(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "2 + 2?", "answer": value} for value in (4, r"$\frac{1}{2}$", answer)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = PromptDataset(open_records(path, "--prompts"), TokenTable())
    with pytest.raises(UserError) as raised:
        REWARDS["math_verify"].check(prompts)
    assert str(raised.value).startswith(f'{path}:3: "answer" = {answer!r}: ')


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ('So it must be.\n"answer": "C"', "C"),
        ("{'answer': 'C'}", "C"),
        ('"answer": "B" is tempting, but "answer": "C".', "C"),
        ("**Answer:** C", "C"),
        ("Thus \\boxed{C}", "C"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("the answer is (C).", "C"),
        ("#### C", "C"),
        ("C", "C"),
        ("C. the third one", "C"),
        ("答案是 C", "C"),
        ("答案是选项C", "C"),
        ("Answer\N{FULLWIDTH COLON}C", "C"),
        ("\\boxed{\\mathrm{C}}", "C"),
        ("\\boxed{C. Paris}", "C"),
        ("The final answer is \\(C\\).", "C"),
        ("The answer is $\\mathbf{C}$", "C"),
        ("The correct answer is option C", "C"),
        ("the answer is c.", "C"),
        ("answer: c\nbecause", "C"),
        ("The answer is (c) and not (b)", "C"),
        ("The answer is a number.", None),
        ("answer: a carbon compound", None),
        ("The answer is I'm not sure", None),
        ("<think>answer: B</think>answer: C", "C"),
        ("answer: Carbon", None),
        ("Considering all of it, no.", None),
        ("I do not know", None),
        ("<think>answer: C", None),
        ("", None),
    ],
)
def test_letters(response: str, letter: str | None) -> None:
    assert [name for name in "ABCDI" if rate("choice", {"answer": name}, response)] == (
        [] if letter is None else [letter]
    )


def test_countdown() -> None:
    record: dict[str, object] = {"numbers": [3, 25, 4], "target": 79}
    checked("countdown", **record)
    right = (
        "#### 3 * 25 + 4",
        "<answer>(25*3)+4 = 79</answer>",
        r"\boxed{4 + 25 \times 3}",
        "\\boxed{\\frac{25}{1}}\n<answer>4+3\N{MULTIPLICATION SIGN}25</answer>",
    )
    wrong = (
        "#### 79",
        "#### 3 * 25 + 3 + 1",
        "#### 3*25+4+4-4",
        "#### 3**25",
        "#### 25*(4-1)+4",
        "3 * 25 + 4",
        "#### __import__('os')",
        "#### 3*25/0",
        "#### " + "(" * 300,
        "",
    )
    assert [text for text in right if not rate("countdown", record, text)] == []
    assert [text for text in wrong if rate("countdown", record, text)] == []
    thirds: dict[str, object] = {"numbers": [8, 3, 8, 3], "target": 24}
    assert rate("countdown", thirds, "#### 8/(3-8/3)")  # exact, not in floating point
    for record in ({"numbers": [1.5], "target": 3}, {"numbers": [1]}, {"target": 3}):
        with pytest.raises(UserError, match=r"^p.jsonl:1: "):
            checked("countdown", **record)


SOLUTION = "1234341221434321"


def test_sudoku() -> None:
    record: dict[str, object] = {"puzzle": "1.34 3412 2.43 4321"}
    checked("sudoku", **record)
    grid = "\n".join(SOLUTION[i : i + 4] for i in range(0, 16, 4))
    for text in (
        grid,
        f"<answer>{SOLUTION}</answer>",
        "So:\n" + "\n".join(" ".join(r) for r in grid.split()),
        f"First try:\n{grid[::-1]}\nThen:\n{grid}",
    ):
        assert rate("sudoku", record, text), text
    for text in ("", grid[:-1], grid.replace("1", "2"), "1234341221434312"):
        assert not rate("sudoku", record, f"<answer>{text}</answer>"), text
    # A right grid of another puzzle.
    assert not rate("sudoku", {"puzzle": "2" + "0" * 15}, grid)
    with pytest.raises(UserError, match="is not 16 or 81 digits"):
        checked("sudoku", puzzle="123")
    nine = "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))
    assert rate("sudoku", {"puzzle": "0" * 81}, f"#### {nine}")
    assert not rate("sudoku", {"puzzle": "0" * 81}, f"#### {nine[9:18]}{nine[:9]}{nine[18:]}"[::-1])


def test_code() -> None:
    isolated()
    calls = {"tests": {"calls": ["assert f(2) == 4", "assert f(3) == 9"]}}
    texts = {"tests": {"cases": [["2", "4"]]}}
    checked("code_tests", **calls)
    right = "I square it:\n```python\ndef f(x):\n    return x * x\n```\nDone."
    half = "```python\ndef f(x): return 4\n```"
    assert REWARDS["code_tests"].rate(
        [calls, calls, calls, texts], [right, half, "", "```\nprint(int(input())**2)\n```"]
    ) == [1.0, 0.5, 0.0, 1.0]
    with pytest.raises(UserError, match=r'"tests" = \{\} has neither "calls"'):
        checked("code_tests", tests={})
    for tests, problem in (
        ({"calls": ["assert f(2) =="]}, r"'assert f\(2\) ==' is no Python"),
        ({"calls": ["assert f(2) == 4"], "setup": 3}, '"setup" = 3 is no text'),
        ({"calls": ["assert f(2) == 4"], "entry_point": ["f"]}, '"entry_point" = .* is no text'),
    ):
        with pytest.raises(UserError, match=rf'^p.jsonl:1: "tests": {problem}'):
            checked("code_tests", tests=tests)
    with pytest.raises(UserError, match='"program_start" = 3 is no text'):
        checked("code_tests", **calls, program_start=3)
    nulls = {"tests": {**calls["tests"], "setup": None, "entry_point": None}}
    nulls["program_start"] = None
    checked("code_tests", **nulls)
    assert REWARDS["code_tests"].rate([nulls], [right]) == [1.0]


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\na\n```\nand\n```python\nb\n```", "b\n"),
        ("```python\ndef f(): 1\n```\n```python\nprint(f())\n```", "def f(): 1\n"),
        ("```python\na\n```\n```bash\nls\n```", "a\n"),
        ("```python\ncut off", "cut off"),
        ("```PYTHON title=a.py\na\n```", "a\n"),
    ],
)
def test_the_program_of_a_response(response: str, code: str) -> None:
    assert code_of(response, "f") == code


def test_thoughts_are_no_answer() -> None:
    assert without_thinking("<think>\n#### 3\n</think>\n\n#### 4") == "#### 4"
    assert without_thinking("thoughts</think>#### 4") == "#### 4"  # the template opened them
    assert without_thinking("<think>#### 4") == ""
    assert without_thinking("#### 4") == "#### 4"


def test_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward.py").write_text(
        "def short(records, responses):\n"
        "    return [len(r) <= record['most'] for record, r in zip(records, responses)]\n"
        "def broken(records, responses): return [1.0]\n"
        "def negative(records, responses): return [-1.0, 0.5]\n"
        "def failing(records, responses): return [record['absent'] for record in records]\n"
        "value = 3\n"
    )
    (tmp_path / "my_broken_reward.py").write_text("def rate(records, responses) return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = get_reward("my_reward:short", "--reward")
    assert reward.rate([{"most": 2}, {"most": 2}], ["ab", "abc"]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"returned \[1.0\] for 2 responses"):
        get_reward("my_reward:broken", "--reward").rate([{}, {}], ["", ""])
    for name, problem in (
        ("negative", r"returned \[-1.0, 0.5\] for 2 responses; return a number from 0 to 1"),
        ("failing", r"failed for 2 responses \(KeyError: 'absent'\); return a number"),
    ):
        with pytest.raises(UserError, match=rf"^reward = 'my_reward:{name}': {problem}"):
            get_reward(f"my_reward:{name}", "--reward").rate([{}, {}], ["", ""])
    for name, problem in (
        ("my_broken_reward:rate", r"cannot be imported \(SyntaxError: "),
        ("my_reward:value", "is no function"),
        ("my_reward:absent", "cannot be imported"),
        ("no_such_package:f", "cannot be imported"),
        ("sing", "unknown reward; choose exact_match, "),
    ):
        with pytest.raises(UserError, match=rf"^--reward = '{name}': {problem}"):
            get_reward(name, "--reward")
