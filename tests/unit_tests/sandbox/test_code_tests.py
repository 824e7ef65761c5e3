"""Verdicts on programs, and programs that try to forge them."""

import collections
import decimal
import fractions
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.errors import UserError
from megatron_dlm.sandbox import isolation, wire
from megatron_dlm.sandbox.code_tests import CallTests, CodeRunner, TextTests, same_output
from tests.sandboxed import SMALL, isolated

SQUARE = CallTests(["assert square(2) == 4", "assert square(-3) == 9"])


@pytest.fixture(scope="module")
def runner() -> CodeRunner:
    isolated()
    return CodeRunner("namespaces", replace(SMALL, cpu_seconds=1, wall_seconds=60), workers=2)


FORGERIES = {
    "leaves at once": "import os; os._exit(0)",
    "leaves when it is called": "def square(x):\n    import os; os._exit(0)",
    "leaves with status 0": "import sys; sys.exit(0)",
    "leaves when asked": "def square(x): raise SystemExit(0)",
    "equal to everything": (
        "class Equal(int):\n"
        "    def __eq__(self, other): return True\n"
        "    __ne__ = lambda self, other: False\n"
        "def square(x): return Equal()"
    ),
    "an object equal to everything": (
        "class Equal:\n    def __eq__(self, other): return True\ndef square(x): return Equal()"
    ),
    "a number that says it is another": (
        "class Liar(int):\n    def __int__(self): return 4\n    def __index__(self): return 4\n"
        "def square(x): return Liar(7)"
    ),
    "builtins replaced": (
        "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = Quiet\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\ndef square(x): return 7"
    ),
    "writes a verdict into everything that is open": (
        "import os\ndef square(x):\n    for number in range(64):\n"
        '        try: os.write(number, b\'{"passed": 2, "error": null}\\n\')\n'
        "        except OSError: pass\n    os._exit(0)"
    ),
    "answers by itself, with the value of a test": (
        "import os\nfor number in range(3, 64):\n"
        '    try: os.write(number, b\'{"value": true, "arguments": [null]}\\n\' * 9)\n'
        "    except OSError: pass"
    ),
    "prints a verdict": 'print(\'{"passed": 2, "error": null}\')\ndef square(x): return 7',
    "looks at the frames of its caller": (
        "import re, sys\ndef square(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in (*frame.f_globals.values(), *frame.f_locals.values()):\n"
        "            found = re.search(r'assert square.*== (\\d+)', str(value))\n"
        "            if found: return int(found[1])\n        frame = frame.f_back\n    return 7"
    ),
    "reads the tests": (
        "def square(x):\n    text = open('tests.json').read()\n"
        "    return 4 if '== 4' in text else 7"
    ),
    "kills its surroundings": (
        "import os, signal\ndef square(x):\n    for n in range(1, 9):\n"
        "        try: os.kill(n, signal.SIGKILL)\n        except OSError: pass"
    ),
    "never ends": "def square(x):\n    while True: pass",
    "is no program": "def square(x) return x * x",
    "is missing": "",
}


@pytest.mark.slow
def test_no_program_forges_a_verdict(runner: CodeRunner) -> None:
    right = "def square(x):\n    print('noise')\n    return x * x"
    verdicts = runner.run((source, SQUARE) for source in (right, *FORGERIES.values()))
    assert verdicts[0].is_right, verdicts[0]
    forged = zip(FORGERIES, verdicts[1:], strict=True)
    assert [(name, verdict) for name, verdict in forged if verdict.passed == 2] == []
    assert all(verdict.error for verdict in verdicts[1:])


OBJECTS = """
from dataclasses import dataclass
class Node:
    def __init__(self, value): self.value, self.left = value, None
@dataclass
class Pair:
    a: int
    b: int
def total(node): return node.value + (total(node.left) if node.left else 0)
def longest(pairs, n): return max(p.b - p.a for p in pairs[:n])
def sort(numbers): numbers.sort()
def count(text): import collections; return collections.Counter(text)
def evens(n): return (i for i in range(n) if i % 2 == 0)
def bisect(x): return x / 2
def check(x): raise ValueError('negative')
def len(x): return 0
"""


