"""Time and memory of ranks that read 200,000 prompts, against an earlier version.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.data_reading --before /tmp/before

Every measurement reads the same file as a run does (checked, rendered and tokenised, with the tiny
models' tokenizer), in processes of its own: seconds of the processor, and the process's own memory
(RssAnon) above what it is before the file is opened, its peak and what stays; of several ranks the
largest.

- `before`: one process, which keeps all tokens in its memory; the version before, where every rank
  of a run did that;
- `alone`: the same in this version;
- `first_start`: each of two ranks that read together for the first time;
- `second_start`: each of them when the run is started again;
- `parquet`: the second start with a Parquet file, once its Arrow copy is in the cache.

Medians go to `benchmarks/results/data_reading.json`.
"""

import argparse
import json
import os
import shutil
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
from megatron_dlm.terminal import say

RECORDS = 200_000
RANKS = 2
RESULT = Path(__file__).parent / "results" / "data_reading.json"

SETUP = """
import json, sys, threading, time
file, folder, rank, size, store, tokenizer_folder = sys.argv[1:]
from megatron_dlm.data.tokenizer import resolve_special_tokens
from megatron_dlm.data.tokenizer_builder import VOCAB_SIZE, build_tokenizer
if file.endswith(".parquet"):
    import datasets
tokenizer = build_tokenizer()
special_tokens = resolve_special_tokens(tokenizer, {"vocab_size": VOCAB_SIZE}, "benchmark")
"""

ALONE = """
from megatron_dlm.data.prompts import read_prompts
def read():
    return read_prompts(file, tokenizer, special_tokens, 1024)
"""

TOGETHER = """
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.token_shards import TokenFiles, read_shared_prompts
from megatron_dlm.data.tokenizing import PromptReader
from megatron_dlm.training.inputs import joined_ranks
dist.init_process_group(
    "gloo", init_method="file://" + store, rank=int(rank), world_size=int(size),
    timeout=timedelta(hours=1),
)
files = TokenFiles(Path(folder), "--save", Path(tokenizer_folder), joined_ranks())
def read():
    reader = PromptReader(tokenizer, special_tokens, 1024)
    return read_shared_prompts(open_records(file, "--prompts"), reader, files)
"""

MEASURE = """
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
start, peak = resident(), [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
seconds, wall = time.process_time(), time.perf_counter()
prompts = read()
seconds, wall = time.process_time() - seconds, time.perf_counter() - wall
stays = resident() - start
print(json.dumps({"cpu_seconds": seconds, "wall_seconds": wall,
                  "peak_mib": max(peak[0] - start, stays), "stays_mib": stays,
                  "tokens": prompts.fingerprint()}))
"""
NUMBERS = ("cpu_seconds", "wall_seconds", "peak_mib", "stays_mib")


def measure(repository: Path, file: Path, folder: Path | None, ranks: int) -> dict[str, Any]:
    """Read a file in some processes at the same time; of each number the largest.

    Args:
        repository: Checkout of the version.
        file: The prompts.
        folder: Of tokenised records; None to keep them in memory.
        ranks: Processes.
    """
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(file.parent / "cache")}
    script = SETUP + (ALONE if folder is None else TOGETHER) + MEASURE
    tokenizer = str(REPOSITORY / "examples" / "tiny" / "qwen3")
    with tempfile.TemporaryDirectory() as store:
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", script, str(file), str(folder)),
                    *(str(rank), str(ranks), f"{store}/store", tokenizer),
                ],
                cwd=file.parent,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    (tokens,) = {each["tokens"] for each in found}
    return {name: max(each[name] for each in found) for name in NUMBERS} | {"tokens": tokens}


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
        tokens, of_table = Path(folder) / "tokens", Path(folder) / "tokens_of_table"
        measure(REPOSITORY, table, of_table, RANKS)  # writes the Arrow copy too
        cases: dict[str, tuple[Path, Path, Path | None, int]] = {
            "before": (before, lines, None, 1),
            "alone": (REPOSITORY, lines, None, 1),
            "first_start": (REPOSITORY, lines, tokens, RANKS),
            "second_start": (REPOSITORY, lines, tokens, RANKS),
            "parquet": (REPOSITORY, table, of_table, RANKS),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
        for _ in range(options.repeats):
            shutil.rmtree(tokens, ignore_errors=True)
            for name, case in cases.items():
                runs[name].append(measure(*case))
                say(f"{name}: {runs[name][-1]}")
        size = lines.stat().st_size
        stored = sum(file.stat().st_size for file in tokens.rglob("*.safetensors"))
    same = {run["tokens"] for its in runs.values() for run in its}
    assert len(same) == 1, "all read the same tokens"
    medians = {
        name: {n: round(statistics.median(run[n] for run in its), 2) for n in NUMBERS}
        for name, its in runs.items()
    }
    result = {
        "what": "prompts read, checked, rendered and tokenised, by a rank",
        "records": options.records,
        "ranks_that_read_together": RANKS,
        "bytes": size,
        "bytes_of_tokens": stored,
        "medians": medians,
        "ratios_to_before": {
            name: {n: round(medians[name][n] / medians["before"][n], 4) for n in NUMBERS}
            for name in medians
            if name != "before"
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
