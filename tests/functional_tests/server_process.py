"""A server command in a process of its own."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx2

from megatron_dlm.commands import main
from tests.distributed_tests.spawn import PROCESSES


def _run(arguments: list[str], log: str) -> None:
    """In the process: the command, its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.exit(main(arguments))


class ServerProcess:
    """A running server at a free port of this machine.

    Args:
        log: File for its output.
        command: Its name.
        arguments: Of the command.
    """

    def __init__(self, log: Path, command: str, *arguments: object) -> None:
        self.log = log
        words = [command, "--port", "0", "--device", "cpu", *map(str, arguments)]
        self.process = PROCESSES.Process(target=_run, args=(words, str(log)), daemon=True)
        self.process.start()
        deadline = time.monotonic() + 120
        while (found := re.search(r"http://127.0.0.1:\d+(?=[\s/])", self.output)) is None:
            assert self.process.is_alive(), self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        self.url = found[0]

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def get(self, path: str) -> Any:
        return httpx2.get(self.url + path).json()

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60)

    def stop(self) -> int:
        """Send SIGTERM; the exit status."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        """Wait until the process has ended; its exit status."""
        self.process.join(60)
        assert self.process.exitcode is not None, "the server goes on"
        return self.process.exitcode
