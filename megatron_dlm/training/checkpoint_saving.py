"""Saves checkpoints of a run while it trains on.

A save has three parts. All ranks plan it and copy what they will write to the host; training waits
for that alone. Then each rank writes its file in a thread. When all have, rank 0's thread adds
index and manifest and gives the folder its name: until then there is only a temporary folder, which
the run's next start removes. Threads tell each other by files, as no collective may run beside
those of training.
"""

import dataclasses
import functools
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dlm import platform
from megatron_dlm.activity import ACTIVITY, SAVE
from megatron_dlm.errors import UserError
from megatron_dlm.output_file import check_space
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.terminal import say
from megatron_dlm.training.best_checkpoint import HeldOutFigure, record_best, write_figure
from megatron_dlm.training.checkpoint_writing import bytes_of, publish, writing_checkpoint
from megatron_dlm.training.checkpointing import (
    Progress,
    is_rank_zero,
    sharded_state,
    write_hf_files,
)
from megatron_dlm.training.manifest import files_of, record_files, write_manifest
from megatron_dlm.training.run_folder import HF_FOLDER, iteration_folder, prune
from megatron_dlm.training.stored_batch import StoredTrajectories, write_trajectories
from megatron_dlm.training.student import Student
from megatron_dlm.training.tensor_file import (
    BackgroundCall,
    HostMemory,
    PlannedSave,
    has_note,
    leave_note,
    take_note,
    write_index,
    write_tensor_file,
)

_PATIENCE = 0.1
"""Seconds between two looks at what other ranks have done."""


@dataclass
class _Pending:
    """A save whose files are being written.

    Attributes:
        final: The checkpoint's folder, once it is complete.
        writer: Writes this rank's file; on rank 0 also publishes the checkpoint.
        has_failed: Set where a rank could not write, so that rank 0 does not wait for it.
    """

    final: Path
    writer: BackgroundCall[None]
    has_failed: threading.Event


_SPACE_REMEDY = "make room there, or choose a smaller --keep-checkpoints"


def _temporary(final: Path) -> Path:
    return final.with_name(final.name + ".tmp")


