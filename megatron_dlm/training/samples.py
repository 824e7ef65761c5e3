"""Samples of rollouts and evaluations in the run folder, for a person to read.

`samples.jsonl` has those of rollouts, `evaluation_samples.jsonl` answers to held-out prompts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.entry import warn
from megatron_dlm.errors import UserError
from megatron_dlm.output_file import write_file
from megatron_dlm.report.run_record import EVALUATION_SAMPLES, SAMPLES
from megatron_dlm.training.checkpointing import is_rank_zero
from megatron_dlm.training.rollout_batch import Collected
from megatron_dlm.training.run import Run
from megatron_dlm.types.trajectory import Trajectory

ROLLOUTS = 20
"""Rollouts of a run, at equal distances, of which samples are kept; the last one comes on top."""

OF_A_ROLLOUT = 2
"""Trajectories of each."""

EVALUATIONS = 20
"""Evaluations of a run, the last ones, of which samples are kept."""


def record_samples(run: Run, collected: Collected) -> None:
    """Add samples of a rollout batch that is due to the run folder; rank 0 does.

    Args:
        run: Before the batch's first update.
        collected: The rollout batch.
    """
    folder, number = run.config.logging.save, run.progress.rollout
    rollouts = run.config.num_rollouts
    is_due = number % max(1, rollouts // ROLLOUTS) == 0 or number == rollouts - 1
    if folder is None or not is_due or not is_rank_zero():
        return
    file = Path(folder) / SAMPLES
    # Of a run that was wound back, those of later rollouts are made again.
    lines = [line for line in _lines(file, "rollout") if line["rollout"] <= number]
    lines += [_described(run, trajectory) for trajectory in collected.own[:OF_A_ROLLOUT]]
    _write(file, lines)


def record_evaluation_samples(run: Run, samples: Sequence[Mapping[str, Any]]) -> None:
    """Add answers to held-out prompts to the run folder; rank 0 does.

    Args:
        run: After the update that they are of.
        samples: See `AnsweredPrompts`.
    """
    folder, step = run.config.logging.save, run.progress.iteration
    if folder is None or not is_rank_zero():
        return
    file = Path(folder) / EVALUATION_SAMPLES
    # Of a run that was wound back, those of later updates are made again.
    lines = [line for line in _lines(file, "step") if line["step"] < step]
    kept = sorted({line["step"] for line in lines})[1 - EVALUATIONS :]
    lines = [line for line in lines if line["step"] in kept]
    _write(file, [*lines, *({"step": step, **sample} for sample in samples)])


def _write(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file; that it cannot be written is a warning, no reason to end a run."""
    try:
        write_file(file, "".join(json.dumps(line) + "\n" for line in lines), "--save")
    except UserError as error:
        warn(str(error))


def _lines(file: Path, key: str) -> list[dict[str, Any]]:
    """What is in the file, by a number under `key`; lines that cannot be read are dropped."""
    found = []
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get(key), int):
            found.append(line)
    return found


def _described(run: Run, trajectory: Trajectory) -> dict[str, Any]:
    decode = run.inputs.tokenizer.decode
    tokens, forwards = len(trajectory.response_ids), trajectory.total_forwards
    return {
        "rollout": run.progress.rollout + 1,
        "sample": trajectory.sample_index,
        "prompt": decode(trajectory.prompt_ids.tolist()),
        "response": decode(trajectory.response_ids.tolist()),
        "response_tokens": tokens,
        "finish_reason": trajectory.finish_reason,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "correct": trajectory.correct,
    }
