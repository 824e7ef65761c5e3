"""Makes odd inputs and feeds them to what a run and the tools read before they build a model.

An input is a number: everything about it is drawn from a generator seeded by it, so that one that
fails can be repeated.
"""

import contextlib
import faulthandler
import io
import json
import os
import random
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from unittest import mock

import yaml

from megatron_dlm.config import parse_config, validate
from megatron_dlm.data import template_limits
from megatron_dlm.entry import report_user_errors, world_size
from megatron_dlm.training.inputs import read_inputs
from tests.fuzz.template import RUNS

SECONDS = 60
"""An input that takes longer, of CPU, is taken to hang."""

TEMPLATE_SECONDS = 1
"""What a template gets here, in place of `template_limits.SECONDS`: many never end."""


class Hang(BaseException):
    """No `Exception`: nothing on the way may take it for a mistake of the user's."""


Outcome = Literal["read", "refused", "finding"]


@dataclass(frozen=True)
class Fed:
    """How an input ended.

    Attributes:
        outcome: It was read, or refused in one line with status 2, or ended otherwise (a finding).
        kind: What was made odd, of a few kinds.
        detail: The same in detail.
        problem: Of a finding: a traceback, or what else was wrong.
    """

    outcome: Outcome
    kind: str
    detail: str
    problem: str | None = None


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value that hardly any field expects."""
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30]),
        lambda: rng.choice([0.0, -1.5, 1e308, 1e-320, 0.1]),
        lambda: rng.choice(["", " ", "auto", "none", "\x00", "é" * 3, "💥", "../..", "/", "1e3"]),
        lambda: "x" * rng.choice([1, 100, 100_000]),
        list,
        dict,
    ]
    if depth < 3:
        choices += [
            lambda: [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {str(i): odd_value(rng, depth + 1) for i in range(rng.randrange(4))},
        ]
    return rng.choice(choices)()


def odd_bytes(rng: random.Random, content: bytes) -> bytes:
    """A damaged file."""
    position = rng.randrange(len(content) + 1)
    return rng.choice(
        [
            b"",
            content[:position],
            content[:position] + bytes([rng.randrange(256)]) + content[position + 1 :],
            content[:position] + rng.randbytes(rng.randrange(1, 9)) + content[position:],
            content + content,
            b"\xef\xbb\xbf" + content,
            content.decode("latin-1").encode("utf-16"),
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            b"9" * 5000,
            rng.randbytes(rng.randrange(200)),
        ]
    )


def _odd_json(rng: random.Random, file: Path) -> None:
    """Change a value of an object, at some depth, or the bytes."""
    if rng.random() < 0.3:
        file.write_bytes(odd_bytes(rng, file.read_bytes()))
        return
    whole = json.loads(file.read_bytes())
    part = whole
    while True:
        key = rng.choice(list(part)) if rng.random() < 0.9 and part else "new"
        if isinstance(part.get(key), dict) and part[key] and rng.random() < 0.7:
            part = part[key]
            continue
        if rng.random() < 0.2:
            part.pop(key, None)
        elif rng.random() < 0.1:
            file.write_text(json.dumps(whole).replace("{", '{"n": ' + "9" * 5000 + ", ", 1))
            return
        else:
            part[key] = odd_value(rng)
        break
    file.write_text(json.dumps(whole))


def _odd_lines(rng: random.Random, file: Path) -> None:
    """Change one record of a JSONL file, or a byte."""
    lines = file.read_bytes().splitlines()
    i = rng.randrange(len(lines))
    if rng.random() < 0.4:
        lines[i] = odd_bytes(rng, lines[i])
    else:
        record = json.loads(lines[i])
        where = record
        messages = record.get("messages")
        if messages and rng.random() < 0.7:
            where = rng.choice(messages)
        key = rng.choice([*where, "messages", "prompt", "tools", "chat_template_kwargs", "content"])
        where[key] = odd_value(rng)
        lines[i] = json.dumps(record).encode()
    file.write_bytes(b"\n".join(lines) + b"\n")


def _odd_config(rng: random.Random, file: Path) -> None:
    """Change a value of the YAML file, or the bytes."""
    kind = rng.random()
    if kind < 0.3:
        file.write_bytes(odd_bytes(rng, file.read_bytes()))
    elif kind < 0.4:
        bomb = "a: &a [x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
        )
        file.write_text(file.read_text() + bomb)
    else:
        values = yaml.safe_load(file.read_text())
        values[rng.choice(list(values))] = odd_value(rng)
        file.write_text(yaml.safe_dump(values))


def _odd_safetensors(rng: random.Random, file: Path) -> None:
    """Change the header, or a byte of the first part of the file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.4:
        position = rng.randrange(8 + length)
        changed = bytearray(content)
        changed[position] = rng.randrange(256)
        file.write_bytes(changed if rng.random() < 0.7 else content[:position])
        return
    header = json.loads(content[8 : 8 + length])
    tensor = rng.choice([name for name in header if name != "__metadata__"])
    header[tensor][rng.choice(["shape", "dtype", "data_offsets"])] = odd_value(rng)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _odd_index(rng: random.Random, file: Path) -> None:
    """Weights in several files, whose index says something odd."""
    model = file.with_name("model.safetensors")
    if not model.exists():
        return
    (length,) = struct.unpack("<Q", model.read_bytes()[:8])
    names = [n for n in json.loads(model.read_bytes()[8 : 8 + length]) if n != "__metadata__"]
    model.rename(file.with_name("model-00001-of-00001.safetensors"))
    weight_map: Any = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    odd = ["../model.safetensors", "/etc/passwd", "", "a/b", ".", 7, None, "missing.safetensors"]
    weight_map[rng.choice(names)] = rng.choice(odd)
    file.write_text(json.dumps({"weight_map": weight_map}))


