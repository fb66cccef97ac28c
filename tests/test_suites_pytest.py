"""agent/suites/runners/pytest.py and plugins/emissary_report.py: what the plugin tells, and what becomes of it."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import TestFinished, TestsSelected, TestStarted, Warned
from agent.suites.messages import Limits, Suite
from agent.suites.runners.driver import WARNINGS_MAX, DriverEvent, Only, Stop
from agent.suites.runners.pytest import PytestDriver, launch
from tests.runner_process import run, states

SUITE = Suite(id="s1", runner="pytest", limits=Limits(grace=7))
PHASE = {"sub": None, "xfail": None, "duration": None, "message": None, "text": "", "at": None, "output": ""}


def line(event: str, **facts: Any) -> bytes:
    if event == "phase":
        facts = PHASE | {"properties": {}} | facts
    return json.dumps({"event": event} | facts).encode() + b"\n"


def of_test(nodeid: str, *phases: tuple[str, str], **facts: Any) -> bytes:
    """The lines of one test; `facts` go to each of its phases."""
    told = [line("phase", id=nodeid, when=when, outcome=outcome, **facts) for when, outcome in phases]
    return line("start", id=nodeid) + b"".join(told) + line("finish", id=nodeid)


GOOD = (("setup", "passed"), ("call", "passed"), ("teardown", "passed"))
BAD = (("setup", "passed"), ("call", "failed"), ("teardown", "passed"))
END = line("end", exitstatus=0, failfast=False)


def told(
    wire: bytes, code: int | None = 0, ended_by: str | None = None, reason: str | None = None, attempt: int = 1
) -> list[DriverEvent]:
    driver = PytestDriver(SUITE, "r1", attempt=attempt)
    events = driver.feed("events", wire, 5.0)
    return [*events, *driver.finish(code, ended_by, reason, 9.0)]


def records(events: list[DriverEvent]) -> list[TestFinished]:
    return [event for event in events if isinstance(event, TestFinished)]


def test_a_test_is_told_when_it_begins_and_with_its_call() -> None:
    driver = PytestDriver(SUITE, "r1")
    told = driver.feed("events", line("session", pytest="9") + line("collected", ids=["t/a.py::test_x[1]"]), 4.0)
    assert told == [TestsSelected(run="r1", suite="s1", tests=(("t/a.py", "test_x[1]"),))]
    (started,) = driver.feed("events", line("start", id="t/a.py::test_x[1]"), 5.0)
    assert started == TestStarted(
        run="r1", suite="s1", case="t/a.py › test_x[1]", name="test_x[1]", file="t/a.py", started=5.0
    )
    assert driver.running() == "t/a.py › test_x[1]"
    setup = line("phase", id="t/a.py::test_x[1]", when="setup", outcome="passed", duration=0.5)
    call = line(
        "phase", id="t/a.py::test_x[1]", when="call", outcome="failed", duration=1.0, message="assert 0",
        text="E  assert 0", at="a.py:3", output="\x1b[1mhi\n", properties={"n": 1},
    )  # fmt: skip
    assert driver.feed("events", setup, 5.5) == []
    assert driver.feed("events", call, 6.5) == [
        TestFinished(
            run="r1",
            suite="s1",
            case="t/a.py › test_x[1]",
            name="test_x[1]",
            file="t/a.py",
            state="failed",
            started=5.0,
            ended=6.5,
            duration=1.5,
            message="assert 0",
            details={"longrepr": "E  assert 0", "properties": {"n": 1}},
            at="a.py:3",
            output="hi\n",
        )
    ]
    assert driver.feed("events", line("finish", id="t/a.py::test_x[1]") + END, 7.0) == []
    assert driver.running() is None
    assert driver.finish(1, None, None, 9.0) == []


@pytest.mark.parametrize(
    ("phases", "facts", "state", "message"),
    [
        (GOOD, {}, "passed", None),
        (BAD, {"message": "no"}, "failed", "no"),
        ((("setup", "failed"), ("teardown", "passed")), {"message": "fixture"}, "blocked", "fixture"),
        ((("setup", "skipped"), ("teardown", "passed")), {"message": "why"}, "skipped", "why"),
        ((("setup", "passed"), ("call", "skipped")), {"message": "inside"}, "skipped", "inside"),
        ((("setup", "passed"), ("call", "skipped")), {"xfail": "known"}, "todo", "known"),
        ((("setup", "passed"), ("call", "skipped")), {"xfail": "", "message": "assert"}, "todo", "assert"),
        ((("setup", "passed"), ("call", "passed")), {"xfail": "known"}, "passed", None),
        ((("setup", "passed"), ("call", "failed")), {"message": "[XPASS(strict)]"}, "failed", "[XPASS(strict)]"),
        ((("setup", "passed"), ("???", "failed")), {"message": "worker crashed"}, "blocked", "worker crashed"),
        ((("setup", "passed"), ("call", "rerun"), *GOOD), {}, "passed", None),
    ],
)
def test_the_states(phases: Any, facts: dict[str, Any], state: str, message: str | None) -> None:
    (record,) = records(told(of_test("a.py::t", *phases, **facts) + END))
    assert (record.state, record.message) == (state, message)
    assert record.known_failure == (state == "todo")


def test_a_failed_teardown_is_a_hook_beside_the_test() -> None:
    wire = of_test("a.py::t", ("setup", "passed"), ("call", "passed"), ("teardown", "failed"), message="late")
    assert states(told(wire + END, code=1)) == {"a.py › t": "passed", "a.py › teardown of t": "hook blocked"}


def test_a_second_outcome_corrects_the_first() -> None:
    first, second = records(told(of_test("a.py::t", *BAD, ("call", "passed")) + END))
    assert (first.case, first.state, first.rev) == ("a.py › t", "failed", 1)
    assert (second.case, second.state, second.rev) == ("a.py › t", "passed", 2)


def test_subtests_are_tests_beside_theirs() -> None:
    wire = (
        line("start", id="a.py::t")
        + line("phase", id="a.py::t", when="call", outcome="failed", sub="[one] (i=1)")
        + line("phase", id="a.py::t", when="call", outcome="failed", message="contains 1 failed subtest")
        + line("finish", id="a.py::t")
    )
    assert states(told(wire + END, code=1)) == {"a.py › t › [one] (i=1)": "failed", "a.py › t": "failed"}


def test_a_later_attempt_is_marked() -> None:
    started, record = told(of_test("a.py::t", *GOOD) + END, attempt=2)
    assert isinstance(started, TestStarted)
    assert isinstance(record, TestFinished)
    assert (started.case, started.attempt, record.case, record.attempt) == ("a.py › t@2", 2, "a.py › t@2", 2)


def test_a_file_that_cannot_be_collected_is_a_crash_with_its_file() -> None:
    wire = line("uncollected", id="a.py", message="ImportError: x", text="long", at=None) + line(
        "end", exitstatus=2, failfast=False
    )
    (record,) = records(told(wire, code=2))
    assert (record.kind, record.state, record.file, record.name, record.details) == (
        *("crash", "blocked", "a.py", "ImportError: x"),
        {"longrepr": "long"},
    )


def test_a_file_skipped_as_a_whole_is_told() -> None:
    wire = line("ignored", id="a.py", message="no display") + line("end", exitstatus=5, failfast=False)
    (record,) = records(told(wire, code=5))
    assert (record.kind, record.state, record.file, record.count, record.message) == (
        *("rest", "skipped", "a.py", None, "no display"),
    )


COLLECTED = line("session", pytest="9") + line("collected", ids=["a.py::t", "a.py::u"])
ONE = COLLECTED + of_test("a.py::t", *GOOD)


@pytest.mark.parametrize(
    ("wire", "code", "ended_by", "reason", "expected"),
    [
        (ONE, None, "SIGINT", "cancelled", {"a.py › t": "passed", "a.py › u": "aborted"}),
        (ONE + line("end", exitstatus=2, failfast=False), 2, None, "cancelled",
         {"a.py › t": "passed", "a.py › u": "aborted"}),
        (ONE, None, "SIGKILL", None, {"a.py › t": "passed", "a.py › u": "lost"}),
        (ONE + line("start", id="a.py::u"), 3, None, None, {"a.py › t": "passed", "a.py › u": "lost"}),
        (COLLECTED + of_test("a.py::t", *BAD) + line("end", exitstatus=1, failfast=True), 1, None, None,
         {"a.py › t": "failed", "a.py › u": "skipped"}),
        (ONE + line("end", exitstatus=2, failfast=False), 2, None, None, {"a.py › t": "passed", "a.py › u": "blocked"}),
        (line("session", pytest="9"), None, "SIGKILL", None, {"(not reported)": "rest lost"}),
        (line("session", pytest="9"), None, "SIGTERM", "cancelled", {"(not reported)": "rest aborted"}),
        (b"", None, "SIGTERM", "cancelled", {"(not reported)": "rest aborted"}),
    ],
)  # fmt: skip
def test_what_was_collected_and_has_no_outcome(
    wire: bytes, code: int | None, ended_by: str | None, reason: str | None, expected: dict[str, str]
) -> None:
    assert states(told(wire, code, ended_by, reason)) == expected


@pytest.mark.parametrize(
    ("status", "name"),
    [(3, "pytest had an internal error"), (4, "pytest was called in a wrong way"), (5, "no tests")],
)
def test_these_exits_are_crashes(status: int, name: str) -> None:
    wire = line("session", pytest="9") + line("end", exitstatus=status, failfast=False)
    assert states(told(wire, status)) == {name: "crash blocked"}


def test_an_exit_that_no_record_explains_is_a_crash() -> None:
    good = of_test("a.py::t", *GOOD) + END
    assert states(told(good, 7)) == {
        "a.py › t": "passed",
        "pytest exited with code 7, and no test failed": "crash blocked",
    }
    assert states(told(good, None, "SIGSEGV")) == {
        "a.py › t": "passed",
        "pytest was ended by SIGSEGV, after its session": "crash lost",
    }
    assert states(told(of_test("a.py::t", *BAD) + END, 1)) == {"a.py › t": "failed"}


def test_a_pytest_that_never_came_up_is_blocked_with_what_it_said() -> None:
    driver = PytestDriver(SUITE, "r1")
    driver.feed("stderr", b"/usr/bin/python3: No module named pytest\n\n", 5.0)
    (record,) = records([*driver.finish(1, None, None, 9.0)])
    assert (record.kind, record.state) == ("crash", "blocked")
    assert record.name == "pytest exited with code 1: /usr/bin/python3: No module named pytest"


def test_what_is_no_event_is_a_warning_and_warnings_are_bounded() -> None:
    wire = b'{"event":"end"}\n{"event":"other"}\n[]\n\xff\n' + b"x\n" * WARNINGS_MAX
    events = PytestDriver(SUITE, "r1").feed("events", wire, 5.0)
    assert [type(event) for event in events] == [Warned] * WARNINGS_MAX


def test_output_is_bounded() -> None:
    suite = Suite(id="s1", runner="pytest", limits=Limits(test_output=10))
    driver = PytestDriver(suite, "r1")
    *_, record = driver.feed("events", of_test("a.py::t", ("call", "passed"), output="x" * 100), 5.0)
    assert isinstance(record, TestFinished)
    assert len(record.output.encode()) <= 10


def test_it_is_stopped_by_sigint_first() -> None:
    assert PytestDriver(SUITE, "r1").stop("cancel") == (Stop(signal.SIGINT, 7), Stop(signal.SIGTERM, 5))


@given(st.data())
def test_chunking_never_changes_the_records(data: st.DataObject) -> None:
    wire = ONE + of_test("a.py::u", *BAD) + END
    cut, got = PytestDriver(SUITE, "r1"), list[DriverEvent]()
    expected = PytestDriver(SUITE, "r1").feed("events", wire, 5.0)
    while wire:
        n = data.draw(st.integers(1, len(wire)))
        got += cut.feed("events", wire[:n], 5.0)
        wire = wire[n:]
    assert got == expected


# The launch


def test_the_launch(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").touch()
    suite = Suite(
        id="s1",
        runner="pytest",
        args=("-q",),
        files=("test_*.py",),
        match=("login", "not slow"),
        env={"PYTHONPATH": "lib"},
        limits=Limits(test_output=99),
    )
    got = launch(suite, tmp_path, tmp_path / "scratch", "r1")
    assert got.argv == (
        *("python3", "-m", "pytest", "-p", "emissary_report", "-k", "(login) or (not slow)", "-q", "test_a.py"),
    )
    assert got.set_env == {
        "PYTHONPATH": f"{tmp_path}/scratch:lib",
        "PYTHONUNBUFFERED": "1",
        "EMISSARY_RUN": "r1",
        "EMISSARY_SUITE": "s1",
        "EMISSARY_OUTPUT_MAX": "99",
    }
    assert (got.pipes, list(got.files)) == (("events",), ["emissary_report.py"])


def test_a_command_replaces_the_executable_and_only_goes_by_file(tmp_path: Path) -> None:
    suite = Suite(id="s1", runner="pytest", command=("poetry", "run", "pytest"))
    got = launch(suite, tmp_path, tmp_path, "r1", only=[Only("a.py", "t"), Only("b.py")])
    assert got.argv == ("poetry", "run", "pytest", "-p", "emissary_report")
    assert got.set_env["PYTHONPATH"] == str(tmp_path)
    assert got.set_env["EMISSARY_ONLY"] == f"{tmp_path}/only.json"
    assert json.loads(got.files["only.json"]) == [["a.py", "t"], ["b.py", None]]


# The plugin, in the pytest that runs these tests

PROJECT = """\
import os, signal, sys, unittest
import pytest

