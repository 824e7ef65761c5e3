"""The tokenizer of an exported folder: a copy of the source's files, with MASK added.

The files are edited as JSON. Loading and saving them with transformers would rewrite them in the
format of the installed version, which older versions and serving engines may not read; names that
transformers 5 wrote into the source are replaced by those that transformers 4 knows as well.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_dlm.data.sentencepiece_model import (
    TOKENIZER_MODEL,
    is_sentencepiece,
    write_tokenizer_json,
)
from megatron_dlm.data.tokenizer import MASK_TOKEN
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.json_file import read_json_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TOKENIZER_MODEL,
    "chat_template.jinja",
)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder, if there is one, has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(_read(file).get("chat_template"))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files; for a SentencePiece model, the files made from it.

    A `tokenizer.model` is not copied: MASK cannot be added to it.

    Raises:
        UserError: `source` has no `tokenizer.json` or no `tokenizer_config.json`, nor a readable
            SentencePiece model.
    """
    is_converted = is_sentencepiece(source)
    needed = TOKENIZER_FILES[:2]
    for name, other in () if is_converted else zip(needed, reversed(needed), strict=True):
        if not (source / name).is_file():
            raise bad_value(
                "--tokenizer",
                str(source),
                f"holds no {name}",
                f"name a folder with it and {other}, or with {TOKENIZER_MODEL}",
            )
    for name in TOKENIZER_FILES:
        if name != TOKENIZER_MODEL and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if is_converted:
        write_tokenizer_json(source, folder)
    config = _read(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("backend", None)
        extra = config.pop("extra_special_tokens", None)
        if isinstance(extra, list):
            config["additional_special_tokens"] = extra
        elif extra is not None:
            config["extra_special_tokens"] = extra
        _write(folder / "tokenizer_config.json", config)


def register_mask_token(folder: Path, mask_token_id: int, mask_token: str | None = None) -> None:
    """Make `mask_token_id` a special token and the tokenizer's `mask_token`, in place.

    Args:
        folder: With the tokenizer's files.
        mask_token_id: Id of MASK.
        mask_token: Text by which readers look up MASK; the token is renamed if necessary. None: an
            id with a text keeps it, a free one (Qwen3) becomes `<|MASK|>`.

    Raises:
        UserError: The text has another id, the id is an ordinary token that cannot be renamed, or
            there is a gap before it.
    """

    def refuse(problem: str) -> UserError:
        remedy = "use the tokenizer that the model was trained with"
        return bad_value("mask_token_id", mask_token_id, problem, remedy)

    tokenizer = _read(folder / "tokenizer.json")
    added: list[dict[str, Any]] = tokenizer["added_tokens"]
    special = {token["id"]: token["content"] for token in added}
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram: pieces with their scores, by id
        by_id = {token_id: text for token_id, (text, _) in enumerate(vocabulary)}
    else:
        by_id = {token_id: text for text, token_id in vocabulary.items()}
    by_id |= special
    old = by_id.get(mask_token_id)
    text = mask_token or old or MASK_TOKEN
    found = next((token_id for token_id, other in by_id.items() if other == text), mask_token_id)
    if found != mask_token_id:
        raise refuse(f"the tokenizer has {text} as {found}")
    if old is None and mask_token_id != max(by_id) + 1:
        # The tokenizers library numbers an added token itself, with the first free id.
        raise refuse(f"the tokenizer's first free id is {max(by_id) + 1}")
    if old is not None and old != text:
        if mask_token_id not in special:
            raise refuse(f"is the ordinary token {old!r}, which cannot become {text}")
        _rename(folder, tokenizer, old, text)
    entry = {"content": text, "lstrip": False, "normalized": False, "rstrip": False}
    entry |= {"single_word": False, "special": True}
    others = [token for token in added if token["id"] != mask_token_id]
    tokenizer["added_tokens"] = sorted(
        [*others, {"id": mask_token_id, **entry}], key=lambda token: token["id"]
    )
    _write(folder / "tokenizer.json", tokenizer)

    config = _read(folder / "tokenizer_config.json")
    config["mask_token"] = text
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"][str(mask_token_id)] = entry
    _write(folder / "tokenizer_config.json", config)

    special_map = folder / "special_tokens_map.json"
    if special_map.is_file():
        _write(special_map, _read(special_map) | {"mask_token": text})
    added_tokens = folder / "added_tokens.json"
    if added_tokens.is_file():
        _write(added_tokens, _read(added_tokens) | {text: mask_token_id})


def _rename(folder: Path, tokenizer: dict[str, Any], old: str, new: str) -> None:
    """Replace the text of a special token wherever files use it, but not in its own entries."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        renamed_pieces = [[new if text == old else text, score] for text, score in vocabulary]
        tokenizer["model"]["vocab"] = renamed_pieces
    elif old in vocabulary:
        # Its place is kept: in some models the place is the id.
        renamed = {new if text == old else text: number for text, number in vocabulary.items()}
        tokenizer["model"]["vocab"] = renamed
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            numbers = _read(folder / name)
            renamed = {new if text == old else text: number for text, number in numbers.items()}
            _write(folder / name, renamed)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            values = _read(folder / name)
            for key in ("additional_special_tokens", "extra_special_tokens"):
                if isinstance(values.get(key), list):
                    values[key] = [new if _text(token) == old else token for token in values[key]]
            _write(folder / name, values)


def _text(token: Any) -> Any:
    """The text of a special token, which may be an object that describes it."""
    return token.get("content") if isinstance(token, dict) else token


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file, "--tokenizer")


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
