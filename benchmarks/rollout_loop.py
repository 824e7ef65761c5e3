"""What the options of the KV cache change in a rollout: memory, forwards and time, but no token.

    python -m benchmarks.rollout_loop --output benchmarks/results/rollout_loop.json

A model of the tiny size with random weights decodes 64 prompts of mixed lengths, and 8 responses to
each of 8 prompts, on the CPU. Each setting is compared with `plain`, which has memory for all and
prefills every prompt at once, in turns within one run. Seconds are processor seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.environment import REPOSITORY, commit, machine, versions
from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.output_file import write_file
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.context import CachedContext
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

PLAIN: dict[str, Any] = {
    "block_size": 4,
    "remasking_strategy": "low_confidence_static",
    "denoising_steps_per_block": 2,
    "dynamic_threshold": 0.9,
    "entropy_bound": 0.1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "max_running_requests": 64,
}
LONGEST_RESPONSE = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quarter of the memory": {"max_total_tokens": 64 * 160 // 4},
    "pieces of 64 tokens": {"chunked_prefill_size": 64},
}


@dataclass
class Rollout:
    """What one rollout took.

    Attributes:
        seconds: Of processor time.
        forwards: Of the model.
        tokens: Of all forwards.
        most_pages: In use at once.
    """

    seconds: float = 0.0
    forwards: int = 0
    tokens: int = 0
    most_pages: int = 0

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Fill in the counts of what runs in the block."""
        context_attention = CachedContext.attention

        def attention(context: CachedContext, starts: Any, ends: Any, noisy: Any) -> Any:
            self.forwards += 1
            self.tokens += int((ends - starts).sum())
            used = context.pool.num_pages - context.pool.num_free
            self.most_pages = max(self.most_pages, used)
            return context_attention(context, starts, ends, noisy)

        with patch.object(CachedContext, "attention", attention):
            yield


def prompts(equal: int) -> list[Prompt]:
    """64 prompts of 10 to 100 tokens, `equal` of them with the same tokens each."""
    made = []
    for index in range(64):
        generator = torch.Generator().manual_seed(index // equal)
        length = int(torch.randint(10, 101, (), generator=generator))
        made.append(Prompt(index, torch.randint(0, 500, (length,), generator=generator)))
    return made


def responses(trajectories: list[Trajectory]) -> list[tuple[list[int], list[int]]]:
    """Tokens and denoising steps."""
    return [(t.response_ids.tolist(), t.unmask_step.tolist()) for t in trajectories]


def measure(repetitions: int) -> dict[str, Any]:
    """Every setting on both sets of prompts."""
    results: dict[str, Any] = {}
    config = Config(parallel=ParallelConfig(device="cpu"))
    special_tokens = SpecialTokens(510, 508, 511, vocab_size=512)
    with initialized(config):
        model = build_model(read_architecture(REPOSITORY / "examples/tiny/qwen3"), config)
        for name, equal in (("64 prompts", 1), ("8 responses to 8 prompts", 8)):
            engines = {
                setting: RolloutEngine(
                    model,
                    generation=GenerationConfig(**{**PLAIN, **changes}),
                    special_tokens=special_tokens,
                    seed=1,
                    groups=ParallelGroups.from_parallel_state(),
                )
                for setting, changes in SETTINGS.items()
            }
            seconds: dict[str, list[float]] = {setting: [] for setting in engines}
            rows: dict[str, Any] = {}
            expected = None
            for repetition in range(repetitions + 1):  # the first one warms up and counts
                for setting, engine in engines.items():
                    rollout = Rollout()
                    started = time.process_time()
                    with rollout.observed():
                        got = responses(engine.generate(prompts(equal), LONGEST_RESPONSE))
                    if repetition:
                        seconds[setting].append(time.process_time() - started)
                        continue
                    expected = expected or got
                    rows[setting] = {
                        "same_responses_as_plain": got == expected,
                        "forwards": rollout.forwards,
                        "tokens_of_forwards": rollout.tokens,
                        "response_tokens": sum(len(tokens) for tokens, _ in got),
                        "most_pages": rollout.most_pages,
                    }
            for setting, row in rows.items():
                row["median_seconds"] = statistics.median(seconds[setting])
                row["ratio_to_plain"] = row["median_seconds"] / rows["plain"]["median_seconds"]
            results[name] = rows
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "repetitions": arguments.repetitions,
        "results": measure(arguments.repetitions),
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if arguments.output is not None:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