def test_passes(record_property):
    print("hello")
    record_property("polarion-parameter-x", "1")

def test_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not now")
def test_skipped(): pass

@pytest.mark.xfail(reason="known")
def test_xfails(): assert 0

@pytest.mark.xfail(strict=True)
def test_xpasses_strictly(): pass

@pytest.fixture
def broken(): raise ValueError("fixture broke")

def test_blocked(broken): pass

@pytest.fixture
def late():
    yield
    raise ValueError("teardown broke")

def test_with_a_late_failure(late): pass

@pytest.mark.parametrize("x", ["a  b"])
def test_parameter(x): pass

def test_with_a_child():
    import subprocess
    assert "EMISSARY_PIPE_EVENTS" not in os.environ
"""
ROWS = {
    "test_a.py › test_passes": "passed",
    "test_a.py › test_fails": "failed",
    "test_a.py › test_skipped": "skipped",
    "test_a.py › test_xfails": "todo",
    "test_a.py › test_xpasses_strictly": "failed",
    "test_a.py › test_blocked": "blocked",
    "test_a.py › test_with_a_late_failure": "passed",
    "test_a.py › teardown of test_with_a_late_failure": "hook blocked",
    "test_a.py › test_parameter[a b]": "passed",
    "test_a.py › test_with_a_child": "passed",
}


def played(
    tmp_path: Path,
    files: dict[str, str],
    *args: str,
    only: tuple[Only, ...] = (),
    stop_at: str = "",
) -> list[DriverEvent]:
    """Run the files by the real pytest."""
    project, scratch = tmp_path / "project", tmp_path / "scratch"
    project.mkdir()
    scratch.mkdir()
    for name, text in files.items():
        (project / name).write_text(text)
    suite = Suite(
        id="s1", runner="pytest", command=(sys.executable, "-m", "pytest"), args=("-p", "no:cacheprovider", *args)
    )

    def is_running(events: list[DriverEvent]) -> bool:
        return any(isinstance(event, TestStarted) and event.name == stop_at for event in events)

    got = launch(suite, project, scratch, "r1", only=only)
    return run(got, PytestDriver(suite, "r1"), project, scratch, stop_when=is_running if stop_at else None)


def test_a_project_of_every_kind_of_test(tmp_path: Path) -> None:
    events = played(tmp_path, {"test_a.py": PROJECT})
    assert states(events) == ROWS
    assert not [event for event in events if isinstance(event, Warned)]
    by_name = {record.name: record for record in records(events)}
    passes, fails, skipped = by_name["test_passes"], by_name["test_fails"], by_name["test_skipped"]
    assert (passes.output, passes.details) == ("hello\n", {"properties": {"polarion-parameter-x": "1"}})
    assert fails.message == "AssertionError: one is not two"
    assert fails.at is not None
    assert fails.at.endswith("test_a.py:9")
    assert "assert 1 == 2" in fails.details["longrepr"]
    assert skipped.message == "not now"
    assert by_name["test_blocked"].message == "ValueError: fixture broke"
    for record in records(events):
        assert record.duration is not None
        assert record.duration >= 0


def test_what_a_test_does_to_its_process_is_no_matter_of_the_report(tmp_path: Path) -> None:
    hostile = """\
