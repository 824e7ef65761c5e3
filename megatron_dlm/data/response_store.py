"""Responses on disk as token ids, generated once for a file of prompts.

    header.json               what they answer and how they were generated
    responses_00000000.jsonl  {"index": 0, "response_ids": [...]}, one line a prompt, in order

Each shard appears under its name only when it is complete, so whatever an interrupted run leaves is
kept and the rest is generated later, under any parallel layout.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.data.prompts import TokenTable
from megatron_dlm.errors import bad_value

_SHARD_SIZE = "prompts_per_shard"


@dataclass(frozen=True)
class ResponseHeader:
    """What decides the responses; a folder holds those of one header.

    Attributes:
        prompts: SHA-256 of the prompt file.
        prompt_tokens: SHA-256 of its token ids, which also depend on tokenizer and chat template.
        num_prompts: Records in it.
        teacher: Folder of the model that answers.
        seed: Seed of the draws.
        max_response_length: In tokens.
        temperature: Of the draws.
        top_k: 0 is off.
        top_p: 1 is off.
    """

    prompts: str
    prompt_tokens: str
    num_prompts: int
    teacher: str
    seed: int
    max_response_length: int
    temperature: float
    top_k: int
    top_p: float


class ResponseStore:
    """The folder of one set of responses.

    Args:
        folder: Created by `create`.
        header: What the responses have to be for.
        field: The flag that the folder came from, for error messages.

    Raises:
        UserError: The folder holds the responses of another header.
    """

    def __init__(self, folder: str | Path, header: ResponseHeader, field: str) -> None:
        self.folder = Path(folder)
        self.header = header
        self._field = field
        self._check_header()

    @property
    def _header_file(self) -> Path:
        return self.folder / "header.json"

    def _check_header(self) -> None:
        if not self._header_file.is_file():
            return
        try:
            saved = json.loads(self._header_file.read_text())
            int(saved[_SHARD_SIZE])
        except (ValueError, KeyError, TypeError):
            saved = {}
        for name, value in dataclasses.asdict(self.header).items():
            if saved.get(name) != value:
                raise bad_value(
                    self._field,
                    str(self.folder),
                    f"holds responses generated with {name} = {saved.get(name)!r}, "
                    f"this run has {value!r}",
                    "name another folder, or the options that they were generated with",
                )

    def create(self, prompts_per_shard: int) -> None:
        """Write the header, if there is none yet; one process calls this."""
        if self._header_file.is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = dataclasses.asdict(self.header) | {_SHARD_SIZE: prompts_per_shard}
        _publish(self._header_file, json.dumps(header, indent=2) + "\n")

    def _shards(self) -> list[range]:
        """Prompt indices of all shards."""
        size, total = (
            json.loads(self._header_file.read_text())[_SHARD_SIZE],
            self.header.num_prompts,
        )
        return [range(start, min(start + size, total)) for start in range(0, total, size)]

    def _file(self, shard: range) -> Path:
        return self.folder / f"responses_{shard.start:08d}.jsonl"

    def missing(self) -> list[range]:
        """Prompt indices of the shards that are not there yet."""
        return [shard for shard in self._shards() if not self._file(shard).is_file()]

    def write(self, shard: range, responses: Sequence[Sequence[int]]) -> None:
        """Publish one shard: the response to each of its prompts."""
        lines = [
            json.dumps({"index": index, "response_ids": list(response_ids)}) + "\n"
            for index, response_ids in zip(shard, responses, strict=True)
        ]
        _publish(self._file(shard), "".join(lines))

    def read(self) -> TokenTable:
        """All responses, in the order of the prompts.

        Raises:
            UserError: A shard is not what was written.
        """
        table = TokenTable()
        for shard in self._shards():
            file = self._file(shard)
            try:
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                intact = [row["index"] for row in rows] == list(shard)
                for row in rows:
                    table.append(row["response_ids"])
            except (OSError, ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                raise bad_value(
                    self._field, str(file), "is damaged", "delete it to have it generated again"
                )
        return table


def _publish(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: it is there completely or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)
