"""Compare every file of a run's checkpoints with its manifest.

megatron-dlm verify --load runs/mine              # all checkpoints of the run
megatron-dlm verify --load runs/mine/iter_0000400

Prints a line for each checkpoint and one for each file that is damaged. Exit status 1 if there is
any, 2 if there is nothing to verify.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dlm.commands import parse_command
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.terminal import say
from megatron_dlm.training.manifest import damages, read_manifest
from megatron_dlm.training.run_folder import is_iteration_folder, iteration_folder, saved_iterations

DAMAGED_STATUS = 1


@dataclass(frozen=True)
class VerifyConfig:
    """Verification: checkpoints to verify."""

    load: str | None = None
    """Run folder (all of its checkpoints) or one of its iteration folders."""


@dataclass(frozen=True)
class Arguments:
    """Verify checkpoints."""

    verify: VerifyConfig = field(default_factory=VerifyConfig)


def main(argv: Sequence[str]) -> int:
    """Read all files, and print which of them are damaged."""
    load = parse_command("verify", Arguments, argv).verify.load
    if load is None:
        raise bad_value("--load", None, "nothing to verify", "name a run folder")
    problems = 0
    for checkpoint in _checkpoints(Path(load)):
        found = damages(checkpoint, (0, 1)) or _unsafe(checkpoint)
        problems += len(found)
        say(f"{checkpoint}  {_summary(checkpoint, found)}")
        for problem in found:
            say(f"  {problem}")
    return DAMAGED_STATUS if problems else 0


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a path, the oldest first."""
    if is_iteration_folder(folder) and folder.is_dir():
        return [folder]
    found = [iteration_folder(folder, iteration) for iteration in saved_iterations(folder)]
    if not found:
        raise bad_value("--load", str(folder), "holds no checkpoint", "name a run folder")
    return found


def _unsafe(checkpoint: Path) -> list[str]:
    """What the index asks for and no checkpoint needs."""
    from megatron_dlm.training.checkpoint_metadata import checked_metadata  # loads PyTorch

    try:
        checked_metadata(checkpoint, "--load")
    except UserError as error:
        return [str(error)]
    return []


def _summary(checkpoint: Path, found: Sequence[str]) -> str:
    if found:
        return "DAMAGED"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return "has no manifest: its files cannot be verified"
    size = sum(record.bytes for record in manifest.values())
    return f"intact, {len(manifest)} files, {size / 1e9:.3g} GB"