def _odd_template(rng: random.Random, file: Path) -> None:
    """A template that fails, never ends, or makes too much."""
    file.write_text(
        rng.choice(
            [
                "{{ messages[0]",
                "{{ 1 / 0 }}",
                "{{ raise_exception('no') }}",
                "{% for a in range(99999) %}{% for b in range(99999) %}"
                "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
                "{{ 'a' * 10**11 }}",
                "{{ messages.__class__.__mro__ }}",
                "{{ messages }}" * 50,
                "",
                "{% for message in messages %}{{ message['content'] }}{% endfor %}" * 20,
            ]
        )
    )


def _odd_binary(rng: random.Random, file: Path) -> None:
    """Change bytes, or numbers of the header, of an indexed corpus."""
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5 and len(content) >= 34:
        position = rng.randrange(9, 34)  # after the magic: version, type, counts
        number = rng.choice([0, 1, 2**31 - 1, 2**62, 2**64 - 1])
        content[position : position + 8] = struct.pack("<Q", number)
        file.write_bytes(content)
    else:
        file.write_bytes(odd_bytes(rng, bytes(content)))


def _pipe(rng: random.Random, file: Path) -> None:
    """A pipe that nobody writes into."""
    file.unlink()
    os.mkfifo(file)


def _folder(rng: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


Change = Callable[[random.Random, Path], None]

MODEL_FILES: dict[str, tuple[Change, ...]] = {
    "dense/config.json": (_odd_json, _pipe, _folder),
    "dense/tokenizer_config.json": (_odd_json, _pipe, _folder),
    "dense/tokenizer.json": (_odd_json, _pipe, _folder),
    "dense/generation_config.json": (_odd_json,),
    "dense/chat_template.jinja": (_odd_template,),
    "dense/model.safetensors": (_odd_safetensors, _pipe, _folder),
    "dense/model.safetensors.index.json": (_odd_index,),
}
"""Files that every run reads, and ways to make them odd; the first most often."""

DATA_FILES: dict[str, dict[str, tuple[Change, ...]]] = {
    "opdlm": {"prompts.jsonl": (_odd_lines, _pipe, _folder)},
    "sft": {"examples.jsonl": (_odd_lines, _pipe, _folder)},
    "scp": {
        "corpus.idx": (_odd_binary, _pipe, _folder),
        "corpus.bin": (_odd_binary, _pipe, _folder),
        "corpus_heldout.idx": (_odd_binary, _pipe, _folder),
    },
}
"""Files that only one run reads."""


def _odd_flags(rng: random.Random) -> list[str]:
    from megatron_dlm.config.fields import option_fields
    from megatron_dlm.config.schema import Config

    name = rng.choice(list(option_fields(Config)))
    value = odd_value(rng)
    text = value if isinstance(value, str) else json.dumps(value)
    number = str(rng.choice([rng.randrange(100), rng.random(), 10 ** rng.randrange(20)]))
    text = rng.choice(
        [text, text, number, number, number, "9" * 5000, "-" * 50, "[" * 5000, "1e999", "nan"]
    )
    return [f"--{name.replace('_', '-')}", text.replace("\x00", "")]


@contextlib.contextmanager
def _environment(rng: random.Random) -> Iterator[str]:
    """Odd numbers from the launcher."""
    name = rng.choice(["RANK", "WORLD_SIZE", "LOCAL_RANK"])
    value = rng.choice(["", "x", "-1", "9" * 30, "1.0", "٣", "5", "0"])
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield f"{name}={value!r}"
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise `Hang` after a time; the limit for templates is shorter and comes first."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    # What waits uses no CPU: this ends the process, and shows where it was.
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)


def feed(number: int, make_folder: Callable[[], Path]) -> Fed:
    """Make an input odd and read it as a run does.

    Args:
        number: Of the input.
        make_folder: Makes a folder with the runs of `tests.fuzz.template`.
    """
    rng = random.Random(number)
    folder = make_folder()
    run = rng.choice(RUNS)
    arguments = ["--config", str(folder / f"{run}.yaml")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.object(template_limits, "SECONDS", TEMPLATE_SECONDS))
        draw = rng.random()
        if draw < 0.15:
            flags = _odd_flags(rng)
            arguments += flags
            kind, detail = "flag", " ".join(flags)[:100]
        elif draw < 0.2:
            kind, detail = "environment", stack.enter_context(_environment(rng))
        else:
            files = rng.choice(
                [MODEL_FILES, DATA_FILES[run], {f"{run}.yaml": (_odd_config, _pipe, _folder)}]
            )
            kind = rng.choice(list(files))
            change = files[kind][0] if rng.random() < 0.85 else rng.choice(files[kind])
            change(rng, folder / kind)
            detail = f"{kind} ({change.__name__.strip('_')})"
        outcome, problem = _read(arguments)
    return Fed(outcome, kind, f"{run}: {detail}", problem)


def _read(arguments: list[str]) -> tuple[Outcome, str | None]:
    def main() -> int:
        config = parse_config(arguments)
        validate(config, world_size())
        read_inputs(config)
        return 0

    output, errors = io.StringIO(), io.StringIO()
    try:
        with _bounded(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = report_user_errors(main)()
    except SystemExit as exit_:
        return ("read", None) if exit_.code in (0, None) else ("finding", f"exit {exit_.code}")
    except Hang:
        return "finding", f"took longer than {SECONDS} seconds of CPU"
    except BaseException:
        return "finding", traceback.format_exc(limit=-6)
    if status == 0:
        return "read", None
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    if status != 2 or len(lines) != 1 or len(lines[0]) > 5000:
        shown = errors.getvalue()[:500]
        return "finding", f"status {status} and {len(lines)} lines: {shown}"
    return "refused", None
