"""Score a checkpoint's responses to held-out prompts, under one or several decoding settings.

megatron-dlm evaluate --load hf/ --data heldout.jsonl --output results.json
torchrun --nproc-per-node 2 -m megatron_dlm evaluate --load hf/ --data heldout.jsonl \
    --settings static,dynamic:0.9,dynamic:0.7 --max-response-length 64

Prints a table. The results file is one JSON object: `load`, `data`, `task`, `num_examples`,
`seconds`, and `settings`, which maps each setting's name (`static`, `dynamic_0.9`, `entropy_64`,
`autoregressive`) to its rates (`accuracy`, `correct`, `total`, `tokens_per_forward`, ...).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments, check_output, resolve_inference


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

    max_examples: int | None = None
    """Evaluate only this many examples from the beginning of the file."""

    output: str | None = None
    """JSON file for the results, replaced if it exists."""


@dataclass(frozen=True)
class Arguments(InferenceArguments):
    """Evaluate a checkpoint."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def print_table(load: str, num_examples: int, results: dict[str, dict[str, Any]]) -> None:
    """Print the results for a person."""
    from rich.console import Console
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
    Console().print(table)


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, generate and score, print and write."""
    arguments = parse_command("evaluate", Arguments, argv)
    options = arguments.evaluation
    if options.data is None:
        raise bad_value("--data", None, "there is nothing to evaluate on", "name a JSONL file")
    if options.max_examples is not None and options.max_examples < 1:
        raise bad_value(
            "--max-examples", options.max_examples, "is less than 1", "choose 1 or more"
        )
    setup = resolve_inference(arguments, world_size())
    settings = setup.settings(options.settings)
    check_output(options.output)
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.records import RecordFile
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.evaluation.evaluator import EvaluationCounts, count, score
    from megatron_dlm.evaluation.generation import (
        Generator,
        load_frozen_model,
        read_inference_inputs,
        sum_over_ranks,
    )
    from megatron_dlm.evaluation.progress import GenerationProgress
    from megatron_dlm.evaluation.tasks import get_task
    from megatron_dlm.parallel import initialized

    task = get_task(options.task)
    file = RecordFile.read(options.data, "--data")
    if options.max_examples is not None:
        file = file.first(options.max_examples)
    tokenizer = load_tokenizer(setup.tokenizer_folder)
    inputs = read_inference_inputs(setup, tokenizer, file)
    task.check(inputs.prompts)

    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    with initialized(setup.config):
        generator = Generator(load_frozen_model(setup), setup, inputs)
        for name, generation in settings.items():
            began = time.perf_counter()
            progress = GenerationProgress(name, len(generator.share), enabled=rank() == 0)
            trajectories = generator.generate(generation, progress)
            counts = count(trajectories, score(trajectories, tokenizer, task))
            total = EvaluationCounts.from_list(sum_over_ranks(counts.to_list()))
            seconds = round(time.perf_counter() - began, 3)
            results[name] = total.result().to_json() | {"seconds": seconds}
    if rank() == 0:
        assert setup.options.load is not None
        print_table(setup.options.load, len(inputs.prompts), results)
        summary = {
            "load": setup.options.load,
            "data": options.data,
            "task": options.task,
            "num_examples": len(inputs.prompts),
            "seconds": round(time.perf_counter() - started, 3),
            "settings": results,
        }
        if options.output is not None:
            Path(options.output).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0
