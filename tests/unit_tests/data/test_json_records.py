"""JSON files are indexed and read a record at a time, as if they had been read whole."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.data import json_records
from megatron_dlm.data.json_records import JsonLines, JsonList
from megatron_dlm.data.open_records import open_stored
from megatron_dlm.errors import UserError

LINES = st.lists(
    st.one_of(
        st.sampled_from(["", " ", "\t\r", " \x0b\x0c  "]),
        st.builds(
            lambda before, value, after: before + json.dumps({"prompt": value}) + after,
            st.sampled_from(["", "  ", "\t"]),
            st.text(max_size=12),
            st.sampled_from(["", "\r", "  "]),
        ),
    ),
    max_size=12,
)


@given(lines=LINES, ends=st.booleans(), chunk=st.integers(1, 40))
def test_lines_are_those_of_the_whole_file(lines: list[str], ends: bool, chunk: int) -> None:
    content = ("\n".join(lines) + "\n" * ends).encode()
    expected = [
        (number, json.loads(line))
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK", chunk)
        path = Path(folder) / "p.jsonl"
        path.write_bytes(content)
        if not expected:
            with pytest.raises(UserError, match="is empty"):
                JsonLines(path, "--prompts")
            return
        file = JsonLines(path, "--prompts")
    assert list(file.records()) == [(f"{path}:{number}", record) for number, record in expected]
    assert file.fingerprint == hashlib.sha256(content).hexdigest()
    chosen = [len(file) - 1, 0, 0]
    some = file.select(chosen).select([2, 0])
    assert [some.record(i) for i in range(len(some))] == [expected[0][1], expected[-1][1]]
    assert some.where(1) == f"{path}:{expected[-1][0]}"
    assert [len(file.first(n)) for n in (1, 99)] == [1, len(file)]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [f'{{"prompt": "{i}"}}\n' for i in range(9)]
    path.write_text("".join(lines))
    file = JsonLines(path, "--prompts")
    os.utime(path, (1, 1))
    assert file.record(8) == {"prompt": "8"}, "the same content, copied again"
    path.write_text("".join(reversed(lines)))
    with pytest.raises(UserError, match=r"p.jsonl': was changed while it is read; start again"):
        file.record(8)


def test_files_of_windows_programs(tmp_path: Path) -> None:
    mark, records = b"\xef\xbb\xbf", [{"prompt": "é"}, {"prompt": "b", "n": 1e300}]
    lines = "\r\n".join(map(json.dumps, records)).encode()
    for name, content in (
        ("p.jsonl", mark + lines),
        ("p.json", mark + json.dumps(records).encode()),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        file = open_stored(str(path), "--prompts")
        assert [file.record(i) for i in range(len(file))] == records
    for content in (lines.decode().encode("utf-16"), b'{"prompt": "\xe9"}', b"\x1f\x8b\x08\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"json:1: is no text in UTF-8; unpack it or save it"):
            open_stored(str(path), "--prompts").record(0)


def test_a_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('\n [{"prompt": "a"},\n {"prompt": "b", "n": 12345678901234567890123}, 3]')
    file = open_stored(str(path), "--prompts")
    assert isinstance(file, JsonList)
    assert file.record(0) == {"prompt": "a"}
    assert str(file.record(1)["n"]) == "12345678901234567890123"
    with pytest.raises(UserError, match=r"p.json: item 2: the item is a number, not an object"):
        file.record(2)
    for content, words in (("[]", "empty list"), ("[1", "broken JSON"), ('{"a": 1}', None)):
        path.write_text(content)
        if words is None:
            assert isinstance(open_stored(str(path), "--prompts"), JsonLines)
        else:
            with pytest.raises(UserError, match=words):
                open_stored(str(path), "--prompts")
