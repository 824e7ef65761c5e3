"""Score a checkpoint's responses to a benchmark, under one or several decoding settings.

megatron-dlm evaluate --load hf/ --data heldout.jsonl --output results.json
megatron-dlm evaluate --load hf/ --task gsm8k --data gsm8k/test.jsonl --output results.json
torchrun --nproc-per-node 2 -m megatron_dlm evaluate --load hf/ --data heldout.jsonl \
    --settings static,dynamic:0.9,dynamic:0.7 --num-seeds 4 --temperature 1 --plot pareto.png

Prints a table. The results file is one JSON object: `load`, `data`, `task`, `num_examples`,
`seconds`, and `settings`, which maps each setting's name (`static`, `dynamic_0.9`, `entropy_64`,
`autoregressive`) to its rates (`accuracy`, `correct`, `total`, `tokens_per_forward`, ...). Every
response stands in OUTPUT.responses.jsonl, with its reward.

With --output, each response is kept in OUTPUT.partial as it comes. After an interruption the same
command goes on, with the same rates; the layout may be another.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments, check_output, resolve_inference
from megatron_dlm.extras import check_installed
from megatron_dlm.output_file import check_output_file, replaced_file, write_file
from megatron_dlm.ranges import AT_LEAST_ONE
from megatron_dlm.terminal import say_table

if TYPE_CHECKING:
    from megatron_dlm.evaluation.answering import Answers
    from megatron_dlm.evaluation.generation import InferenceInputs
    from megatron_dlm.evaluation.rewards import Reward
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation: data, task and decoding settings."""

    data: str | None = None
    """The benchmark's file as it was published (JSONL, JSON, CSV or Parquet), or the name of a data
    set with configuration and split, for --task of a benchmark (default there: where it was
    published); for a reward's name, JSONL of prompts with the fields that the reward reads."""

    task: str = "exact_match"
    """What is asked, and what a right response is: a benchmark (gsm8k, math_500, aime_2024,
    aime_2025, mgsm, mmlu, mmlu_pro, mmlu_redux, gpqa_diamond, ceval, arc, race, ifeval, bbh,
    humaneval, mbpp, livecodebench), a .py file that defines TASK, or, for prompts as they are, a
    reward (exact_match, math_verify, choice, instructions, code_tests, countdown, sudoku, or
    package.module:function)."""

    settings: tuple[str, ...] = ()
    """Decoding settings to evaluate one after the other, separated by commas: the short name of a
    strategy, with the value of its option after a colon if it is not the options' (static,
    static:<steps>, dynamic:<threshold>, ...), with @ and a block size if that is not the model's
    (dynamic:0.9@8), or autoregressive (default: the one that the decoding options describe)."""

    num_seeds: Annotated[int, AT_LEAST_ONE] = 1
    """Answer everything so many times, with --seed and the seeds after it; results have mean and
    standard deviation over them."""

    max_examples: Annotated[int | None, AT_LEAST_ONE] = None
    """Evaluate only this many examples from the beginning of the file."""

    output: str | None = None
    """JSON file for the results, replaced if it exists; the responses stand in a file beside it
    that ends in .responses.jsonl."""

    plot: str | None = None
    """Picture (.png, .svg or .pdf) of accuracy against tokens per forward, a point a setting."""

    restart: bool = False
    """Forget what an interrupted command left in OUTPUT.partial, instead of going on with it."""

    unsafe_code_execution: bool = False
    """Run code of responses without isolation where the machine allows none: the code can then do
    what you can."""


