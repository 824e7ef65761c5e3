"""Training with rollouts by a server of its own, against the same run that decodes itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.server_process import ServerProcess
from tests.tiny import run_config, run_training, save_random_model, write_data

GREEDY: dict[str, Any] = dict(
    num_rollouts=3,
    rollout_batch_size=8,
    global_batch_size=4,
    temperature=0.0,
    dynamic_threshold=0.2,
    max_response_length=16,
)
SERVER: dict[str, Any] = dict(GREEDY, rollout_engine="sglang", rollout_engine_retries=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    write_data(folder, 28)
    save_random_model(folder / "model")
    save_random_model(folder / "other", seed=7)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """With other weights than the run's, in the beginning."""
    server = ServerProcess(
        folder / "log",
        "rollout-server",
        *("--load", folder / "other", "--block-size", 4, "--dynamic-threshold", 0.2),
        *("--max-prompt-length", 128, "--max-response-length", 32),
    )
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def internal(folder: Path) -> list[dict[str, Any]]:
    return run_training(run_config(folder, folder / "model", **GREEDY, save=str(folder / "own")))


@pytest.mark.parametrize("weights", ["distributed", "disk"])
def test_a_server_trains_as_the_run_itself_does(
    folder: Path, server: ServerProcess, internal: list[dict[str, Any]], weights: str
) -> None:
    config = run_config(
        folder,
        folder / "model",
        **SERVER,
        rollout_engine_urls=(server.url,),
        rollout_engine_weights=weights,
        save=str(folder / weights),
    )
    lines = run_training(config)
    assert [line["loss"] for line in lines] == [line["loss"] for line in internal]
    for name in ("tokens_per_forward", "response_lengths", "tokens_by_step", "eos_rate"):
        assert [line[name] for line in lines] == [line[name] for line in internal]
    assert server.get("/model_info")["weight_version"] == "4"
    assert not (folder / weights / "rollout_weights").exists()
