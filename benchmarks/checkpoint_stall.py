"""How long training waits for a checkpoint: written at once, or in the background.

    python -m benchmarks.checkpoint_stall
    torchrun --nproc-per-node 8 -m benchmarks.checkpoint_stall --hidden-size 2048 --layers 16

A random dense model is trained with the distributed optimizer and saved by turns in three ways:

- gathered: Megatron-Core's `fully_reshardable` form, with its writing processes; then all files are
  read back for the manifest;
- waiting: `--no-async-save`, each rank writes and hashes its own share, and training waits;
- background: `--async-save`, training waits for the copy on the host.

`wait` is the time in which no update is computed. `slowdown` is by how much longer the updates take
that are computed while a checkpoint is written. Medians go to
`benchmarks/results/checkpoint_stall.json`.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core import dist_checkpointing

from benchmarks.environment import REPOSITORY, commit, machine, versions
from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.data.arithmetic import write_examples
from megatron_dlm.entry import rank, world_size
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpoint_saving import CheckpointSaver
from megatron_dlm.training.checkpointing import sharded_state
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.loop import micro_batches
from megatron_dlm.training.manifest import files_of, record_files
from megatron_dlm.training.rollout_batch import collect
from megatron_dlm.training.run import Run, build_run
from megatron_dlm.training.train_step import train_step

RESULT = Path(__file__).parent / "results" / "checkpoint_stall.json"
WAYS = ("gathered", "waiting", "background")


def prepare(folder: Path, hidden_size: int, layers: int) -> None:
    """Write random weights, a tokenizer and examples."""
    config = transformers.Qwen3Config(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        intermediate_size=3 * hidden_size,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden_size // 8,
        vocab_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=510,
        pad_token_id=508,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = REPOSITORY / "examples" / "tiny" / "qwen3"
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    write_examples(folder / "examples.jsonl", "train", 5, 64)


def configuration(folder: Path, run_folder: Path) -> Config:
    """Of a run that trains on the examples."""
    return Config.from_dict(
        {
            "objective": "sft",
            "load": str(folder),
            "train_data": str(folder / "examples.jsonl"),
            "save": str(run_folder),
            "max_response_length": 40,
            "train_iters": 1,
            "global_batch_size": world_size(),
            "micro_batch_size": 1,
            "use_distributed_optimizer": True,
            "tensorboard": False,
        }
    )


class Measured:
    """A run whose updates and saves are timed."""

    def __init__(self, run: Run) -> None:
        """Do the first updates, which allocate what all others use."""
        self._run = run
        self._collected = collect(run)
        self.update()
        self.seconds_of_update = statistics.median(self.update() for _ in range(3))

    def update(self) -> float:
        """Seconds of one optimizer update."""
        run = self._run
        batches = micro_batches(run, self._collected, 0)

        def step() -> None:
            student = run.student
            train_step(
                student.ddp,
                student.optimizer,
                student.scheduler,
                run.objective,
                batches,
                None,
                run.groups,
            )

        return _seconds(step)

    def save(self, way: str) -> dict[str, float]:
        """Save in one way, and train on until the checkpoint is published."""
        run = self._run
        run.progress.iteration += 1
        folder = str(run.config.logging.save)
        if way == "gathered":
            wait = _seconds(lambda: self._save_gathered(Path(folder, "gathered")))
            return {"wait": wait, "slowdown": 0.0, "updates": 0}
        run.saver = CheckpointSaver(folder, keep=1, in_background=way == "background")
        run.save()  # the first time it takes memory
        run.saver.finish()
        saver = run.saver
        run.progress.iteration += 1
        wait = _seconds(run.save)
        updates = []
        is_published = way == "waiting"
        while not is_published:
            updates.append(self.update())

            def poll() -> None:
                nonlocal is_published
                is_published = saver.poll() is not None

            wait += _seconds(poll)
        slowdown = sum(updates) - len(updates) * self.seconds_of_update
        return {"wait": wait, "slowdown": slowdown, "updates": len(updates)}

    def _save_gathered(self, folder: Path) -> None:
        student = self._run.student
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        state = sharded_state(student.model, None, is_loading=False)
        state["optimizer"] = student.optimizer.sharded_state_dict(
            state["model"], metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )
        dist_checkpointing.save(state, str(folder))
        record_files(folder, files_of(folder)[rank() :: world_size()])
        torch.distributed.barrier()


def _seconds(call: Callable[[], Any]) -> float:
    platform.synchronize()
    start = time.perf_counter()
    call()
    platform.synchronize()
    return time.perf_counter() - start


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    """Save in each way by turns, so that a busy moment of the machine meets all."""
    config = configuration(folder, folder / "run")
    inputs = read_inputs(config)
    with initialized(config):
        run = build_run(config, inputs)
        measured = Measured(run)
        measured.save("gathered")  # starts the process that collects results
        parameters = sum(parameter.numel() for parameter in run.student.model.parameters())
        saves: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(repetitions):
            for way in WAYS:
                saves[way].append(measured.save(way))
        newest = max((folder / "run").glob("iter_*"))
        size = sum((newest / name).stat().st_size for name in files_of(newest))
        torch.distributed.barrier()
    medians = {
        way: {key: statistics.median(save[key] for save in of_way) for key in of_way[0]}
        for way, of_way in saves.items()
    }
    wait = {way: median["wait"] for way, median in medians.items()}
    return {
        "what": "seconds that training waits for one checkpoint of a dense model, fp32, Adam",
        "parameters": parameters,
        "ranks": world_size(),
        "checkpoint_gb": size / 1e9,
        "seconds_of_update": measured.seconds_of_update,
        "medians": medians,
        "wait_ratio_to_gathered": wait["background"] / wait["gathered"],
        "wait_ratio_to_waiting": wait["background"] / wait["waiting"],
        "saves": saves,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "machine": machine(platform.device().type),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; temporary by default")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if world_size() > 1 and arguments.folder is None:
        parser.error("several ranks need a --folder that all of them see")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if rank() == 0:
            prepare(folder, arguments.hidden_size, arguments.layers)
            (folder / "ready").touch()
        while not (folder / "ready").exists():
            time.sleep(0.1)
        result = measure(folder, arguments.repetitions)
        if rank() == 0:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(result["medians"], indent=2))


if __name__ == "__main__":
    main()
