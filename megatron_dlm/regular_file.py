"""Read files named by the user; a pipe or a device is refused, since reading might never end."""

import errno
import os
import stat
from pathlib import Path


def check_regular(path: str | Path) -> None:
    """Check that a path is a regular file, without opening it.

    Raises:
        OSError: It is not one or does not exist; `strerror` says which.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def is_regular(path: str | Path) -> bool:
    """Whether a path is a regular file that this user can see, whatever the path."""
    try:
        check_regular(path)
    except (OSError, ValueError):  # ValueError: of a name with a null character
        return False
    return True


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: It is not a regular file, or cannot be read.
    """
    check_regular(path)
    return Path(path).read_bytes()
