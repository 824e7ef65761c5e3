"""Generate responses with any checkpoint, by diffusion or autoregressively.

megatron-dlm generate --load hf/ --prompt "Tom has 3 apples and buys 4 more. How many?"
torchrun --nproc-per-node 8 -m megatron_dlm generate --load runs/mine --prompts prompts.jsonl \
    --output responses.jsonl --dynamic-threshold 0.7

Output is JSONL in the order of the prompts: the fields of a prompt's record with `response`,
`finish_reason` ("eos" or "length") and `tokens_per_forward` added (or replaced). A single --prompt
without --output prints the text of the response.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments, check_output, resolve_inference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_dlm.data.records import RecordFile
    from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class PromptConfig:
    """Prompts: where they come from and where the responses go."""

    prompt: str | None = None
    """One prompt; a user's message where the tokenizer has a chat template."""

    chat: bool = True
    """Put --prompt into the chat template; without it the model continues the bare text."""

    prompts: str | None = None
    """JSONL of prompts, one object a line with `messages` (chat) or `prompt` (bare text)."""

    output: str | None = None
    """JSONL file for the responses, replaced if it exists (default: standard output)."""


@dataclass(frozen=True)
class Arguments(InferenceArguments):
    """Generate responses."""

    prompt: PromptConfig = field(default_factory=PromptConfig)


def read_records(options: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> RecordFile:
    """The prompts as records.

    Raises:
        UserError: The file cannot be read or is empty.
    """
    from megatron_dlm.data.records import RecordFile

    if options.prompts is not None:
        return RecordFile.read(options.prompts, "--prompts")
    if options.chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": options.prompt}]
        return RecordFile.of([{"messages": messages}], "--prompt")
    return RecordFile.of([{"prompt": options.prompt}], "--prompt")


def response_record(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One line of output."""
    tokens = trajectory.response_ids
    return trajectory.record | {
        "response": tokenizer.decode(tokens.tolist(), skip_special_tokens=True),
        "finish_reason": trajectory.finish_reason,
        "tokens_per_forward": round(len(tokens) / trajectory.denoising_forwards, 4),
    }


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, generate, write."""
    arguments = parse_command("generate", Arguments, argv)
    options = arguments.prompt
    if (options.prompt is None) == (options.prompts is None):
        problem = (
            "is missing, as is --prompts" if options.prompt is None else "comes with --prompts"
        )
        raise bad_value("--prompt", options.prompt, problem, "give one of the two")
    setup = resolve_inference(arguments, world_size())
    [(setting, generation)] = setup.settings().items()
    check_output(options.output)
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.evaluation.generation import (
        Generator,
        gather_in_order,
        load_frozen_model,
        read_inference_inputs,
    )
    from megatron_dlm.evaluation.progress import GenerationProgress
    from megatron_dlm.parallel import initialized

    tokenizer = load_tokenizer(setup.tokenizer_folder)
    inputs = read_inference_inputs(setup, tokenizer, read_records(options, tokenizer))
    with initialized(setup.config):
        generator = Generator(load_frozen_model(setup), setup, inputs)
        progress = GenerationProgress(setting, len(generator.share), enabled=rank() == 0)
        trajectories = generator.generate(generation, progress)
        records = gather_in_order([response_record(t, tokenizer) for t in trajectories])
    if rank() == 0:
        assert records is not None
        if options.prompts is None and options.output is None:
            print(records[0]["response"])
            return 0
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if options.output is None:
            sys.stdout.write(text)
        else:
            Path(options.output).write_text(text, encoding="utf-8")
    return 0
