"""The command line: `megatron-dlm COMMAND ...`, one module a command.

A command's module is imported when the command is run, and has a `main(argv)` that returns the exit
status. `pretrain_opdlm.py` and `tools/` run the same commands from a checkout.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from megatron_dlm import __version__
from megatron_dlm.entry import collect_garbage_rarely, rank, report_user_errors, run_as_process
from megatron_dlm.errors import bad_value, unknown_name
from megatron_dlm.terminal import say

T = TypeVar("T")

PROGRAM = "megatron-dlm"

COMMANDS = {
    "train": "Turn an autoregressive language model into a block-diffusion model.",
    "evaluate": "Score a checkpoint's responses to held-out prompts.",
    "lm-eval": "Run tasks of lm-evaluation-harness on a checkpoint.",
    "generate": "Generate responses with a checkpoint.",
    "chat": "Chat with a checkpoint in a terminal.",
    "trajectory": "Show on an HTML page how responses were decoded.",
    "serve": "Answer requests over HTTP with a checkpoint, as OpenAI's API does.",
    "rollout-server": "Decode the rollouts of training runs over HTTP, as SGLang does.",
    "serve-teacher": "Give the most likely tokens of texts over HTTP, for runs with --teacher-url.",
    "convert": "Convert a checkpoint: Hugging Face to Megatron and back.",
    "plan": "Find the layout, memory and time of a run on so many GPUs.",
    "report": "Compare training runs on one HTML page.",
    "verify": "Compare a run's checkpoints with what was written.",
    "data": "Check, count or prepare prompts and examples.",
    "preprocess": "Tokenise a text corpus for pretraining.",
    "critical-batch-size": "Find the critical batch size by branched training.",
}
"""What each command does, in the order of the help text."""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command's name and its arguments; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: After printing a command's `--help` (status 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help", "--version"):
        if rank() == 0:
            say(f"{PROGRAM} {__version__}" if name == "--version" else _help())
        return 0
    if name not in COMMANDS:
        raise _no_command(name)
    collect_garbage_rarely()
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    status: int = module.main(arguments[1:])
    return status


def command_line(*first: str) -> NoReturn:
    """Run a command with the arguments of this process, and end it with the command's status.

    Args:
        first: Arguments before those, as the command's name.
    """
    run_as_process(lambda: main([*first, *sys.argv[1:]]))


def parse_command(name: str, options: type[T], argv: Sequence[str]) -> T:
    """Read a command's arguments; its help text begins with the line in `COMMANDS`.

    Raises:
        UserError: An argument is unknown or has no value of its type.
        SystemExit: After printing `--help` (status 0).
    """
    from megatron_dlm.config import parse_arguments

    return parse_arguments(options, argv, description=COMMANDS[name], prog=f"{PROGRAM} {name}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Autoregressive language models into block-diffusion models, on Megatron-Core.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists a command's options. Several processes:",
            "  torchrun --nproc-per-node N -m megatron_dlm COMMAND [OPTIONS]",
        )
    )


def _no_command(name: str | None) -> Exception:
    if name is None:
        return bad_value("command", None, "is missing", f"choose {' or '.join(COMMANDS)}")
    return unknown_name("command", name, COMMANDS, "command")
