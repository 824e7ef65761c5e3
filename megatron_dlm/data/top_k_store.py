"""The teacher's most likely tokens at every token of stored responses, on disk.

top_k_00000000.safetensors  prompts [n] int64, the first of which names the file; token_ids [T, k]
                            int32, log_probs [T, k] and log_rest [T] float32, where T are the tokens
                            of the n responses, in order; in its metadata, SHA-256 of these tokens

Shards are memory-mapped: training reads only what it needs, when it needs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_dlm.data.shard_store import ShardStore
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import write_file
from megatron_dlm.types.teacher_targets import TopKTargets

_TENSORS = {"token_ids": "I32", "log_probs": "F32", "log_rest": "F32"}
"""Fields of `TopKTargets` as tensors of a shard, and their types."""
_PROMPTS = "prompts"
_RESPONSES = "responses"


@dataclass(frozen=True)
class TopKHeader:
    """Everything that the targets depend on.

    Attributes:
        prompt_tokens: SHA-256 of the prompts' token ids.
        num_prompts: How many there are.
        teacher: Folder of the model whose distributions they are, for information.
        teacher_weights: Fingerprint of its weights.
        bf16: Whether it was run in bfloat16.
        k: Tokens of a distribution.
    """

    prompt_tokens: str
    num_prompts: int
    teacher: str = field(compare=False)
    teacher_weights: str
    bf16: bool
    k: int


class TopKTable:
    """The targets of responses, left on disk.

    Args:
        places: For each prompt, the handle of its memory-mapped file, and its rows.
    """

    def __init__(self, places: Mapping[int, tuple[Any, slice]]) -> None:
        self._places = places

    def __getitem__(self, index: int) -> TopKTargets:
        """Targets at the L tokens of one prompt's response, [L, k]."""
        file, rows = self._places[index]
        return TopKTargets(*(file.get_slice(name)[rows] for name in _TENSORS))


class TopKStore(ShardStore):
    """The folder of one teacher's targets.

    Args:
        folder: As in `ShardStore`.
        header: As in `ShardStore`.
        field: As in `ShardStore`.
        responses: The response to each prompt, in order.
        vocab_size: Ids from here on do not exist.
    """

    content = "top_k"
    suffix = ".safetensors"

    def __init__(
        self,
        folder: str | Path,
        header: TopKHeader,
        field: str,
        responses: TokenTable,
        vocab_size: int,
    ) -> None:
        super().__init__(folder, header, field)
        self._k = header.k
        self._responses = responses
        self._vocab_size = vocab_size

    def write(self, prompts: Sequence[int], targets: TopKTargets) -> None:
        """Write one shard: targets at all tokens of its responses, concatenated, on the CPU."""
        assert len(targets) == sum(map(self._responses.length, prompts))
        tensors = {name: getattr(targets, name) for name in _TENSORS}
        tensors[_PROMPTS] = torch.tensor(prompts)
        metadata = {_RESPONSES: self._responses.fingerprint(prompts)}
        content = save(tensors, metadata)
        write_file(self.file(prompts), content, self._field)

    def prompts(self, shard: Path) -> list[int]:
        """See `ShardStore.prompts`.

        Raises:
            UserError: It is damaged, or has ids outside the vocabulary.
        """
        file, prompts = self._open(shard)
        # Here and not in `read`: it reads all ids, so only one process should do it.
        smallest, largest = (int(bound) for bound in file.get_tensor("token_ids").aminmax())
        for token_id in (smallest, largest):
            if not 0 <= token_id < self._vocab_size:
                raise bad_value(
                    f"{shard}: token_ids",
                    token_id,
                    f"is no token of the model's vocabulary of {self._vocab_size}",
                    "delete the file to have it computed again",
                )
        return prompts

    def read(self) -> TopKTable:
        """Open all shards.

        Raises:
            UserError: One is damaged, or of other responses.
        """
        places = {}
        for shard in self.shards():
            file, prompts = self._open(shard)
            start = 0
            for index in prompts:
                end = start + self._responses.length(index)
                places[index] = (file, slice(start, end))
                start = end
        return TopKTable(places)

    def _open(self, shard: Path) -> tuple[Any, list[int]]:
        """The handle of a shard, and its prompts."""
        try:
            file = safe_open(shard, framework="pt")
            prompts = file.get_tensor(_PROMPTS).tolist()
            found = {name: file.get_slice(name) for name in _TENSORS}
            responses = self._responses.fingerprint(prompts)
        except (OSError, SafetensorError, IndexError, OverflowError):
            raise self.damaged(shard) from None
        if not prompts or shard != self.file(prompts):
            raise self.damaged(shard)
        if (file.metadata() or {}).get(_RESPONSES) != responses:
            raise bad_value(
                self._field,
                str(shard),
                "was computed for other responses than are stored now",
                "delete it to have it computed again",
            )
        tokens = sum(map(self._responses.length, prompts))
        shapes = ([tokens, self._k], [tokens, self._k], [tokens])
        if {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()} != {
            name: (dtype, shape)
            for (name, dtype), shape in zip(_TENSORS.items(), shapes, strict=True)
        }:
            raise self.damaged(shard)
        return file, prompts
