"""Every benchmark in its own published form: its prompt, a right response and a wrong one."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.rewards import RIGHT, get_reward
from megatron_dlm.evaluation.tasks import TASKS, get_task
from megatron_dlm.evaluation.tasks.reading import read_task_file
from tests.sandboxed import isolated

QUESTION = "Which is a number?"
OPTIONS = ["sky", "seven", "blue", "bird"]
LETTERED = "A. sky\nB. seven\nC. blue\nD. bird"
HIDDEN = json.dumps([{"input": "5\n", "output": "25\n", "testtype": "stdin"}])
METHOD = "class Solution:\n    def square(self, n: int) -> int:\n"
SQUARE = "```python\nprint(int(input()) ** 2)\n```"

BENCHMARKS: dict[str, tuple[list[dict[str, Any]], list[str], list[str], str]] = {
    # Records, right responses to them, wrong ones, and what the first prompt has to contain.
    "gsm8k": (
        [{"question": "3 + 4?", "answer": "It is <<3+4=7>>7.\n#### 7"}],
        [r"So \boxed{7}"],
        [r"So \boxed{8}"],
        "3 + 4?\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ),
    "math_500": (
        [
            {
                "problem": "Half of one?",
                "solution": "It is half.",
                "answer": r"\frac{1}{2}",
                "subject": "Algebra",
                "level": 1,
                "unique_id": "test/1",
            }
        ],
        [r"\boxed{0.5}"],
        [r"\boxed{2}"],
        "Half of one?\nPlease reason",
    ),
    "aime_2024": (
        [{"ID": "2024-I-1", "Problem": "33?", "Solution": "33.", "Answer": 33}],
        [r"\boxed{033}"],
        ["33 or 34"],
        "33?\n",
    ),
    "aime_2025": ([{"problem": "70?", "answer": "70", "id": "0"}], [r"\boxed{70}"], [""], "70?\n"),
    "mgsm": (
        [{"question": "Drei plus vier?", "answer": None, "answer_number": 7, "equation": None}],
        [r"\boxed{7}"],
        [r"\boxed{3}"],
        "Drei plus vier?",
    ),
    "mmlu": (
        [
            {"question": QUESTION, "subject": "words", "choices": OPTIONS, "answer": 1},
            {"question": QUESTION, **dict(zip("ABCD", OPTIONS, strict=True)), "answer": "B"},
        ],
        ['"answer": "B"', "B"],
        ['"answer": "C"', "no"],
        f"{QUESTION}\n{LETTERED}\nPlease show your choice in the answer field with only the choice "
        'letter, e.g., "answer": "C".',
    ),
    "mmlu_pro": (
        [
            {
                "question_id": 70,
                "question": QUESTION,
                "options": [*OPTIONS, "fish", "cat", "dog", "cow", "sea", "ten"],
                "answer": "J",
                "answer_index": 9,
                "category": "words",
            }
        ],
        ['"answer": "J"'],
        ['"answer": "B"'],
        "I. sea\nJ. ten\n",
    ),
    "mmlu_redux": (
        [
            {"question": QUESTION, "choices": OPTIONS, "answer": 1, "error_type": "ok"},
            {
                "question": QUESTION,
                "choices": OPTIONS,
                "answer": 0,
                "error_type": "wrong_groundtruth",
                "correct_answer": "1",
            },
        ],
        ['"answer": "B"', '"answer": "B"'],
        ['"answer": "A"', '"answer": "A"'],
        LETTERED,
    ),
    "ceval": (
        [
            {
                "id": 0,
                "question": QUESTION,
                **dict(zip("ABCD", OPTIONS, strict=True)),
                "answer": "B",
                "explanation": "",
            }
        ],
        ["答案是 B"],
        ["答案是 C"],
        LETTERED,
    ),
    "arc": (
        [
            {
                "id": "a",
                "question": QUESTION,
                "choices": {"text": OPTIONS, "label": ["1", "2", "3", "4"]},
                "answerKey": "2",
            }
        ],
        ["The answer is B."],
        ["The answer is D."],
        LETTERED,
    ),
    "race": (
        [
            {
                "example_id": "1.txt",
                "article": "Words.",
                "question": QUESTION,
                "options": OPTIONS,
                "answer": "B",
            }
        ],
        ['"answer": "B"'],
        ['"answer": "A"'],
        f"Words.\n\n{QUESTION}\n{LETTERED}",
    ),
    "ifeval": (
        [
            {
                "key": 1000,
                "prompt": "Write, without commas.",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{"num_words": None}],
            }
        ],
        ["one two"],
        ["one, two"],
        "Write, without commas.",
    ),
    "bbh": (
        [
            {"input": "not True is", "target": "False"},
            {"input": f"{QUESTION}\n(A) sky\n(B) seven", "target": "(B)"},
        ],
        ["#### False.", "#### B"],
        ["#### True", "#### (A)"],
        "not True is\nThink step by step",
    ),
    "humaneval": (
        [
            {
                "task_id": "HumanEval/0",
                "prompt": 'import math\n\ndef twice(x):\n    return 2 * x\n\n\ndef area(r: float):\n    """Area of a\n    circle."""\n',  # noqa: E501
                "canonical_solution": "    return math.pi * r * r\n",
                "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(0) == 0\n    assert abs(candidate(twice(1)) - 12.566) < 1e-3\n",  # noqa: E501
                "entry_point": "area",
            }
        ],
        ["```python\ndef area(r):\n    return math.pi * twice(r) * r / 2\n```"],
        ["```python\ndef twice(x): return 0\ndef check(f): pass\ndef area(r): return 0\n```"],
        "Complete this Python function.",
    ),
    "mbpp": (
        [
            {
                "task_id": 11,
                "text": "Write a function to square.",
                "code": "",
                "test_list": ["assert square(2) == 4", "assert square(N) == 9"],
                "test_setup_code": "N = 3",
                "challenge_test_list": [],
            },
            {
                "task_id": 2,
                "prompt": "Write a function to square.",
                "code": "",
                "test_imports": ["import math"],
                "test_list": ["assert math.isclose(square(0.1), 0.01)"],
            },
        ],
        ["```python\ndef square(x):\n    return x * x\n```"] * 2,
        ["```python\ndef square(x):\n    return 4\n```"] * 2,
        "assert square(2) == 4",
    ),
    "livecodebench": (
        [
            {
                "question_content": "Print the square.",
                "starter_code": "",
                "public_test_cases": json.dumps(
                    [{"input": "2\n", "output": "4\n", "testtype": "stdin"}]
                ),
                "private_test_cases": base64.b64encode(
                    zlib.compress(pickle.dumps(HIDDEN))
                ).decode(),
                "metadata": "{}",
            },
            {
                "question_content": "Return the square.",
                "starter_code": METHOD,
                "public_test_cases": json.dumps(
                    [{"input": "2", "output": "4", "testtype": "functional"}]
                ),
                "private_test_cases": json.dumps(
                    [{"input": "3", "output": "9", "testtype": "functional"}]
                ),
                "metadata": json.dumps({"func_name": "square"}),
            },
        ],
        [SQUARE, f"```python\n{METHOD}        return n * n\n```"],
        ["```python\nprint(4)\n```", f"```python\n{METHOD}        return 4\n```"],
        "Print the square.\n\nThe program reads standard input",
    ),
}


def file_of(folder: Path, records: list[dict[str, Any]]) -> str:
    path = folder / "benchmark.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks(name: str, tmp_path: Path) -> None:
    records, right, wrong, text = BENCHMARKS[name]
    task = get_task(name)
    if task.reward == "code_tests":
        isolated()
    file = read_task_file(task, file_of(tmp_path, records), None)
    converted = [record for _, record in file.records()]
    assert text in converted[0]["messages"][0]["content"]
    reward = get_reward(task.reward, "--task")
    reward.check(PromptDataset(file, TokenTable()))
    rewards = reward.rate(converted * 2, [*right, *wrong])
    assert [value >= RIGHT for value in rewards] == [True] * len(right) + [False] * len(wrong)


def test_every_benchmark_is_tested() -> None:
    assert set(BENCHMARKS) | {"gpqa_diamond"} == {
        name for name, task in TASKS.items() if task.convert is not None
    }


def test_the_right_choice_of_gpqa_is_anywhere() -> None:
    letters = set()
    for number in range(20):
        record = {"Question": f"{QUESTION} {number}", "Correct Answer": "seven\n"}
        record |= {f"Incorrect Answer {n}": word for n, word in enumerate(("a", "b", "c"), 1)}
        ((again,), (converted,)) = (TASKS["gpqa_diamond"].prompts([("x", record)]) for _ in "12")
        assert converted == again
        letter = converted["answer"]
        assert f"{letter}. seven\n" in converted["messages"][0]["content"]
        letters.add(letter)
    assert letters == set("ABCD")


def test_hidden_tests_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    record = BENCHMARKS["livecodebench"][0][0] | {
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Trap()))).decode()
    }
    with pytest.raises(UserError, match="the hidden tests are not one text"):
        TASKS["livecodebench"].prompts([("x", record)])
    assert not (tmp_path / "sprung").exists()


def test_files_of_other_forms(tmp_path: Path) -> None:
    records = BENCHMARKS["bbh"][0]
    wrapped = tmp_path / "task.json"
    wrapped.write_text(json.dumps({"canary": "", "examples": records}))
    assert len(read_task_file(TASKS["bbh"], str(wrapped), 1)) == 1
    table = tmp_path / "subject_test.csv"
    row = {"question": QUESTION, **dict(zip("ABCD", OPTIONS, strict=True)), "answer": "B"}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    (_, record), *_ = read_task_file(TASKS["mmlu"], str(table), None).records()
    assert record["answer"] == "B"
    columns = tmp_path / "test.parquet"
    datasets.Dataset.from_list(BENCHMARKS["gsm8k"][0]).to_parquet(str(columns))
    (_, record), *_ = read_task_file(TASKS["gsm8k"], str(columns), None).records()
    assert record["messages"][0]["content"].startswith("3 + 4?")


def test_a_benchmark_is_asked_for_at_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: Any, **options: Any) -> datasets.Dataset:
        asked.append((*names, options["split"]))
        return datasets.Dataset.from_list(BENCHMARKS["gsm8k"][0] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_task_file(TASKS["gsm8k"], None, 2)) == 2
    assert len(read_task_file(TASKS["gsm8k"], "owner/name dev", None)) == 3
    assert asked == [("openai/gsm8k", "main", "test"), ("owner/name", None, "dev")]
    with pytest.raises(UserError, match=r"no data set.s name with its split"):
        read_task_file(TASKS["gsm8k"], "owner/name", None)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, [{"problem": "1?", "answer": "1"}, {"text": "1?"}])
    with pytest.raises(UserError) as raised:
        read_task_file(TASKS["math_500"], path, None)
    assert str(raised.value).startswith(f"{path}:2: is no record of task 'math_500' (LookupError")
    for name in ("none.csv", "none.json"):
        with pytest.raises(UserError, match="there is no such file"):
            read_task_file(TASKS["mmlu"], name, None)
    with pytest.raises(UserError, match="there is nothing to evaluate on"):
        read_task_file(TASKS["exact_match"], None, None)


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "my_task.py"
    file.write_text(
        "from megatron_dlm.evaluation.tasks.base import Task, ask\n"
        "TASK = Task('capitals', 'exact_match',\n"
        "    lambda record: ask(f\"Capital of {record['land']}?\", answer=record['city']))\n"
    )
    task = get_task(str(file))
    (record,) = task.prompts([("x", {"land": "Peru", "city": "Lima"})])
    assert record["messages"][0]["content"] == "Capital of Peru?"
    assert get_reward(task.reward, "--task").rate([record], ["#### Lima"]) == [1.0]
    file.write_text("TASK = 3")
    with pytest.raises(UserError, match="defines no task"):
        get_task(str(file))
    file.write_text("1 / 0")
    with pytest.raises(UserError, match=r"cannot be run \(ZeroDivisionError"):
        get_task(str(file))