@dataclass(frozen=True)
class Arguments(InferenceArguments):
    """Evaluate a checkpoint."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def print_table(load: str, num_examples: int, results: dict[str, dict[str, Any]]) -> None:
    """Print the results for a person."""
    from rich.table import Table

    table = Table(title=f"{load}: {num_examples} examples", title_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    verifies = any(result.get("acceptance_rate") is not None for result in results.values())
    accepted = ("accepted",) if verifies else ()
    for heading in ("tok/fwd", *accepted, "tokens/s", "mean length", "EOS", "seconds"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        rate = result["tokens_per_forward"]
        deviation = result.get("accuracy_std")
        table.add_row(
            name,
            f"{result['accuracy']:.1%}" + ("" if deviation is None else f" ± {deviation:.1%}"),
            "-" if rate is None else f"{rate:.2f}",
            *([_share(result["acceptance_rate"])] if verifies else []),
            f"{result['tokens_per_second']:,.0f}",
            f"{result['mean_response_length']:.1f}",
            f"{result['eos_rate']:.1%}",
            f"{result['seconds']:.1f}",
        )
    say_table(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _check(options: EvaluationConfig) -> None:
    if options.plot is None:
        return
    if Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        problem, remedy = "is no picture", "end the name in .png, .svg or .pdf"
        raise bad_value("--plot", options.plot, problem, remedy)
    check_installed("matplotlib", "--plot", options.plot)
    check_output_file(options.plot, "--plot", [("--data", options.data)])


def _check_room(
    settings: Mapping[str, GenerationConfig], inputs: InferenceInputs, positions: int
) -> None:
    """Whole blocks of each setting's size have to fit the model's positions."""
    longest = max(len(prompt.token_ids) for prompt in inputs.prompts) + inputs.max_response_length
    for name, generation in settings.items():
        if generation.block_size is None:
            continue
        room = positions // generation.block_size * generation.block_size
        if longest > room:
            problem = f"its blocks leave {room} of the model's positions, {longest} are needed"
            raise bad_value("--settings", name, problem, "lower --max-response-length")


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, generate, rate, print and write."""
    arguments = parse_command("evaluate", Arguments, argv)
    options = arguments.evaluation
    _check(options)
    setup = resolve_inference(arguments, world_size())
    settings = setup.settings(options.settings)
    for name, generation in settings.items():
        if options.num_seeds > 1 and generation.temperature == 0:
            problem = f"{name} draws nothing at --temperature 0, so all seeds answer alike"
            remedy = "choose a temperature above 0, or one seed"
            raise bad_value("--num-seeds", options.num_seeds, problem, remedy)
    check_output(options.output, options.restart, setup, ("--data", options.data))
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.evaluation.answering import answer_prompts, results_header
    from megatron_dlm.evaluation.evaluator import Response
    from megatron_dlm.evaluation.generation import (
        Generator,
        load_frozen_model,
        read_inference_inputs,
    )
    from megatron_dlm.evaluation.partial_results import open_partial_results
    from megatron_dlm.evaluation.rewards import get_reward
    from megatron_dlm.evaluation.tasks import get_task
    from megatron_dlm.evaluation.tasks.reading import read_task_file
    from megatron_dlm.parallel import ParallelGroups, initialized

    task = get_task(options.task)
    reward = get_reward(task.reward, "--task", unsafe_code_execution=options.unsafe_code_execution)
    file = read_task_file(task, options.data, options.max_examples)
    tokenizer = load_tokenizer(setup.tokenizer_folder)
    inputs = read_inference_inputs(setup, tokenizer, file)
    reward.check(inputs.prompts)
    _check_room(settings, inputs, setup.source.architecture.max_position_embeddings)

    header = results_header("evaluate", setup, inputs, tokenizer, settings)
    header |= {"task": task.name, "num_seeds": options.num_seeds}

    def response_of(trajectory: Trajectory) -> dict[str, Any]:
        return Response.of(trajectory, tokenizer).to_json()

    started = time.perf_counter()
    first = setup.config.data.seed
    runs = [
        _Run(name, generation, seed)
        for name, generation in settings.items()
        for seed in range(first, first + options.num_seeds)
    ]
    answered: list[Answers] = []
    with initialized(setup.config):
        groups = ParallelGroups.from_parallel_state()
        partial = open_partial_results(options.output, header, groups, restart=options.restart)
        generator = Generator(load_frozen_model(setup), setup, inputs, groups)
        for run in runs:
            label = run.setting if options.num_seeds == 1 else f"{run.setting}, seed {run.seed}"
            answers = answer_prompts(
                generator, label, run.generation, partial, response_of, run.seed
            )
            if answers is not None:
                answered.append(answers)
    if rank() == 0:
        assert setup.options.load is not None
        records = [record for _, record in inputs.prompts.file.records()]
        rated = [_rate(run, a, records, reward) for run, a in zip(runs, answered, strict=True)]
        results = _by_setting(rated, options.num_seeds)
        seconds = time.perf_counter() - started + sum(partial.seconds.values())
        summary = {
            "load": setup.options.load,
            "data": file.path,
            "task": options.task,
            "num_examples": len(inputs.prompts),
            "seconds": round(seconds, 3),
            "settings": results,
        }
        if options.output is not None:
            _write_responses(responses_file(options.output), rated, records)
            write_file(options.output, json.dumps(summary, indent=2) + "\n", "--output")
            partial.remove()
        print_table(setup.options.load, len(inputs.prompts), results)
        if options.plot is not None:
            from megatron_dlm.evaluation.plot import accuracy_and_speed

            accuracy_and_speed(options.plot, task.name, results)
    return 0


