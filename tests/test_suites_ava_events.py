"""agent/suites/runners/ava_events.py: records out of what AVA tells the observer."""

import base64
import json
import signal
from typing import Any

import pytest

from agent.core.events import TestFinished, TestStarted, Warned
from agent.suites.messages import Limits, Suite
from agent.suites.runners.ava_events import AvaEvents
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.driver import DriverEvent, LastEvent, Only, Stop
from tests.ava_rows import ROWS, Row, final, shown

NO_EVENTS = Warned("ava.events", "AVA told no events: its results are read as TAP")

LIMITS = Limits()


class Play:
    """A run of one file, told event by event."""

    def __init__(self, *, limits: Limits = LIMITS, **more: Any) -> None:
        self.driver = AvaEvents(
            Suite(id="s", runner="ava", driver="events", files=("a.js",), limits=limits), "r1", **more
        )
        self.told: list[DriverEvent] = []
        self.now = 0.0

    def tell(self, kind: str, title: str = "", file: str | None = "a.js", **fields: Any) -> list[DriverEvent]:
        self.now += 1
        line = json.dumps({"type": kind, "testFile": file, "title": title, **fields}) + "\n"
        got = self.driver.feed("events", line.encode(), self.now)
        self.told += got
        return got

    def select(self, *titles: str) -> None:
        for title in titles:
            self.tell("declared-test", title)
            self.tell("selected-test", title)

    def finish(self, code: int | None = 1, died_of: str | None = None, reason: str | None = None) -> list[LastEvent]:
        got = self.driver.finish(code, died_of, reason, 99.0)
        self.told += got
        return got

    def shown(self) -> list[str]:
        return shown(final(self.told).values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_ava_tells_becomes(row: Row) -> None:
    driver = AvaEvents(row.suite("events"), "r1")
    events = []
    if row.stopped:
        driver.stop(row.stopped)
    for at, byte in enumerate(row.wire("events")):
        events += driver.feed("events", bytes([byte]), at)
    events += driver.feed("stdout", row.wire("tap"), 9e9)
    events += driver.finish(row.code, None, row.stopped, 9e9)
    assert shown(final(events).values()) == row.expected("events")
    assert not [event for event in events if isinstance(event, Warned)]


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in ("titles", "globs")], ids=lambda row: row.name)
def test_both_drivers_give_a_test_the_same_case(row: Row) -> None:
    tap, events = AvaTap(row.suite("tap"), "r1"), AvaEvents(row.suite("events"), "r1")
    by_tap = {event.case for event in tap.feed("stdout", row.wire("tap"), 1.0) if isinstance(event, TestFinished)}
    told = events.feed("events", row.wire("events"), 1.0)
    by_events = {event.case for event in told if isinstance(event, TestFinished) and event.kind == "test"}
    assert by_events <= by_tap


def test_a_test_from_its_start_to_its_end() -> None:
    play = Play(attempt=2)
    play.select("works")
    assert play.driver.running() is None
    (started,) = play.tell("test-register-log-reference", "works")
    assert started == TestStarted(
        run="r1", suite="s", case="a.js › works@2", name="works", file="a.js", started=3.0, attempt=2
    )
    assert play.driver.running() == "a.js › works@2"
    (ended,) = play.tell("test-passed", "works", duration=1500, knownFailing=True, logs=["one\ntwo", "\x1b[31mthree"])
    assert ended == TestFinished(
        run="r1",
        suite="s",
        case="a.js › works@2",
        name="works",
        file="a.js",
        state="passed",
        started=3.0,
        ended=4.0,
        duration=1.5,
        attempt=2,
        log=("one", "two", "three"),
        known_failure=True,
    )
    assert play.driver.running() is None
    play.tell("end", file=None)
    assert play.finish(0) == []


def test_the_one_that_runs_longest_is_the_one_that_runs() -> None:
    play = Play()
    play.select("a", "b")
    play.tell("test-register-log-reference", "a")
    play.tell("test-register-log-reference", "b")
    assert play.driver.running() == "a.js › a"
    play.tell("test-passed", "a")
    assert play.driver.running() == "a.js › b"


def test_a_failure_says_what_and_where() -> None:
    play = Play()
    err = {
        "name": "AssertionError",
        "assertion": "t.is()",
        "details": {"Difference:": "- 1\n+ 2", "n": "x" * 200_000},
        "message": "no\nway",
        "at": "a.js:4",
        "line": "AssertionError: no",
    }
    (failed,) = play.tell("test-failed", "a", err=err)
    assert isinstance(failed, TestFinished)
    assert (failed.state, failed.message, failed.at) == ("failed", "no", "a.js:4")
    assert failed.details["assertion"] == "t.is()"
    assert failed.details["details"]["Difference:"] == "- 1\n+ 2"
    assert len(json.dumps(failed.details)) < 70_000


