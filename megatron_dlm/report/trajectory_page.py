"""The page about trajectories: which tokens each forward settled, and with what confidence.

It shows lines that `megatron-dlm generate --trajectories` wrote. Their texts are not trusted: they
reach the page as JSON in a script element that is data, and its own script puts them there as text.
The page's policy allows no other script and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import megatron_dlm
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.output_file import write_file
from megatron_dlm.regular_file import check_regular

_COLUMNS = {"token_ids": int, "texts": str, "block": int, "step": int, "forward": int}
"""Lists of a part of a trajectory, as long as each other, and what they hold."""

_LABEL = 60
"""Characters of a prompt by which it is chosen on the page."""


def write_trajectory_page(
    file: str | Path, output: str | Path, most: int, field: str = "--output"
) -> int:
    """Write the page of the first trajectories of a file.

    Args:
        file: JSON lines.
        output: The HTML file.
        most: Trajectories on the page, at least 1.
        field: What the user named the output with.

    Returns:
        Number of trajectories on the page.

    Raises:
        UserError: A line holds no trajectory, there is none, or the page cannot be written.
    """
    entries: list[dict[str, Any]] = []
    note = ""
    for where, line in _lines(file):
        if len(entries) == most:
            note = f"The first {most} of {Path(file).name}."
            break
        entries.append(_entry(line, where))
    if not entries:
        raise bad_value("file", str(file), "is empty", "name what generate --output wrote")
    write_file(output, page(entries, f"Trajectories: {Path(file).stem}", note), field)
    return len(entries)


def page(entries: list[dict[str, Any]], title: str, note: str = "") -> str:
    """The page as HTML, with everything that it shows inside."""
    source = files(megatron_dlm.report)
    style, script = (
        source.joinpath(f"trajectory.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(source.joinpath("trajectory.html").read_text("utf-8"))
    html = template.render(
        title=title,
        note=note,
        version=megatron_dlm.__version__,
        style=style,
        style_hash=_content_hash(style),
        script=script,
        script_hash=_content_hash(script),
        # Without "<", no text can end the element that holds it.
        data=json.dumps(entries, allow_nan=False).replace("<", "\\u003c"),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def _content_hash(text: str) -> str:
    """What a Content-Security-Policy names an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _lines(file: str | Path) -> Iterator[tuple[str, bytes]]:
    try:
        check_regular(file)
        with Path(file).open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    yield f"{file}:{number}", line
    except OSError as error:
        problem = f"cannot be read ({error.strerror or type(error).__name__})"
        raise bad_value("file", str(file), problem, "name what generate wrote") from error


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """What the page needs of a line.

    Raises:
        UserError: The line is no JSON, or holds no trajectory.
    """
    try:
        record = json.loads(line)
        trajectory = record["trajectory"]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON; write the file with generate again") from error
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{where}: there is no trajectory; add --trajectories to generate"
        ) from error
    problem = _problem(record, trajectory)
    if problem is not None:
        raise UserError(f"{where}: {problem}; write the file with generate again")
    question = " ".join(_question(record, trajectory).split())
    which = f"{trajectory['prompt_index'] + 1}.{record.get('response_index', 0) + 1}"
    return {
        "label": f"({which}) {question if len(question) <= _LABEL else question[:_LABEL] + '…'}",
        "response": record["response"],
        "finish_reason": record["finish_reason"],
        "trajectory": trajectory,
    }


def _question(record: dict[str, Any], trajectory: dict[str, Any]) -> str:
    """The last message of a chat, or the prompt, without special tokens where that is known."""
    try:
        asked = record["messages"][-1]["content"]
    except (LookupError, TypeError):
        asked = record.get("prompt")
    return asked if isinstance(asked, str) else "".join(trajectory["prompt"]["texts"])


def _problem(record: dict[str, Any], trajectory: Any) -> str | None:
    """What the page could not show of a trajectory; None if there is nothing."""
    try:
        for part in ("response", "tail"):
            columns = trajectory[part]
            length = len(columns["token_ids"])
            for name, kind in _COLUMNS.items():
                if len(columns[name]) != length or not _all_are(columns[name], kind):
                    return f"trajectory.{part}.{name} does not hold {length} {kind.__name__}s"
            confidence = columns["confidence"]
            if len(confidence) != length or not _all_are(confidence, float | int):
                return f"trajectory.{part}.confidence does not hold {length} numbers"
            if not all(map(math.isfinite, confidence)):
                return f"trajectory.{part}.confidence holds NaN or infinite values"
            last = trajectory["denoising_forwards"]
            if not all(1 <= forward <= last for forward in columns["forward"]):
                return f"trajectory.{part}.forward is not in 1 to {last}"
            if not all(step >= 1 for step in columns["step"]):
                return f"trajectory.{part}.step is not positive"
        problem = _problem_of_rounds(trajectory.get("rounds", []), last)
        if problem is not None:
            return problem
        texts = [record["response"], record["finish_reason"], *trajectory["prompt"]["texts"]]
        numbers = [trajectory["prompt_index"], record.get("response_index", 0)]
        ids = trajectory["special_token_ids"]
        if not (_all_are(texts, str) and _all_are(numbers, int) and _all_are(ids, int)):
            return "the trajectory has another form"
        if not isinstance(trajectory["settings"], dict) or "canvas_length" not in trajectory:
            return "the trajectory has another form"
    except (LookupError, TypeError):
        return "the trajectory has another form"
    return None


def _problem_of_rounds(rounds: list[dict[str, Any]], last: int) -> str | None:
    """What the page could not show of the rounds that verified drafts."""
    for number, verified in enumerate(rounds):
        name, count = f"trajectory.rounds[{number}]", len(verified["draft_ids"])
        if not _all_are(verified["draft_ids"], int):
            return f"{name}.draft_ids does not hold ints"
        if len(verified["draft_texts"]) != count or not _all_are(verified["draft_texts"], str):
            return f"{name}.draft_texts does not hold {count} strs"
        numbers = [verified[field] for field in ("first", "forward", "num_accepted", "draws_next")]
        if not _all_are(numbers, int):
            return f"{name} does not hold numbers"
        if not (1 <= verified["forward"] <= last and 0 <= verified["num_accepted"] <= count):
            return f"{name} has a forward beyond {last}, or accepts more than {count} drafts"
    return None


def _all_are(values: list[Any], kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)