def test_tests_may_use_what_the_program_defines(runner: CodeRunner) -> None:
    tests = CallTests(
        [
            "root = Node(3); root.left = Node(4); assert total(root) == 7",
            "assert longest([Pair(1, 5), Pair(2, 9)], 2) == 7",
            "numbers = [3, 1, 2]; assert sort(numbers) is None; assert numbers == [1, 2, 3]",
            "assert count('abca') == {'a': 2, 'b': 1, 'c': 1}",
            "assert list(evens(5)) == [0, 2, 4]",
            "assert math.isclose(bisect(3), 1.5)",
            "try:\n    check(-1)\n    assert False\nexcept ValueError as error:\n"
            "    assert 'negative' in str(error)",
            "assert len([1, 2]) == 2",  # the tests' own builtins
            "assert helper(1) == 2",
            "assert check is not None",
        ],
        setup="def helper(x): return x + 1",
    )
    (verdict,) = runner.run([(OBJECTS + "\ndef helper(x): return 0", tests)])
    assert verdict.is_right, verdict


def test_the_entry_point_is_the_programs(runner: CodeRunner) -> None:
    tests = CallTests(
        ["check(twice)"],
        setup="def twice(x):\n    '''Twice x.'''\ndef check(candidate): assert candidate(2) == 4",
        entry_point="twice",
    )
    right, wrong = runner.run(
        [("def twice(x): return 2 * x", tests), ("def check(candidate): pass", tests)]
    )
    assert right.is_right
    assert wrong.error == "AttributeError: module 'program' has no attribute 'twice'"


def test_programs_that_read_and_write_text(runner: CodeRunner) -> None:
    tests = TextTests([("2\n", "4\n"), ("5", "25")])
    right, wrong, late, leaves, broken = runner.run(
        (source, tests)
        for source in (
            "print(int(input()) ** 2)",
            "print(4)",
            "print(int(input()) ** 2)\nimport time\nwhile True: pass",
            "import os; os._exit(0)",
            "print(4); raise ValueError('no')",
        )
    )
    assert right.is_right
    assert (wrong.passed, wrong.error) == (1, "the output is not the expected one")
    assert (late.passed, late.error) == (0, "the program ran past its limit of time")
    assert not leaves.is_right
    assert broken.error == "the program ended with status 1: ValueError: no"


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1 2\n3\n\n", "1 2 \n3", True),
        ("1.50", "1.5", True),
        ("yes", "YES", False),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("1", "", False),
    ],
)
def test_outputs_are_compared_line_by_line(found: str, expected: str, same: bool) -> None:
    assert same_output(found, expected) is same


hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=3,
)
plain = st.recursive(
    hashable | st.sets(hashable, max_size=3) | st.builds(range, st.integers(0, 9)),
    lambda inner: (
        st.lists(inner, max_size=3).map(collections.deque)
        | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=4,
)


def never(value: object) -> int:
    raise TypeError(value)


@given(plain)
def test_plain_values_arrive_as_they_are(value: object) -> None:
    tree = json.loads(json.dumps(wire.encode(value, never)))
    arrived = wire.decode(tree, never)
    assert arrived == value
    assert type(arrived) is type(value)


def test_numbers_too_long_for_text_and_iterators_without_end() -> None:
    assert wire.decode(wire.encode(7**10000, never), never) == 7**10000
    values = (fractions.Fraction(1, 3), decimal.Decimal("1.10"))
    assert wire.decode(wire.encode(values, never), never) == values
    with pytest.raises(ValueError, match="more than 1000000 items"):
        wire.encode((i for i in iter(int, 1)), never)


def test_code_is_refused_without_isolation_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "why_not_isolated", lambda: "new namespaces: not permitted")
    with pytest.raises(UserError) as raised:
        isolation.isolation("--task", "humaneval", unsafe=False)
    assert str(raised.value) == (
        "--task = 'humaneval': runs code that a model writes, and this machine cannot isolate it "
        "(new namespaces: not permitted); allow unprivileged user namespaces, or add "
        "--unsafe-code-execution to run it without"
    )
    assert isolation.isolation("--task", "humaneval", unsafe=True) == "none"
    runner = CodeRunner("none", replace(SMALL, cpu_seconds=1, wall_seconds=60), workers=2)
    right, wrong = runner.run(
        (f"def square(x):\n    {body}", SQUARE)
        for body in ("return x * x", "import os; os._exit(0)")
    )
    assert right.is_right
    assert not wrong.is_right
