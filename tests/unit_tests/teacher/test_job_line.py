"""What the two sides of a job tell each other."""

import threading
from contextlib import nullcontext

import pytest
from torch.distributed import HashStore, PrefixStore

from megatron_dlm.commands.teacher_ranks import ends_teacher
from megatron_dlm.config import Config
from megatron_dlm.errors import TrainingDiverged, UserError
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.teacher.job_line import JobLine, ranks_client

CONFIG = Config.from_dict({"teacher_ranks": 2, "device": "cpu"})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> tuple[JobLine, JobLine]:
    """Of the student's and of the teacher's side, of a job of three."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    store = PrefixStore("job", HashStore())
    return JobLine(store), JobLine(store)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 75), (UserError("no"), 2), (TrainingDiverged("no"), 3), (ValueError("no"), 1)],
)
def test_the_teacher_ends_as_the_student_does(
    lines: tuple[JobLine, JobLine], error: Exception | None, status: int
) -> None:
    student, teacher = lines
    assert teacher.ended() is None

    def hold() -> None:
        while teacher.ended() is None:
            pass
        for rank in range(2):
            teacher.leave(rank)

    holding = threading.Thread(target=hold)
    holding.start()
    raised = nullcontext() if error is None else pytest.raises(type(error))
    with raised, ends_teacher(CONFIG, student) as ended:
        if error is not None:
            raise error
        ended.status = 75
    holding.join()  # who ends waits for those that have to see it
    assert teacher.ended() == status


def test_the_place_is_waited_for_until_the_run_is_to_stop(
    lines: tuple[JobLine, JobLine], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = lines
    monkeypatch.delenv("WORLD_SIZE")
    request, place = StopRequest(), ["http://127.0.0.1:1"]
    with (
        initialized(Config.from_dict({"device": "cpu"})),
        StopAgreement(request, ParallelGroups()) as stop,
    ):
        threading.Timer(0.2, teacher.publish, (place, "key")).start()
        assert student.wait_for_place(stop) == (place, "key")
        threading.Timer(0.3, request._handle, (15, None)).start()
        with pytest.raises(StopRequested):  # nobody answers there
            ranks_client(CONFIG, student, stop)
        with pytest.raises(StopRequested):
            JobLine(HashStore()).wait_for_place(stop)


def test_a_signal_at_a_rank_of_the_teacher_stops_the_student(
    lines: tuple[JobLine, JobLine], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = lines
    monkeypatch.delenv("WORLD_SIZE")
    with initialized(Config.from_dict({"device": "cpu"})):
        asked = student.asked_to_stop
        with StopAgreement(StopRequest(), ParallelGroups(), asked_elsewhere=asked) as stop:
            assert stop.requested == 0
            teacher.ask_to_stop(15)
            assert stop._thread is not None
            stop._thread.join(30)
            assert stop.requested == 15
            assert stop.decide().stop == 15
