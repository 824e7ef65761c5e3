"""The page about trajectories, in headless Chromium: what it shows is what the trajectory says."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_dlm.commands import main
from megatron_dlm.report.trajectory_page import page
from tests.unit_tests.report.browser import CHROMIUM, Browser, browser

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
TEXTS = [
    "the",
    " cat",
    "\n",
    "ü",
    "漢字",
    "<b>",
    "&amp;",
    "</script>",
    "\u202e",
    " ",
    "",
    "<E4>",
]


def made_entry(seed: int, *, canvas: bool = False, num_blocks: int = 3) -> dict[str, Any]:
    """A line of generate's output: every block is settled in a random order."""
    draw = random.Random(seed)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("token_ids", "texts", "block", "step", "forward", "confidence")
    }
    forwards = 0
    for block in range(num_blocks):
        steps = draw.randint(1, 4)
        order = [*range(1, steps + 1), *(draw.randint(1, steps) for _ in range(4 - steps))]
        draw.shuffle(order)
        for step in order:
            which = draw.randrange(len(TEXTS))
            columns["token_ids"].append(which)
            columns["texts"].append(TEXTS[which])
            columns["block"].append(block)
            columns["step"].append(step)
            columns["forward"].append(forwards + step)
            columns["confidence"].append(round(draw.random(), 6))
        forwards += steps
    length = 4 * num_blocks - 2
    response, tail = (
        {name: values[own] for name, values in columns.items()}
        for own in (slice(length), slice(length, None))
    )
    return {
        "messages": [{"role": "user", "content": f"{HOSTILE} {seed}"}],
        "response": HOSTILE + "".join(response["texts"]),
        "finish_reason": "length",
        "tokens_per_forward": 1.0,
        "response_index": seed,
        "trajectory": {
            "prompt_index": 0,
            "setting": "dynamic_0.9",
            "seed": seed,
            "settings": {"block_size": 4, "temperature": 1.0},
            "prompt": {"token_ids": [1], "texts": [HOSTILE]},
            "response": response,
            "tail": tail,
            "special_token_ids": [0],
            "canvas_length": 20 if canvas else None,
            "denoising_forwards": forwards,
            "total_forwards": forwards,
        },
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def written(folder: Path, entries: list[dict[str, Any]], *options: str) -> str:
    """Write the page with the command; returns its address."""
    lines = folder / "responses.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert main(["trajectory", str(lines), *options]) == 0
    return (folder / "responses.html").as_uri()


def shown(tab: Browser) -> list[str]:
    """Classes of each token on the page."""
    script = "[...document.querySelectorAll('#tokens .token')].map((t) => t.className)"
    classes: list[str] = tab.run(script)
    return classes


def colors(tab: Browser) -> list[str]:
    """Colour of each token on the page; empty where it has none of its own."""
    script = "[...document.querySelectorAll('#tokens .token')].map((t) => t.style.backgroundColor)"
    found: list[str] = tab.run(script)
    return found


def expected(entry: dict[str, Any], forward: int) -> list[str]:
    """MASK, later, new or settled, from the forward that each token was settled by."""
    trajectory = entry["trajectory"]
    parts = [trajectory["response"], trajectory["tail"]]
    by = [f for part in parts for f in part["forward"]]
    blocks = [b for part in parts for b in part["block"]]
    open_blocks = {b for f, b in zip(by, blocks, strict=True) if f > forward}
    states = []
    for own, block in zip(by, blocks, strict=True):
        if own <= forward:
            states.append("new" if own == forward else "settled")
        elif block == min(open_blocks) or trajectory["canvas_length"] is not None:
            states.append("mask")
        else:
            states.append("later")
    return states


def state_of(classes: str) -> str:
    return next((s for s in ("mask", "later", "new") if s in classes.split()), "settled")


def test_the_slider_shows_the_steps(tab: Browser, tmp_path: Path) -> None:
    entries = [made_entry(1), made_entry(2, canvas=True), made_entry(3, num_blocks=1)]
    tab.open(written(tmp_path, entries))
    for number, entry in enumerate(entries):
        trajectory = entry["trajectory"]
        forwards = trajectory["denoising_forwards"]
        tab.run(
            f"document.getElementById('choice').value = {number};"
            "document.getElementById('choice').dispatchEvent(new Event('change'))"
        )
        assert [state_of(c) for c in shown(tab)] == expected(entry, forwards)
        # To the first state by a key, through the others by key, slider and button in turn.
        tab.run("document.activeElement.blur()")
        tab.press("Home")
        for forward in range(forwards + 1):
            assert [state_of(c) for c in shown(tab)] == expected(entry, forward)
            settled = expected(entry, forward).count("settled") + expected(entry, forward).count(
                "new"
            )
            where = tab.run("document.getElementById('where').textContent")
            assert where.startswith(f"Forward {forward} of {forwards}")
            total = len(expected(entry, 0))
            assert where.endswith(f"({settled} of {total} in all)")
            if forward % 3 == 0:
                tab.press("ArrowRight")
            elif forward % 3 == 1:
                tab.run(
                    f"document.getElementById('forward').value = {forward + 1};"
                    "document.getElementById('forward').dispatchEvent(new Event('input'))"
                )
            else:
                tab.run("document.getElementById('next').click()")
        tab.press("ArrowLeft")
        assert [state_of(c) for c in shown(tab)] == expected(entry, forwards - 1)
        tab.press("End")

        tokens = trajectory["response"]
        figures = tab.run("[...document.querySelectorAll('dd')].map((d) => d.textContent)")
        mean = sum(tokens["confidence"]) / len(tokens["confidence"])
        blocks = {*tokens["block"], *trajectory["tail"]["block"]}
        length = len(tokens["token_ids"])
        assert figures == [
            str(length),
            str(forwards),
            f"{length / forwards:.2f}",
            str(len(blocks)),
            f"{mean:.3f}",
            "length limit",
        ]
        steps = [*tokens["step"], *trajectory["tail"]["step"]]
        owners = [*tokens["block"], *trajectory["tail"]["block"]]
        last = Counter(
            max(s for s, b in zip(steps, owners, strict=True) if b == block) for block in blocks
        )
        histogram = tab.run("document.getElementById('steps').getAttribute('aria-label')")
        assert histogram == ", ".join(f"{s}: {last[s]}" for s in range(1, max(last) + 1))
        by = Counter([*tokens["forward"], *trajectory["tail"]["forward"]])
        bars = tab.run("document.getElementById('settled').getAttribute('aria-label')")
        assert bars == ", ".join(f"{f}: {by[f]}" for f in range(1, forwards + 1))


def drafted_entry() -> dict[str, Any]:
    """A line whose response came about by three rounds: drafts of 4, of 2 and of none."""
    entry = made_entry(9)
    trajectory = entry["trajectory"]
    for part, length in (("response", 6), ("tail", 0)):
        columns = trajectory[part]
        trajectory[part] = {name: values[:length] for name, values in columns.items()}
    columns = trajectory["response"]
    columns["block"] = [0, 0, 0, 0, 1, 1]
    columns["step"] = [1, 1, 2, 2, 1, 2]
    columns["forward"] = [2, 2, 4, 4, 4, 5]
    trajectory["denoising_forwards"] = 5
    trajectory["rounds"] = [
        {
            "first": first,
            "forward": forward,
            "draft_ids": [*range(len(texts))],
            "draft_texts": texts,
            "num_accepted": accepted,
            "draws_next": True,
        }
        for first, forward, texts, accepted in (
            (0, 2, ["a", HOSTILE, "c", "d"], 1),
            (2, 4, ["e", "f"], 2),
            (5, 5, [], 0),
        )
    ]
    return entry


def test_rounds_show_what_was_drafted(tab: Browser, tmp_path: Path) -> None:
    tab.open(written(tmp_path, [drafted_entry(), made_entry(1)]))
    figures = tab.run("[...document.querySelectorAll('dd')].map((d) => d.textContent)")
    assert figures[-1] == "3 of 6"
    tab.press("Home")
    says = []
    for _ in range(5):
        tab.press("ArrowRight")
        says.append(tab.run("document.querySelector('#drafts .soft').textContent"))
    assert says == [
        "A draft of 4, verified by forward 2: ",
        "4 drafted, 1 accepted, 1 corrected: ",
        "A draft of 2, verified by forward 4: ",
        "2 drafted, 2 accepted, 1 drawn after them: ",
        "Nothing left to draft: one token is drawn",
    ]
    for _ in range(3):
        tab.press("ArrowLeft")
    drafts = "[...document.querySelectorAll('#drafts .token')].map((t) => [t.className, "
    assert tab.run(drafts + "t.textContent])") == [
        ["token", "a"],
        ["token refused", HOSTILE],
        ["token refused", "c"],
        ["token refused", "d"],
    ]
    titles = tab.run("[...document.querySelectorAll('#tokens .token')].map((t) => t.title)")
    origins = ["draft accepted", "in place of a refused draft"]
    assert [t.split(", ")[3] for t in titles[:2]] == origins
    assert titles[2:] == ["MASK"] * 4
    tab.press("End")
    titles = tab.run("[...document.querySelectorAll('#tokens .token')].map((t) => t.title)")
    assert "drawn without a draft" in titles[4]
    assert "drawn without a draft" in titles[5]
    # A response of another strategy has none of this.
    tab.run(
        "document.getElementById('choice').value = 1;"
        "document.getElementById('choice').dispatchEvent(new Event('change'))"
    )
    assert tab.run("document.getElementById('drafts').checkVisibility()") is False
    assert tab.run("document.getElementById('key-refused').checkVisibility()") is False


def test_colours_follow_step_and_confidence(tab: Browser, tmp_path: Path) -> None:
    entry = made_entry(4)
    tab.open(written(tmp_path, [entry]) + "#1/999/step")
    trajectory = entry["trajectory"]
    for by in ("step", "confidence"):
        tab.run(f"document.querySelector('input[value={by}]').click()")
        values = [*trajectory["response"][by], *trajectory["tail"][by]]
        found = colors(tab)
        assert all(found)
        # One value, one colour: and text on it is black or white, whichever is read better.
        assert len(set(zip(values, found, strict=True))) == len(set(values))
    inks = tab.run("[...document.querySelectorAll('#tokens .token')].map((t) => t.style.color)")
    for ink, color in zip(inks, colors(tab), strict=True):
        other = "rgb(0, 0, 0)" if ink != "rgb(0, 0, 0)" else "rgb(255, 255, 255)"
        assert contrast(ink, color) >= 4.5 > 0
        assert contrast(ink, color) >= contrast(other, color) - 0.2


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in color.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_stay_texts(tab: Browser, tmp_path: Path) -> None:
    entry = made_entry(5)
    entry["response"] += "\ud83d"  # half a character
    tab.messages.clear()
    tab.open(written(tmp_path, [entry]))
    assert tab.run("document.title") == "Trajectories: responses"
    assert tab.run("document.scripts.length") == 2
    assert tab.run("document.images.length") == 0
    assert tab.run("document.getElementById('prompt-text').textContent") == HOSTILE
    assert HOSTILE in tab.run("document.getElementById('response').textContent")
    assert HOSTILE[:60] in tab.run("document.getElementById('choice').textContent")
    texts = tab.run("[...document.querySelectorAll('#tokens .token')].map((t) => t.textContent)")
    signs = {"\n": "↵", "\u202e": "U+202E", " ": "␣", "": "∅"}
    trajectory = entry["trajectory"]
    given = [*trajectory["response"]["texts"], *trajectory["tail"]["texts"]]
    assert texts == [signs.get(text, text) for text in given]
    assert tab.messages == []
    # A script that came in by another way would be refused.
    tab.run(
        "{ const s = document.createElement('script'); s.textContent = 'document.title = 1';"
        "document.body.append(s); }"
    )
    tab.run("fetch('https://example.org').catch(() => null)")
    assert tab.run("document.title") == "Trajectories: responses"
    assert any("Content Security Policy" in message for message in tab.messages)


def test_screenshots_show_something(tab: Browser, tmp_path: Path) -> None:
    tab.open(written(tmp_path, [made_entry(6)]) + "#1/3/step")
    means = []
    for dark in (False, True):
        tab.screenshot(tmp_path / "page.png", 1100, 900, dark=dark)
        with Image.open(tmp_path / "page.png") as image:
            assert image.size == (1100, 900)
            counts = image.convert("L").histogram()
            assert max(counts) < 0.9 * sum(counts)
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 100
            means.append(sum(i * n for i, n in enumerate(counts)) / sum(counts))
        assert tab.run("document.documentElement.scrollWidth") <= 1100
    assert means[0] > 180
    assert means[1] < 80


def test_a_page_has_the_first_trajectories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [made_entry(seed) for seed in range(5)]
    written(tmp_path, entries, "--max-trajectories", "2")
    assert "2 trajectories" in capsys.readouterr().out
    html = (tmp_path / "responses.html").read_text(encoding="utf-8")
    assert "The first 2 of responses.jsonl." in html
    assert HOSTILE not in html
    assert "The first" not in page([], "all")


def broken_round(**changes: object) -> str:
    entry = drafted_entry()
    entry["trajectory"]["rounds"][0] |= changes
    return json.dumps(entry)


def broken(part: str, column: str, value: object) -> dict[str, Any]:
    entry = made_entry(0)
    entry["trajectory"][part][column] = value
    return entry


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "responses.jsonl:2: is no JSON"),
        ("[1]", "responses.jsonl:2: there is no trajectory; add --trajectories to generate"),
        (json.dumps({"response": "x"}), "responses.jsonl:2: there is no trajectory"),
        (json.dumps({"trajectory": None}), "responses.jsonl:2: the trajectory has another form"),
        (json.dumps(broken("tail", "step", [])), "trajectory.tail.step does not hold 2 ints"),
        (json.dumps(broken("tail", "texts", [1, 2])), "trajectory.tail.texts does not hold 2 strs"),
        (json.dumps(broken("tail", "forward", [0, 1])), "trajectory.tail.forward is not in 1 to"),
        (json.dumps(broken("tail", "confidence", ["", 1])), "confidence does not hold 2 numbers"),
        (
            json.dumps(broken("tail", "confidence", [1.0, math.nan])),
            "trajectory.tail.confidence holds NaN or infinite values",
        ),
        (broken_round(draft_texts=["a"]), "rounds[0].draft_texts does not hold 4 strs"),
        (broken_round(draft_ids=["a"]), "rounds[0].draft_ids does not hold ints"),
        (broken_round(num_accepted=5), "rounds[0] has a forward beyond 5, or accepts more than 4"),
        (broken_round(forward="1"), "rounds[0] does not hold numbers"),
    ],
)
def test_lines_without_a_trajectory_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps(made_entry(0)) + "\n" + line + "\n")
    assert main(["trajectory", str(file)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not (tmp_path / "responses.html").exists()


def test_files_that_cannot_be_shown_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for arguments, problem in (
        ([], "file = None: there is none; write megatron-dlm trajectory FILE"),
        (["."], "file = '.': is no name of a file"),
        ([str(empty)], "is empty; name what generate --output wrote"),
        ([str(tmp_path / "none.jsonl")], "cannot be read (No such file or directory)"),
        ([str(empty), "--output", str(empty)], "is the input file"),
        ([str(empty), "--max-trajectories", "0"], "--max-trajectories"),
    ):
        assert main(["trajectory", *arguments]) == 2
        assert problem in capsys.readouterr().err
