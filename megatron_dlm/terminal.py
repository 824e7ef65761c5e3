"""Lines for the person watching: that one cannot be shown is no reason to lose results.

A terminal that knows no such character is shown an escape; one that was closed, a pipe whose reader
has left (`| head`) and a full disk that standard output goes to are shown nothing more.
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from megatron_dlm.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


COLUMNS = 100
"""Width that lines about a run keep to."""


def wrapped(parts: Iterable[str], separator: str = " | ") -> str:
    """Parts of a line side by side, on further lines, indented, where they exceed `COLUMNS`."""
    lines: list[str] = []
    for part in parts:
        longer = lines[-1] + separator + part if lines else part
        if not lines or len(longer) > COLUMNS:
            lines.append("  " + part if lines else part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def escape_unknown_characters() -> None:
    """Have standard output write escapes for what its encoding lacks, as standard error does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_lock = threading.RLock()  # a signal handler may speak while this thread does

_status_is_shown = False

_CLEAR_LINE = "\r\x1b[K"


def is_live() -> bool:
    """Whether standard output is a terminal that a line can be written over on."""
    return _refused is None and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def show_status(text: str) -> None:
    """Show a line at the bottom of the terminal in place of the last one; the next line clears it.

    Args:
        text: Cut where it is wider than the terminal; empty to clear what is shown.
    """
    global _status_is_shown
    with _lock:
        if not is_live() or not (text or _status_is_shown):
            return
        width = shutil.get_terminal_size((COLUMNS, 24)).columns - 1
        try:
            sys.stdout.write(_CLEAR_LINE + text[:width])
            sys.stdout.flush()
        except OSError as refusal:
            _discard(sys.stdout, refusal)
        _status_is_shown = bool(text)


_refused: OSError | None = None
"""Why standard output leads nowhere by now."""


def say(text: str, *, error: bool = False) -> None:
    """Show a line, or nothing where that cannot be.

    Args:
        text: Without the newline at its end.
        error: On standard error instead of standard output.
    """
    try:
        _write(sys.stderr if error else sys.stdout, text + "\n")
    except OSError as refusal:
        _discard(sys.stderr if error else sys.stdout, refusal)


def say_table(table: "Table") -> None:
    """Show a table as wide as the terminal."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        console.print(table)
    say(capture.get().removesuffix("\n"))


def write_results(text: str) -> None:
    """Write what a command was run for to standard output.

    A reader that has left wants no more of it.

    Raises:
        UserError: It cannot be written, to a full disk for one.
    """
    try:
        if _refused is not None:
            raise _refused
        _write(sys.stdout, text)
    except BrokenPipeError as refusal:
        _discard(sys.stdout, refusal)
    except OSError as refusal:
        _discard(sys.stdout, refusal)
        raise UserError(
            f"standard output cannot be written ({refusal.strerror}); make room there, or send it"
            " elsewhere"
        ) from refusal


def end_standard_output() -> None:
    """Write what standard output still holds, or drop it where that cannot be."""
    try:
        sys.stdout.flush()
    except OSError as refusal:
        _discard(sys.stdout, refusal)


def shows(text: str) -> bool:
    """Whether standard output has all characters of a text."""
    if sys.stdout.encoding is None:  # text in memory
        return True
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _write(stream: TextIO, text: str) -> None:
    global _status_is_shown
    with _lock:
        if _status_is_shown and stream.isatty():
            stream.write(_CLEAR_LINE)
            _status_is_shown = False
        stream.write(text)
        stream.flush()  # what cannot be written is known here, and not when the process ends


def _discard(stream: TextIO, refusal: OSError) -> None:
    """Let a stream lead nowhere, also what it still holds: Python flushes it when it ends."""
    global _refused
    if stream is sys.stdout:
        _refused = refusal
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
