"""Trajectories in a checkpoint: of the rollout batch in work, and for the next ones.

The weights that rolled them out are gone when the run goes on. What a teacher says of them is not
kept: its weights are still the same, and it says the same again.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dlm.types.trajectory import Prompt, Trajectory

STORED_BATCH = "rollout_batch.jsonl"
LEFTOVERS = "leftover_responses.jsonl"
AHEAD = "next_rollout.jsonl"

_OF_THE_DATA = ("prompt_ids", "record")
_NOT_KEPT = (*_OF_THE_DATA, "targets", "confidence", "rounds")
_TENSORS = ("response_ids", "unmask_step", "tail_ids", "tail_unmask_step")


def stored(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as JSON knows it, without its prompt, which is in the data, and targets."""
    values = {
        field.name: getattr(trajectory, field.name)
        for field in fields(Trajectory)
        if field.name not in _NOT_KEPT
    }
    return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}


def restored(entry: dict[str, Any], prompt: Prompt) -> Trajectory:
    """The trajectory that was `stored`, with its prompt."""
    values = entry | {name: torch.tensor(entry[name], dtype=torch.int64) for name in _TENSORS}
    values["document_lengths"] = tuple(entry["document_lengths"])
    return Trajectory(prompt_ids=prompt.token_ids, record=prompt.record, **values)


class StoredTrajectories(NamedTuple):
    """Of a checkpoint.

    Attributes:
        batch: Of the rollout batch that has updates to serve; none between two.
        leftovers: That the next rollout goes on with (`--partial-rollouts`).
        ahead: Of the next rollout, where servers have decoded it (`--max-rollout-staleness`).
    """

    batch: Sequence[dict[str, Any]] = ()
    leftovers: Sequence[dict[str, Any]] = ()
    ahead: Sequence[dict[str, Any]] = ()


_FILES = (STORED_BATCH, LEFTOVERS, AHEAD)


def write_trajectories(checkpoint: Path, trajectories: StoredTrajectories) -> None:
    """Put stored trajectories into a checkpoint, one a line; no file of none."""
    for name, entries in zip(_FILES, trajectories, strict=True):
        if entries:
            lines = (json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
            (checkpoint / name).write_text("".join(lines))


def read_trajectories(checkpoint: Path) -> StoredTrajectories:
    """The stored trajectories of a checkpoint."""
    files = (checkpoint / name for name in _FILES)
    texts = (file.read_text() if file.is_file() else "" for file in files)
    return StoredTrajectories(*(tuple(map(json.loads, text.splitlines())) for text in texts))
