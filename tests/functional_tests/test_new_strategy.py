"""A decoding strategy is one file: flags, rules, settings, engine and exports use a fifth one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny import REPOSITORY, save_random_model, write_data

STRATEGY = '''\
"""left_to_right: tokens in the order of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.ranges import Range
from megatron_dlm.rollout.strategies.base import Strategy, StrategyOption, register
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks

if TYPE_CHECKING:
    from torch import Tensor


def left_to_right(blocks: DenoisedBlocks, run: int) -> Tensor:
    """The first `run` masked positions."""
    return blocks.masked & (blocks.masked.cumsum(dim=-1) <= run)


register(
    Strategy(
        name="left_to_right",
        short_name="ordered",
        commit=left_to_right,
        option=StrategyOption(
            name="run_length",
            type=int,
            default=2,
            range=Range(1, 9),
            unit="tokens",
            help="Tokens that left_to_right keeps at a step.",
        ),
        help="the first ones of the text",
    )
)
'''

FRAMEWORK = """\
import runpy, sys
from pathlib import Path

from megatron_dlm.config import parse_config, validate
from megatron_dlm.conversion.formats.diffusion_files import write_remote_code
from megatron_dlm.errors import UserError

def problem(*flags):
    run = ["--load", "weights", "--prompts", "p.jsonl", "--num-rollouts", "2", "--device", "cpu"]
    try:
        validate(parse_config([*run, *flags]), 1)
    except UserError as error:
        return str(error)

ordered = ("--remasking-strategy", "left_to_right", "--run-length")
assert problem(*ordered, "3") is None
assert "is outside [1, 9]" in problem(*ordered, "10")
assert "choose --remasking-strategy left_to_right" in problem("--run-length", "3")
write_remote_code("sdar", Path(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

EXPORT = """\
import sys
import torch
from exported.configuration_sdar import SDARConfig
from exported.modeling_sdar import SDARForCausalLM

assert "megatron_dlm" not in sys.modules
sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8)
heads = dict(num_attention_heads=4, num_key_value_heads=2)
config = SDARConfig(**sizes, **heads, mask_token_id=59, eos_token_id=58, block_size=4)
torch.manual_seed(0)
model = SDARForCausalLM(config).eval()
forwards = []
model.model.register_forward_hook(lambda *_: forwards.append(1))
options = dict(max_new_tokens=4, min_new_tokens=4, remasking_strategy="left_to_right")
for run_length, expected in ((None, 2), (1, 4), (3, 2), (4, 1)):
    forwards.clear()
    model.generate(torch.arange(8)[None], run_length=run_length, **options)
    assert len(forwards) == expected, (run_length, len(forwards))
try:
    model.generate(torch.arange(8)[None], run_length=10, **options)
except ValueError as error:
    assert "`run_length` (=10) is outside [1, 9]" in str(error)
else:
    raise AssertionError("10 is out of range")
"""


def run(folder: Path, script: str, *arguments: object) -> None:
    """Run a script that finds packages of the folder and none of this repository."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_fifth_strategy_is_one_file(tmp_path: Path) -> None:
    framework, apart = tmp_path / "framework", tmp_path / "apart"
    for name in ("megatron_dlm", "tools"):
        shutil.copytree(REPOSITORY / name, framework / name)
    strategies = framework / "megatron_dlm" / "rollout" / "strategies"
    (strategies / "left_to_right.py").write_text(STRATEGY)
    (apart / "exported").mkdir(parents=True)
    write_data(tmp_path, 4)
    model, results = save_random_model(tmp_path / "model"), tmp_path / "results.json"
    config = json.loads((model / "config.json").read_text())
    stated = {"attention_pattern": "full", "shifted": True}
    (model / "config.json").write_text(json.dumps(config | stated))
    evaluate = [framework / "tools" / "evaluate.py", "--load", model, "--output", results]
    evaluate += ["--data", tmp_path / "examples.jsonl", "--max-response-length", 12]
    evaluate += ["--device", "cpu", "--settings", "ordered:3,ordered"]
    run(framework, FRAMEWORK, apart / "exported", *evaluate)
    settings = json.loads(results.read_text())["settings"]
    # A random model does not end by itself: twelve tokens, three or two at a time.
    speed = {name: result["tokens_per_forward"] for name, result in settings.items()}
    assert speed == {"ordered_3": 3.0, "ordered_2": 2.0}
    run(apart, EXPORT)
