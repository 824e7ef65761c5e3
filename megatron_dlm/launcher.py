"""What a rank owes its launcher: to end with it, and to say when starting again is in vain.

`torchrun --max-restarts` starts all ranks again whatever status they ended with. Each attempt has a
folder of its own beside that of the attempt before, so a status that no restart can change is found
there, without a network and before PyTorch is imported.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

_ATTEMPT_FOLDER = re.compile(r"attempt_(\d+)")
_STATUS = "exit_status"
_PR_SET_PDEATHSIG = 1

STATUS_FILE = "MEGATRON_DLM_STATUS_FILE"
"""Environment variable with the file that a script reads the exit status from."""


def attempt() -> int:
    """How often torchrun has started the ranks again; 0 without it."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, however it ends.

    SIGKILL: a process that took its time to save would write beside the run that is started in its
    place. Linux only; nothing elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """`die_with_parent`, in a process that a launcher gave a rank."""
    if "RANK" in os.environ:
        die_with_parent()


def leave_status(status: int) -> None:
    """Leave the status that this process ends with for the script that started torchrun.

    torchrun itself ends with 1 whatever its processes ended with.
    """
    file = os.environ.get(STATUS_FILE)
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{status}\n")


def leave_error(message: str, status: int | None) -> None:
    """Leave an error where torchrun looks for it, so that its table of failures shows it.

    Args:
        message: One line.
        status: Exit status that starting again does not change: `final_error` of the next attempt
            finds it. None where it may.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        details = {"timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": details}, _STATUS: status}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(content))


def final_error() -> tuple[str, int] | None:
    """The error and exit status that this node's ranks left in the attempt before this one.

    None if there was no attempt before, or if none of its ranks left an error.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or not attempt():
        return None
    own = Path(file).parent.parent
    match = _ATTEMPT_FOLDER.fullmatch(own.name)
    if match is None:
        return None
    before = own.with_name(f"attempt_{int(match[1]) - 1}")
    for error_file in sorted(before.glob("*/error.json")):
        try:
            content = json.loads(error_file.read_bytes())
            return str(content["message"]["message"]), int(content[_STATUS])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of torch's own, or cut short
    return None
