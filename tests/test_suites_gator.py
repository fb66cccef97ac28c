"""Runner `gator`: the lines of `agent gator --events-fd`, as records."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolMisuse
from agent.core.events import TestFinished, TestsSelected, TestStarted, Warned
from agent.suites.messages import Suite
from agent.suites.runners.driver import CannotLaunch, Only
from agent.suites.runners.gator import GatorDriver, launch
from tests import no_json

SUITE = Suite(id="tree", runner="gator", files=("spec.yaml",))


def end(ident: str, result: str, code: int = 0, **more: Any) -> dict[str, Any]:
    common = {"pruned": False, "why": None, "started": 5.0, "ended": 7.5, "folder": "", "metrics": {"msg_error": 0}}
    return {"event": "end", "path": ["g"], "ident": ident, "result": result, "code": code, **common, **more}


LINES: list[dict[str, Any]] = [
    {"event": "plan", "jobs": [["g", ident] for ident in ("a", "b", "c", "d", "e", "f")]},
    {"event": "start", "path": ["g"], "ident": "a", "started": 5.0},
    {"event": "output", "path": ["g"], "ident": "a", "text": "hello"},
    end("a", "SUCCESS", metrics={"msg_info": 1, "lint": 2.5}),
    {"event": "start", "path": ["g"], "ident": "b", "started": 5.0},
    end("b", "FAILURE", 3),
    end("c", "FAILURE", 0, metrics={"msg_error": 2}),
    end("d", "ABORTED", pruned=True, why="on_pass: 'b' did not pass", started=None),
    end("e", "FAILURE", 254, why="its process ended, and it did not say how"),
]


def wire(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def records(events: list[Any]) -> list[tuple[str, str, str | None]]:
    return [(event.name, event.state, event.message) for event in events if isinstance(event, TestFinished)]


def test_jobs_become_tests_by_ident_and_path() -> None:
    driver = GatorDriver(SUITE, "r-1")
    events = driver.feed("events", wire(LINES), 10.0)
    selected, started, finished = events[0], events[1], events[2]
    assert isinstance(selected, TestsSelected)
    assert selected.tests[0] == ("g", "a")
    assert isinstance(started, TestStarted)
    assert (started.case, started.file, started.name) == ("g › a", "g", "a")
    assert isinstance(finished, TestFinished)
    assert (finished.state, finished.duration, finished.output) == ("passed", 2.5, "hello")
    assert finished.details == {"code": 0, "metrics": {"msg_info": 1, "lint": 2.5}}
    assert records(events) == [
        ("a", "passed", None),
        ("b", "failed", "exited with code 3"),
        ("c", "failed", "2 messages of errors"),
        ("d", "skipped", "on_pass: 'b' did not pass"),
        ("e", "blocked", "its process ended, and it did not say how"),
    ]
    assert records(list(driver.finish(1, None, None, 11.0))) == [("f", "lost", "lost: agent gator exited with code 1")]


def test_events_that_were_dropped_are_warned_of_and_their_jobs_are_lost() -> None:
    driver = GatorDriver(SUITE, "r-1")
    plan = {"event": "plan", "jobs": [["g", "a"]]}
    (_, warned) = driver.feed("events", wire([plan, {"event": "dropped", "count": 3}]), 0)
    assert warned == Warned("gator.dropped", "3 events of jobs were not told: they came faster than they were read")
    assert records(list(driver.finish(0, None, None, 0))) == [("a", "lost", "lost: agent gator exited with code 0")]


def test_the_job_that_runs_is_named() -> None:
    driver = GatorDriver(SUITE, "r-1")
    driver.feed("events", wire(LINES[:2]), 0)
    assert driver.running() == "g › a"
    driver.feed("events", wire(LINES[2:4]), 0)
    assert driver.running() is None


def test_what_we_ended_is_aborted() -> None:
    driver = GatorDriver(SUITE, "r-1")
    (stop,) = driver.stop("cancel")
    assert (stop.signal, stop.wait_s, stop.alone) == (signal.SIGTERM, 10.0, True)
    driver.feed(
        "events", wire([LINES[0], end("a", "FAILURE", 255), end("b", "ABORTED", why="the tier was stopped")]), 0
    )
    left = records(list(driver.finish(1, None, "cancel", 0)))
    assert left[0] == ("c", "aborted", "aborted: cancel")


def test_a_stopped_job_is_aborted_and_not_failed() -> None:
    driver = GatorDriver(SUITE, "r-1")
    events = driver.feed("events", wire([LINES[0], end("a", "FAILURE", 255), end("b", "ABORTED", why="stopped")]), 0)
    assert records(events) == [("a", "aborted", "aborted: stopped"), ("b", "aborted", "aborted: stopped")]


@pytest.mark.parametrize(
    ("code", "number", "reason", "state", "kind"),
    [
        (2, None, None, "blocked", "crash"),
        (None, "SIGKILL", None, "lost", "crash"),
        (None, "SIGKILL", "deadline", "aborted", "rest"),
    ],
)
def test_a_run_that_never_had_a_plan_is_told(
    code: int | None, number: str | None, reason: str | None, state: str, kind: str
) -> None:
    driver = GatorDriver(SUITE, "r-1")
    driver.feed("stderr", b"spec.yaml:3: g/a: waits for itself: a -> a.\n", 0)
    (record,) = driver.finish(code, number, reason, 0)
    assert isinstance(record, TestFinished)
    assert (record.state, record.kind) == (state, kind)
    if reason is None:
        assert record.name == "spec.yaml:3: g/a: waits for itself: a -> a."


def test_an_exit_that_no_record_explains_is_a_crash() -> None:
    driver = GatorDriver(SUITE, "r-1")
    plan = {"event": "plan", "jobs": [["g", "a"]]}
    driver.feed("events", wire([plan, end("a", "SUCCESS")]), 0)
    assert records(list(driver.finish(1, None, None, 0))) == [
        ("agent gator exited with code 1", "blocked", "agent gator exited with code 1, and no job failed")
    ]


def test_of_a_job_tried_again_the_first_start_counts_and_an_end_once() -> None:
    driver = GatorDriver(SUITE, "r-1")
    start = {"event": "start", "path": ["g"], "ident": "a"}
    events = driver.feed("events", wire([LINES[0], start, start, end("a", "SUCCESS"), end("a", "FAILURE", 1)]), 0)
    assert [type(event).__name__ for event in events] == ["TestsSelected", "TestStarted", "TestFinished"]


def test_the_agent_runs_the_spec_as_its_child(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("!Job {command: x}")
    started = launch(SUITE, tmp_path, tmp_path / "run/scratch", "r-1")
    assert started.argv[-3:] == ("--events-fd", "@pipe:events", "spec.yaml")
    assert str(tmp_path / "run/tracking") in started.argv  # beside the result, and kept with it
    assert started.pipes == ("events",)
    with pytest.raises(CannotLaunch, match="there is no spec"):
        launch(SUITE, tmp_path / "none", tmp_path, "r-1")
    with pytest.raises(ProtocolMisuse):
        launch(SUITE, tmp_path, tmp_path, "r-1", only=[Only("g", "a")])


@given(st.lists(st.binary(max_size=30) | no_json.objects("event", "path", "ident"), max_size=5), st.data())
def test_rubbish_and_chunks_change_nothing(rubbish: list[bytes], data: st.DataObject) -> None:
    lines = [json.dumps(line).encode() for line in LINES]
    for piece in rubbish:
        lines.insert(data.draw(st.integers(0, len(lines))), piece.replace(b"\n", b""))
    whole = b"".join(line + b"\n" for line in lines)
    driver, events = GatorDriver(SUITE, "r-1"), list[Any]()
    while whole:
        n = data.draw(st.integers(1, len(whole)))
        events += driver.feed("events", whole[:n], 10.0)
        whole = whole[n:]
    assert [event for event in events if not isinstance(event, Warned)] == GatorDriver(SUITE, "r-1").feed(
        "events", wire(LINES), 10.0
    )