import json, os, time
def test_of_what_we_write_with(monkeypatch):
    monkeypatch.setattr(json, "dumps", None)
    monkeypatch.setattr(json, "JSONEncoder", None)
    monkeypatch.setattr(os, "write", lambda fd, data: 1 / 0)
    monkeypatch.setattr(time, "time", lambda: float("nan"))
    monkeypatch.setattr(os, "environ", {})
def test_fork():
    if pid := os.fork():
        os.waitpid(pid, 0)
def test_after(): pass
"""
    assert states(played(tmp_path, {"test_a.py": hostile})) == {
        "test_a.py › test_of_what_we_write_with": "passed",
        "test_a.py › test_fork": "passed",
        "test_a.py › test_after": "passed",
    }


def test_only_some_tests_are_run_again(tmp_path: Path) -> None:
    only = (Only("test_a.py", "test_passes"), Only("test_a.py", "test_parameter[a b]"), Only("test_b.py"))
    files = {"test_a.py": PROJECT, "test_b.py": "def test_x(): pass", "test_c.py": "def test_y(): 1/0"}
    assert states(played(tmp_path, files, only=only)) == {
        "test_a.py › test_passes": "passed",
        "test_a.py › test_parameter[a b]": "passed",
        "test_b.py › test_x": "passed",
    }


def test_files_that_cannot_be_read_block_what_else_was_collected(tmp_path: Path) -> None:
    files = {
        "test_a.py": "import no_such_module",
        "test_b.py": "import pytest; pytest.importorskip('no_such_module')",
        "test_c.py": "def test_x(): pass",
    }
    assert states(played(tmp_path, files)) == {
        "test_a.py › ModuleNotFoundError: No module named 'no_such_module'": "crash blocked",
        "test_b.py › (not reported)": "rest skipped",
        "test_c.py › test_x": "blocked",
    }


def test_stopping_at_a_failure_skips_the_rest(tmp_path: Path) -> None:
    files = {"test_a.py": "def test_x(): 1/0\ndef test_y(): pass"}
    assert states(played(tmp_path, files, "-x")) == {"test_a.py › test_x": "failed", "test_a.py › test_y": "skipped"}


def test_a_killed_pytest_loses_its_tests_by_name(tmp_path: Path) -> None:
    text = (
        "import os, signal\ndef test_w(): pass\ndef test_x(): os.kill(os.getpid(), signal.SIGKILL)\ndef test_y(): pass"
    )
    assert states(played(tmp_path, {"test_a.py": text})) == {
        "test_a.py › test_w": "passed",
        "test_a.py › test_x": "lost",
        "test_a.py › test_y": "lost",
    }


def test_a_stopped_pytest_aborts_its_tests_by_name(tmp_path: Path) -> None:
    text = "import signal\ndef test_w(): pass\ndef test_x(): signal.pause()\ndef test_y(): pass"
    assert states(played(tmp_path, {"test_a.py": text}, stop_at="test_x")) == {
        "test_a.py › test_w": "passed",
        "test_a.py › test_x": "aborted",
        "test_a.py › test_y": "aborted",
    }


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-k", "nothing"], {"no tests": "crash blocked"}),
        (["no_such_file.py"], {"pytest was called in a wrong way": "crash blocked"}),
    ],
)
def test_nothing_to_run(tmp_path: Path, args: list[str], expected: dict[str, str]) -> None:
    assert states(played(tmp_path, {"test_a.py": "def test_x(): pass"}, *args)) == expected


def test_a_usage_that_pytest_cannot_read(tmp_path: Path) -> None:
    (record,) = records(played(tmp_path, {}, "--no-such-option"))
    assert (record.kind, record.state) == ("crash", "blocked")
    assert record.name.startswith("pytest exited with code 4: ")
