"""The fingerprint of a large file depends on its ends and its size."""

import hashlib
from pathlib import Path

import pytest

from megatron_dlm.data.fingerprint import add_ends, add_samples

MIB = 1 << 20


def fingerprint(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    digest = hashlib.sha256()
    add_ends(digest, path)
    return digest.hexdigest()


@pytest.mark.parametrize("size", [0, 10, MIB, MIB + 1, 3 * MIB])
def test_what_is_digested(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    expected = hashlib.sha256(content[:MIB] + content[-MIB:] + str(size).encode())
    assert fingerprint(tmp_path / "a", content) == expected.hexdigest()


@pytest.mark.parametrize("position", [0, MIB - 1, 2 * MIB, 3 * MIB - 1])
def test_both_ends_count(tmp_path: Path, position: int) -> None:
    content = bytearray(3 * MIB)
    before = fingerprint(tmp_path / "a", content)
    assert fingerprint(tmp_path / "elsewhere", content) == before
    content[position] = 1
    assert fingerprint(tmp_path / "a", content) != before
    assert fingerprint(tmp_path / "a", bytes(3 * MIB + 1)) != before


@pytest.mark.parametrize("position", [0, 2 * MIB + 5, 3 * MIB])
def test_samples_are_of_the_middle_too(tmp_path: Path, position: int) -> None:
    def sampled(content: bytes) -> str:
        (tmp_path / "a").write_bytes(content)
        digest = hashlib.sha256()
        add_samples(digest, tmp_path / "a")
        return digest.hexdigest()

    content = bytearray(3 * MIB + 1)
    before = sampled(content)
    content[position] = 1
    assert sampled(content) != before
    assert sampled(bytes(3 * MIB)) != before
