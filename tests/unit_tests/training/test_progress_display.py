"""What a phase shows of itself: counts, rates and, from the last such phase, what is left."""

import time

import pytest

from megatron_dlm import activity
from megatron_dlm.training import progress_display
from megatron_dlm.training.progress_display import progress


def test_a_phase_is_measured_by_the_last_one() -> None:
    doing = activity.Activity()
    doing.enter("rollout")
    for _ in range(40):
        doing.step()
    assert progress(doing, doing.entered + 4.0) == "rollout: 40 forwards, 10.0/s, 0:04"
    doing.enter("update")
    doing.enter("rollout")
    for _ in range(10):
        doing.step()
    now = doing.entered + 2.0
    expected = "rollout: 10 of about 40 forwards, 5.0/s, 0:02, about 0:06 left"
    assert progress(doing, now) == expected
    for _ in range(30):  # longer than the last one
        doing.step()
    assert progress(doing, now) == "rollout: 40 forwards, 20.0/s, 0:02"


def test_work_of_known_size_is_counted() -> None:
    doing = activity.Activity()
    doing.enter("rollout")
    with doing.working("responses", 1200) as work:
        assert progress(doing, doing.entered) == "rollout: 0 of 1,200 responses, 0:00"
        doing.step()
        work.done += 300
        now = work.since + 3.0
        doing.entered = work.since
        expected = "rollout: 300 of 1,200 responses, 1 forward, 0.3/s, 0:03, about 0:09 left"
        assert progress(doing, now) == expected
        with doing.working("rows", 2):
            assert progress(doing, now).startswith("rollout: 0 of 2 rows, ")
        doing.step()
        doing.enter("update")  # of other work nothing is known
        assert "responses" not in progress(doing, now)
    doing.enter("rollout")
    with doing.working("responses", 4) as work:
        doing.step()
        doing.entered = now = doing.since
        expected = "rollout: 0 of 4 responses, 1 of about 2 forwards, 0.5/s, 0:02, about 0:02 left"
        assert progress(doing, now + 2.0) == expected


def test_the_rate_is_that_of_the_work() -> None:
    """Responses of a teacher come at the end of a start, which has loaded models before."""
    doing = activity.Activity()
    doing.step()
    with doing.working("responses", 8) as work:
        for _ in range(6):
            doing.step()
        doing.entered = work.since - 60.0
        expected = "start: 0 of 8 responses, 7 forwards, 2.0/s, 1:03"
        assert progress(doing, work.since + 3.0) == expected


def test_lines_come_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_display, "LIVE_SECONDS", 0.01)
    monkeypatch.setattr(progress_display, "LINE_SECONDS", 0.02)
    monkeypatch.setattr(progress_display, "ACTIVITY", activity.Activity())
    shown = ""
    with progress_display.progress_display(shows=True):
        deadline = time.monotonic() + 60
        while not shown and time.monotonic() < deadline:
            shown = capsys.readouterr().out
    assert shown.startswith("start: 0:0")
    with progress_display.progress_display(shows=False):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""
