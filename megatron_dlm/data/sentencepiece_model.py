"""Make a `tokenizer.json` for folders with only a SentencePiece `tokenizer.model`.

transformers reads every such file as byte-pair encoding without normalisation, which is right for
Llama 2 and Mistral. Here the file decides: unigram or byte-pair encoding, its normalisation, and
the handling of spaces and unknown characters (Kudo and Richardson 2018).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE, Unigram

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.json_file import read_json_object

TOKENIZER_MODEL = "tokenizer.model"

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BYTE_PAIR = 1, 2
_READ_ELSEWHERE = ("added_tokens_decoder", "auto_map", "sp_model_kwargs", "use_fast", "vocab_file")


def is_sentencepiece(folder: Path) -> bool:
    """Whether a folder's only tokenizer file is `tokenizer.model`."""
    others = ("tokenizer.json", "vocab.json", "vocab.txt")
    return (folder / TOKENIZER_MODEL).is_file() and not any(
        (folder / name).is_file() for name in others
    )


@contextmanager
def with_tokenizer_json(folder: Path, field: str) -> Iterator[Path]:
    """A folder with a `tokenizer.json`: the folder itself, or a temporary one.

    Args:
        folder: With a tokenizer's files.
        field: The flag that the folder came from, for error messages.

    Raises:
        UserError: Its SentencePiece model cannot be read.
    """
    if not is_sentencepiece(folder):
        yield folder
        return
    with TemporaryDirectory() as made:
        write_tokenizer_json(folder, Path(made), field)
        template = folder / "chat_template.jinja"
        if template.is_file():
            (Path(made) / template.name).write_bytes(template.read_bytes())
        yield Path(made)


def write_tokenizer_json(source: Path, folder: Path, field: str = "--tokenizer") -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for a `tokenizer.model`.

    Args:
        source: Folder of the model. Added tokens, special tokens and whether texts begin with BOS
            are read from the JSON files beside it.
        folder: Folder to write.
        field: The flag that the source came from, for error messages.

    Raises:
        UserError: sentencepiece is not installed, the file is not one of its models or of an
            unsupported kind, or an added token does not fit.
    """
    proto = _read(source / TOKENIZER_MODEL, field)
    config = _special_tokens(proto)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).is_file():
            config |= read_json_object(source / name, field)
    tokenizer = _tokenizer(proto, source / TOKENIZER_MODEL, field)
    _add_tokens(tokenizer, source, config, field)
    # Llama's class begins texts with BOS by default.
    adds_bos = str(config.get("tokenizer_class", "")).startswith("Llama")
    _frame(tokenizer, config, bos=config.pop("add_bos_token", adds_bos))
    for key in _READ_ELSEWHERE:
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _read(file: Path, field: str) -> Any:
    """The protocol buffer of a file."""

    def refuse(problem: str, remedy: str) -> UserError:
        return bad_value(field, str(file), problem, remedy)

    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise refuse(
            "cannot be read without the packages sentencepiece and protobuf",
            "pip install sentencepiece protobuf, or put the tokenizer's tokenizer.json beside it",
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception:  # DecodeError of the protobuf implementation in use
        proto.Clear()
    if not any(piece.type == _UNKNOWN for piece in proto.pieces):
        raise refuse(
            "is no SentencePiece model", "fetch it again, or put its tokenizer.json beside it"
        )
    if (
        proto.trainer_spec.model_type not in (_UNIGRAM, _BYTE_PAIR)
        or proto.trainer_spec.treat_whitespace_as_suffix
    ):
        raise refuse(
            "is no unigram or byte-pair encoding that marks beginnings of words",
            "put its tokenizer.json beside it",
        )
    return proto


def _special_tokens(proto: Any) -> dict[str, Any]:
    """The file's own special tokens under the names of tokenizer_config.json."""
    spec = proto.trainer_spec
    ids = {"unk": spec.unk_id, "bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id}
    return {
        f"{name}_token": proto.pieces[token_id].piece
        for name, token_id in ids.items()
        if token_id >= 0
    }


def _tokenizer(proto: Any, file: Path, field: str) -> Tokenizer:
    """Encodes text without added tokens as SentencePiece does.

    The texts before and after an added token are encoded separately, each with the initial space.
    """
    make = _unigram if proto.trainer_spec.model_type == _UNIGRAM else _byte_pair_encoding
    tokenizer = Tokenizer(make(proto))
    tokenizer.normalizer = _normalizer(proto)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            for piece in proto.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    if tokenizer.get_vocab_size() != len(proto.pieces):
        raise bad_value(field, str(file), "names a piece twice", "put its tokenizer.json beside it")
    return tokenizer


def _unigram(proto: Any) -> Unigram:
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    # Pieces that are not text get the lowest score, so that encoding does not choose them.
    lowest = min(piece.score for piece in proto.pieces)
    scores = [
        (piece.piece, piece.score if piece.type == _NORMAL else lowest) for piece in proto.pieces
    ]
    return Unigram(scores, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)


def _byte_pair_encoding(proto: Any) -> BPE:
    ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    merges = sorted(
        (-piece.score, ids[piece.piece[:cut]], ids[piece.piece[cut:]], cut, piece.piece)
        for piece in proto.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in ids and piece.piece[cut:] in ids
    )
    return BPE(
        vocab=ids,
        merges=[(text[:cut], text[cut:]) for *_, cut, text in merges],
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(proto: Any) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _add_tokens(tokenizer: Tokenizer, source: Path, config: Mapping[str, Any], field: str) -> None:
    """Add the tokens of the JSON files, each with the id given there."""
    added: dict[int, Any] = {}
    if (source / "added_tokens.json").is_file():
        stated = read_json_object(source / "added_tokens.json", field)
        added |= {token_id: {"content": text} for text, token_id in stated.items()}
    decoder = config.get("added_tokens_decoder") or {}
    added |= {int(token_id): token for token_id, token in decoder.items()}
    for token_id, token in sorted(added.items()):
        flags = ("lstrip", "rstrip", "single_word", "special", "normalized")
        kept = {"normalized": False} | {flag: token[flag] for flag in flags if flag in token}
        tokenizer.add_tokens([AddedToken(token["content"], **kept)])
        if tokenizer.token_to_id(token["content"]) != token_id:
            raise bad_value(
                field,
                str(source),
                f"{token['content']!r} cannot be added as {token_id}: the first free id is another",
                "repair added_tokens.json or added_tokens_decoder in tokenizer_config.json",
            )


def _frame(tokenizer: Tokenizer, config: dict[str, Any], *, bos: bool) -> None:
    """Let texts begin with BOS and end with EOS if the configuration says so."""
    ends = {"bos_token": bos, "eos_token": config.pop("add_eos_token", False)}
    texts = {}
    for name, is_added in ends.items():
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if is_added and text is not None and tokenizer.token_to_id(text) is not None:
            texts[name] = text
    if not texts:
        return
    template = [texts.get("bos_token"), "$A", texts.get("eos_token")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[part for part in template if part is not None],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in texts.values()],
    )
