"""A command's first line does not wait for what its process never uses."""

import json
import subprocess
import sys

import pytest
import torch

from tests.tiny import REPOSITORY

LISTS = """
import json, sys
import torch
compile = torch.compile
import megatron_dlm.api
assert torch.compile is compile
from megatron.core.fusions.fused_bias_geglu import geglu
assert type(geglu).__name__ == "function"
print(json.dumps(sorted(sys.modules)))
from torch.utils.tensorboard import SummaryWriter
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Megatron-Core compiles")
def test_compiler_and_loggers_are_not_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTS], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout))
    assert {"torch", "megatron.core", "transformers"} <= imported
    unused = {"torch._dynamo", "torch._inductor.compile_fx", "tensorboard", "matplotlib", "wandb"}
    assert not unused & imported
