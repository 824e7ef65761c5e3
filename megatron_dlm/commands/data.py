"""Look at data before a run does: check it, count it, or write it as one file of prompts.

megatron-dlm data check --prompts mixture.yaml --tokenizer models/Qwen3-8B
megatron-dlm data stats --train-data 'data/*.parquet' --tokenizer models/Qwen3-8B
megatron-dlm data prepare --prompts examples/data/opdlm_62k.yaml --tokenizer models/Qwen3-8B \
    --output data/opdlm_train.jsonl

`check` lists every record that a run would refuse, and those that are too long, empty or the same
as an earlier one; exit status 1 if a run would stop. `stats` shows lengths in tokens by domain.
`prepare` writes the records without any such problem as JSONL. --report FILE has the same for
programs: one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dlm.commands import parse_command
from megatron_dlm.config.groups import DataConfig, TemplateConfig, TrainOn
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import check_output_file, replaced_file, write_file
from megatron_dlm.ranges import AT_LEAST_ONE
from megatron_dlm.terminal import say, say_table

if TYPE_CHECKING:
    from megatron_dlm.data.record_source import RecordSource
    from megatron_dlm.data.survey import Survey, Tokenize

ACTIONS = ("check", "stats", "prepare")
REFUSED_STATUS = 1
KINDS = {
    "bad": "that a run refuses",
    "too_long": "over --max-prompt-length",
    "empty": "without text",
    "duplicate": "the same as an earlier one",
}
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class InputConfig:
    """Input: the data and how a run would read it."""

    prompts: str | None = None
    """Prompts, as --prompts of a run takes them: JSONL, Parquet, Arrow, a pattern, a data set of
    the Hugging Face hub, or a mixture of these in a YAML file."""

    train_data: str | None = None
    """Examples, as --train-data of a run takes them."""

    tokenizer: str | None = None
    """Folder of the tokenizer, which is best that of the model: its config.json then says which
    tokens there are."""

    train_on: TrainOn = DataConfig.train_on
    """Turns of the assistant that are examples, as in a run."""

    max_prompt_length: Annotated[int, AT_LEAST_ONE] = DataConfig.max_prompt_length
    """Longest prompt in tokens, chat template included."""

    max_response_length: Annotated[int | None, AT_LEAST_ONE] = None
    """Longest response of an example in tokens, EOS included (default: no limit)."""

    domain_field: str = TemplateConfig.domain_field
    """Field of a record that names its domain."""

    prompt_suffix_by_domain: dict[str, str] = field(default_factory=dict)
    """Text to append to a prompt by its domain, as in a run; JSON."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as in a run; JSON."""


@dataclass(frozen=True)
class OutputConfig:
    """Output: what is written and shown."""

    output: str | None = None
    """JSONL file that prepare writes, replaced if it exists."""

    report: str | None = None
    """File for the report as JSON lines, replaced if it exists."""

    max_shown: int = 20
    """Most records of each kind that are listed on the terminal; the report has all."""


@dataclass(frozen=True)
class Arguments:
    """Check, count or prepare data."""

    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, read all records, report."""
    action = argv[0] if argv and not argv[0].startswith("-") else None
    arguments = parse_command("data", Arguments, argv[1:] if action else argv)
    if action not in ACTIONS:
        raise bad_value("action", action, "is none", f"write megatron-dlm data {'|'.join(ACTIONS)}")
    check_arguments(action, arguments)
    options, output = arguments.input, arguments.output
    # Imported only now, because it takes seconds.
    from megatron_dlm.data.open_records import open_records
    from megatron_dlm.data.survey import survey

    name = "prompts" if options.prompts is not None else "train_data"
    path = getattr(options, name)
    records = open_records(path, f"--{name.replace('_', '-')}", options.domain_field)
    found = survey(records, _reader(options), options.max_prompt_length, options.domain_field)
    if output.report is not None:
        write_file(output.report, "".join(_report_lines(path, found)), "--report")
    refused = found.count("bad") + found.count("too_long")
    if action == "stats":
        _show_lengths(path, found)
    _show_problems(found, 0 if action == "stats" else output.max_shown)
    if action == "prepare":
        assert output.output is not None
        if not found.good:
            raise bad_value(f"--{name}", path, "has no record to write", "run data check on it")
        _write_records(records, found.good, output.output)
        say(f"wrote {output.output}: {len(found.good):,} of {found.num_records:,} records")
        return 0
    return REFUSED_STATUS if action == "check" and refused else 0


def check_arguments(action: str, arguments: Arguments) -> None:
    """Check what needs no reading.

    Raises:
        UserError: Something is missing, contradicts, or cannot be written.
    """
    options, output = arguments.input, arguments.output
    if (options.prompts is None) == (options.train_data is None):
        problem = "is missing" if options.prompts is None else "comes with --train-data"
        raise bad_value("--prompts", options.prompts, problem, "give it or --train-data")
    if options.tokenizer is None:
        raise bad_value("--tokenizer", None, "is missing", "name its folder")
    if options.max_prompt_length < 1:
        raise bad_value(
            "--max-prompt-length", options.max_prompt_length, "is less than 1", "choose 1 or more"
        )
    if (output.output is None) == (action == "prepare"):
        problem = "is missing" if action == "prepare" else f"is not for data {action}"
        raise bad_value("--output", output.output, problem, "give it to data prepare alone")
    inputs = (("--prompts", options.prompts), ("--train-data", options.train_data))
    for flag, path in (("--output", output.output), ("--report", output.report)):
        if path is not None:
            check_output_file(path, flag)
            for other, value in inputs:
                if value == path:
                    raise bad_value(flag, path, f"is {other}", "write another file")


def _reader(options: InputConfig) -> Tokenize:
    """Reads records as a run would, prompts of any length.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    from megatron_dlm.data.document_encoder import config_beside
    from megatron_dlm.data.domains import Domains
    from megatron_dlm.data.prompts import ExampleDataset, PromptDataset, read_examples
    from megatron_dlm.data.prompts import tokenize_prompts as tokenized
    from megatron_dlm.data.tokenizer import load_tokenizer, resolve_special_tokens

    assert options.tokenizer is not None
    tokenizer = load_tokenizer(options.tokenizer)
    # Without a model, MASK is the first id after the tokenizer's.
    largest = max(tokenizer.get_vocab().values())
    config = config_beside(options.tokenizer) or {"vocab_size": largest + 2}
    special_tokens = resolve_special_tokens(tokenizer, config, options.tokenizer)
    domains = Domains(options.domain_field, options.prompt_suffix_by_domain)

    def read(records: RecordSource) -> PromptDataset | ExampleDataset:
        if options.prompts is not None:
            return tokenized(
                records,
                tokenizer,
                special_tokens,
                NO_LIMIT,
                options.chat_template_kwargs,
                domains=domains,
            )
        return read_examples(
            records,
            tokenizer,
            special_tokens,
            NO_LIMIT,
            options.max_response_length,
            options.chat_template_kwargs,
            train_on=options.train_on,
            domains=domains,
        )

    return read


