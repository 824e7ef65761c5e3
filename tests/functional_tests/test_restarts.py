"""A job of two hosts whose launchers and ranks are killed ends as one of one host that is not."""

import os
import signal
import sys
from pathlib import Path

from tests.faults.jobs import (
    checkpoints,
    free_port,
    job_config,
    prepare,
    ranks_of,
    wait_gone,
)
from tests.faults.runs import RunningProcess, check_same, events
from tests.functional_tests.entry_points import run_ranks
from tests.tiny import REPOSITORY
from tests.two_hosts import INTERFACE, Host, two_hosts

LAUNCH = str(REPOSITORY / "examples" / "launch.sh")
UPDATES = 16


class Job:
    """One training, started on two hosts as docs/launching.md has it."""

    def __init__(self, folder: Path, run: Path, hosts: tuple[Host, Host]) -> None:
        self.folder, self.hosts, self.port = folder, hosts, free_port()
        self.file = folder / "run.yaml"
        self.file.write_text(job_config(folder, run, UPDATES).to_yaml())

    def start(self, number: int, **environment: str) -> RunningProcess:
        """Start the launcher on a host."""
        host = self.hosts[number]
        return RunningProcess(
            host.command("bash", LAUNCH, str(self.file)),
            self.folder / f"{host.name}.log",
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            NNODES="2",
            NODE_RANK=str(number),
            MASTER_ADDR=self.hosts[0].address,
            MASTER_PORT=str(self.port),
            LOCAL_ADDR=host.address,
            SOCKET_IFNAME=INTERFACE,
            NPROC_PER_NODE="1",
            MAX_RESTARTS="2",
            LOG_DIR=str(self.folder / "logs"),
            **environment,
        )


def test_a_job_of_two_hosts_that_is_killed_twice_ends_as_one_that_is_not(tmp_path: Path) -> None:
    prepare(tmp_path)
    whole, run, unseen = tmp_path / "whole", tmp_path / "run", tmp_path / "unseen"
    file = tmp_path / "whole.yaml"
    file.write_text(job_config(tmp_path, whole, UPDATES).to_yaml())
    assert run_ranks(2, "train", "--config", file).status == 0

    with two_hosts() as hosts:
        job = Job(tmp_path, run, hosts)
        first, second = job.start(0), job.start(1)
        second.wait_until(lambda: checkpoints(run) > 0)
        (rank,) = ranks_of(second.process.pid).values()
        agent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(agent, signal.SIGKILL)
        assert second.wait() == 128 + signal.SIGKILL
        wait_gone([rank])
        first.wait_until(lambda: f"error: rank 1 on host-b (process {rank}, " in first.output)

        # The same command on that host: the other one has waited. What is resumed, rank 0 alone
        # decides: where this one looks there is no run.
        saved = checkpoints(run)
        second = job.start(1, SAVE=str(unseen))
        second.wait_until(lambda: checkpoints(run) > saved)
        rank = ranks_of(second.process.pid)[1]
        os.kill(rank, signal.SIGKILL)
        assert (second.wait(300), first.wait(300)) == (0, 0), first.output + second.output

    assert f"error: rank 1 on host-b (process {rank}, " in first.output
    assert first.output.count("error: rank 1 on ") == 2
    assert first.output.count("going on from") == 2
    assert "going on from" not in second.output
    # Rank 0 may have seen a collective fail before it heard that the other rank is dead.
    history = [event for event in events(run) if event != "failed"]
    assert history == ["started", "resumed", "resumed", "finished"]
    assert not unseen.exists()
    check_same(run, whole)
    logs = {
        name: sorted((tmp_path / "logs" / name).glob("*/attempt_*/0"))
        for name in ("host-a", "host-b")
    }
    assert [len(folders) for folders in logs.values()] == [3, 3]
    said = [(folder / "stdout.log").read_text() for folder in logs["host-a"]]
    assert ["going on from" in text for text in said] == [False, True, True]
