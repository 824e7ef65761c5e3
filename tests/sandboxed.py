"""Programs in the sandbox, for tests."""

import pytest

from megatron_dlm.sandbox.isolation import why_not_isolated
from megatron_dlm.sandbox.process import Limits, Outcome, Program, run_programs

SMALL = Limits(
    cpu_seconds=2,
    wall_seconds=60,
    memory_bytes=256 << 20,
    processes=8,
    disk_bytes=8 << 20,
    output_bytes=1 << 20,
)


def isolated() -> None:
    """Skip a test where the kernel gives no namespaces."""
    reason = why_not_isolated()
    if reason is not None:
        pytest.skip(f"no isolation on this machine: {reason}")


def run(source: str, limits: Limits = SMALL, stdin: str = "") -> Outcome:
    """Run a program alone."""
    isolated()
    (outcome,) = run_programs([Program.of(source, stdin)], limits, isolated=True)
    return outcome