def test_output_is_of_the_only_test_that_runs_else_of_what_fails_next() -> None:
    def write(text: str) -> None:
        play.tell("worker-stdout", chunk=base64.b64encode(text.encode()).decode())

    play = Play(limits=Limits(test_output=8))
    play.select("a", "b", "c")
    write("at load ")
    play.tell("test-register-log-reference", "a")
    write("of a alone, long")
    (a,) = play.tell("test-passed", "a")
    play.tell("test-register-log-reference", "b")
    play.tell("test-register-log-reference", "c")
    write("of both")
    (b,) = play.tell("test-passed", "b")
    (c,) = play.tell("test-failed", "c", err={"name": "Error"})
    outputs = [event.output for event in (a, b, c) if isinstance(event, TestFinished)]
    assert outputs == ["ne, long", "", " of both"]


def test_killed_all_that_was_selected_is_lost_by_name() -> None:
    play = Play()
    play.select("a", "b")
    play.tell("test-passed", "a")
    play.finish(None, "SIGKILL")
    assert play.shown() == ["lost a.js › b", "passed a.js › a"]


def test_killed_before_anything_was_selected_the_runner_is_lost() -> None:
    play = Play()
    play.tell("starting")
    (crash,) = play.finish(None, "SIGKILL")
    assert isinstance(crash, TestFinished)
    assert (crash.kind, crash.state) == ("crash", "lost")
    assert crash.message == "lost: AVA ended by SIGKILL before it was done"


def test_files_that_had_not_begun_are_lost_with_the_runner() -> None:
    play = Play()
    play.tell("files", file=None, total=3)
    play.select("a")
    play.tell("test-failed", "a", err={"name": "E"})
    play.finish(None, "SIGKILL")
    assert play.shown() == [
        "failed a.js › a",
        "lost/crash AVA ended by SIGKILL before it was done: 2 of 3 files had not begun",
    ]


def test_files_that_a_failure_kept_from_beginning_are_skipped() -> None:
    play = Play()
    play.tell("files", file=None, total=3)
    play.select("a")
    play.tell("test-failed", "a", err={"name": "E"})
    play.tell("end", file=None)
    play.finish(1)
    assert play.shown() == ["failed a.js › a", "skipped/rest (not reported) x?"]


def test_stopped_what_was_selected_is_aborted_by_name() -> None:
    play = Play(limits=Limits(grace=3))
    play.select("a", "b")
    play.tell("test-register-log-reference", "a")
    assert play.driver.stop("cancel: by hand") == (Stop(signal.SIGINT, 3, alone=True), Stop(signal.SIGTERM, 5.0))
    play.tell("interrupt", file=None)
    a, _ = play.finish(1, None, "cancel: by hand")
    assert isinstance(a, TestFinished)
    assert (a.message, a.started) == ("aborted: cancel: by hand", 5.0)
    assert play.shown() == ["aborted a.js › a", "aborted a.js › b"]


def test_stopped_before_the_end_a_run_is_never_complete() -> None:
    play = Play()
    play.select("a")
    play.tell("test-passed", "a")
    play.driver.stop("stop")
    play.tell("worker-failed", signal="SIGTERM")
    play.finish(None, "SIGTERM", "stop")
    assert play.shown() == [
        "aborted/crash a.js › a.js exited due to SIGTERM",
        "aborted/rest (not reported) x?",
        "passed a.js › a",
    ]


def test_avas_own_timeout_names_the_hung_tests() -> None:
    play = Play()
    play.select("a", "b")
    play.tell("timeout", file=None, period=10_000, pendingTests={"a.js": ["a", "unheard of"], "z.js": ["a"]})
    a, b = play.finish(1)
    assert isinstance(a, TestFinished)
    assert isinstance(b, TestFinished)
    assert (a.state, a.message) == ("lost", "lost: no test had ended for 10 s, AVA's own timeout")
    assert b.message == "lost: AVA died before it ended"


