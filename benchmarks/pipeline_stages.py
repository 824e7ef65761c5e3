"""How long pipeline stages wait in a rollout: one group of sequences, as many as stages, more.

    python -m benchmarks.pipeline_stages --output benchmarks/results/pipeline_stages.json

The tiny example's model decodes 32 prompts on 2 and on 4 stages, each a process, with groups in
flight, in turns within one run. `computing` is what it says; where stages are more than the
machine's cores, they wait for these, too. In `sleeping` each forward of a stage also sleeps, by its
tokens and in equal shares of a whole model's forward, as a stage would that computes elsewhere and
is busy with products: its waits are those of the schedule. A forward whose time does not depend on
its tokens gains nothing from groups, which are more and smaller forwards: so it is with `computing`
at this size. Idle slots are counted, not measured: see `megatron_dlm.accounting.stage_slots`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.environment import REPOSITORY, commit, machine, versions
from benchmarks.rollout_loop import PLAIN, responses
from megatron_dlm.accounting.stage_slots import stage_slots
from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.forward import Row, forward_row
from megatron_dlm.models.model import StageModel
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.output_file import write_file
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout import batch
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt

SEQUENCES = 32
RESPONSE = 32
FOLDER = REPOSITORY / "examples/tiny/qwen3"
ENDLESS = SpecialTokens(511, 508, 511, vocab_size=512)
"""MASK, which is never drawn, is the only token that ends a response: all are equally long."""


def prompts() -> list[Prompt]:
    """Of 16 tokens each."""
    made = []
    for index in range(SEQUENCES):
        generator = torch.Generator().manual_seed(index)
        made.append(Prompt(index, torch.randint(0, 500, (16,), generator=generator)))
    return made


def _engine(model: StageModel, groups: int) -> RolloutEngine:
    changes = {"max_running_requests": SEQUENCES, "decoding_groups": groups}
    return RolloutEngine(
        model,
        generation=GenerationConfig(**{**PLAIN, **changes}),
        special_tokens=ENDLESS,
        seed=1,
        groups=ParallelGroups.from_parallel_state(),
    )


def _measure(
    rank: int, stages: int, store: str, folder: str, repetitions: int, sleep: float
) -> None:
    """One stage's part; its figures go into a file of the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=stages)
    config = Config(parallel=ParallelConfig(device="cpu", pipeline_model_parallel_size=stages))
    forward = forward_row

    def slower(model: torch.nn.Module, row: Row, equally_long: bool) -> Tensor:
        # After what it waits for has come.
        time.sleep(sleep / stages * len(row.token_ids) / (SEQUENCES * PLAIN["block_size"]))
        return forward(model, row, equally_long)

    figures: dict[str, Any] = {}
    with initialized(config):
        architecture = read_architecture(FOLDER)
        model = build_model(architecture, config)
        load_hf_weights(model, architecture, FOLDER)
        expected = None
        for kind in ("computing", "sleeping"):
            for repetition in range(repetitions + 1):  # the first one warms up
                for groups in (1, stages, 2 * stages):
                    engine = _engine(model, groups)
                    dist.barrier()
                    NEIGHBOURS.take()
                    began = time.perf_counter()
                    used = slower if kind == "sleeping" else forward
                    with patch.object(batch, "forward_row", used):
                        got = responses(engine.generate(prompts(), RESPONSE))
                    seconds = time.perf_counter() - began
                    waited = NEIGHBOURS.take()
                    expected = expected or got
                    assert got == expected, "responses depend on the groups"
                    row = figures.setdefault(kind, {}).setdefault(str(groups), {})
                    if repetition:
                        row.setdefault("seconds", []).append(seconds)
                        row.setdefault("waited", []).append(waited / seconds)
                        continue
                    slots = stage_slots(engine.work.take().groups, stages)
                    row.update(dataclasses.asdict(slots), idle_slot_share=slots.idle_share)
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def _results(stages: int, repetitions: int, sleep: float) -> dict[str, Any]:
    """All stages' figures: medians over repetitions, waits as the mean over stages."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store").as_uri()
        arguments = (stages, store, folder, repetitions, sleep)
        mp.spawn(_measure, arguments, nprocs=stages)  # type: ignore[attr-defined]
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(stages)]
    results: dict[str, Any] = {}
    for kind, by_groups in ranks[0].items():
        rows = results[kind] = {}
        for groups, row in by_groups.items():
            waits = [statistics.median(rank[kind][groups]["waited"]) for rank in ranks]
            rows[groups] = {
                "idle_slots": row["idle"],
                "slots": row["idle"] + row["busy"],
                "idle_slot_share": row["idle_slot_share"],
                "median_seconds": statistics.median(row["seconds"]),
                "median_wait_share": statistics.fmean(waits),
            }
        for row in rows.values():
            row["speed_over_one_group"] = rows["1"]["median_seconds"] / row["median_seconds"]
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sleep", type=float, default=0.1, help="seconds of a model's forward")
    arguments = parser.parse_args()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "repetitions": arguments.repetitions,
        "sleep_seconds": arguments.sleep,
        "results": {
            f"{stages} stages": _results(stages, arguments.repetitions, arguments.sleep)
            for stages in (2, 4)
        },
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if arguments.output is not None:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
