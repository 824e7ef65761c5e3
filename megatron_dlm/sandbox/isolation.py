"""Which isolation this machine allows, and what happens where it allows none."""

from __future__ import annotations

import functools
import sys
from typing import Literal

from megatron_dlm.errors import bad_value
from megatron_dlm.sandbox.process import Limits, Program, SandboxFailed, run_programs

Isolation = Literal["namespaces", "none"]
"""namespaces: users, files, processes, network and IPC apart. none: limits of time and memory of
single processes only; the code can do whatever its user can."""


@functools.cache
def why_not_isolated() -> str | None:
    """What keeps this machine from isolating a program; None if nothing does.

    Starts a program once, and remembers.
    """
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    try:
        (outcome,) = run_programs([Program.of("print(6 * 7)")], Limits(), isolated=True)
    except (SandboxFailed, OSError) as error:
        return str(error)
    if outcome.stdout != b"42\n":
        return f"a first program failed: {outcome.stderr.decode(errors='replace').strip()}"
    return None


def isolation(field: str, value: object, *, unsafe: bool) -> Isolation:
    """The isolation in force for code that a model writes.

    Args:
        field: The option that asks for code to be run.
        value: Its value.
        unsafe: Whether the user accepts none, where this machine allows none.

    Raises:
        UserError: There is none, and the user has not accepted that.
    """
    reason = why_not_isolated()
    if reason is None:
        return "namespaces"
    if unsafe:
        return "none"
    raise bad_value(
        field,
        value,
        f"runs code that a model writes, and this machine cannot isolate it ({reason})",
        "allow unprivileged user namespaces, or add --unsafe-code-execution to run it without",
    )
