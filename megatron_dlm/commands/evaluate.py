"""Score a checkpoint's responses to held-out prompts, under one or several decoding settings.

megatron-dlm evaluate --load hf/ --data heldout.jsonl --output results.json
torchrun --nproc-per-node 2 -m megatron_dlm evaluate --load hf/ --data heldout.jsonl \
    --settings static,dynamic:0.9,dynamic:0.7 --max-response-length 64

Prints a table. The results file is one JSON object: `load`, `data`, `task`, `num_examples`,
`seconds`, and `settings`, which maps each setting's name (`static`, `dynamic_0.9`, `entropy_64`,
`autoregressive`) to its rates (`accuracy`, `correct`, `total`, `tokens_per_forward`, ...).

With --output, the verdict on each response is kept in OUTPUT.partial as it comes. After an
interruption the same command goes on, with the same rates; the layout may be another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dlm.commands import parse_command
from megatron_dlm.config.marks import AT_LEAST_ONE
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments, check_output, resolve_inference
from megatron_dlm.output_file import write_file
from megatron_dlm.terminal import say_table

if TYPE_CHECKING:
    from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation: data, task and decoding settings."""

    data: str | None = None
    """JSONL of prompts with the reference that the task compares with, `answer`."""

    task: str = "exact_match"
    """What a correct response is: exact_match compares what follows the last ####, math_verify the
    last mathematical expression, by its value."""

    settings: tuple[str, ...] = ()
    """Decoding settings to evaluate one after the other, separated by commas: the short name of a
    strategy, with the value of its option after a colon if it is not the options' (static,
    static:<steps>, dynamic:<threshold>, ...), or autoregressive (default: the one that the decoding
    options describe)."""

    max_examples: Annotated[int | None, AT_LEAST_ONE] = None
    """Evaluate only this many examples from the beginning of the file."""

    output: str | None = None
    """JSON file for the results, replaced if it exists."""

    restart: bool = False
    """Forget what an interrupted command left in OUTPUT.partial, instead of going on with it."""


@dataclass(frozen=True)
class Arguments(InferenceArguments):
    """Evaluate a checkpoint."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def print_table(load: str, num_examples: int, results: dict[str, dict[str, Any]]) -> None:
    """Print the results for a person."""
    from rich.table import Table

    table = Table(title=f"{load}: {num_examples} examples", title_justify="left")
    table.add_column("setting", no_wrap=True)
    for heading in ("accuracy", "tokens/fwd", "mean length", "EOS", "seconds"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        rate = result["tokens_per_forward"]
        table.add_row(
            name,
            f"{result['accuracy']:.1%}",
            "-" if rate is None else f"{rate:.2f}",
            f"{result['mean_response_length']:.1f}",
            f"{result['eos_rate']:.1%}",
            f"{result['seconds']:.1f}",
        )
    say_table(table)


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, generate and score, print and write."""
    arguments = parse_command("evaluate", Arguments, argv)
    options = arguments.evaluation
    if options.data is None:
        raise bad_value("--data", None, "there is nothing to evaluate on", "name a JSONL file")
    setup = resolve_inference(arguments, world_size())
    settings = setup.settings(options.settings)
    check_output(options.output, options.restart, setup, ("--data", options.data))
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.records import RecordFile
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.evaluation.answering import answer_prompts, results_header
    from megatron_dlm.evaluation.evaluator import EvaluationCounts, count, score
    from megatron_dlm.evaluation.generation import (
        Generator,
        load_frozen_model,
        read_inference_inputs,
    )
    from megatron_dlm.evaluation.partial_results import open_partial_results
    from megatron_dlm.evaluation.tasks import get_task
    from megatron_dlm.parallel import ParallelGroups, initialized

    task = get_task(options.task)
    file = RecordFile.read(options.data, "--data")
    if options.max_examples is not None:
        file = file.first(options.max_examples)
    tokenizer = load_tokenizer(setup.tokenizer_folder)
    inputs = read_inference_inputs(setup, tokenizer, file)
    task.check(inputs.prompts)

    header = results_header("evaluate", setup, inputs, tokenizer, settings) | {"task": task.name}

    def counts_of(trajectory: Trajectory) -> list[int]:
        return count([trajectory], score([trajectory], tokenizer, task)).to_list()

    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    with initialized(setup.config):
        groups = ParallelGroups.from_parallel_state()
        partial = open_partial_results(options.output, header, groups, restart=options.restart)
        generator = Generator(load_frozen_model(setup), setup, inputs, groups)
        for name, generation in settings.items():
            answers = answer_prompts(generator, name, generation, partial, counts_of)
            if answers is not None:
                total = sum(map(EvaluationCounts.from_list, answers.results), EvaluationCounts())
                results[name] = total.result().to_json() | {"seconds": round(answers.seconds, 3)}
    if rank() == 0:
        assert setup.options.load is not None
        seconds = time.perf_counter() - started + sum(partial.seconds.values())
        summary = {
            "load": setup.options.load,
            "data": options.data,
            "task": options.task,
            "num_examples": len(inputs.prompts),
            "seconds": round(seconds, 3),
            "settings": results,
        }
        if options.output is not None:
            write_file(options.output, json.dumps(summary, indent=2) + "\n", "--output")
            partial.remove()
        print_table(setup.options.load, len(inputs.prompts), results)
    return 0
