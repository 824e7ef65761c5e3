"""Fingerprints of large files without reading them whole."""

from pathlib import Path
from typing import Protocol

_SAMPLED_BYTES = 1 << 20

_SAMPLES = 64


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


def add_ends(digest: Digest, file: Path) -> None:
    """Add a file's size and its first and last MiB to a digest; its path does not count."""
    with file.open("rb") as content:
        digest.update(content.read(_SAMPLED_BYTES))
        size = content.seek(0, 2)
        content.seek(max(0, size - _SAMPLED_BYTES))
        digest.update(content.read())
    digest.update(str(size).encode())


def add_samples(digest: Digest, file: Path) -> None:
    """Add a file's size and 64 MiB of it, evenly spread, to a digest; a smaller file as a whole."""
    size = file.stat().st_size
    step = max(_SAMPLED_BYTES, size // _SAMPLES)
    with file.open("rb") as content:
        for start in range(0, size, step):
            content.seek(start)
            digest.update(content.read(_SAMPLED_BYTES))
    digest.update(str(size).encode())
