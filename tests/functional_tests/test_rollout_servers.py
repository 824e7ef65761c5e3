"""Training with rollouts by a server of its own, against the same run that decodes itself."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dlm.config import Config
from megatron_dlm.conversion import weight_transfer
from megatron_dlm.errors import UserError
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.external import engine
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.external.flight import Flight
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.training import run
from megatron_dlm.training.checkpoint_writing import write_latest
from megatron_dlm.training.run import Run
from megatron_dlm.training.stored_batch import AHEAD
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.distributed_tests.spawn import run_distributed
from tests.functional_tests.entry_points import lines
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
        *("--max-prompt-length", 128, "--max-response-length", 32, "--weights-path", folder),
    )
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def internal(folder: Path) -> list[dict[str, Any]]:
    return run_training(run_config(folder, folder / "model", **GREEDY, save=str(folder / "own")))


@pytest.mark.parametrize("weights", ["distributed", "disk"])
def test_a_server_trains_as_the_run_itself_does(
    folder: Path,
    server: ServerProcess,
    internal: list[dict[str, Any]],
    weights: str,
) -> None:
    shared = folder / f"shared_{weights}"
    shared.mkdir()
    (shared / "thesis.txt").write_text("of somebody else")
    # Left open by a run that was killed in the middle of a push.
    assert server.post("/begin_weight_update").json()["success"]
    assert server.post("/begin_weight_update").status_code == 400
    config = run_config(
        folder,
        folder / "model",
        **SERVER,
        rollout_engine_urls=(server.url,),
        rollout_engine_weights=weights,
        rollout_engine_weights_path=str(shared) if weights == "disk" else None,
        save=str(folder / weights),
    )
    lines = run_training(config)
    assert [line["loss"] for line in lines] == [line["loss"] for line in internal]
    for name in ("tokens_per_forward", "response_lengths", "tokens_by_step", "eos_rate"):
        assert [line[name] for line in lines] == [line[name] for line in internal]
    assert server.get("/model_info")["weight_version"] == "4"
    # Closed after the last push; nobody pushes buckets to a server that reads a folder.
    closed = server.post("/end_weight_update")
    assert closed.status_code == (400 if weights == "distributed" else 200)
    assert [path.name for path in shared.iterdir()] == ["thesis.txt"]


def test_prompts_that_come_again_are_decoded_with_the_weights_of_the_last_push(
    folder: Path, server: ServerProcess
) -> None:
    """They fill pages of the cache, which the server keeps: those of older weights are useless."""
    text = "Tom has 12 apples and buys 3 more each day. "
    records = [{"prompt": f"{text * 4}How many are there after {day} days?"} for day in range(8)]
    prompts = folder / "long.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"prompts": str(prompts), "num_rollouts": 3, "lr": 3e-2, "min_lr": 1e-2}
    found = []
    for name, engine_options in (
        ("long_own", GREEDY),
        ("long_there", {**SERVER, "rollout_engine_urls": (server.url,)}),
    ):
        values = {**engine_options, **options, "save": str(folder / name)}
        found.append(run_training(run_config(folder, folder / "model", **values)))
    assert losses(found[1]) == losses(found[0])
    assert len(set(losses(found[0]))) == 6


def test_weights_are_read_only_where_the_server_may(
    folder: Path, tmp_path: Path, server: ServerProcess
) -> None:
    link = folder / "link"
    link.symlink_to(tmp_path)
    for path in (str(tmp_path), f"{folder}/../{tmp_path.name}", str(link), "/etc"):
        refused = server.post("/update_weights_from_disk", model_path=path)
        assert refused.status_code == 403
        assert "--weights-path" in refused.text


class Early(RolloutEngine):
    """An engine inside the run that decodes a rollout whole when it is begun."""

    _early: list[Trajectory] | None = None
    _version = -1

    @property
    def is_ahead(self) -> bool:
        return self._early is not None

    def begin(self, prompts: list[Prompt], max_response_length: int) -> None:
        self._early = super().generate_together(prompts, max_response_length, one_queue=True)

    def generate_together(self, prompts, max_response_length, **options):
        if self._early is None:
            self.begin(prompts, max_response_length)
        early, self._early = self._early, None
        assert [t.sample_index for t in early] == [p.sample_index for p in prompts]
        return early

    def ahead(self, *, waits: bool) -> list[Trajectory]:
        return []

    def take_up(self, trajectories: list[Trajectory], max_response_length: int) -> None:
        raise AssertionError

    def give_up(self) -> None:
        self._early = None

    def close(self) -> None:
        pass


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_rollout_ahead_is_of_the_weights_that_it_was_begun_with(
    folder: Path, server: ServerProcess, internal: list[dict[str, Any]], staleness: int
) -> None:
    options = {
        **SERVER,
        "rollout_engine_urls": (server.url,),
        "max_rollout_staleness": staleness,
        "save_interval": 3,
    }
    save = folder / f"ahead_{staleness}"
    config = run_config(folder, folder / "model", **options, save=str(save))
    lines = run_training(config)
    # Two updates a rollout: the first one is not ahead, then so many behind, and one more.
    assert [line["weight_lag"] for line in lines] == [0, 1, *[staleness, staleness + 1] * 2]
    with (
        mock.patch.object(run, "RolloutEngine", Early),
        mock.patch.object(Config, "decodes_itself", True),
    ):
        early = run_config(folder, folder / "model", **options, save=str(folder / "early"))
        with mock.patch.object(Run, "save"):
            expected = run_training(early)
        shutil.rmtree(folder / "early")
    assert losses(lines) == losses(expected)
    assert losses(lines)[:3] != losses(internal)[:3] or losses(lines)[3:] != losses(internal)[3:]
    # From the checkpoint after the second batch on, whose next rollout was ahead.
    shutil.rmtree(save / "iter_0000006")
    write_latest(str(save), 4)
    assert (save / "iter_0000004" / AHEAD).is_file()
    assert losses(run_training(config)) == losses(lines)


def test_a_run_that_is_stopped_while_servers_decode_goes_on(
    folder: Path, server: ServerProcess
) -> None:
    request = StopRequest()
    options = {**SERVER, "rollout_engine_urls": (server.url,), "max_rollout_staleness": 1}
    config = run_config(folder, folder / "model", **options, save=str(folder / "stopped"))
    wait = Flight.wait

    def wait_until_stopped(flight: Flight, seconds: float) -> None:
        wait(flight, seconds)
        metrics = folder / "stopped" / "metrics.jsonl"
        if metrics.exists() and len(lines(metrics)) == 2:
            request._handle(signal.SIGTERM, None)

    with mock.patch.object(Flight, "wait", wait_until_stopped), pytest.raises(StopRequested):
        run_training(config, request)
    done = run_training(config)
    assert [line["step"] for line in done] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= line["weight_lag"] <= 2 for line in done)


def test_settings_that_differ_are_refused(folder: Path, server: ServerProcess) -> None:
    for changes, named in (
        ({"dynamic_threshold": 0.3}, ["dynamic_threshold is 0.2 there and 0.3", "--dynamic-thr"]),
        ({"block_size": 8}, ["block_size is 4 there and 8 in the run", "--block-size"]),
        ({"rollout_engine_urls": ("http://127.0.0.1:9",)}, ["is not answered", "start the server"]),
    ):
        options = {**SERVER, "rollout_engine_urls": (server.url,), **changes}
        save = str(folder / "refused")
        with pytest.raises(UserError) as refused:
            run_training(run_config(folder, folder / "model", **options, save=save))
        for part in ["--rollout-engine-urls = 'http://", *named]:
            assert part in str(refused.value)


def test_the_order_of_settling_is_found_where_a_server_does_not_say_it(
    folder: Path, server: ServerProcess, internal: list[dict[str, Any]]
) -> None:
    decode = RolloutServer.decode

    async def bare(self: RolloutServer, client: Any, body: dict[str, Any]) -> dict[str, Any]:
        answer = await decode(self, client, body)
        del answer["meta_info"]["denoising"]
        return answer

    options = {**SERVER, "rollout_engine_urls": (server.url,)}
    with (
        mock.patch.object(RolloutServer, "decode", bare),
        mock.patch.object(engine, "check_settings", return_value=False),
    ):
        config = run_config(folder, folder / "model", **options, save=str(folder / "bare"))
        lines = run_training(config)
        ahead = run_config(
            folder, folder / "model", **options, max_rollout_staleness=1, save=str(folder / "no")
        )
        with pytest.raises(UserError, match=r"does not say at which step.*opdlm_off"):
            run_training(ahead)
    assert losses(lines) == losses(internal)
    for name in ("tokens_per_forward", "tokens_by_step"):
        assert [line[name] for line in lines] == [line[name] for line in internal]


def train_on_rank(rank: int, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank of a world; bucket by bucket, so that there are several."""
    with mock.patch.object(weight_transfer, "BUCKET_BYTES", 20_000):
        return run_training(run_config(folder, folder / "model", **options))