def _write_records(records: RecordSource, indices: Sequence[int], path: str) -> None:
    with replaced_file(path, "--output") as temporary, temporary.open("wb") as file:
        for index in indices:
            line = json.dumps(records.record(index), ensure_ascii=True)
            file.write(line.encode() + b"\n")


def _report_lines(path: str, found: Survey) -> Iterator[str]:
    """The report for programs."""
    for problem in found.problems:
        yield json.dumps(problem._asdict()) + "\n"
    for domain, prompts, responses in _by_domain(found):
        line: dict[str, Any] = {"kind": "domain", "domain": domain}
        for name, lengths in (("prompt", prompts), ("response", responses)):
            if lengths:
                line |= {f"{name}s": len(lengths), f"{name}_tokens": _described(lengths)}
        yield json.dumps(line) + "\n"
    counts = {kind: found.count(kind) for kind in KINDS}
    summary = {"data": path, "records": found.num_records, "good": len(found.good), **counts}
    yield json.dumps({"kind": "summary", **summary}) + "\n"


def _described(lengths: Sequence[int]) -> dict[str, Any]:
    from megatron_dlm.data.survey import histogram, percentiles

    return {
        "total": sum(lengths),
        "mean": round(sum(lengths) / len(lengths), 2),
        **percentiles(lengths),
        "histogram": [{"from": low, "to": high, "count": n} for low, high, n in histogram(lengths)],
    }


def _by_domain(found: Survey) -> list[tuple[str, list[int], list[int]]]:
    """(domain, lengths of prompts, of responses), and of all where there are several."""
    rows = [(name, its.prompts, its.responses) for name, its in sorted(found.domains.items())]
    if len(rows) > 1:
        rows.append(("all", [n for _, p, _ in rows for n in p], [n for _, _, r in rows for n in r]))
    return rows


def _show_lengths(path: str, found: Survey) -> None:
    """Tables of lengths for people."""
    from rich.table import Table

    from megatron_dlm.data.survey import histogram, percentiles

    rows = _by_domain(found)
    prompts = [(domain, lengths) for domain, lengths, _ in rows if lengths]
    responses = [(domain, lengths) for domain, _, lengths in rows if lengths]
    for name, measured in (("prompts", prompts), ("responses", responses)):
        if not measured:
            continue
        names = ("domain", name, "tokens", "mean", *percentiles([1]))
        table = Table(title=f"{path}: {name} in tokens")
        for i, heading in enumerate(names):
            table.add_column(heading, justify="right" if i else "left", no_wrap=True)
        for domain, lengths in measured:
            numbers = [len(lengths), sum(lengths), round(sum(lengths) / len(lengths))]
            numbers += percentiles(lengths).values()
            table.add_row(domain, *(f"{number:,}" for number in numbers))
        say_table(table)
        classes = histogram(measured[-1][1])
        most = max(count for _, _, count in classes)
        for low, high, count in classes:
            bar = "#" * -(-40 * count // most)
            say(f"{low:>7,} to {high:>7,} {count:>9,} {bar}")


def _show_problems(found: Survey, max_shown: int) -> None:
    """How many problems of each kind there are, and the first ones."""
    for kind in KINDS:
        problems = [problem for problem in found.problems if problem.kind == kind]
        for problem in problems[:max_shown]:
            say(f"{kind}  {problem.where}: {problem.text}")
        if max_shown and len(problems) > max_shown:
            say(f"{kind}  and {len(problems) - max_shown:,} more, all in --report FILE")
    counts = ", ".join(f"{found.count(kind):,} {meaning}" for kind, meaning in KINDS.items())
    say(f"{found.num_records:,} records: {len(found.good):,} good, {counts}")
