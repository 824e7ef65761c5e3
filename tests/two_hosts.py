"""Two hosts on one machine: each has a name and a network of its own, and a cable joins them."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

INTERFACE = "cable0"

LONGEST_LIFE = "1200"
"""Seconds after which a host ends by itself, should nobody be there to end it."""


@dataclass(frozen=True)
class Host:
    """A pair of Linux namespaces.

    Attributes:
        name: What `hostname` says there.
        address: That the other host reaches it at.
        keeper: A process in it, which keeps it there.
    """

    name: str
    address: str
    keeper: subprocess.Popen[str]

    def command(self, *words: str) -> list[str]:
        """A command as it is run on this host, in place of `nsenter`."""
        return [
            *("nsenter", "--target", str(self.keeper.pid), "--preserve-credentials"),
            *("--user", "--net", "--uts", *words),
        ]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them; skips the test where the kernel or a container refuses."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"two hosts need {tool}, of util-linux or iproute2, which is not installed")
    first = _host("host-a", "10.77.0.1", ["unshare", "--user", "--map-root-user"])
    try:
        second = _host("host-b", "10.77.0.2", [*first.command("unshare")])
        try:
            peer = ["peer", "name", INTERFACE, "netns", str(second.keeper.pid)]
            _run(first.command("ip", "link", "add", INTERFACE, "type", "veth", *peer))
            for host in (first, second):
                _run(host.command("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE))
                _run(host.command("ip", "link", "set", INTERFACE, "up"))
            yield first, second
        finally:
            _end(second.keeper)
    finally:
        _end(first.keeper)


def _host(name: str, address: str, prefix: list[str]) -> Host:
    script = f"hostname {name} && ip link set lo up && echo ready && exec sleep {LONGEST_LIFE}"
    keeper = subprocess.Popen(
        [*prefix, "--net", "--uts", "bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    if keeper.stdout.readline() != "ready\n":
        reason = keeper.stderr.read().strip()
        _end(keeper)
        pytest.skip(f"this machine gives no namespaces for {name}: {reason}")
    return Host(name, address, keeper)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine joins no namespaces: {done.stderr.strip()}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
