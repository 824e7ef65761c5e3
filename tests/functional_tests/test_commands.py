"""The command line as a whole: help, unknown commands, torchrun."""

import os
import subprocess
import sys

import pytest

from megatron_dlm.commands import COMMANDS, main
from tests.functional_tests.entry_points import GENERATE, PRETRAIN, Outcome, run_process
from tests.tiny import REPOSITORY


def run_module(*arguments: str, torchrun: bool = False) -> Outcome:
    """Run `python -m megatron_dlm`, or the same under torchrun in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "3"]
    command = [sys.executable, *(launcher if torchrun else ()), "-m", "megatron_dlm", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_help_lists_commands_without_importing_pytorch() -> None:
    check = (
        "import sys; from megatron_dlm.commands import main; status = main(['--help']); "
        "heavy = {'torch', 'megatron', 'transformers', 'pydantic', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name, summary in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize(("command", "script"), [("train", PRETRAIN), ("generate", GENERATE)])
def test_help_of_a_command_is_that_of_its_script(command, script) -> None:
    of_command, of_script = run_module(command, "--help"), run_process(script, "--help")
    assert of_command == of_script
    assert of_command.status == 0
    assert f"usage: megatron-dlm {command}" in of_command.stdout
    assert COMMANDS[command] in of_command.stdout


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["trian"], ("command = 'trian'", "did you mean train?")),
        (["critical_batch_size"], ("did you mean critical-batch-size?",)),
        (["--load", "models/mine"], ("command = '--load'",)),
        ([], ("command = None", "choose train or evaluate")),
    ],
    ids=["misspelt", "underscores", "flag", "nothing"],
)
def test_no_command(arguments, fragments, capsys) -> None:
    status = main(arguments)
    captured = capsys.readouterr()
    Outcome(status, captured.out, captured.err).check_error(*fragments)


def test_an_error_under_torchrun_is_said_once_and_restarts_do_no_work() -> None:
    config = ("--config", "examples/tiny/opdlm.yaml", "--prompts", "README.md")
    done = run_module("train", *config, "--tensor-model-parallel-size", "4", torchrun=True)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "does not divide the 2 processes of the run" in line
    # The table of failures of the last attempt, in which nothing ran, still shows the reason.
    assert "attempt_3" in done.stderr
    assert f"traceback : {line}" in done.stderr
    assert "exitcode  : 2" in done.stderr
