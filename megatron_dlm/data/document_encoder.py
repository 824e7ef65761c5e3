"""Token ids of a text corpus's documents, with file and line in errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_dlm.data.tokenizer import (
    check_token_ids,
    load_tokenizer,
    own_mask_token_ids,
    resolve_special_tokens,
)
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.json_file import read_json_object
from megatron_dlm.models.architecture import read_generation_config
from megatron_dlm.models.config_keys import CONFIG_KEYS, TOKEN_KEYS, checked_keys


class DocumentEncoder:
    """Turns JSONL lines into token ids.

    Args:
        keys: Fields that hold text.
        tokenizer: Folder of the tokenizer; a config.json in it may name the id of EOS.
        append_eod: Whether every document ends with EOS.

    Raises:
        UserError: There is no tokenizer, or it has no EOS and documents are to end with it.
    """

    def __init__(self, keys: Sequence[str], tokenizer: str, append_eod: bool) -> None:
        self._keys = keys
        self._tokenizer = load_tokenizer(tokenizer)
        config = config_beside(tokenizer)
        self._vocab_size: int | None = config.get("vocab_size")
        self._mask_token_id: int | None
        if config:
            special = resolve_special_tokens(
                self._tokenizer,
                config,
                tokenizer,
                generation_config=read_generation_config(Path(tokenizer), "--tokenizer"),
                config_file=str(Path(tokenizer) / "config.json"),
            )
            self._mask_token_id, eos_token_id = special.mask_token_id, special.eos_token_id
        else:
            eos_token_id = self._tokenizer.eos_token_id
            self._mask_token_id = next(iter(own_mask_token_ids(self._tokenizer)), None)
        self._end: list[int] = []
        if append_eod:
            if eos_token_id is None:
                raise bad_value(
                    "--append-eod", True, "the tokenizer has no EOS token", "write --no-append-eod"
                )
            self._end = [eos_token_id]
        self.largest_id: int = max([*self._tokenizer.get_vocab().values(), *self._end])

    def encode(self, where: str, line: bytes) -> dict[str, list[int]]:
        """Token ids of the document on a line, by key; an empty text has none.

        Args:
            where: Place of the document, for error messages.
            line: A JSON object.

        Raises:
            UserError: The line is not a document; names file and line.
        """
        remedy = f'write one JSON object a line, with "{self._keys[0]}"'
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            problem = f"broken JSON ({error.msg} at column {error.colno})"
            raise UserError(f"{where}: {problem}; {remedy}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: the line is not an object; {remedy}")
        return {key: self._encode_text(record, key, where) for key in self._keys}

    def _encode_text(self, record: dict[str, Any], key: str, where: str) -> list[int]:
        text = record.get(key)
        if not isinstance(text, str):
            problem = "is not a string" if key in record else "is missing"
            raise UserError(f'{where}: "{key}" {problem}; write the document\'s text')
        if not text:
            return []
        # verbose=False: documents longer than the model's maximum are cut into windows later.
        encoded: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        check_token_ids(
            encoded,
            f'{where}: "{key}"',
            self._tokenizer,
            mask_token_id=self._mask_token_id,
            vocab_size=self._vocab_size,
        )
        return encoded + self._end


def config_beside(tokenizer_folder: str) -> dict[str, Any]:
    """The config.json beside a tokenizer; empty if there is none that describes a model."""
    file = Path(tokenizer_folder) / "config.json"
    if not file.is_file():
        return {}
    keys = {"vocab_size": CONFIG_KEYS["vocab_size"], **TOKEN_KEYS}
    config = checked_keys(read_json_object(file, "--tokenizer"), keys, str(file))
    return config if "vocab_size" in config else {}
