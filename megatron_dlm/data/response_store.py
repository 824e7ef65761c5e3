"""Responses on disk as token ids, generated once for a file of prompts.

responses_00000000.jsonl  {"index": 0, "response_ids": [...]}, one line a prompt, in order
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dlm.data.prompts import TokenTable
from megatron_dlm.data.shard_store import ShardStore, publish


@dataclass(frozen=True)
class ResponseHeader:
    """What decides the responses.

    Attributes:
        prompts: SHA-256 of the prompt file.
        prompt_tokens: SHA-256 of its token ids, which also depend on tokenizer and chat template.
        num_prompts: Records in it.
        teacher: Folder of the model that answered, for information.
        teacher_weights: Fingerprint of its weights.
        bf16: Whether it was run in bfloat16.
        seed: Seed of the draws.
        max_response_length: In tokens.
        temperature: Of the draws.
        top_k: 0 is off.
        top_p: 1 is off.
    """

    prompts: str
    prompt_tokens: str
    num_prompts: int
    teacher: str = field(compare=False)
    teacher_weights: str
    bf16: bool
    seed: int
    max_response_length: int
    temperature: float
    top_k: int
    top_p: float


class ResponseStore(ShardStore):
    """The folder of one set of responses; its header is a `ResponseHeader`."""

    content = "responses"
    suffix = ".jsonl"

    def write(self, shard: range, responses: Sequence[Sequence[int]]) -> None:
        """Publish one shard: the response to each of its prompts."""
        text = "".join(
            json.dumps({"index": index, "response_ids": list(response_ids)}) + "\n"
            for index, response_ids in zip(shard, responses, strict=True)
        )
        publish(self.file(shard), lambda temporary: temporary.write_text(text))

    def read(self) -> TokenTable:
        """All responses, in the order of the prompts.

        Raises:
            UserError: A shard is not what was written.
        """
        table = TokenTable()
        for shard in self.shards():
            try:
                rows = [json.loads(line) for line in self.file(shard).read_text().splitlines()]
                intact = [row["index"] for row in rows] == list(shard)
                for row in rows:
                    table.append(row["response_ids"])
            except (OSError, ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                raise self.damaged(shard)
        return table