@dataclass(frozen=True)
class _Run:
    """All prompts under one setting, with one seed."""

    setting: str
    generation: GenerationConfig
    seed: int


@dataclass(frozen=True)
class _Rated:
    """Responses of a run, their rewards and rates."""

    run: _Run
    responses: list[Any]
    rewards: list[float]
    rates: dict[str, Any]


def _rate(
    run: _Run, answers: Answers, records: Sequence[Mapping[str, Any]], reward: Reward
) -> _Rated:
    from megatron_dlm.evaluation.evaluator import Response, rates

    responses = [Response(**result) for result in answers.results]
    rewards = reward.rate(records, [response.text for response in responses])
    tokens = sum(response.tokens for response in responses)
    seconds = {
        "tokens_per_second": tokens / answers.seconds,
        "seconds": round(answers.seconds, 3),
    }
    return _Rated(run, responses, rewards, rates(responses, rewards).to_json() | seconds)


_SUMS = ("correct", "total", "seconds")


def _by_setting(rated: Sequence[_Rated], num_seeds: int) -> dict[str, dict[str, Any]]:
    """The rates of each setting; over several seeds their means, and the accuracy's deviation."""
    results: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rated), num_seeds):
        of_seeds = rated[start : start + num_seeds]
        result = dict(of_seeds[0].rates)
        if num_seeds > 1:
            for name in result:
                values = [entry.rates[name] for entry in of_seeds]
                if None not in values:
                    result[name] = sum(values) if name in _SUMS else statistics.fmean(values)
            accuracies = [entry.rates["accuracy"] for entry in of_seeds]
            result["accuracy_std"] = statistics.stdev(accuracies)
            result["seeds"] = {str(entry.run.seed): entry.rates for entry in of_seeds}
        results[of_seeds[0].run.setting] = result
    return results


def responses_file(output: str) -> str:
    """Where every response is written: results.json has results.responses.jsonl."""
    return f"{output.removesuffix('.json')}.responses.jsonl"


def _write_responses(
    path: str, rated: Sequence[_Rated], records: Sequence[Mapping[str, Any]]
) -> None:
    with replaced_file(path, "--output") as temporary, temporary.open("w", encoding="utf-8") as out:
        for entry in rated:
            run = {"setting": entry.run.setting, "seed": entry.run.seed}
            for response, reward, record in zip(
                entry.responses, entry.rewards, records, strict=True
            ):
                line = run | response.to_json() | {"reward": reward, "record": record}
                out.write(json.dumps(line, ensure_ascii=True) + "\n")
