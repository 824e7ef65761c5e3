"""What every server process does beside decoding: listening, answering HTTP, stopping."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from megatron_dlm.entry import warn
from megatron_dlm.errors import bad_value
from megatron_dlm.serving.options import HttpConfig

HANG_UP_SECONDS = 5
"""That the last responses have to be sent, after all of them were decoded."""


def listening(options: HttpConfig) -> socket.socket:
    """A socket at the address; connections wait in it from now on.

    Warns of an address that others reach, where requests need no key.

    Raises:
        UserError: The address is unknown, or another program has the port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        problem = f"is no address of this machine ({error})"
        raise bad_value("--host", options.host, problem, "choose 127.0.0.1 or 0.0.0.0") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        problem = f"{options.host} cannot be listened at ({error.strerror})"
        raise bad_value("--port", options.port, problem, "choose another one, or 0") from error
    if options.key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        warn(f"--host {options.host}: whoever reaches it is answered; add --api-key")
    return listener


@contextmanager
def answering(app: ASGIApp, listener: socket.socket, on_end: Callable[[], None]) -> Iterator[None]:
    """Answer HTTP in a thread of its own; on exit, what is being sent is sent to its end.

    Raises:
        RuntimeError: It could not be started; its thread has said why.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=HANG_UP_SECONDS,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            on_end()

    thread = threading.Thread(target=run, name="http")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
    if not server.started:
        raise RuntimeError("the HTTP server could not be started")


@contextmanager
def stopping_at_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Have the first SIGTERM or SIGINT call `stop`; a second one ends the process."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        # Not `print`, which cannot be entered twice.
        text = f"{signal.Signals(number).name}: finishing what runs; a second one ends it at once\n"
        os.write(2, text.encode())
        stop()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
