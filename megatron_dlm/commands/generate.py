"""Generate responses with any checkpoint, by diffusion or autoregressively.

megatron-dlm generate --load hf/ --prompt "Tom has 3 apples and buys 4 more. How many?"
torchrun --nproc-per-node 8 -m megatron_dlm generate --load runs/mine --prompts prompts.jsonl \
    --output responses.jsonl --dynamic-threshold 0.7

Output is JSONL in the order of the prompts: the fields of a prompt's record with `response`,
`finish_reason` ("eos" or "length") and `tokens_per_forward` added (or replaced); with
--num-responses, `response_index`, and with --trajectories, `trajectory`, which `megatron-dlm
trajectory` shows. A single response to --prompt without --output is printed as text.

Responses are kept in OUTPUT.partial as they come, and OUTPUT appears when all are there. After an
interruption the same command goes on, with the same result; the layout may be another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments, check_output, resolve_inference
from megatron_dlm.output_file import replaced_file
from megatron_dlm.ranges import AT_LEAST_ONE
from megatron_dlm.terminal import shows, write_results

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_dlm.data.record_source import RecordSource
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class PromptConfig:
    """Prompts: where they come from and where the responses go."""

    prompt: str | None = None
    """One prompt; a user's message where the tokenizer has a chat template."""

    chat: bool = True
    """Put --prompt into the chat template; without it the model continues the bare text."""

    prompts: str | None = None
    """Prompts, as --prompts of a run takes them: JSONL, one object a line with `messages` (chat) or
    `prompt` (bare text), or other files."""

    num_responses: Annotated[int, AT_LEAST_ONE] = 1
    """Responses to each prompt, at a temperature above 0. The first ones do not depend on how many
    there are."""

    trajectories: bool = False
    """Write with each response how it was decoded: block, step, forward and confidence of each
    token. `megatron-dlm trajectory` shows them on a page."""

    output: str | None = None
    """JSONL file for the responses, replaced if it exists (default: standard output)."""

    restart: bool = False
    """Forget what an interrupted command left in OUTPUT.partial, instead of going on with it."""


@dataclass(frozen=True)
class Arguments(InferenceArguments):
    """Generate responses."""

    prompt: PromptConfig = field(default_factory=PromptConfig)


def read_records(
    options: PromptConfig, tokenizer: PreTrainedTokenizerBase, domain_field: str
) -> RecordSource:
    """The prompts as records.

    Raises:
        UserError: The file cannot be read or is empty.
    """
    from megatron_dlm.data.json_records import RecordsInMemory
    from megatron_dlm.data.open_records import open_records

    if options.prompts is not None:
        return open_records(options.prompts, "--prompts", domain_field)
    if options.chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": options.prompt}]
        return RecordsInMemory([{"messages": messages}], "--prompt")
    return RecordsInMemory([{"prompt": options.prompt}], "--prompt")


def response_record(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a line of output has of every response."""
    tokens = trajectory.response_ids
    return trajectory.record | {
        "response": tokenizer.decode(tokens.tolist(), skip_special_tokens=True),
        "finish_reason": trajectory.finish_reason,
        "tokens_per_forward": round(len(tokens) / trajectory.denoising_forwards, 4),
    }


def check_options(options: PromptConfig, generation: GenerationConfig) -> None:
    """Check that several responses differ, and that trajectories have a place.

    Raises:
        UserError: They do not.
    """
    if options.num_responses > 1 and generation.temperature == 0:
        raise bad_value(
            "--num-responses",
            options.num_responses,
            "at temperature 0 all responses to a prompt are the same",
            "add --temperature 1, or drop it",
        )
    if options.trajectories and options.prompt is not None and options.output is None:
        problem = "without --output, only the text of the response is printed"
        raise bad_value("--trajectories", True, problem, "add --output")


def json_line(record: dict[str, Any], *, ascii_only: bool = False) -> str:
    """A record as a line of JSON, in characters that UTF-8 has."""
    line = json.dumps(record, ensure_ascii=ascii_only) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json_line(record, ascii_only=True)
    return line


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
    settings = setup.settings()
    [(setting, generation)] = settings.items()
    check_options(options, generation)
    check_output(options.output, options.restart, setup, ("--prompts", options.prompts))
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.evaluation.answering import answer_prompts, results_header
    from megatron_dlm.evaluation.generation import (
        Generator,
        load_frozen_model,
        read_inference_inputs,
    )
    from megatron_dlm.evaluation.partial_results import open_partial_results
    from megatron_dlm.evaluation.trajectory_record import trajectory_record
    from megatron_dlm.parallel import ParallelGroups, initialized

    tokenizer = load_tokenizer(setup.tokenizer_folder)
    records = read_records(options, tokenizer, setup.config.template.domain_field)
    inputs = read_inference_inputs(setup, tokenizer, records, options.num_responses)
    header = results_header("generate", setup, inputs, tokenizer, settings)
    header |= {"num_responses": options.num_responses, "trajectories": options.trajectories}

    def line_of(trajectory: Trajectory) -> str:
        record = response_record(trajectory, tokenizer)
        which, response = inputs.place(trajectory)
        if options.num_responses > 1:
            record["response_index"] = response
        if options.trajectories:
            record["trajectory"] = trajectory_record(
                trajectory,
                generation,
                tokenizer,
                setting=setting,
                seed=setup.config.data.seed,
                prompt_index=which,
            )
        return json_line(record)

    with initialized(setup.config):
        groups = ParallelGroups.from_parallel_state()
        partial = open_partial_results(options.output, header, groups, restart=options.restart)
        generator = Generator(
            load_frozen_model(setup), setup, inputs, groups, keeps_confidence=options.trajectories
        )
        answers = answer_prompts(generator, setting, generation, partial, line_of)
    if answers is None:
        return 0
    lines: list[str] = answers.results
    if options.output is not None:
        with (
            replaced_file(options.output, "--output") as temporary,
            temporary.open("w", encoding="utf-8") as opened,
        ):
            opened.writelines(lines)
        partial.remove()
    elif options.prompts is None and len(lines) == 1:
        write_results(json.loads(lines[0])["response"] + "\n")
    else:
        for line in lines:
            write_results(line if shows(line) else json_line(json.loads(line), ascii_only=True))
    return 0
