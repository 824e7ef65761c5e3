"""The tokenizer of an exported folder: a copy of the source's files, with MASK made known.

The files are edited as JSON. Loading and saving them with transformers would rewrite them in the
dialect of the installed version, which older versions and serving engines may not read; what
transformers 5 wrote into the source is put back into words that transformers 4 knows as well.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_dlm.data.tokenizer import MASK_TOKEN
from megatron_dlm.errors import bad_value

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files.

    Raises:
        UserError: `source` has no `tokenizer.json` or no `tokenizer_config.json`.
    """
    for name in TOKENIZER_FILES[:2]:
        if not (source / name).is_file():
            raise bad_value(
                "--tokenizer",
                str(source),
                f"holds no {name}",
                "name a folder with tokenizer.json and tokenizer_config.json",
            )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
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


def register_mask_token(folder: Path, mask_token_id: int) -> None:
    """Make `mask_token_id` a special token and the tokenizer's `mask_token`, in place.

    An id that has a text already keeps it; a free one (Qwen3) becomes `<|MASK|>`.

    Raises:
        UserError: `<|MASK|>` is there under another id, or the id lies behind a gap.
    """
    tokenizer = _read(folder / "tokenizer.json")
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    by_id = {token_id: text for text, token_id in vocabulary.items()}
    text = by_id.get(mask_token_id, MASK_TOKEN)
    if vocabulary.get(text, mask_token_id) != mask_token_id:
        raise bad_value(
            "mask_token_id",
            mask_token_id,
            f"the tokenizer has {MASK_TOKEN} as {vocabulary[text]}",
            "use the tokenizer that the model was trained with",
        )
    if mask_token_id not in by_id and mask_token_id != max(by_id) + 1:
        # The tokenizers library numbers an added token itself, with the first free id.
        raise bad_value(
            "mask_token_id",
            mask_token_id,
            f"the tokenizer's first free id is {max(by_id) + 1}",
            "use the tokenizer that the model was trained with",
        )
    entry = {"content": text, "lstrip": False, "normalized": False, "rstrip": False}
    entry |= {"single_word": False, "special": True}
    added = [token for token in tokenizer["added_tokens"] if token["id"] != mask_token_id]
    added.append({"id": mask_token_id, **entry})
    tokenizer["added_tokens"] = sorted(added, key=lambda token: token["id"])
    _write(folder / "tokenizer.json", tokenizer)

    config = _read(folder / "tokenizer_config.json")
    config["mask_token"] = text
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"][str(mask_token_id)] = entry
    _write(folder / "tokenizer_config.json", config)

    special = folder / "special_tokens_map.json"
    if special.is_file():
        _write(special, _read(special) | {"mask_token": text})
    added_tokens = folder / "added_tokens.json"
    if added_tokens.is_file():
        _write(added_tokens, _read(added_tokens) | {text: mask_token_id})


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise bad_value("--tokenizer", str(file), "is no JSON file", "repair the file") from error
    assert isinstance(value, dict)
    return value


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
