"""Time and memory of a rank that reads 200,000 prompts, against an earlier version.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.data_reading --before /tmp/before

Each measurement is a process of its own that reads the same file as a run does (checked, rendered
and tokenised, with the tiny models' tokenizer): seconds of the processor, and its own memory
(RssAnon) above what it is before the file is opened, its peak and what stays. Parquet is measured
in this version only, once its Arrow copy is in the cache. Medians go to
`benchmarks/results/data_reading.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, commit, machine, versions
from megatron_dlm.data.arithmetic import examples
from megatron_dlm.output_file import write_file

RECORDS = 200_000
RESULT = Path(__file__).parent / "results" / "data_reading.json"

CHILD = """
import json, os, sys, threading, time
from megatron_dlm.data.prompts import read_prompts
from megatron_dlm.data.tokenizer import resolve_special_tokens
from megatron_dlm.data.tokenizer_builder import VOCAB_SIZE, build_tokenizer
if sys.argv[1].endswith(".parquet"):
    import datasets
tokenizer = build_tokenizer()
special_tokens = resolve_special_tokens(tokenizer, {"vocab_size": VOCAB_SIZE}, "benchmark")
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
start, peak = resident(), [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
seconds = time.process_time()
prompts = read_prompts(sys.argv[1], tokenizer, special_tokens, 1024)
seconds = time.process_time() - seconds
stays = resident() - start
print(json.dumps({"cpu_seconds": seconds, "peak_mib": max(peak[0] - start, stays),
                  "stays_mib": stays, "tokens": prompts.fingerprint()}))
"""


def measure(repository: Path, file: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(file.parent / "cache")}
    command = [sys.executable, "-c", CHILD, str(file)]
    done = subprocess.run(
        command, cwd=file.parent, env=environment, capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of the version before")
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    before = options.before.resolve()
    git = ["git", "rev-parse", "--short", "HEAD"]
    of_before = subprocess.run(git, cwd=before, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        import datasets

        lines, table = Path(folder) / "prompts.jsonl", Path(folder) / "prompts.parquet"
        some = list(islice(examples("train", 1), 2000))
        rows = [row | {"id": i} for i, row in enumerate(islice(cycle(some), options.records))]
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets.Dataset.from_list(rows).to_parquet(str(table))
        del rows
        cases = {"before": (before, lines), "jsonl": (REPOSITORY, lines)}
        cases |= {"parquet": (REPOSITORY, table)}
        measure(*cases["parquet"])  # writes the Arrow copy
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
        for _ in range(options.repeats):
            for name, case in cases.items():
                runs[name].append(measure(*case))
        size = lines.stat().st_size
    same = {run["tokens"] for its in runs.values() for run in its}
    assert len(same) == 1, "all read the same tokens"
    numbers = ("cpu_seconds", "peak_mib", "stays_mib")
    medians = {
        name: {n: round(statistics.median(run[n] for run in its), 2) for n in numbers}
        for name, its in runs.items()
    }
    result = {
        "what": "prompts read, checked, rendered and tokenised by one rank",
        "records": options.records,
        "bytes": size,
        "medians": medians,
        "ratios_to_before": {
            name: {n: round(medians[name][n] / medians["before"][n], 3) for n in numbers}
            for name in ("jsonl", "parquet")
        },
        "runs": runs,
        "commit": commit(),
        "commit_before": of_before.strip(),
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_file(options.output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios_to_before"], indent=2))


if __name__ == "__main__":
    main()
