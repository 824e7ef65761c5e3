"""Under torchrun: a killed launcher takes its ranks along, a killed rank is started again."""

from pathlib import Path

from tests.faults.jobs import Job, checkpoints, free_port, job_config, prepare, wait_gone
from tests.faults.runs import check_same
from tests.functional_tests.entry_points import run_ranks


def test_a_job_that_is_killed_twice_ends_as_one_that_is_not(tmp_path: Path) -> None:
    prepare(tmp_path)
    whole = tmp_path / "whole.yaml"
    whole.write_text(job_config(tmp_path, tmp_path / "whole").to_yaml())
    assert run_ranks(2, "train", "--config", whole).status == 0

    run, log, port = tmp_path / "run", tmp_path / "run.log", free_port()
    config = job_config(tmp_path, run)
    job = Job(config, log, restarts=1, port=port)
    job.wait_until(lambda: checkpoints(run) > 0)
    ranks = list(job.ranks().values())
    assert len(ranks) == 2
    job.hit("launcher")
    wait_gone(ranks)
    job.wait()

    # The same command: it goes on, at the port that the dead ranks had.
    job = Job(config, log, restarts=1, port=port)
    saved = checkpoints(run)
    job.wait_until(lambda: checkpoints(run) > saved)
    dead = job.ranks()[1]
    assert job.hit("1")
    assert job.wait() == 0, job.output
    assert f"(process {dead}, phase " in job.output
    assert job.output.count("error: rank 1 on ") == 1
    check_same(run, tmp_path / "whole")
