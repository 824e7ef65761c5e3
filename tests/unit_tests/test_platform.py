"""Page-locked memory of the host: exactly what was asked for, given back with the tensor."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_dlm import platform


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