def test_ranks_share_servers_and_gather_the_weights(
    folder: Path, server: ServerProcess, internal: list[dict[str, Any]]
) -> None:
    options = {
        **SERVER,
        "rollout_engine_urls": (server.url,),
        "tensor_model_parallel_size": 2,
        "save": str(folder / "ranks"),
    }
    for found in run_distributed(train_on_rank, 4, folder, options):
        assert losses(found) == pytest.approx(losses(internal), rel=1e-4)
        for name in ("response_lengths", "tokens_by_step", "eos_rate"):
            assert [line[name] for line in found] == [line[name] for line in internal]


def test_draws_are_those_of_a_rollout_inside_the_run(folder: Path, server: ServerProcess) -> None:
    sampled = {"temperature": 1.0, "top_p": 0.9, "num_rollouts": 1}
    own = run_config(folder, folder / "model", **GREEDY | sampled, save=str(folder / "drawn"))
    options = {**SERVER, **sampled, "rollout_engine_urls": (server.url,)}
    served = run_config(folder, folder / "model", **options, save=str(folder / "drawn_there"))
    assert losses(run_training(served)) == losses(run_training(own))


def test_a_server_that_refuses_the_weights_ends_the_run_at_once(
    folder: Path, server: ServerProcess
) -> None:
    """Neither the other ranks nor a group that never comes together are waited for."""
    post = RolloutServer.post
    for refused in ("/init_weights_update_group", "/update_weights_from_distributed"):

        def refusing(
            self: RolloutServer,
            path: str,
            body: dict[str, Any],
            refused: str = refused,
            **more: Any,
        ) -> Any:
            return post(self, path, {} if path == refused else body, **more)

        options = {**SERVER, "rollout_engine_urls": (server.url,)}
        config = run_config(folder, folder / "model", **options, save=str(folder / "refusing"))
        with (
            mock.patch.object(RolloutServer, "post", refusing),
            pytest.raises(UserError, match=f"{refused} is refused .* is missing"),
        ):
            run_training(config)
