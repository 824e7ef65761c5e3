"""Files and folders that commands write: each is there completely, or as it was before.

A file is written beside its place, put on the disk and renamed; a full disk, a refused write or a
killed process leaves what was there. What cannot be written is found out before long work.
"""

import errno
import glob
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dlm.errors import UserError, bad_value


@contextmanager
def replaced_file(file: str | Path, field: str = "file") -> Iterator[Path]:
    """A path to write a file's new content to; the file has it when the block ends without error.

    Args:
        file: Where the content goes. Of a symbolic link, what it points to is replaced. Its folder
            must exist.
        field: What the user named it with, for error messages.

    Yields:
        A path in the same folder, with the same suffix.

    Raises:
        UserError: The content cannot be written; the file is as it was.
    """
    target = Path(os.path.realpath(file))
    temporary = _beside(target)
    try:
        with writing(file, field):
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
            sync_file(temporary)
            temporary.replace(target)
            sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(file: str | Path, content: str | bytes, field: str = "file") -> None:
    """Replace the content of a file; text in UTF-8.

    Raises:
        UserError: As `replaced_file`.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replaced_file(file, field) as temporary:
        temporary.write_bytes(data)


@contextmanager
def writing(path: str | Path, field: str) -> Iterator[None]:
    """Say in one line that something could not be written, and why.

    Raises:
        UserError: In place of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, field, error) from error


def unwritable(path: str | Path, field: str, error: OSError) -> UserError:
    """The error for what the system refuses to write."""
    reason = error.strerror or str(error) or type(error).__name__
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room there, or name another place" if full else "name another place"
    return bad_value(field, str(path), f"cannot be written ({reason})", remedy)


def check_output_file(
    file: str | Path, field: str, inputs: Iterable[tuple[str, str | Path | None]] = ()
) -> None:
    """Check, before the work for it begins, that a file can be written; makes its folder.

    Args:
        file: Where results will go.
        field: What the user named it with.
        inputs: What the user named files that the command reads with, and the files.

    Raises:
        UserError: It cannot, or is one of the inputs, under whatever name.
    """
    path = Path(file)
    with writing(file, field):
        if path.is_dir():
            raise bad_value(field, str(file), "is a folder", "name a file")
        for flag, source in inputs:
            if source is not None and _is_same(path, Path(source)):
                problem = f"is the input {flag} = {str(source)!r}, which would be lost"
                raise bad_value(field, str(file), problem, "name another file")
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise bad_value(field, str(file), "is no regular file", "name another file")
        if path.exists() and not os.access(path, os.W_OK):
            raise bad_value(field, str(file), "is read-only", "name another file")
        _probe(Path(os.path.realpath(path)).parent)


def check_output_folder(
    folder: str | Path, field: str, inputs: Iterable[tuple[str, str | Path | None]] = ()
) -> None:
    """Check, before the work for it begins, that a folder can be made or replaced.

    Args:
        folder: What will be made, or replaced as a whole.
        field: What the user named it with.
        inputs: What the user named files and folders that the command reads with, and these.

    Raises:
        UserError: It cannot, or replacing it would remove an input.
    """
    path = Path(folder)
    with writing(folder, field):
        if path.exists() and not path.is_dir():
            raise bad_value(field, str(folder), "is no folder", "name another folder")
        for flag, source in inputs:
            if source is not None and path.exists() and _holds(path, Path(source)):
                problem = f"holds the input {flag} = {str(source)!r}, which would be lost"
                raise bad_value(field, str(folder), problem, "name another folder")
        _probe(Path(os.path.realpath(path)).parent)


def check_space(
    folder: Path,
    field: str,
    what: str,
    needed: int,
    remedy: str = "make room there, or name another place",
) -> None:
    """Check that the disk of a folder has room for so many bytes.

    Args:
        folder: An existing folder.
        field: What the user named the place with.
        what: What is to be written, with its article.
        needed: Bytes.
        remedy: What to do if it has not.

    Raises:
        UserError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise bad_value(
            field,
            str(folder),
            f"no space for {what}: it takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} are free",
            remedy,
        )


def sync_file(file: Path) -> None:
    """Put the content of a file on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a rename is not there before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_runs(pid: int) -> bool:
    """Whether there is such a process on this host, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beside(target: Path) -> Path:
    """A hidden name of this process beside a file, not too long; libraries go by the suffix.

    What killed processes of this host left under such a name is removed.
    """
    prefix = f".{target.stem[:100]}.{socket.gethostname()}."
    for left in target.parent.glob(f"{glob.escape(prefix)}*.tmp{glob.escape(target.suffix)}"):
        owner = left.name.removeprefix(prefix).partition(".")[0]
        if owner.isdecimal() and not process_runs(int(owner)):
            left.unlink(missing_ok=True)
    return target.with_name(f"{prefix}{os.getpid()}.tmp{target.suffix}")


def _probe(folder: Path) -> None:
    """Make a folder, and write a byte there.

    Raises:
        OSError: The system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    probe = _beside(folder / "probe")
    try:
        probe.write_bytes(b"\n")
    finally:
        probe.unlink(missing_ok=True)


def _is_same(first: Path, second: Path) -> bool:
    """Whether two paths are one file: through links of both kinds, and however they are written."""
    try:
        return first.samefile(second)
    except OSError:  # one of them does not exist
        return os.path.realpath(first) == os.path.realpath(second)


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder or lies in it."""
    return any(_is_same(folder, place) for place in (path, *Path(os.path.realpath(path)).parents))
