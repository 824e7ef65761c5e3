"""Responses on disk as token ids, generated once for a file of prompts.

responses_00000000.jsonl  {"index": 0, "response_ids": [...]}, one line a prompt, in order;
                          the first prompt names the file
"""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from megatron_dlm.data.shard_store import ShardStore
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import write_file
from megatron_dlm.types.special_tokens import SpecialTokens


@dataclass(frozen=True)
class ResponseHeader:
    """Everything that the responses depend on.

    Attributes:
        prompts: SHA-256 of the prompt file.
        prompt_tokens: SHA-256 of its token ids, which also depend on tokenizer and chat template.
        num_prompts: Records in it.
        teacher: Folder of the model that answered, for information.
        teacher_weights: Fingerprint of its weights.
        bf16: Whether it was run in bfloat16.
        seed: Seed of the draws.
        eos_token_ids: Each of them ends a response; ascending.
        max_response_length: In tokens.
        temperature: Of the draws.
        top_k: 0 is off.
        top_p: 1 is off.
        prompt_limits: SHA-256 of the prompts' own limits of responses; None if no prompt has
            one.
    """

    prompts: str
    prompt_tokens: str
    num_prompts: int
    teacher: str = field(compare=False)
    teacher_weights: str
    bf16: bool
    seed: int
    eos_token_ids: list[int]
    max_response_length: int
    temperature: float
    top_k: int
    top_p: float
    prompt_limits: str | None = None


class ResponseStore(ShardStore):
    """The folder of one set of responses.

    Args:
        folder: As in `ShardStore`.
        header: As in `ShardStore`.
        field: As in `ShardStore`.
        special_tokens: MASK and ids outside the vocabulary are refused.
    """

    content = "responses"
    suffix = ".jsonl"

    def __init__(
        self,
        folder: str | Path,
        header: ResponseHeader,
        field: str,
        special_tokens: SpecialTokens,
    ) -> None:
        super().__init__(folder, header, field)
        self._num_prompts = header.num_prompts
        self._special_tokens = special_tokens

    def write(self, prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        """Write one shard: the responses to some prompts, in order."""
        text = "".join(
            json.dumps({"index": index, "response_ids": list(response_ids)}) + "\n"
            for index, response_ids in zip(prompts, responses, strict=True)
        )
        write_file(self.file(prompts), text, self._field)

    def prompts(self, shard: Path) -> list[int]:
        """See `ShardStore.prompts`."""
        return list(self._responses(shard))

    def read(self) -> TokenTable:
        """The response to each prompt, in order; empty where there is none yet.

        Raises:
            UserError: A shard is damaged.
        """
        responses: dict[int, Sequence[int]] = {}
        for shard in self.shards():
            responses |= self._responses(shard)
        table = TokenTable()
        for index in range(self._num_prompts):
            table.append(responses.get(index, ()))
        return table

    def _responses(self, shard: Path) -> dict[int, Sequence[int]]:
        responses: dict[int, Sequence[int]] = {}
        try:
            for number, line in enumerate(shard.read_bytes().splitlines(), start=1):
                row = orjson.loads(line)
                response_ids = array("i", row["response_ids"])
                self._check_ids(response_ids, f"{shard}:{number}")
                responses[int(row["index"])] = response_ids
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise self.damaged(shard) from None
        prompts = list(responses)
        intact = prompts and all(responses.values()) and prompts == sorted(prompts)
        if not intact or shard != self.file(prompts) or prompts[-1] >= self._num_prompts:
            raise self.damaged(shard)
        return responses

    def _check_ids(self, response_ids: Sequence[int], where: str) -> None:
        special = self._special_tokens
        for token_id in (min(response_ids, default=0), max(response_ids, default=0)):
            if not 0 <= token_id < special.vocab_size:
                problem = f"is no token of the model's vocabulary of {special.vocab_size}"
                raise bad_value(
                    f"{where}: response_ids",
                    token_id,
                    problem,
                    "delete the file or name another folder",
                )
        if special.mask_token_id in response_ids:
            raise bad_value(
                f"{where}: response_ids",
                special.mask_token_id,
                "is the MASK token, which stands for text not yet written",
                "delete the file or name another folder",
            )
