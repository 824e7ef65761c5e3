"""Read the file of a benchmark as it was published."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_dlm.data.json_records import JsonLines, RecordsInMemory
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.tasks.base import Task
from megatron_dlm.extras import check_installed

FIELD = "--data"


def read_task_file(task: Task, data: str | None, max_examples: int | None) -> RecordSource:
    """The prompts of a task.

    Args:
        task: Converts records.
        data: A file, or a data set's name with configuration and split (``openai/gsm8k main
            test``); None for where the benchmark was published.
        max_examples: Read only so many from the beginning; None for all.

    Raises:
        UserError: The data cannot be read, or are none of this task's.
    """
    if data is None and not task.source:
        raise bad_value(FIELD, None, "there is nothing to evaluate on", "name a JSONL file")
    name = task.source if data is None else data
    suffix = Path(name).suffix.lower()
    if task.convert is None and suffix not in (".csv", ".parquet"):
        file = open_records(name, FIELD)
        return file if max_examples is None else file.first(max_examples)
    if suffix == ".jsonl":
        read = list(islice(JsonLines(name, FIELD).records(), max_examples))
    else:
        records = _records(name, suffix, max_examples)
        read = [(f"{name}: record {number}", r) for number, r in enumerate(records, start=1)]
    return RecordsInMemory(task.prompts(read), name)


def _records(name: str, suffix: str, max_examples: int | None) -> list[dict[str, Any]]:
    if suffix in (".json", ".csv") and not Path(name).is_file():
        raise bad_value(FIELD, name, "there is no such file", "name the benchmark's file")
    try:
        if suffix == ".json":
            content = json.loads(Path(name).read_text("utf-8"))
            # BIG-Bench Hard puts its list into an object.
            records = content["examples"] if isinstance(content, dict) else content
        elif suffix == ".csv":
            with Path(name).open(encoding="utf-8-sig", newline="") as file:
                records = list(csv.DictReader(file))
        else:
            records = _through_datasets(name, suffix)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise bad_value(FIELD, name, problem, "repair it, or name another") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise bad_value(FIELD, name, "holds no records", "name a file of JSON objects or rows")
    return records[:max_examples]


def _through_datasets(name: str, suffix: str) -> list[dict[str, Any]]:
    """Rows of a Parquet file, or of a data set ``name [configuration] split``."""
    check_installed("datasets", FIELD, name)
    from datasets import load_dataset

    if suffix == ".parquet":
        rows = load_dataset("parquet", data_files=name, split="train")
    else:
        words = name.split()
        if len(words) < 2:
            problem = "is no file, and as a data set's name it lacks a split"
            raise bad_value(FIELD, name, problem, "name a file, or e.g. 'openai/gsm8k main test'")
        rows = load_dataset(*words[:-1], split=words[-1])
    return [dict(row) for row in rows]
