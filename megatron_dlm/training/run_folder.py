"""What lies where in a run folder; imports nothing heavy, to report a wrong path at once."""

from pathlib import Path

from megatron_dlm.errors import bad_value

LATEST = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"

# What Megatron-Core knows a distributed checkpoint by.
_CHECKPOINT_FILE = "metadata.json"


def iteration_folder(run_folder: str | Path, iteration: int) -> Path:
    """Where a run keeps the checkpoint of an iteration."""
    return Path(run_folder) / f"iter_{iteration:07d}"


def latest_iteration(run_folder: str | Path) -> int | None:
    """The newest published checkpoint of a run folder, None if there is none.

    Raises:
        UserError: The file that names it holds no number.
    """
    file = Path(run_folder) / LATEST
    if not file.is_file():
        return None
    text = file.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise bad_value(
            str(file), text, "is no iteration", "write the number of an iter_* folder into it"
        )
    return int(text)


def find_checkpoint(path: str | Path, field: str = "--load") -> Path:
    """The iteration folder that a run folder or iteration folder stands for.

    Raises:
        UserError: The folder holds no published checkpoint.
    """
    folder = Path(path)
    if (folder / _CHECKPOINT_FILE).is_file():
        return folder
    iteration = latest_iteration(folder)
    if iteration is None:
        raise bad_value(
            field,
            str(path),
            "holds neither a Hugging Face model nor a Megatron checkpoint",
            "name a folder with config.json, a run folder or one of its iter_* folders",
        )
    checkpoint = iteration_folder(folder, iteration)
    if not (checkpoint / _CHECKPOINT_FILE).is_file():
        raise bad_value(
            field,
            str(path),
            f"{LATEST} names {checkpoint.name}, which holds no checkpoint",
            "name another iter_* folder of the run",
        )
    return checkpoint
