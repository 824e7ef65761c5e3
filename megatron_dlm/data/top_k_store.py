"""The teacher's most likely tokens at every token of stored responses, on disk.

top_k_00000000.safetensors  token_ids [T, k] int32, log_probs [T, k] and log_rest [T] float32, where
                            T are the response tokens of the shard's prompts, in order

Shards are opened, not read: what training asks for is taken from the files as it goes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_dlm.data.prompts import TokenTable
from megatron_dlm.data.shard_store import ShardStore, publish
from megatron_dlm.distillation.top_k_targets import TopKTargets

_TENSORS = {"token_ids": "I32", "log_probs": "F32", "log_rest": "F32"}
"""Fields of `TopKTargets` as tensors of a shard, and their types."""


@dataclass(frozen=True)
class TopKHeader:
    """What decides the targets.

    Attributes:
        prompt_tokens: SHA-256 of the prompts' token ids.
        responses: SHA-256 of the responses' token ids.
        num_prompts: How many there are.
        teacher: Folder of the model whose distributions they are, for information.
        teacher_weights: Fingerprint of its weights.
        bf16: Whether it was run in bfloat16.
        k: Tokens of a distribution.
    """

    prompt_tokens: str
    responses: str
    num_prompts: int
    teacher: str = field(compare=False)
    teacher_weights: str
    bf16: bool
    k: int


class TopKTable:
    """The targets of all responses, in the order of the prompts, left on disk.

    Args:
        ends: [N + 1], where each response begins among the tokens of all N, and the last ends.
        shards: Prompt indices of each shard.
        files: Handles of the shards' files, which are mapped into memory.
    """

    def __init__(self, ends: Sequence[int], shards: Sequence[range], files: Sequence[Any]) -> None:
        self._ends = ends
        self._starts = [shard.start for shard in shards]
        self._files = files

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> TopKTargets:
        """Targets at the L tokens of one prompt's response, [L, k]."""
        shard = bisect_right(self._starts, index) - 1
        before = self._ends[self._starts[shard]]
        rows = slice(self._ends[index] - before, self._ends[index + 1] - before)
        return TopKTargets(*(self._files[shard].get_slice(name)[rows] for name in _TENSORS))


class TopKStore(ShardStore):
    """The folder of one teacher's targets.

    Args:
        folder: As in `ShardStore`.
        header: As in `ShardStore`.
        field: As in `ShardStore`.
        responses: All responses, in the order of the prompts.
    """

    content = "top_k"
    suffix = ".safetensors"

    def __init__(
        self, folder: str | Path, header: TopKHeader, field: str, responses: TokenTable
    ) -> None:
        super().__init__(folder, header, field)
        self._k = header.k
        self._ends = responses.ends

    def _tokens(self, shard: range) -> int:
        return self._ends[shard.stop] - self._ends[shard.start]

    def write(self, shard: range, targets: TopKTargets) -> None:
        """Publish one shard: targets at all tokens of its responses, end to end, on the CPU."""
        assert len(targets) == self._tokens(shard)
        tensors = {name: getattr(targets, name) for name in _TENSORS}
        publish(self.file(shard), lambda temporary: temporary.write_bytes(save(tensors)))

    def read(self) -> TopKTable:
        """Open all shards.

        Raises:
            UserError: One is missing or not what was written.
        """
        shards = self.shards()
        return TopKTable(self._ends, shards, [self._open(shard) for shard in shards])

    def _open(self, shard: range) -> Any:
        tokens = self._tokens(shard)
        shapes = ([tokens, self._k], [tokens, self._k], [tokens])
        try:
            file = safe_open(self.file(shard), framework="pt")
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            raise self.damaged(shard) from None
        if {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()} != {
            name: (dtype, shape)
            for (name, dtype), shape in zip(_TENSORS.items(), shapes, strict=True)
        }:
            raise self.damaged(shard)
        return file
