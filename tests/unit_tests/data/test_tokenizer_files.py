"""Odd files of a tokenizer are loaded, or refused in one line that names the file."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.config_keys import TOKENIZER_KEYS
from tests.refusal import refusal
from tests.tiny import TOKENIZER

CONTENTS = {
    "not UTF-8": b"\xff\xfe{}",
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "thousands of digits": b'{"eos_token_id": ' + b"1" * 5000 + b"}",
    "zeros": b"\0" * 10,
}
VALUES: dict[str, Any] = {
    "negative": -1,
    "float": 1.5,
    "true": True,
    "list": [1, [2]],
    "list of objects": [{"name": "x"}],
    "object": {"a": 1},
    "beyond 64 bits": 2**63,
    "not a number": float("nan"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny examples' model, with the chat template in tokenizer_config.json."""
    folder = shutil.copytree(TOKENIZER, tmp_path / "model")
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(file.read_text()) | {"chat_template": template.read_text()}
    file.write_text(json.dumps(config))
    template.unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [510, 508]}')
    return folder


def read(folder: Path) -> None:
    read_architecture(folder)
    load_tokenizer(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"],
)
@pytest.mark.parametrize("content", CONTENTS)
def test_files_that_are_no_json_objects(folder: Path, name: str, content: str) -> None:
    (folder / name).write_bytes(CONTENTS[content])
    began = time.process_time()
    message = refusal(read, folder)
    assert time.process_time() - began < 1
    assert message is not None
    assert f"'{folder / name}': " in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("key", TOKENIZER_KEYS)
def test_values_of_the_wrong_type(folder: Path, key: str) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    accepted = {"model_max_length": {"float", "beyond 64 bits"}, "added_tokens_decoder": {"object"}}
    for name, value in VALUES.items():
        file.write_text(json.dumps(config | {key: value}))
        message = refusal(read, folder)
        if name in accepted.get(key, ()):
            continue  # transformers decides
        assert message is not None, name
        assert message.startswith(f"{file}: {key} = "), name
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_cache", "x", "use_cache"),
        ("layer_types", [1], "layer_types"),
        ("auto_map", 5, "'int'"),
        ("quantization_config", [], "'list'"),
    ],
)
def test_config_json_is_blamed_where_transformers_cannot_read_it(
    folder: Path, key: str, value: object, reason: str
) -> None:
    """A tokenizer is loaded with the config.json beside it, whoever else reads that."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(f"--tokenizer = '{file}': cannot be read by transformers (")
    assert reason in str(error.value)
