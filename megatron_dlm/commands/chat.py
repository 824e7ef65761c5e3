r"""Chat with a checkpoint: each answer is decoded before your eyes.

megatron-dlm chat --load hf/
printf 'What is 17 + 25?\n/think off\nAnd 6 times 7?\n' | megatron-dlm chat --load hf/

On a terminal, tokens appear in the block in decoding as they settle. In a pipe, answers go to
standard output block by block, and everything else to standard error. Lines that begin with a slash
are commands (`/help`). Ctrl-C ends an answer, Ctrl-D the chat. In a pipe, the exit status is 2 if a
line was refused.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import USER_ERROR_STATUS, world_size
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.evaluation.options import InferenceArguments, resolve_inference
from megatron_dlm.output_file import check_output_file, write_file
from megatron_dlm.terminal import is_live, say, shows, write_results

if TYPE_CHECKING:
    from megatron_dlm.evaluation.chat_display import BlockByBlock, SettlingTokens
    from megatron_dlm.evaluation.chat_session import ChatSession
    from megatron_dlm.evaluation.generation import InferenceInputs
    from megatron_dlm.types.trajectory import Trajectory

HELP = """\
/reset           begin a new chat; the system message stays
/system TEXT     put a system message first; without a text, remove it
/think on|off    switch thinking, where the chat template can
/seed N          seed of the draws
/save FILE       write the chat as a line of JSON, as --prompts takes it
/exit            leave, as Ctrl-D does
//...            a message that begins with a slash"""


@dataclass(frozen=True)
class ChatConfig:
    """Chat: how it begins."""

    system: str | None = None
    """System message."""

    thinking: bool | None = None
    """Whether the model thinks before it answers, where the chat template can switch that (default:
    as the template has it)."""


@dataclass(frozen=True)
class Arguments(InferenceArguments):
    """Chat."""

    chat: ChatConfig = field(default_factory=ChatConfig)


INTERRUPTED_STATUS = 130
"""Of a program that Ctrl-C ended, as shells have it."""


class _Leave(Exception):
    """The user wants to go."""


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed since; a second one ends the program."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(on_terminal: bool) -> Iterator[str]:
    """What the user writes, line by line."""
    if not on_terminal:
        if hasattr(sys.stdin, "reconfigure"):  # text in memory has no encoding
            sys.stdin.reconfigure(errors="replace")
        yield from sys.stdin
        return
    import readline  # noqa: F401  # input() edits lines and knows earlier ones

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D leaves")
        except EOFError:
            say("")
            return


def _obey(line: str, session: ChatSession) -> None:
    """Carry out a command.

    Raises:
        UserError: There is no such command, or it cannot be carried out.
        _Leave: It is /exit.
    """
    name, _, value = line.partition(" ")
    value = value.strip()
    switches = {"on": True, "off": False}
    if name in ("/exit", "/quit"):
        raise _Leave
    if name == "/help":
        say(HELP, error=True)
    elif name == "/reset":
        session.reset()
    elif name == "/system":
        session.set_system(value)
    elif name == "/think":
        if value not in switches:
            raise bad_value(name, value or None, "is neither on nor off", "write one of them")
        session.think(switches[value])
    elif name == "/seed":
        if not (value.isascii() and value.isdecimal() and len(value) < 20):
            remedy = "write one of up to 19 digits, 0 or more"
            raise bad_value(name, value or None, "is no such whole number", remedy)
        session.seed = int(value)
    elif name == "/save":
        if not value:
            raise bad_value(name, None, "there is no file", "write /save FILE")
        check_output_file(value, name)
        write_file(value, json.dumps(session.record(), ensure_ascii=False) + "\n", name)
        say(f"{value}  {len(session.messages)} messages", error=True)
    else:
        raise bad_value("command", name, "is unknown", "write /help for those that there are")


def _answer(session: ChatSession, text: str, display: BlockByBlock | SettlingTokens) -> None:
    """Ask, show the answer while it comes, and what it took.

    Raises:
        UserError: The chat is too long, or the template refuses it.
    """
    inputs = session.ask(text)
    try:
        _stream(session, inputs, display)
    except UserError:
        session.take_back()
        raise


