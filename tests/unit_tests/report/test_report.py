"""The page about runs: it shows what the folders hold, and names what they do not."""

import json
import os
import re
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.commands import main
from megatron_dlm.config import Config
from megatron_dlm.report.figures import COLORS, Line, averaged, line_chart, ticks
from megatron_dlm.report.page import page
from megatron_dlm.report.run_record import read_runs
from megatron_dlm.training.run_history import record


class Page(HTMLParser):
    """Texts of the cells of each table, by the heading before it, and what a browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.loaded: list[str] = []
        self._heading, self._cell, self._in_heading = "", False, False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "xlink:href", "data", "srcset")
        self.loaded += [value or "" for name, value in attributes if name in names]
        self.loaded += [tag] if tag in ("script", "link", "iframe", "object") else []
        if tag == "h2":
            self._heading, self._in_heading = "", True
        elif tag == "tr":
            self.rows.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.rows[self._heading][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_heading = self._in_heading and tag != "h2"
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self._heading += data
        elif self._cell:
            self.rows[self._heading][-1][-1] += data


def write_run(folder: Path, *, losses: list[float | None], **options: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "rollout": step,
            "loss": loss,
            "lr": {"default": 1e-3},
            "accuracy": step / 100,
            "time": {"rollout": 3.0, "student": 57.0},
            "throughput": {"mfu": 0.25, "peak_memory_gb": 1.5, "teacher_tflops": None},
            "evaluation": {"static": {"accuracy": 0.5 / step, "tokens_per_forward": 1.0}},
        }
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = Config.from_dict({"objective": "opdlm", "save": "here", **options}).to_dict()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    record(folder, "started", iteration=0, rollout=0, changes={"lr": [1e-5, 1e-3]})
    record(folder, "diverged", iteration=len(losses), rollout=1, what="loss <is> nan")
    sample = {"rollout": 1, "prompt": "2 + 2?", "response": "<b>4</b>", "finish_reason": "eos"}
    samples = [sample, {**sample, "response": "five \ud83d"}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    answer = {"step": 2, "decoding": "static", "prompt": "3 + 3?", "response": "six"}
    answers = [answer | {"reference": "<6>", "correct": False}, answer | {"reference": None}]
    (folder / "evaluation_samples.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return folder


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "first", losses=[3.0, None, 1.0], lr=1e-3)
    second = write_run(tmp_path / "second", losses=[3.0, 2.0], lr=3e-4, divergence="reverse_kl")
    output = tmp_path / "pages" / "both.html"
    assert main(["report", str(first), str(second), "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""
    html = output.read_text(encoding="utf-8")
    shown = Page(html)
    assert all(target.startswith("#") for target in shown.loaded)  # of a page without network
    summary = {row[0]: row[1:] for row in shown.rows["Summary"]}
    assert summary["state"] == ["diverged", "diverged"]
    assert summary["updates"] == ["3", "2"]
    assert summary["training loss, last"] == ["1", "2"]
    assert summary["right at the first try, last"] == ["3 %", "2 %"]
    assert summary["held-out prompts, static, last"][1] == "25 % (best 50 %)"
    assert 'After update 2, static <span class="soft">wrong</span>' in html
    assert "<pre>&lt;6&gt;</pre>" in html
    assert "Held-out prompts, static: right" in html
    assert summary["minutes in all phases"] == ["3", "2"]
    assert summary["MFU, median"] == ["25 %", "25 %"]
    assert shown.rows["Options that differ"] == [
        ["option", "first", "second"],
        ["divergence", "forward_kl", "reverse_kl"],
        ["lr", "0.001", "0.0003"],
    ]
    events = [row[1:] for row in shown.rows["History"]]
    assert ["diverged", "3", "what: loss <is> nan"] in events
    assert any(row[:2] == ["started", "0"] and "lr: 1e-05 → 0.001" in row[2] for row in events)
    assert {row[0] for row in shown.rows["Versions and machines"]} > {"megatron-dlm", "torch"}
    assert "<pre>&lt;b&gt;4&lt;/b&gt;</pre>" in html  # what a model writes is text
    assert "<pre>five ?</pre>" in html
    for svg in re.findall(r"<svg.*?</svg>", html):
        ElementTree.fromstring(svg)
    (loss,) = re.findall(r"<h3>Training loss</h3>(<svg.*?</svg>)", html)
    lengths = [len(points.split()) for points in re.findall(r'points="([^"]*)"', loss)]
    assert lengths == [2, 2]  # a loss that was no number has no point


def test_options_of_one_run_are_compared_with_the_defaults(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", losses=[1.0], lr=0.125)
    assert main(["report", str(run)]) == 0
    rows = Page((run / "report.html").read_text()).rows["Options that differ from their defaults"]
    assert ["lr", str(Config().optimizer.lr), "0.125"] in rows
    assert all(row[1] != row[2] for row in rows)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "run", losses=[1.0]) for parent in "ab"]
    assert [run.name for run in read_runs([*runs, runs[0]])] == ["a/run", "b/run"]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml", "history.jsonl"])
def test_what_is_missing_is_named(
    tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_run(tmp_path / "whole", losses=[1.0])
    run = write_run(tmp_path / "part", losses=[1.0])
    (run / missing).unlink()
    output = tmp_path / "out.html"
    assert main(["report", str(run), str(whole), "--output", str(output)]) == 0
    assert capsys.readouterr().err == f"note: part: {missing} is missing\n"
    assert f"part: {missing} is missing" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "run = None: nothing to report on; write megatron-dlm report RUN"),
        (["no_such"], "there is no such folder; name the --save of a training run"),
        (["file"], "is no folder"),
        (["empty"], "holds none of metrics.jsonl, config.yaml and history.jsonl"),
        (["run", "run2"], "--output = None: 2 runs have no folder in common; name a file"),
        (["run", "--output", "empty"], "--output = 'empty': is a folder"),
        (["--output", "x.html", "run"], "'run': belongs to no flag"),
    ],
)
def test_what_cannot_be_reported_on(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("empty").mkdir()
    for name in ("run", "run2"):
        write_run(Path(name), losses=[1.0])
    assert main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**400), 10**400) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = ("step", "loss", "lr", "time", "throughput", "event", "time", "changes", "environment")
KEYS += (
    "loss_by_position",
    "tokens_by_step",
    "response_lengths",
    "rollout",
    "prompt",
    "finish_reason",
    "accuracy",
    "command",
    "objective",
    "iteration",
)
LINES = st.dictionaries(st.sampled_from(KEYS), VALUES).map(json.dumps) | st.text(max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(("metrics", "history", "samples")), st.lists(LINES)), LINES)
def test_no_content_of_a_folder_breaks_the_page(files: dict[str, list[str]], config: str) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "config.yaml").write_bytes(config.encode("utf-8", "surrogatepass"))
        for name, lines in files.items():
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
            (folder / f"{name}.jsonl").write_bytes(data)
        runs = read_runs([folder])
        html = page(runs)
        html.encode("utf-8")
        for svg in re.findall(r"<svg.*?</svg>", html):
            ElementTree.fromstring(svg)
        odd = [line for line in files.get("history", []) if line.strip()]
        notes = [note for note in runs[0].notes if note.startswith("history.jsonl")]
        assert len(runs[0].history) == len(odd) or notes
    finally:
        shutil.rmtree(folder)


def test_a_pipe_in_a_folder_is_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[1.0])
    (run / "history.jsonl").unlink()
    os.mkfifo(run / "history.jsonl")
    (note,) = read_runs([run])[0].notes
    assert note == "history.jsonl cannot be read (is no regular file)"


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_ticks_are_round_and_enclose_the_values(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = ticks(low, high)
    slack = 1e-6 * (found[1] - found[0])
    assert 2 <= len(found) <= 8
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=900))
def test_all_of_a_chart_lies_within_its_frame(points: list[tuple[float, float]]) -> None:
    points.sort()
    kept = averaged(points, 240)
    assert len(kept) == min(len(points), 240)
    svg = ElementTree.fromstring(
        line_chart([Line("a & b", COLORS[0], points)], "update", "nats", may_be_logarithmic=True)
    )
    (line,) = (element for element in svg if element.tag == "polyline")
    for place in line.attrib["points"].split():
        x, y = map(float, place.split(","))
        assert 61.9 <= x <= 446.1
        assert 13.9 <= y <= 210.1
