"""Chat: answers are those of `generate`, block by block; several responses, trajectories."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from megatron_dlm.commands import chat as chat_command
from megatron_dlm.commands import main
from megatron_dlm.rollout.forward_plan import ForwardPlan
from megatron_dlm.rollout.pages import PAGE_SIZE
from megatron_dlm.rollout.work import RolloutWork
from tests.chat_templates import THINKING
from tests.distributed_tests.spawn import PROCESSES
from tests.functional_tests.entry_points import GENERATE, Call, Outcome, lines, run_ranks
from tests.tiny import REPOSITORY

TINY = REPOSITORY / "examples" / "tiny" / "qwen3"
CHAT = REPOSITORY / "tools" / "chat.py"
LENGTH = 14
DECODING = ("--block-size", 4, "--temperature", 1, "--device", "cpu")
COMMON = (*DECODING, "--max-response-length", LENGTH)


@pytest.fixture
def say(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Chat in a pipe: options of the command, with the lines that are written to it."""

    def chat(*options: object, written: Sequence[str]) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in written)))
        return call(CHAT, *options)

    return chat


WRONG = ["/nothing", "/seed x", f"/seed {'9' * 5000}", "/save"]


def answers_of(chat: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Each answer of a saved chat, and the chat before it."""
    messages = chat["messages"]
    return [
        ({**chat, "messages": messages[:i]}, message["content"])
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def generated(call: Call, folder: Path, records: list[dict[str, Any]], *options: object) -> Any:
    prompts, output = folder / "asked.jsonl", folder / "generated.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = call(GENERATE, "--prompts", prompts, "--output", output, *options)
    assert done.status == 0, done.stderr
    return lines(output)


def test_answers_are_those_of_generate_and_come_by_blocks(
    say: Call, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--load", TINY, *COMMON)
    pieces: list[str] = []
    monkeypatch.setattr(chat_command, "write_results", pieces.append)
    computed: list[list[int]] = [[]]  # tokens of each forward, by engine
    add, begin = RolloutWork.add, RolloutWork.__init__

    def note(work: RolloutWork, plan: ForwardPlan, *rest: Any, **options: Any) -> None:
        computed[-1].append(int((plan.ends - plan.starts).sum()))
        add(work, plan, *rest, **options)

    def note_new(work: RolloutWork, **values: Any) -> None:
        computed.append([])
        begin(work, **values)

    monkeypatch.setattr(RolloutWork, "add", note)
    monkeypatch.setattr(RolloutWork, "__init__", note_new)
    saved = tmp_path / "chat.jsonl"
    question = "Lily has 2 cards. She buys 9 more. How many cards does she have now?"
    written = [question, "", "/seed 5", "//And then?", f"/save {saved}", "/exit", "not read"]
    outcome = say(*model, "--system", "Count.", "--seed", 3, written=written)
    assert outcome.status == 0, outcome.stderr
    [chat] = lines(saved)
    roles = [message["role"] for message in chat["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert chat["messages"][3]["content"] == "/And then?"
    text = "".join(pieces)
    told, blocks = outcome.stderr.splitlines(), []
    done: list[int] = []
    known = 0  # tokens whose keys are there
    # Both turns by one engine, and the second turn's first forward has no page of the first one.
    [of_chat] = filter(None, computed)
    for (asked, answer), seed in zip(answers_of(chat), (3, 5), strict=True):
        # Alone in its file, as the chat's question is: the draws are keyed by the place there.
        [line] = generated(call, tmp_path, [asked], *model, "--seed", seed, "--trajectories")
        assert line["response"] == answer
        assert text.startswith(answer + "\n")
        text = text.removeprefix(answer + "\n")
        trajectory = line["trajectory"]
        forwards = trajectory["denoising_forwards"]
        positions = (len(trajectory["prompt"]["token_ids"]) // 4 + 1) * 4
        assert of_chat[len(done)] == positions - known // PAGE_SIZE * PAGE_SIZE
        done += of_chat[len(done) :][:forwards]
        length = len(trajectory["response"]["token_ids"])
        known = (len(trajectory["prompt"]["token_ids"]) + length - 1) // 4 * 4
        cut = f", cut at {LENGTH} tokens" if line["finish_reason"] == "length" else ""
        speed = f"{length / forwards:.2f} a forward"
        assert told.pop(0) == f"[{length} tokens in {forwards} forwards: {speed}{cut}]"
        # After each forward, the text of the block that it finished.
        for forward in range(1, forwards + 1):
            expected = text_of_block(trajectory, forward)
            assert pieces.pop(0) == expected + ("\n" if forward == forwards else "")
        blocks.append(len({*trajectory["response"]["block"]}))
    assert (text, pieces) == ("", [])
    assert max(blocks) > 2
    assert told == [f"{saved}  5 messages"]


def text_of_block(trajectory: dict[str, Any], forward: int) -> str:
    """Text of the response in the block that a forward finished; empty if it finished none."""
    ends: dict[int, int] = {}
    texts: dict[int, str] = {}
    for part in ("response", "tail"):
        columns = trajectory[part]
        for i, block in enumerate(columns["block"]):
            ends[block] = max(ends.get(block, 0), columns["forward"][i])
            is_text = columns["token_ids"][i] not in trajectory["special_token_ids"]
            said = columns["texts"][i] if part == "response" and is_text else ""
            texts[block] = texts.get(block, "") + said
    return next((texts[block] for block, end in ends.items() if end == forward), "")


def test_thinking_is_switched(files: Path, say: Call, call: Call, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in (files / "dense").iterdir():
        if "token" in file.name:
            (tokenizer / file.name).write_bytes(file.read_bytes())
    (tokenizer / "chat_template.jinja").write_text(THINKING)
    model = ("--load", files / "dense", "--tokenizer", tokenizer, *COMMON)
    saved = [tmp_path / f"{name}.jsonl" for name in ("on", "off")]
    written = ["Why?", f"/save {saved[0]}", "/reset", "/think off", "Why?", f"/save {saved[1]}"]
    outcome = say(*model, "--thinking", written=written)
    assert outcome.status == 0, outcome.stderr
    chats = [lines(file)[0] for file in saved]
    assert [c["chat_template_kwargs"]["enable_thinking"] for c in chats] == [True, False]
    answers = []
    for [(asked, answer)] in map(answers_of, chats):
        [line] = generated(call, tmp_path, [asked], *model)
        assert line["response"] == answer
        answers.append(answer)
    assert answers[0] != answers[1]
    # The template of the tiny model has no such switch.
    plain = ("--load", files / "dense", *COMMON)
    outcome = say(*plain, written=["/think on", "/think maybe"])
    assert outcome.status == 2
    assert "thinking = 'on': the chat template has no variable enable_thinking" in outcome.stderr
    assert "/think = 'maybe': is neither on nor off; write one of them" in outcome.stderr
    say(*plain, "--no-thinking", written=[]).check_error("thinking = 'off'", "--tokenizer")


def test_a_chat_that_is_full_says_so(files: Path, say: Call, tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    written = ["Hello", "word " * 120, "Still there?", f"/save {saved}", "/reset", "And now?"]
    outcome = say("--load", files / "dense", *COMMON, written=written)
    assert outcome.status == 2
    answer, refused, hint, second, note, third = outcome.stderr.splitlines()
    assert refused.startswith("error: chat:1: prompt length = ")
    assert hint == "the message was not taken; /reset begins a new chat"
    for figures in (answer, second, third):
        assert figures.startswith(f"[{LENGTH} tokens in ")
    assert note.endswith("4 messages")
    contents = [message["content"] for message in lines(saved)[0]["messages"]]
    assert contents[::2] == ["Hello", "Still there?"]
    outcome = say("--load", files / "dense", *COMMON, written=WRONG)
    assert [
        re.sub("9+[^']*", "9...", line.split(";")[0]) for line in outcome.stderr.splitlines()
    ] == [
        "error: command = '/nothing': is unknown",
        "error: /seed = 'x': is no such whole number",
        "error: /seed = '9...': is no such whole number",
        "error: /save = None: there is no file",
    ]


def test_a_model_without_a_chat_template_is_refused(files: Path, say: Call, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (files / "dense").iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).write_bytes(file.read_bytes())
    say("--load", model, *COMMON, written=["x"]).check_error(
        "--load = ", "no chat template", "--tokenizer", "generate --no-chat"
    )


def chat_in_terminal(terminal: str, arguments: list[str]) -> None:
    """Run the command with a terminal of its own."""
    # As in a shell; whoever started the tests may have it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(opened, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(opened, descriptor)
    os.environ.update(TERM="xterm", HOME="/nonexistent")
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    os._exit(main(["chat", *arguments]))


class Terminal:
    """The user's end of a chat."""

    def __init__(self, arguments: Sequence[object]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        words = list(map(str, arguments))
        self.process = PROCESSES.Process(
            target=chat_in_terminal, args=(os.ttyname(slave), words), daemon=True
        )
        self.process.start()
        self._slave = slave
        self.text = ""

    def write(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Everything up to and including a text, which must come."""
        deadline = monotonic() + seconds
        while text not in self.text:
            ready, _, _ = select.select([self._master], [], [], max(deadline - monotonic(), 0))
            assert ready, self.text
            self.text += os.read(self._master, 1 << 16).decode(errors="replace")
        before, _, self.text = self.text.partition(text)
        return before + text

    def insist(self, key: str, text: str) -> str:
        """Press a key until a text comes.

        Python's input() notices a signal that comes before it waits for keys with the next key.
        """
        for _ in range(60):
            self.write(key)
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, 2)
        raise AssertionError(self.text)

    def close(self) -> int | None:
        """Wait for the end; returns the status."""
        os.close(self._slave)
        self.process.join(60)
        self.process.kill()
        with contextlib.suppress(OSError):
            os.close(self._master)
        return self.process.exitcode


def test_on_a_terminal_tokens_settle_and_ctrl_c_ends_an_answer(files: Path) -> None:
    """MASK is seen; the program outlives the interrupt; Ctrl-D leaves."""
    slow = ("--remasking-strategy", "low_confidence_static")
    terminal = Terminal(("--load", files / "dense", *DECODING, *slow))
    try:
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.write("How many?\n")
        terminal.wait_for("\u2591")
        terminal.write("\x03")
        shown = terminal.wait_for("stopped; ")
        assert "\x1b[J" in shown
        terminal.wait_for("> ")
        terminal.insist("\x03", "/exit or Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.write("/nothing\n")
        terminal.wait_for("error: command = '/nothing'")
        terminal.wait_for("> ")
        terminal.write("\x04")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()


def test_several_responses_and_their_trajectories(files: Path, call: Call, tmp_path: Path) -> None:
    prompts = files / "prompts.jsonl"
    model = ("--load", files / "dense", "--prompts", prompts, *COMMON)
    outputs = {}
    for number in (1, 3):
        outputs[number] = tmp_path / f"{number}.jsonl"
        options = ("--num-responses", number, "--trajectories", "--output", outputs[number])
        assert call(GENERATE, *model, *options).status == 0
    parallel = tmp_path / "parallel.jsonl"
    options = ("--num-responses", 3, "--trajectories", "--output", parallel)
    assert run_ranks(2, "generate", *model, *options, "--max-running-requests", 2).status == 0
    one, three, together = map(lines, (outputs[1], outputs[3], parallel))
    # What is decoded together changes last digits of the probabilities, not the tokens.
    confidences = take_confidences(three)
    assert take_confidences(together) == pytest.approx(confidences, rel=2e-3)
    assert together == three
    take_confidences(one)
    assert all(0 < value <= 1 for value in confidences)
    asked = lines(prompts)
    assert [line["messages"] for line in three] == [r["messages"] for r in asked for _ in range(3)]
    assert [line["response_index"] for line in three] == [0, 1, 2] * len(asked)
    assert one == [{k: v for k, v in line.items() if k != "response_index"} for line in three[::3]]
    assert len({line["response"] for line in three}) == len(three)
    for i, line in enumerate(three):
        check_trajectory(line, prompt_index=i // 3)

    single = ("--load", files / "dense", *COMMON, "--prompt", "x")
    call(GENERATE, *single, "--trajectories").check_error("--trajectories = True", "add --output")
    call(GENERATE, *single, "--num-responses", 2, "--temperature", 0).check_error(
        "--num-responses = 2: at temperature 0 all responses to a prompt are the same"
    )
    printed = call(GENERATE, *single, "--num-responses", 2).stdout
    assert [json.loads(line)["response_index"] for line in printed.splitlines()] == [0, 1]


def test_drafts_are_the_steps_of_a_speculative_response(
    files: Path, call: Call, tmp_path: Path
) -> None:
    output = tmp_path / "drafted.jsonl"
    folder = shutil.copytree(files / "dense", tmp_path / "two_modes")
    config = json.loads((folder / "config.json").read_text())
    config |= {"attention_pattern": "block_causal", "shifted": False, "block_size": 4}
    (folder / "config.json").write_text(json.dumps(config | {"context_attention": "causal"}))
    model = ("--load", folder, "--prompts", files / "prompts.jsonl", *COMMON)
    speculative = ("--remasking-strategy", "speculative", "--draft-steps", 2)
    options = (*speculative, "--trajectories", "--output", output)
    assert call(GENERATE, *model, *options).status == 0
    for line in lines(output):
        trajectory = line["trajectory"]
        response, rounds = trajectory["response"], trajectory["rounds"]
        token_ids, settled = response["token_ids"], 0
        for verified in rounds:
            drafts, accepted = verified["draft_ids"], verified["num_accepted"]
            assert verified["first"] == settled
            assert len(verified["draft_texts"]) == len(drafts)
            count = accepted + verified["draws_next"]
            place = slice(settled, min(settled + accepted, len(token_ids)))
            assert token_ids[place] == drafts[: place.stop - settled]
            own = slice(settled, settled + count)
            assert {*response["forward"][own]} == {verified["forward"]}
            settled += count
            if accepted < len(drafts):  # a draft that was refused is not what was drawn instead
                assert verified["draws_next"]
        # An end token cuts off what the same round settled after it.
        assert LENGTH >= settled >= len(token_ids)
        assert rounds[-1]["forward"] == trajectory["denoising_forwards"]
        assert all(0 < value <= 1 for value in response["confidence"])
        # Each step of a block is one forward, and the first one is step 1.
        for block in {*response["block"]}:
            of_block = [
                pair
                for pair, own in zip(
                    zip(response["step"], response["forward"], strict=True),
                    response["block"],
                    strict=True,
                )
                if own == block
            ]
            steps = sorted({*of_block})
            assert [step for step, _ in steps] == [*range(1, len(steps) + 1)]
            assert len({forward for _, forward in steps}) == len(steps)
        assert trajectory["tail"]["token_ids"] == []
    assert main(["trajectory", str(output)]) == 0


def take_confidences(written: list[dict[str, Any]]) -> list[float]:
    """The confidences of all lines, which lose them."""
    parts = [line["trajectory"][part] for line in written for part in ("response", "tail")]
    return [value for part in parts for value in part.pop("confidence")]


def check_trajectory(line: dict[str, Any], prompt_index: int) -> None:
    """A trajectory says where its tokens are and when they came."""
    trajectory = line["trajectory"]
    response, tail = trajectory["response"], trajectory["tail"]
    assert trajectory["prompt_index"] == prompt_index
    if "\ufffd" not in line["response"]:
        assert "".join(response["texts"]) == line["response"]
    length, first = len(response["token_ids"]), len(trajectory["prompt"]["token_ids"])
    assert (length, line["finish_reason"]) == (LENGTH, "length")
    assert (first + length + len(tail["token_ids"])) % 4 == 0
    assert len(tail["token_ids"]) < 4
    blocks = [*response["block"], *tail["block"]]
    assert blocks == [(first + i) // 4 - first // 4 for i in range(len(blocks))]
    steps, forwards = [*response["step"], *tail["step"]], [*response["forward"], *tail["forward"]]
    # Forwards are counted through: each settles something, and only in one block.
    assert {*forwards} == {*range(1, trajectory["denoising_forwards"] + 1)}
    by_forward = dict(zip(forwards, zip(blocks, steps, strict=True), strict=True))
    for forward, block, step in zip(forwards, blocks, steps, strict=True):
        assert by_forward[forward] == (block, step)
    assert [by_forward[forward] for forward in sorted(by_forward)] == sorted(by_forward.values())
    assert line["tokens_per_forward"] == round(length / trajectory["denoising_forwards"], 4)
