"""What lies where in a run folder; imports nothing heavy, to report a wrong path at once.

A run folder holds a folder for each checkpoint, `iter_0000100`, and the number of the newest in
`latest_checkpointed_iteration.txt`. The folders are what counts: without that file, or with
something odd in it, the newest of them is the newest checkpoint.
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_dlm.entry import warn
from megatron_dlm.errors import bad_value
from megatron_dlm.training.manifest import MANIFEST, damages

LATEST = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"

# What Megatron-Core knows a distributed checkpoint by.
_CHECKPOINT_FILE = "metadata.json"

_ITERATION = re.compile(r"iter_(\d{7,})")
_LEFT_OVER = re.compile(r"(iter_\d{7,})\.(tmp|old)")


def iteration_folder(run_folder: str | Path, iteration: int) -> Path:
    """Where a run keeps the checkpoint of an iteration."""
    return Path(run_folder) / f"iter_{iteration:07d}"


def saved_iterations(run_folder: str | Path) -> list[int]:
    """Iterations of the checkpoints in a run folder, ascending.

    Only folders whose names are those that a run gives: no copies under other names, no links.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        return []
    found = ((_ITERATION.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(
        int(match[1])
        for match, path in found
        if match is not None and path.is_dir() and not path.is_symlink()
    )


def latest_iteration(run_folder: str | Path) -> int | None:
    """The newest published checkpoint of a run folder, None if there is none."""
    file, saved = Path(run_folder) / LATEST, saved_iterations(run_folder)
    if not saved:
        return None
    try:
        text = file.read_text(errors="replace").strip()
    except OSError:
        warn(f"{file} is missing; the newest checkpoint there is {saved[-1]}")
        return saved[-1]
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        shown = text if len(text) < 40 else text[:40] + "…"
        warn(f"{file} = {shown!r} is no iteration; the newest checkpoint there is {saved[-1]}")
        return saved[-1]
    return int(text)


def is_run_folder(path: str | Path | None) -> bool:
    """Whether `path` holds a checkpoint of a run; what died before its first can start again."""
    return path is not None and ((Path(path) / LATEST).is_file() or bool(saved_iterations(path)))


def is_of_run(path: str | Path, run_folder: str | Path) -> bool:
    """Whether a path is that of a run folder, or of one of its checkpoints."""
    named, folder = Path(path).resolve(), Path(run_folder).resolve()
    return named == folder or (
        named.parent == folder and _ITERATION.fullmatch(named.name) is not None
    )


def is_iteration_folder(path: str | Path) -> bool:
    """Whether `path` is a checkpoint, rather than the folder of a run."""
    return (Path(path) / _CHECKPOINT_FILE).is_file() or (
        _ITERATION.fullmatch(Path(path).name) is not None
    )


def find_checkpoint(path: str | Path, field: str = "--load", skip: Collection[Path] = ()) -> Path:
    """The iteration folder that a run folder or iteration folder stands for.

    Of a run folder it is the newest one that is not damaged, as far as that can be told without
    reading tensors (`manifest.damages`); a damaged one is named in a warning.

    Args:
        path: Run folder or iteration folder.
        field: What the user named it with, for error messages.
        skip: Checkpoints of a run folder that are known to be damaged.

    Raises:
        UserError: The folder holds no checkpoint, or none that is not damaged.
    """
    folder = Path(path)
    if is_iteration_folder(folder):
        problem = _problem(folder)
        if problem is not None:
            raise bad_value(field, str(path), problem, "load another checkpoint of the run")
        return folder
    latest = latest_iteration(folder)
    if latest is None:
        if (folder / LATEST).is_file():
            raise bad_value(
                field,
                str(path),
                f"its checkpoints are gone, only {LATEST} is left",
                "name another folder, or remove that file",
            )
        raise bad_value(
            field,
            str(path),
            "holds neither a Hugging Face model nor a Megatron checkpoint",
            "name a folder with config.json, a run folder or one of its iter_* folders",
        )
    # Later ones are of a run that was wound back.
    candidates = sorted({latest, *(i for i in saved_iterations(folder) if i <= latest)})
    first_problem = None
    for iteration in reversed(candidates):
        checkpoint = iteration_folder(folder, iteration)
        problem = "is damaged" if checkpoint in skip else _problem(checkpoint)
        if problem is None:
            return checkpoint
        if checkpoint not in skip:
            warn(f"{checkpoint} is left out: {problem}")
        first_problem = first_problem or f"{checkpoint.name} {problem}"
    raise bad_value(
        field,
        str(path),
        f"none of its {len(candidates)} checkpoints can be used ({first_problem})",
        "load another run or the weights it started from",
    )


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as far as small files and sizes show it."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    found = damages(checkpoint)
    if found:
        return f"is damaged: {found[0]} (if you changed it yourself, remove {MANIFEST} there)"
    return None if (checkpoint / _CHECKPOINT_FILE).is_file() else "holds no checkpoint"


def tidy(run_folder: str | Path) -> None:
    """Remove what a process that was killed while it saved left behind; the run's owner calls it.

    A checkpoint that was about to be replaced by another of the same iteration is put back.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFT_OVER.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        final = folder / match[1]
        try:
            if match[2] == "old" and not final.exists():
                path.rename(final)
            else:
                shutil.rmtree(path)
        except OSError as error:
            warn(f"{path} cannot be removed ({error.strerror})")


def prune(
    run_folder: str | Path,
    newest: int,
    keep: int,
    keep_every: int = 0,
    kept: Collection[int] = (),
) -> None:
    """Remove old checkpoints of a run; what cannot be removed is named in a warning.

    Args:
        run_folder: The run's folder. What the run did not write itself stays: links, and folders
            under other names than a run gives.
        newest: The iteration just saved. Later ones are of a run that was wound back, and stay.
        keep: How many of the newest stay; 0 keeps all.
        keep_every: Iterations that are multiples of it stay too; 0: no others.
        kept: These stay too.
    """
    if not keep:
        return
    earlier = [iteration for iteration in saved_iterations(run_folder) if iteration <= newest]
    for iteration in earlier[:-keep]:
        if iteration in kept or (keep_every and iteration % keep_every == 0):
            continue
        folder = iteration_folder(run_folder, iteration)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            warn(f"{folder} cannot be removed ({error.strerror})")
