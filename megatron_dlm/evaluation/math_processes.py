"""Mathematical answers of many responses, rated by several processes at once.

math-verify takes milliseconds for a plain answer and seconds for some expressions, and its limits
of time work in the main thread of a process only.

    python -m megatron_dlm.evaluation.math_processes < answers.json > rewards.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_dlm.evaluation.math_scoring import math_answer, math_answers_match

FEWEST = 128
"""Responses of a process: it takes a second to start."""

Pair = tuple[str, str]
"""A response without its thoughts, and the reference."""


def rate_answers(pairs: Sequence[Pair], processes: int | None = None) -> list[float]:
    """1 for each response whose answer has the value of its reference, else 0.

    Args:
        pairs: Responses and references.
        processes: At most; None: this process's share of the cores.

    Raises:
        RuntimeError: A process failed; with what it wrote.
    """
    at_most = _own_cores() if processes is None else processes
    number = min(at_most, len(pairs) // FEWEST)
    is_main = threading.current_thread() is threading.main_thread()
    if number < 2 and is_main:
        return _rate(pairs)
    number = max(1, number)
    rewards = [0.0] * len(pairs)
    with ThreadPoolExecutor(number) as pool:
        # Dealt out in turn: what takes long often stands together.
        shares = pool.map(_rate_in_process, [pairs[first::number] for first in range(number)])
        for first, share in enumerate(shares):
            rewards[first::number] = share
    return rewards


def _own_cores() -> int:
    """Cores of this process, if those of a node are shared evenly by its ranks."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _rate(pairs: Sequence[Pair]) -> list[float]:
    return [
        float(math_answers_match(math_answer(response), reference)) for response, reference in pairs
    ]


def _rate_in_process(pairs: Sequence[Pair]) -> list[float]:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_dlm.evaluation.math_processes"],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if ended.returncode:
        raise RuntimeError(f"rating answers ended with {ended.returncode}: {ended.stderr[-2000:]}")
    rewards = json.loads(ended.stdout)
    assert isinstance(rewards, list)
    return rewards


if __name__ == "__main__":
    json.dump(_rate(json.load(sys.stdin)), sys.stdout)
