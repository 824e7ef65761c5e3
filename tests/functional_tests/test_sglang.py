"""SGLang itself beside our engine, where `benchmarks/sglang_on_cpu/environment.sh` has made one."""

import os
from pathlib import Path

import pytest

from benchmarks.sglang_on_cpu.__main__ import CASES, is_equal, measure

ENVIRONMENT = os.environ.get("SGLANG_ENVIRONMENT")


@pytest.mark.slow
@pytest.mark.skipif(ENVIRONMENT is None, reason="SGLANG_ENVIRONMENT names no environment with it")
@pytest.mark.parametrize("case", CASES)
def test_sglang_decodes_and_trains_as_the_run_itself_does(case: str) -> None:
    result = measure(CASES[case], Path(str(ENVIRONMENT)), count=8)
    assert is_equal(result), result