def test_one_crash_a_file() -> None:
    play = Play()
    play.select("a")
    play.tell("uncaught-exception", err={"name": "E", "message": "m", "line": "E: m"})
    play.tell("unhandled-rejection", err={"name": "E", "message": "n", "line": "E: n"})
    play.tell("worker-failed", nonZeroExitCode=1)
    play.tell("worker-finished", file="empty.js", forcedExit=False)
    play.tell("worker-finished", file="stopped.js", forcedExit=True)
    play.tell("worker-failed", file="memory.js", err={"name": "E", "message": "heap", "line": "E: heap"})
    play.tell("shared-worker-error", file=None, err={"name": "E", "message": "shared"})
    play.tell("end", file=None)
    play.finish(1)
    assert play.shown() == [
        "blocked a.js › a",
        "blocked/crash a.js › E: m",
        "blocked/crash empty.js › No tests found in empty.js",
        "blocked/crash memory.js › E: heap",
        "blocked/crash shared-worker-error",
    ]


def test_an_exit_code_that_nothing_explains_is_a_crash_of_the_runner() -> None:
    play = Play()
    play.select("a")
    play.tell("test-passed", "a")
    play.tell("end", file=None)
    play.driver.feed("stderr", b"said last\n", 50.0)
    (crash,) = play.finish(1)
    assert isinstance(crash, TestFinished)
    assert (crash.kind, crash.state, crash.output) == ("crash", "blocked", "said last")
    assert crash.name == "AVA ended with exit code 1, and no result says why"


def test_with_nothing_selected_the_crash_says_so() -> None:
    play = Play()
    play.tell("end", file=None)
    (crash,) = play.finish(1)
    assert isinstance(crash, TestFinished)
    assert crash.name == "AVA ended with exit code 1: no file or title matched, or no test was selected"


def test_only_what_was_asked_for_gives_records() -> None:
    play = Play(attempt=2, only=[Only("a.js", "a")])
    play.select("a", "a longer title that the pattern matched")
    for title in ("a", "a longer title that the pattern matched"):
        play.tell("test-register-log-reference", title)
        play.tell("test-passed", title)
    play.tell("end", file=None)
    play.finish(0)
    assert [event.case for event in play.told if isinstance(event, TestStarted | TestFinished)] == ["a.js › a@2"] * 2


def test_without_events_two_seconds_after_the_first_result_tap_is_read() -> None:
    driver = AvaEvents(Suite(id="s", runner="ava", driver="events", files=("a.js",)), "r1")
    assert driver.feed("stdout", b"TAP version 13\n", 0.0) == []
    assert driver.feed("stdout", b"ok 1 - a\n", 10.0) == []
    assert driver.feed("stderr", b"noise\n", 11.9) == []
    told = driver.feed("stdout", b"ok 2 - b\n", 12.0)
    assert told[0] == NO_EVENTS
    assert shown(final(told).values()) == ["passed a.js › a", "passed a.js › b"]
    assert driver.feed("events", b'{"type":"end"}\n', 12.5) == []  # too late
    assert len(driver.feed("stdout", b"ok 3 - c\n", 13.0)) == 1
    (rest,) = driver.finish(None, "SIGKILL", None, 14.0)
    assert isinstance(rest, TestFinished)
    assert (rest.kind, rest.state) == ("rest", "lost")


def test_without_events_at_the_end_tap_counts() -> None:
    driver = AvaEvents(Suite(id="s", runner="ava", driver="events", files=("a.js",)), "r1")
    driver.feed("stdout", b"ok 1 - a\n\n1..1\n# tests 1\n# pass 1\n# fail 0\n", 1.0)
    warned, record = driver.finish(0, None, None, 1.5)
    assert warned == NO_EVENTS
    assert isinstance(record, TestFinished)
    assert record.state == "passed"


def test_a_project_with_its_own_observer_is_read_as_tap_at_once() -> None:
    driver = AvaEvents(Suite(id="s", runner="ava", driver="events", files=("a.js",)), "r1")
    driver.feed("stdout", b"ok 1 - a\n", 1.0)
    warned, record = driver.feed("events", b'{"type":"unusable","reason":"the project has one"}\n', 1.0)
    assert warned == Warned("ava.events", "the project has one: its results are read as TAP")
    assert isinstance(record, TestFinished)


def test_a_line_that_cannot_be_read_is_a_warning_and_warnings_are_few() -> None:
    play = Play()
    bad = b"not json\n" + b'{"type": 7}\n' + b"x" * (2 * 1024 * 1024) + b"\n" + b"{}\n" * 100
    warnings = play.driver.feed("events", bad, 1.0)
    assert len(warnings) == 5
    assert "of 2097152 bytes" in str(warnings[2])
    play.tell("end", file=None)
    assert play.finish(0)[0] == Warned("ava.events", "103 lines on the events' pipe could not be read")


def test_a_line_number_that_selects_nothing_is_a_warning() -> None:
    play = Play()
    assert play.tell("line-number-selection-error", err={"name": "E", "message": "cannot parse"}) == [
        Warned("ava.lines", "a.js: cannot parse")
    ]