class CheckpointSaver:
    """Saves the checkpoints of one run; all ranks call each method.

    At most one save is being written. On a failure what was saved before is untouched, and its
    newest is named.
    """

    def __init__(
        self,
        run_folder: str | Path,
        *,
        keep: int = 0,
        keep_every: int = 0,
        keep_best: bool = False,
        in_background: bool = False,
    ) -> None:
        """Prepare to save; nothing is written.

        Args:
            run_folder: The run's folder, created if needed.
            keep: Remove all but this many newest checkpoints after each; 0 keeps all.
            keep_every: But not those whose iteration is a multiple of this; 0: no others.
            keep_best: Nor the one with the best figure.
            in_background: Whether training goes on while files are written. It takes as much
                memory of the host as this rank writes; without it, as the largest tensor takes.
        """
        self._run_folder = run_folder
        self._keep = keep
        self._keep_every = keep_every
        self._keep_best = keep_best
        self._host = HostMemory() if in_background else None
        self._pending: _Pending | None = None
        self._is_first = True

    def save(
        self,
        model: torch.nn.Module,
        *,
        hf_config: dict[str, Any],
        tokenizer_folder: Path | None,
        generation_config: dict[str, Any] | None = None,
        progress: Progress | None = None,
        student: Student | None = None,
        run_config: dict[str, Any] | None = None,
        figure: HeldOutFigure | None = None,
        trajectories: StoredTrajectories | None = None,
    ) -> None:
        """Start a checkpoint, after the one before it has been published.

        Args:
            model: The model to save.
            hf_config: Its config.json.
            tokenizer_folder: Folder with the tokenizer's files to copy, or None.
            generation_config: Its generation_config.json; none is written without one.
            progress: Of the run; iteration 0 without one.
            student: With it, optimizer and schedule are saved and the run can be resumed.
            run_config: The run's flat configuration.
            figure: What the model reaches on held-out data, if it was measured.
            trajectories: That the run goes on with, on rank 0.

        Raises:
            UserError: On every rank: the disk is too full, the folder cannot be written, or the
                host has no memory for copies.
        """
        self.finish()
        started, says = time.perf_counter(), progress is not None
        progress = progress or Progress()
        final = iteration_folder(self._run_folder, progress.iteration)
        temporary = _temporary(final)
        state = sharded_state(model, student, is_loading=False)
        needed = bytes_of(state)
        state["progress"] = dataclasses.asdict(progress)
        state["config"] = run_config or {}
        with errors_on_all_ranks(), writing_checkpoint(final):
            if is_rank_zero():
                shutil.rmtree(temporary, ignore_errors=True)
                final.parent.mkdir(parents=True, exist_ok=True)
                check_space(final.parent, "--save", "a checkpoint", needed, _SPACE_REMEDY)
                temporary.mkdir()
        planned = PlannedSave()
        try:
            with writing_checkpoint(final):
                dist_checkpointing.save(
                    state,
                    str(temporary),
                    # What several replicas of the model hold is shared out among them.
                    FullyParallelSaveStrategyWrapper(
                        planned, parallel_state.get_data_parallel_group(with_context_parallel=True)
                    ),
                    validate_access_integrity=self._is_first,
                )
            with errors_on_all_ranks(), writing_checkpoint(final):
                if is_rank_zero():
                    hf_folder = temporary / HF_FOLDER
                    write_hf_files(hf_folder, hf_config, generation_config, tokenizer_folder)
                    if figure is not None:
                        write_figure(temporary, figure)
                    if trajectories is not None:
                        write_trajectories(temporary, trajectories)
            with errors_on_all_ranks():
                content = planned.content
                if self._host is not None:
                    content = self._host.copy(content)
        except UserError:
            _remove(temporary)
            raise
        self._is_first = False
        has_failed = threading.Event()
        write = functools.partial(write_tensor_file, temporary, content)

        def write_and_publish(iteration: int = progress.iteration) -> None:
            leave_note(temporary, write())
            if planned.metadata is not None and _all_notes_are_there(temporary, has_failed):
                _complete(temporary, planned.metadata)
                self._publish(temporary, final, iteration)
                if says:
                    seconds = time.perf_counter() - started
                    say(f"saved {final} (update {iteration}, {seconds:.1f} s)")

        self._pending = _Pending(final, BackgroundCall(write_and_publish), has_failed)
        if self._host is None:
            self.finish()

    def _publish(self, temporary: Path, final: Path, iteration: int) -> None:
        publish(temporary, final, iteration)
        best = record_best(self._run_folder, iteration)
        kept = {best} if self._keep_best and best is not None else ()
        prune(self._run_folder, iteration, self._keep, self._keep_every, kept)

    def poll(self) -> Path | None:
        """Look whether the checkpoint that is being written is published; do not wait.

        Returns:
            The published folder, once; None if there is nothing new.

        Raises:
            UserError: On every rank: a rank's file could not be written.
        """
        return None if self._pending is None or self._is_writing(self._pending) else self._end()

    def finish(self) -> Path | None:
        """Wait until the checkpoint that is being written, if any, is published.

        Returns:
            The published folder, None if there is nothing new.

        Raises:
            UserError: See `poll`.
        """
        if self._pending is None:
            return None
        with ACTIVITY.during(SAVE):
            while self._is_writing(self._pending):
                self._pending.writer.join(_PATIENCE)
        return self._end()

    def leave(self, seconds: float) -> None:
        """Give the checkpoint that is being written time to be published, without other ranks.

        For a rank that ends with an error, which the others may not have.
        """
        if self._pending is not None:
            self._pending.writer.join(seconds)

    def _is_writing(self, pending: _Pending) -> bool:
        """Whether a rank is still writing and none has failed; the same on all ranks."""
        writer = pending.writer
        state = torch.tensor([writer.is_alive(), writer.error is not None], dtype=torch.int32)
        state = state.to(platform.device())
        torch.distributed.all_reduce(state, op=torch.distributed.ReduceOp.MAX)
        is_writing, has_failed = state.tolist()
        if has_failed:
            pending.has_failed.set()
        return bool(is_writing and not has_failed)

    def _end(self) -> Path:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        try:
            with errors_on_all_ranks(), writing_checkpoint(pending.final):
                pending.writer.result()
        except UserError:
            _remove(_temporary(pending.final))
            raise
        return pending.final


def _all_notes_are_there(folder: Path, has_failed: threading.Event) -> bool:
    """Wait for the files of all ranks; False if one of them has failed."""
    missing = set(range(torch.distributed.get_world_size()))
    while missing:
        missing = {rank for rank in missing if not has_note(folder, rank)}
        if missing and has_failed.wait(_PATIENCE):
            return False
    return True


def _complete(folder: Path, metadata: Metadata) -> None:
    """Add index and manifest to a folder that has the files of all ranks."""
    files = [take_note(folder, rank) for rank in range(torch.distributed.get_world_size())]
    write_index(folder, metadata, files)
    records = {file.name: file.record for file in files}
    rest = [name for name in files_of(folder) if name not in records]
    write_manifest(folder, records | record_files(folder, rest))


def _remove(temporary: Path) -> None:
    if is_rank_zero():
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(run_folder: str | Path, model: torch.nn.Module, **content: Any) -> None:
    """Write and publish a single checkpoint; all ranks call this.

    Args:
        run_folder: Where, created if needed.
        model: The model to save.
        content: See `CheckpointSaver.save`.

    Raises:
        UserError: See `CheckpointSaver.save`.
    """
    CheckpointSaver(run_folder).save(model, **content)
