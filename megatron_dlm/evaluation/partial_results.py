"""Results of single prompts beside an output file, from which an interrupted command goes on.

    OUTPUT.partial/header.json          what the results depend on: model, data, options
    OUTPUT.partial/<start>_<rank>.jsonl {"setting": ..., "index": 3, "seconds": 1.5, "result": ...},
                                        a line for each prompt when its response is complete

Every start of the command adds files of its own, one a data-parallel rank. When the output file is
written, the folder is removed.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_dlm.entry import rank
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import unwritable, write_file, writing
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks

SUFFIX = ".partial"
HEADER = "header.json"


@dataclass
class PartialResults:
    """What earlier starts of a command left, and where this one adds to it.

    Attributes:
        folder: Of the files; None for a command without an output file, which leaves nothing.
        file_name: Of this rank's file, which appears with the first result.
        done: Indices of the prompts that have a result, by setting; the same on all ranks.
        results: Their results, by setting and index; on rank 0.
        seconds: That earlier starts took for a setting; on rank 0.
    """

    folder: Path | None = None
    file_name: str = ""
    done: dict[str, set[int]] = field(default_factory=dict)
    results: dict[str, dict[int, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _file: TextIO | None = None
    _lock: TextIO | None = None

    def add(self, setting: str, index: int, result: Any, seconds: float) -> None:
        """Keep the result of a prompt; one process of each replica of the model calls this.

        Args:
            setting: How it was decoded.
            index: Of the prompt.
            result: What JSON can hold.
            seconds: Since the first start began with this setting.

        Raises:
            UserError: It cannot be written; what was kept before stays.
        """
        if self.folder is None:
            return
        entry = {"setting": setting, "index": index, "seconds": seconds, "result": result}
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / self.file_name).open("a", encoding="ascii")
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):  # what it still holds is refused once more
                    self._file.close()
            self._release()
            raise unwritable(self.folder, "--output", error) from error

    def remove(self) -> None:
        """Forget everything; rank 0 calls this when the output is complete."""
        if self._file is not None:
            self._file.close()
        if self.folder is not None and self.folder.is_dir():
            # The header last: what a killed process leaves is still known by it.
            for file in self.folder.glob("*.jsonl"):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def own(self) -> None:
        """Keep other commands away until this process ends or has removed the folder.

        Raises:
            UserError: Another command answers the same prompts now.
        """
        assert self.folder is not None
        self._lock = (self.folder / HEADER).open()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem, remedy = (
                "another command writes there now",
                "wait for it, or name another file",
            )
            output = str(self.folder).removesuffix(SUFFIX)
            raise bad_value("--output", output, problem, remedy) from error


def open_partial_results(
    output: str | None, header: Mapping[str, Any], groups: ParallelGroups, *, restart: bool
) -> PartialResults:
    """Find out what an interrupted start of the same command left; all ranks call this.

    Args:
        output: The output file; None keeps nothing.
        header: What decides the results, as plain values by name.
        groups: Process groups.
        restart: Forget what is there.

    Raises:
        UserError: On all ranks: what is there was begun by another command, or the place cannot be
            written.
    """
    if output is None:
        return PartialResults()
    folder = Path(output + SUFFIX)
    found, start = PartialResults(folder), 0
    with errors_on_all_ranks():
        if rank() == 0:
            if restart and (folder / HEADER).is_file():
                found.own()
                with writing(folder, "--output"):
                    shutil.rmtree(folder)
            _begin(folder, header, output)
            found.own()
            start = _read(found)
    known: list[Any] = [(start, found.done)]
    torch.distributed.broadcast_object_list(known, src=0)
    start, found.done = known[0]
    found.file_name = f"{start:03d}_{groups.replica:05d}.jsonl"
    return found


def _begin(folder: Path, header: Mapping[str, Any], output: str) -> None:
    """Write the header, or compare what is there with it."""
    file = folder / HEADER
    header = json.loads(json.dumps(header))  # as it is read back
    if not file.is_file():
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            problem = f"{folder} is in the way: it holds no results of an interrupted command"
            raise bad_value("--output", output, problem, "remove it, or name another file")
        with writing(folder, "--output"):
            folder.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(header, indent=1) + "\n", "--output")
        return
    try:
        saved = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        saved = {}
    for name in (*header, *saved):
        if saved.get(name) != header.get(name):
            raise bad_value(
                "--output",
                output,
                f"{folder} holds results of an interrupted command with {name} = "
                f"{saved.get(name)!r}, this one has {header.get(name)!r}",
                "repeat that command to go on with it, or add --restart to forget them",
            )


def _read(found: PartialResults) -> int:
    """Take in the results of earlier starts; returns the number of starts there were."""
    assert found.folder is not None
    files = sorted(found.folder.glob("[0-9]*_[0-9]*.jsonl"))
    for file in files:
        for line in file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                setting, index, result = entry["setting"], int(entry["index"]), entry["result"]
                seconds = float(entry["seconds"])
            except (ValueError, LookupError, TypeError):
                continue  # cut off where the process was killed: that prompt is answered again
            found.results.setdefault(setting, {})[index] = result
            found.seconds[setting] = max(seconds, found.seconds.get(setting, 0.0))
    found.done = {setting: set(results) for setting, results in found.results.items()}
    starts = {int(file.name.partition("_")[0]) for file in files}
    return max(starts, default=-1) + 1
