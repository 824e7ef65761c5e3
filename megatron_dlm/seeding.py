"""Random generators keyed by their purpose, not by how often they were used."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator determined by the key, such as (seed, sample index, epoch).

    Different keys give unrelated streams. Draws for a sample therefore do not depend on the
    parallel layout, on the order of work or on where a run was interrupted.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
