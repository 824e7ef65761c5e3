"""Page-locked memory of the host: exactly what was asked for, given back with the tensor."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.platform.control_groups import memory_left


class _Runtime:
    """Stands for the CUDA runtime, which locks pages, or refuses to."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.answer == 0:
            self.locked[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.mark.parametrize("answer", [0, 2], ids=["locked", "refused"])
def test_memory_is_locked_in_its_own_size(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    runtime = _Runtime(answer)
    cuda: Any = torch.cuda
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(cuda, "cudart", lambda: runtime)
    memory = platform.host_memory(1000)
    assert len(memory) == 1000
    assert runtime.locked == ({memory.data_ptr(): 1000} if answer == 0 else {})
    assert len(platform.host_memory(0)) == 0
    del memory
    assert not runtime.locked


@pytest.mark.slow
def test_a_device_is_selected_in_a_fresh_process() -> None:
    """Before anything else is imported; what is refused leaves the choice open."""
    code = """if True:
        from megatron_dlm import platform
        from megatron_dlm.errors import UserError
        try:
            platform.select("cuda")
        except UserError as error:
            print(error)
        print(platform.select(), platform.device(), platform.is_cuda())
        import torch
        print(torch.zeros(2, device="cuda").device, torch.cuda.current_device())
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        "--device = 'cuda': this PyTorch sees no CUDA device; use --device cpu or auto",
        "cpu cpu False",
        "cpu cpu",
    ]


def group(folder: Path, limit: str, usage: int, cache: int, *, version: int = 2) -> Path:
    """Files of a control group, as the kernel has them."""
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    line = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 5\n{line} {cache}\nactive_file 7\n")
    return folder


@pytest.mark.parametrize(
    ("version", "path", "root", "expected"),
    [
        (2, "/job/task", "/", 600),  # the tightest of both, page cache not counted
        (2, "/job", "/", 700),
        (2, "/", "/job/task", 600),  # a group mounted as the root
        (2, "/elsewhere/task", "/job", 700),  # a name that only the host knows
        (1, "/job/task", "/", 600),
        (1, "/", "/", None),
    ],
)
def test_a_container_has_less_memory_than_its_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    path: str,
    root: str,
    expected: int | None,
) -> None:
    mount = tmp_path / "mount"
    group(mount / "job", "1000", 500, 200, version=version)
    unlimited = str(2**63 - 4096) if version == 1 else "max"
    group(mount / "job/task", "900", 350, 50, version=version)
    if version == 1:
        group(mount, unlimited, 10, 0, version=1)
    point = mount if root == "/" else mount / root[1:]
    kind, number, controllers = ("cgroup", 4, "memory") if version == 1 else ("cgroup2", 0, "")
    process = tmp_path / "process"
    process.mkdir()
    (process / "cgroup").write_text(f"3:cpuset:/x\n{number}:{controllers}:{path}\n")
    options = f"rw,{controllers}" if controllers else "rw"
    (process / "mountinfo").write_text(
        f"20 1 0:1 / /proc rw,nosuid - proc proc rw\n"
        f"21 1 0:2 / /unnamed rw - tmpfs  rw\n"
        f"30 25 0:26 {root} {point} rw,nosuid shared:4 - {kind} {kind} {options}\n"
    )
    assert memory_left(process) == expected
    monkeypatch.setattr(platform, "memory_left", lambda: memory_left(process))
    of_host = platform.available_memory()
    assert of_host == expected if expected is not None else of_host > 10**6
    assert memory_left(tmp_path / "nothing") is None
