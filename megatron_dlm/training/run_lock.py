"""One process owns a run folder: a file in it names the owner, and its age says whether it lives.

Made with an exclusive create, which is atomic on NFS too. The owner touches the file every few
seconds. Who finds one looks whether its process exists, on the same host, and elsewhere whether it
is touched while they watch: no clocks are compared.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_dlm.entry import rank, warn
from megatron_dlm.errors import bad_value
from megatron_dlm.training.run_folder import tidy

LOCK = "run.lock"

TOUCH_SECONDS = 5.0
"""Seconds between two signs of life of an owner."""

WATCH_SECONDS = 3 * TOUCH_SECONDS
"""Seconds without one after which the owner on another host counts as dead."""


@contextmanager
def owned_run_folder(folder: str | Path | None) -> Iterator[None]:
    """Own a run folder for the time of the block; nothing on ranks other than 0, or without one.

    What a killed owner left in it is tidied; one that is made here and stays empty is removed.

    Raises:
        UserError: Another process owns it, it is a model's, or it cannot be written.
    """
    if folder is None or rank() != 0:
        yield
        return
    if (Path(folder) / "config.json").is_file():
        problem = "is a Hugging Face model (it has config.json), no folder of a run"
        raise bad_value("--save", str(folder), problem, "choose another folder")
    file = Path(folder) / LOCK
    me = _this_process()
    was_there = file.parent.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _take(file, me)
        tidy(folder)
    except OSError as error:
        raise bad_value(
            "--save", str(folder), f"cannot be written ({error.strerror})", "choose another folder"
        ) from error
    stop = threading.Event()
    thread = threading.Thread(target=_touch, args=(file, me, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _read(file) == me:
            file.unlink(missing_ok=True)
        if not was_there:
            with suppress(OSError):
                file.parent.rmdir()


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _boot_id() -> str | None:
    """Tells a host from itself after a restart, and from another container of the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    """Tells who numbers processes as this one does; containers of one host do it each."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def _take(file: Path, me: dict[str, Any]) -> None:
    """Make the lock, in place of a stale one."""
    while not _create(file, me):
        owner = _read(file)
        if owner is None:
            continue  # released between the two
        if _is_alive(file, owner):
            job = f", job {owner['job']}" if owner.get("job") else ""
            raise bad_value(
                "--save",
                str(file.parent),
                f"process {owner.get('pid')} on {owner.get('host')}{job} writes there since "
                f"{owner.get('since')}",
                "choose another folder, or end that one",
            )
        # Only who renames it has it; another process may have taken it over meanwhile.
        stale = file.with_name(f".{LOCK}.{me['host']}.{me['pid']}.stale")
        with suppress(FileNotFoundError):
            file.rename(stale)
            if _read(stale) == owner:
                warn(
                    f"{file.parent}: its last owner, process {owner.get('pid')} on "
                    f"{owner.get('host')}, is dead; taking over"
                )
                stale.unlink()
            else:
                stale.rename(file)


def _create(file: Path, me: dict[str, Any]) -> bool:
    """Whether the lock was free and is ours now."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as opened:
        opened.write(json.dumps(me) + "\n")
        opened.flush()
        os.fsync(descriptor)
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """The owner that a lock names; None without a lock. One being written names an unknown one."""
    try:
        owner = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(file: Path, owner: dict[str, Any]) -> bool:
    """Whether the owner still runs."""
    here = owner.get("host") == socket.gethostname() and owner.get("boot") == _boot_id()
    pid = owner.get("pid")
    if here and isinstance(pid, int) and Path("/proc/self").exists():
        started = _process_start(pid)
        if started is not None and started == owner.get("process_start"):
            return True
        # Containers share host name and boot, but number processes for themselves: elsewhere a
        # process that is not found here may live.
        namespace = _pid_namespace()
        if namespace is not None and owner.get("pid_namespace") == namespace:
            return False
    return _is_touched(file)


def _is_touched(file: Path) -> bool:
    """Whether somebody touches the file within `WATCH_SECONDS`."""
    before = _age_mark(file)
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(0.5, TOUCH_SECONDS))
        if _age_mark(file) != before:
            return True
    return False


def _age_mark(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def _touch(file: Path, me: dict[str, Any], stop: threading.Event) -> None:
    """Show that the owner lives, until told to stop."""
    while not stop.wait(TOUCH_SECONDS):
        with suppress(OSError):
            if _read(file) == me:
                os.utime(file)
