"""Data sets by name, from a hub that speaks the hub's protocol, and from the cache without one."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from tests.hub import hub
from tests.tiny import REPOSITORY

READ = """
import json, os, sys
from megatron_dlm.data.open_records import open_records
from megatron_dlm.errors import UserError

found = {}
for path in sys.argv[1:]:
    try:
        records = open_records(path, "--prompts")
        found[path] = [records.record(i) for i in range(len(records))]
    except UserError as error:
        found[path] = str(error)
if "HF_HUB_OFFLINE" not in os.environ:
    from megatron_dlm.evaluation.tasks import TASKS
    from megatron_dlm.evaluation.tasks.reading import read_task_file

    task = read_task_file(TASKS["gsm8k"], None, 2)
    found["gsm8k"] = [record for _, record in task.records()]
print(json.dumps(found))
"""


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(count)]


def save(folder: Path, count: int, name: str = "data/train-00000-of-00001", card: str = "") -> Path:
    """A revision of a data set, as the hub has it."""
    file = folder / f"{name}.parquet"
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows(count)).to_parquet(str(file))
    (folder / "README.md").write_text(f"---\nlicense: mit\n{card}---\n")
    return folder


def read(home: Path, paths: list[str], **environment: str) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_HOME": str(home), "PYTHONPATH": str(REPOSITORY)} | environment
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], env=kept, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def questions(records: list[Mapping[str, Any]]) -> list[str]:
    return [record["messages"][0]["content"] for record in records]


def test_names_are_read_from_a_hub_and_then_from_the_cache(tmp_path: Path) -> None:
    card = "configs:\n- config_name: main\n  data_files: [{split: test, path: main/test*}]\n"
    revisions = {"main": save(tmp_path / "new", 9), "v1": save(tmp_path / "old", 5)}
    benchmark = save(tmp_path / "benchmark", 4, "main/test-00000", card)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "seed: 1\nsources:\n- {hub: owner/name, max_samples: 3, domain: a}\n"
        "- {hub: owner/name, revision: v1, streaming: true, max_samples: 4}\n"
    )
    files = "hf://datasets/owner/name@v1/data/*.parquet"
    paths = ["hf://datasets/owner/name", "hf://datasets/owner/name@v1", files, str(mixture)]
    home, missing = tmp_path / "home", "hf://datasets/no/such"
    repositories = {"owner/name": revisions, "openai/gsm8k": {"main": benchmark}}
    with hub(repositories) as server:
        found = read(home, [*paths, missing], HF_ENDPOINT=server.endpoint)
        downloads = [asked for asked in server.asked if asked.startswith("GET /datasets/")]
    assert "RepositoryNotFoundError" in found.pop(missing)
    all_questions = [row["question"] for row in rows(9)]
    assert questions(found[paths[0]]) == all_questions
    assert questions(found[paths[1]]) == questions(found[files]) == all_questions[:5]
    mixed = questions(found[str(mixture)])
    assert {*mixed[:3]} < {*all_questions}
    assert [r.get("domain") for r in found[str(mixture)]] == ["a"] * 3 + [None] * 4
    assert len({*mixed[3:]} & {*all_questions[:5]}) == 4
    benchmark_questions = questions(found.pop("gsm8k"))
    assert [question.split("\n")[0] for question in benchmark_questions] == all_questions[:2]
    whole = [name for name in downloads if name.endswith(".parquet")]
    assert len({*whole}) == 3
    # The hub is gone: what was read last is in the cache, and nothing else is taken for it.
    again = read(home, paths[:2], HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    assert again[paths[1]] == found[paths[1]]
    assert again[paths[0]].startswith(
        "--prompts = 'owner/name@main': is not reached, and what was read last of it is commit "
    )
