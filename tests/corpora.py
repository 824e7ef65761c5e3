"""Small corpora that many tests share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """Write token ids with Megatron-Core's own builder; returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(list(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_documents(num: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Documents of 1 .. `longest` ids below 500, with EOS (510) at the end."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest, (num,), generator=generator).tolist()
    return [
        [*torch.randint(0, 500, (length,), generator=generator).tolist(), 510] for length in lengths
    ]
