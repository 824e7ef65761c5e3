"""Read the file of a benchmark as it was published."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from megatron_dlm.data.json_records import RecordsInMemory, is_json_list
from megatron_dlm.data.open_records import open_records, open_stored
from megatron_dlm.data.record_formats import StandardRecords
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.tables import open_hub
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.tasks.base import Task

FIELD = "--data"


def read_task_file(task: Task, data: str | None, max_examples: int | None) -> RecordSource:
    """The prompts of a task.

    Args:
        task: Converts records.
        data: What `open_records` opens, a CSV file, or a data set's name with configuration and
            split (``openai/gsm8k main test``); None for where the benchmark was published.
        max_examples: Read only so many from the beginning; None for all.

    Raises:
        UserError: The data cannot be read, or are none of this task's.
    """
    if data is None and not task.source:
        raise bad_value(FIELD, None, "there is nothing to evaluate on", "name a JSONL file")
    name = task.source if data is None else data
    file = _open(name, task.convert is not None)
    if max_examples is not None:
        file = file.first(max_examples)
    if task.convert is None:
        return file
    return RecordsInMemory(task.prompts(list(file.records())), name)


def _open(name: str, as_stored: bool) -> RecordSource:
    path, words = Path(name), name.split()
    suffix = path.suffix.lower()
    if suffix in (".csv", ".json") and not path.is_file():
        raise bad_value(FIELD, name, "there is no such file", "name the benchmark's file")
    if suffix == ".csv" or (suffix == ".json" and not is_json_list(name)):
        return RecordsInMemory(_rows(path), name)
    if not path.exists() and words[0].count("/") == 1 and not suffix:
        if len(words) not in (2, 3):
            problem = "is no file, and no data set's name with its split"
            raise bad_value(FIELD, name, problem, "name a file, or e.g. 'openai/gsm8k main test'")
        subset = words[1] if len(words) == 3 else None
        records = open_hub(words[0], FIELD, subset=subset, split=words[-1])
        return records if as_stored else StandardRecords(records)
    return open_stored(name, FIELD) if as_stored else open_records(name, FIELD)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, or the list that BIG-Bench Hard puts into an object."""
    try:
        if path.suffix.lower() == ".json":
            records = json.loads(path.read_text("utf-8"))["examples"]
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                records = list(csv.DictReader(file))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise bad_value(FIELD, str(path), problem, "repair it, or name another") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise bad_value(FIELD, str(path), "holds no records", "name a file of JSON objects or rows")
    return records
