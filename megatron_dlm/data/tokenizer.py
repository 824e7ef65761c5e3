"""Load a checkpoint's tokenizer and decide which ids are EOS, padding and MASK."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from megatron_dlm.data.sentencepiece_model import TOKENIZER_MODEL, with_tokenizer_json
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.json_file import read_json_object
from megatron_dlm.models.architecture import GENERATION_CONFIG, Architecture
from megatron_dlm.models.config_keys import TOKEN_KEYS, TOKENIZER_KEYS, checked_keys
from megatron_dlm.types.special_tokens import SpecialTokens

MASK_TOKEN = "<|MASK|>"
"""Usual name of a mask token that is not declared as `mask_token`."""

DLLM_MASK_TOKEN = "<|mask|>"
"""Name of the mask token in dllm's `a2d-qwen3` folders; dllm looks it up by this name."""

MASK_TOKENS = (MASK_TOKEN, DLLM_MASK_TOKEN)

_TOKENIZER_JSON = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", TOKENIZER_MODEL, "vocab.txt")


def load_tokenizer(folder: str | Path, field: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder; nothing is ever downloaded.

    Args:
        folder: A folder with the files that `transformers` wrote.
        field: The flag that the folder came from, for error messages.

    Raises:
        UserError: The folder does not exist, holds no tokenizer that `transformers` can load, or
            one of its files states something of the wrong type.
    """
    path = Path(folder)
    remedy = (
        f"name a folder with tokenizer.json or {TOKENIZER_MODEL}, and with tokenizer_config.json"
    )
    if not path.is_dir():
        raise bad_value(field, str(folder), "is not a folder", remedy)
    # Without this check transformers builds an empty tokenizer from the config.json alone.
    if not has_tokenizer(path):
        raise bad_value(field, str(folder), "holds no tokenizer", remedy)
    for file in path.iterdir():
        if not (file.is_file() or file.is_dir()):  # reading from a pipe might never end
            raise bad_value(field, str(file), "is no regular file", "remove it")
    settings = path / "tokenizer_config.json"
    if settings.is_file():
        checked_keys(read_json_object(settings, field), TOKENIZER_KEYS, str(settings))
    config = _config(path, field)
    try:
        with with_tokenizer_json(path, field) as readable:
            tokenizer = AutoTokenizer.from_pretrained(
                readable,
                # Without the config.json, transformers would look for one.
                config=config if readable == path else PretrainedConfig(),
                local_files_only=True,
                trust_remote_code=False,
            )
            tokenizer.name_or_path = str(path)
    except UserError:
        raise
    except Exception as error:  # The `tokenizers` library raises bare Exceptions.
        if (path / "config.json").is_file() and _loads_without_config(path):
            raise _unreadable_config(path, field, error) from error
        for name in _TOKENIZER_JSON:
            if (path / name).is_file():
                read_json_object(path / name, field)  # raises an error that names the faulty file
        lines = str(error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise bad_value(
            field, str(folder), f"the tokenizer cannot be loaded ({reason})", remedy
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise bad_value(field, str(folder), "is no text tokenizer", remedy)
    return tokenizer


def _config(folder: Path, field: str) -> PretrainedConfig | None:
    """An empty configuration for models that transformers does not know, else None.

    Otherwise transformers would read config.json, ask whether to run the model's own code and warn
    about the model type; the tokenizer needs none of this.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    model_type = read_json_object(file, field).get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return None if is_known else PretrainedConfig()


def _loads_without_config(folder: Path) -> bool:
    """Whether it is the config.json beside a tokenizer, read by transformers too, that is wrong."""
    try:
        AutoTokenizer.from_pretrained(
            folder, config=PretrainedConfig(), local_files_only=True, trust_remote_code=False
        )
    except Exception:
        return False
    return True


def _unreadable_config(folder: Path, field: str, error: Exception) -> UserError:
    return bad_value(
        field,
        str(folder / "config.json"),
        f"cannot be read by transformers ({error})",
        "repair the file",
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


class HasVocabulary(Protocol):
    """A tokenizer, or a description of one."""

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Tokens with an attribute `special`, by id."""


def differing_token(tokenizer: HasVocabulary, other: HasVocabulary) -> str | None:
    """The first token that two tokenizers encode differently; None if they share a vocabulary.

    Either may have special tokens, such as MASK, under ids that are free in the other: a conversion
    adds MASK, and no text of the other tokenizer uses such an id.
    """
    first, second = tokenizer.get_vocab(), other.get_vocab()
    for one, vocabulary, rest in ((tokenizer, first, second), (other, second, first)):
        if vocabulary.items() <= rest.items():
            continue
        added, taken = one.added_tokens_decoder, set(rest.values())
        for text, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
            if rest.get(text) == token_id:
                continue
            special = text in MASK_TOKENS or (token_id in added and added[token_id].special)
            if text in rest or token_id in taken or not special:
                return text
    return None


def special_tokens_of(
    tokenizer: PreTrainedTokenizerBase, architecture: Architecture, folder: Path
) -> SpecialTokens:
    """The special tokens of a model with a tokenizer from a folder; see `resolve_special_tokens`.

    Raises:
        UserError: As in `resolve_special_tokens`.
    """
    return resolve_special_tokens(
        tokenizer,
        architecture.hf_config,
        str(folder),
        generation_config=architecture.generation_config,
        config_file=architecture.file,
    )


def resolve_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    hf_config: Mapping[str, Any],
    source: str,
    *,
    generation_config: Mapping[str, Any] | None = None,
    config_file: str = "config.json",
) -> SpecialTokens:
    """Decide the special tokens of a checkpoint; the only place where this is done.

    A response ends at the tokenizer's EOS and at each EOS of generation_config.json or config.json.
    As in transformers, generation_config.json overrides config.json; but as in serving engines, a
    special token that only config.json lists also ends a response. For a tokenizer without MASK
    (stock Qwen3), MASK is the id in config.json or generation_config.json, else the first id after
    the tokenizer's: the checkpoint's embedding is padded, so that id has a row.

    Args:
        tokenizer: The checkpoint's tokenizer.
        hf_config: The checkpoint's `config.json`; `vocab_size` is required, `eos_token_id` (an id
            or a list of ids), `pad_token_id` and `mask_token_id` are optional.
        source: Where the tokenizer came from, for error messages.
        generation_config: The checkpoint's `generation_config.json`, with the same optional keys.
        config_file: Path of `config.json`, for error messages; `generation_config` is from the
            same folder.

    Raises:
        UserError: There is no EOS; there is no MASK and no free id below `vocab_size`; two of the
            files state different ones; or an id does not fit the vocabulary or serves two purposes.
    """
    vocab_size = int(hf_config["vocab_size"])
    generation_config = generation_config or {}
    ends = eos_token_ids(tokenizer, hf_config, generation_config, source, config_file)
    if not ends:
        raise bad_value(
            "eos_token_id",
            None,
            f"neither config.json nor the tokenizer of {source} has an EOS token",
            "set eos_token in tokenizer_config.json or eos_token_id in config.json",
        )
    eos = ends[0]
    configured = (values.get("pad_token_id") for values in (generation_config, hf_config))
    pad = _first_known(tokenizer.pad_token_id, *configured, eos)
    assert pad is not None
    mask = _resolve_mask(tokenizer, hf_config, generation_config, source, config_file)
    for name, token_id in (("pad", pad), ("mask", mask)):
        _check_own_id(name, token_id, vocab_size, source)
    if mask in (*ends, pad):
        raise bad_value(
            "mask_token_id",
            mask,
            f"is also {'the EOS' if mask in ends else 'the padding'} token of {source}",
            f"set mask_token_id in {config_file} to an id of its own",
        )
    return SpecialTokens(eos, pad, mask, ends, vocab_size=vocab_size)


def eos_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    source: str,
    config_file: str,
) -> tuple[int, ...]:
    """The ids that end a response; the tokenizer's first. See `resolve_special_tokens`.

    Raises:
        UserError: One of the files, or the tokenizer, names an id outside the vocabulary.
    """
    vocab_size = int(hf_config["vocab_size"])
    _check_ids(hf_config, vocab_size, config_file)
    _check_ids(generation_config, vocab_size, _generation_file(config_file))
    configured = _as_ids(hf_config.get("eos_token_id"))
    generated = _as_ids(generation_config.get("eos_token_id"))
    if generated:
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        configured = [token_id for token_id in configured if token_id in special]
    own = _as_ids(tokenizer.eos_token_id)
    for token_id in own:
        _check_own_id("eos", token_id, vocab_size, source)
    return tuple(dict.fromkeys((*own, *generated, *configured)))


def _check_ids(values: Mapping[str, Any], vocab_size: int, file: str) -> None:
    for key, value in checked_keys(values, TOKEN_KEYS, file).items():
        if key not in TOKEN_KEYS:
            continue
        for token_id in _as_ids(value):
            if token_id >= vocab_size:
                raise bad_value(
                    f"{file}: {key}",
                    value,
                    f"is outside the vocabulary (vocab_size {vocab_size})",
                    "use the file that belongs to the checkpoint",
                )


def _check_own_id(name: str, token_id: int, vocab_size: int, source: str) -> None:
    if not 0 <= token_id < vocab_size:
        raise bad_value(
            f"{name}_token_id",
            token_id,
            f"is outside the vocabulary of {source} (vocab_size {vocab_size})",
            "use the tokenizer that belongs to the checkpoint",
        )


def _generation_file(config_file: str) -> str:
    return str(Path(config_file).with_name(GENERATION_CONFIG))


def _resolve_mask(
    tokenizer: PreTrainedTokenizerBase,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    source: str,
    config_file: str,
) -> int:
    configured, file = hf_config.get("mask_token_id"), config_file
    generated, generation_file = (
        generation_config.get("mask_token_id"),
        _generation_file(config_file),
    )
    if configured is None:
        configured, file = generated, generation_file
    elif generated not in (None, configured):
        raise bad_value(
            f"{generation_file}: mask_token_id",
            generated,
            f"but {config_file} says {configured}",
            "repair the file that is wrong",
        )
    own = own_mask_token_ids(tokenizer)
    texts = " and ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} as {i}" for i in own)
    if configured is not None:
        if own and configured not in own:
            raise bad_value(
                f"{file}: mask_token_id",
                configured,
                f"but the tokenizer in {source} has {texts}",
                "use the tokenizer that the model was trained with, or repair the file that is"
                " wrong",
            )
        return configured
    if len(own) > 1:
        raise bad_value(
            "mask_token_id",
            None,
            f"the tokenizer of {source} has {texts}",
            "set mask_token in tokenizer_config.json, or mask_token_id in config.json",
        )
    if own:
        return own[0]
    vocab_size = int(hf_config["vocab_size"])
    free = max(tokenizer.get_vocab().values()) + 1
    if free >= vocab_size:
        raise bad_value(
            "mask_token_id",
            None,
            f"the tokenizer of {source} has no MASK and leaves no free id below"
            f" vocab_size {vocab_size}",
            f"add {MASK_TOKEN} to the tokenizer and a row to the embedding,"
            " or set mask_token_id in config.json",
        )
    return free


def check_token_ids(
    token_ids: Sequence[int],
    what: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token_id: int | None,
    vocab_size: int | None,
) -> None:
    """Check that a model can take the ids of a text; all texts are checked here.

    A tokenizer may know more tokens than the model has, as long as no text uses them.

    Args:
        token_ids: The ids.
        what: Source of the text, ``file:line`` first, for error messages.
        tokenizer: The tokenizer that made them.
        mask_token_id: Id of MASK; None if unknown.
        vocab_size: Of the model; None if unknown.

    Raises:
        UserError: An id is MASK or outside the model's vocabulary.
    """
    largest = max(token_ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        # Tokenizers take no larger ids, which a request may hold.
        text = tokenizer.convert_ids_to_tokens(largest) if largest < 1 << 31 else None
        raise UserError(
            f"{what} contains {text!r} (id {largest}), which is no token of the model's vocabulary"
            f" of {vocab_size}; remove it or use the tokenizer of the model"
        )
    if mask_token_id in token_ids:
        raise UserError(
            f"{what} contains the MASK token (id {mask_token_id}),"
            " which stands for text not yet written; remove it"
        )


def unusable_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str) -> str | None:
    """A warning about tokenizer tokens without a row in the model's embedding; None if none."""
    unusable = {i: text for text, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not unusable:
        return None
    first = min(unusable)
    return (
        f"warning: the tokenizer of {source} has {len(unusable)} tokens from {unusable[first]!r}"
        f" (id {first}) on that the model's vocabulary of {vocab_size} does not have; texts with"
        " them are refused"
    )


def require_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Check that chat prompts can be rendered.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{source}: the record has `messages` but the tokenizer has no chat template;"
            " use `prompt` records or add chat_template.jinja to the tokenizer folder"
        )


def _as_ids(value: Any) -> list[int]:
    """The value of a key with one id, several or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def own_mask_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Candidates for MASK in a tokenizer: the declared id, else ids with the usual names."""
    if isinstance(declared := tokenizer.mask_token_id, int):
        return [declared]
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in MASK_TOKENS if name in vocabulary]


def _first_known(*candidates: object) -> int | None:
    """Return the first candidate that is a token id."""
    return next((candidate for candidate in candidates if isinstance(candidate, int)), None)
