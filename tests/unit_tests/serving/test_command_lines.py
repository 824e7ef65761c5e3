"""Command lines of other engines in the documentation have flags that these engines know.

`flags_of_engines.json` has the flags that the engines' own argument parsers listed, built from the
wheels that it names; those of vLLM are the engine's, without those of its HTTP side.
"""

import json
import re
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

ENGINES = json.loads((Path(__file__).parent / "flags_of_engines.json").read_text())
PAGES = {name: (REPOSITORY / "docs" / name).read_text() for name in ("serving.md",)}


@pytest.mark.parametrize("engine", ENGINES)
def test_flags_are_those_of_the_engine(engine: str) -> None:
    known = set(ENGINES[engine]["flags"].split())
    given = set()
    for block in re.findall(r"```bash\n(.*?)```", PAGES["serving.md"], flags=re.DOTALL):
        for command in block.replace("\\\n", " ").splitlines():
            if command.startswith(ENGINES[engine]["command"]):
                given |= set(re.findall(r"--[\w-]+", command))
    assert given
    assert given <= known
    assert ENGINES[engine]["version"] in PAGES["serving.md"]