def _stream(
    session: ChatSession, inputs: InferenceInputs, display: BlockByBlock | SettlingTokens
) -> None:
    """Decode the answer to what was asked, and keep it."""
    from megatron_dlm.evaluation.chat_session import Decoding

    finished: list[int] = []
    with _stop_on_interrupt() as is_stopped:
        for state in session.answer(inputs):
            if isinstance(state, Decoding):
                finished = state.finished
                write_results(display.show(state))
                if is_stopped():
                    write_results(display.end(finished))
                    if finished:
                        session.keep(session.text(finished))
                        say("stopped; what is shown stays in the chat", error=True)
                    else:
                        session.take_back()
                        say("stopped; the question is taken back", error=True)
                    return
            else:
                token_ids = state.response_ids.tolist()
                write_results(display.end(token_ids))
                session.keep(session.text(token_ids))
                say(_figures(state, inputs.max_response_length), error=True)


def _figures(trajectory: Trajectory, longest: int) -> str:
    tokens, forwards = len(trajectory.response_ids), trajectory.denoising_forwards
    cut = f", cut at {longest} tokens" if trajectory.finish_reason == "length" else ""
    counts = [
        f"{n} {unit}{'' if n == 1 else 's'}"
        for n, unit in ((tokens, "token"), (forwards, "forward"))
    ]
    return f"[{' in '.join(counts)}: {tokens / forwards:.2f} a forward{cut}]"


def _converse(
    session: ChatSession,
    lines: Iterator[str],
    new_display: Callable[[], BlockByBlock | SettlingTokens],
    forgives: bool,
) -> int:
    """Answer line after line; returns the exit status, 0 if the user sees and `forgives` errors."""
    status = 0
    for line in lines:
        text = line.strip()
        is_command = text.startswith("/") and not text.startswith("//")
        try:
            if is_command:
                _obey(text, session)
            elif text:
                _answer(session, text[1:] if text[0] == "/" else text, new_display())
        except UserError as error:
            say(f"error: {error}", error=True)
            if not is_command:
                say("the message was not taken; /reset begins a new chat", error=True)
            status = 0 if forgives else USER_ERROR_STATUS
        except _Leave:
            break
    return status


def main(argv: Sequence[str]) -> int:
    """Load the model, then answer line after line."""
    arguments = parse_command("chat", Arguments, argv)
    if world_size() > 1:
        problem = "a chat is with one process"
        raise bad_value("WORLD_SIZE", world_size(), problem, "start it without torchrun")
    setup = resolve_inference(arguments, 1)
    [(setting, generation)] = setup.settings().items()
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.evaluation.chat_display import BlockByBlock, SettlingTokens
    from megatron_dlm.evaluation.chat_session import ChatSession, check_thinking
    from megatron_dlm.evaluation.generation import load_frozen_model
    from megatron_dlm.evaluation.trajectory_record import token_texts
    from megatron_dlm.parallel import initialized

    tokenizer = load_tokenizer(setup.tokenizer_folder)
    if not tokenizer.chat_template:
        problem = "its tokenizer has no chat template"
        remedy = "name a --tokenizer that has one, or continue texts with generate --no-chat"
        raise bad_value("--load", setup.options.load, problem, remedy)
    if arguments.chat.thinking is not None:
        check_thinking(tokenizer, arguments.chat.thinking)
    on_terminal = sys.stdin.isatty() and is_live()
    with initialized(setup.config):
        session = ChatSession(
            load_frozen_model(setup),
            setup,
            generation,
            tokenizer,
            thinking=arguments.chat.thinking,
        )
        session.set_system(arguments.chat.system or "")

        def display() -> BlockByBlock | SettlingTokens:
            if not on_terminal:
                return BlockByBlock(session.text)
            columns, rows = shutil.get_terminal_size()
            return SettlingTokens(
                session.text,
                lambda token_ids: token_texts(token_ids, tokenizer),
                columns=columns,
                rows=rows,
                ascii_only=not shows("\u2591"),
            )

        if on_terminal:
            say(f"{setup.options.load}, {setting}; /help lists commands, Ctrl-D leaves")
        try:
            return _converse(session, _lines(on_terminal), display, forgives=on_terminal)
        except KeyboardInterrupt:  # a second one in an answer, or one in a pipe
            say("")
            return INTERRUPTED_STATUS
