"""Reads files that a user names: a pipe or a device, which might never end, is refused."""

import errno
import os
import stat
from pathlib import Path


def check_regular(path: str | Path) -> None:
    """Check that a path is a regular file, without opening it.

    Raises:
        OSError: It is not, or there is nothing; `strerror` says it.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: It is none, or cannot be read.
    """
    check_regular(path)
    return Path(path).read_bytes()
