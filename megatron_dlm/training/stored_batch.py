"""Trajectories in a checkpoint that is written before their rollout batch has served all updates.

The weights that rolled them out are gone by then. What a teacher says of them is not kept: its
weights are still the same, and it says the same again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.types.trajectory import Prompt, Trajectory

STORED_BATCH = "rollout_batch.jsonl"

_OF_THE_DATA = ("prompt_ids", "record")
_NOT_KEPT = (*_OF_THE_DATA, "targets", "confidence")
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


def write_batch(checkpoint: Path, batch: Iterable[dict[str, Any]]) -> None:
    """Put the stored trajectories of a batch into a checkpoint, one a line."""
    lines = (json.dumps(entry, separators=(",", ":")) + "\n" for entry in batch)
    (checkpoint / STORED_BATCH).write_text("".join(lines))


def read_batch(checkpoint: Path) -> Sequence[dict[str, Any]]:
    """The stored trajectories of a checkpoint; none where it was written after its batch."""
    file = checkpoint / STORED_BATCH
    if not file.is_file():
        return ()
    return tuple(json.loads(line) for line in file.read_text().splitlines())
