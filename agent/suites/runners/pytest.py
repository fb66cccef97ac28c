"""Runner `pytest`: started with a plugin of ours, which tells of each phase of each test on a pipe.

    collected -> start -> phase setup -> phase call -> (record) -> phase teardown -> finish

A test's record is told with its call, or with a setup that did not pass; the teardown comes after it and never changes
it. What was collected and had no outcome is told by name when pytest has ended.

Source: protocols/suites.md, "pytest, TAP, command"; the lines of the pipe: plugins/emissary_report.py.
"""

import json
import os
import pkgutil
import signal as signals
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from agent.core.events import State, TestFinished, TestsSelected, TestStarted, Warned
from agent.core.lines import Lines
from agent.suites.messages import Suite
from agent.suites.runners.command import expanded
from agent.suites.runners.driver import (
    MESSAGE_MAX,
    TEXT_MAX,
    UNREPORTED,
    CannotLaunch,
    Cases,
    DriverEvent,
    LastEvent,
    Launch,
    Only,
    PluginLines,
    Stop,
    clip,
    first_line,
    plain,
    title,
)

EVENTS: Final = "events"  # the pipe
PLUGIN: Final = "emissary_report"
ONLY: Final = "only.json"  # in the scratch folder
TERM_WAIT_S: Final = 5.0
_STDERR_MAX: Final = 4096  # bytes that are kept, to say why pytest never came up
_NO_TESTS: Final = 5  # exit status
_ENDS: Final = {3: "pytest had an internal error", 4: "pytest was called in a wrong way", _NO_TESTS: "no tests"}


def launch(suite: Suite, project: Path, scratch: Path, run: str, *, only: Sequence[Only] = ()) -> Launch:
    """pytest of the `python3` in PATH, or `command` in its place. Raises CannotLaunch."""
    plugin = pkgutil.get_data("agent.suites.runners", f"plugins/{PLUGIN}.py")
    if plugin is None:
        raise CannotLaunch(f"{PLUGIN}.py is not part of this installation", remedy="Install the agent again.")
    files = {f"{PLUGIN}.py": plugin}
    own_path = suite.env.get("PYTHONPATH") or ("PYTHONPATH" in suite.env_pass and os.environ.get("PYTHONPATH"))
    env = {
        "PYTHONPATH": f"{scratch}{os.pathsep}{own_path}" if own_path else str(scratch),
        "PYTHONUNBUFFERED": "1",
        "EMISSARY_RUN": run,
        "EMISSARY_SUITE": suite.id,
        "EMISSARY_OUTPUT_MAX": str(suite.limits.test_output),
    }
    if only:
        files[ONLY] = json.dumps([[one.file, one.name] for one in only]).encode()
        env["EMISSARY_ONLY"] = str(scratch / ONLY)
    selection = ("-k", " or ".join(f"({match})" for match in suite.match)) if suite.match else ()
    return Launch(
        argv=(
            *(suite.command or ("python3", "-m", "pytest")),
            *("-p", PLUGIN),
            *selection,
            *suite.args,
            *expanded(suite.files, project),
        ),
        set_env=env,
        unset_env=("EMISSARY_ONLY", "PYTEST_XDIST_WORKER"),
        pipes=(EVENTS,),
        files=files,
    )


class _Session(msgspec.Struct, frozen=True, tag_field="event", tag="session"):
    pytest: str


class _Collected(msgspec.Struct, frozen=True, tag_field="event", tag="collected"):
    ids: list[str]


class _Ignored(msgspec.Struct, frozen=True, tag_field="event", tag="ignored"):
    id: str
    message: str | None


class _Uncollected(msgspec.Struct, frozen=True, tag_field="event", tag="uncollected"):
    id: str
    message: str | None
    text: str
    at: str | None


class _Start(msgspec.Struct, frozen=True, tag_field="event", tag="start"):
    id: str


class _Phase(msgspec.Struct, frozen=True, tag_field="event", tag="phase"):
    id: str
    sub: str | None
    when: str | None
    outcome: str
    xfail: str | None
    duration: float | None
    message: str | None
    text: str
    at: str | None
    output: str
    properties: dict[str, str | int]


class _Finish(msgspec.Struct, frozen=True, tag_field="event", tag="finish"):
    id: str


class _End(msgspec.Struct, frozen=True, tag_field="event", tag="end"):
    exitstatus: int
    failfast: bool


_Line: TypeAlias = _Session | _Collected | _Ignored | _Uncollected | _Start | _Phase | _Finish | _End
_decode = msgspec.json.Decoder(_Line).decode


class _Test:
    """A test that runs now."""

    def __init__(self, case: str, started: float) -> None:
        self.case, self.started = case, started
        self.setup_s = 0.0
        self.rev = 0  # of its record; 0: none yet


class PytestDriver:
    """One attempt of a run of pytest."""

    def __init__(self, suite: Suite, run: str, *, attempt: int = 1) -> None:
        self._suite, self._run, self._attempt = suite, run, attempt
        self._output_max = suite.limits.test_output
        # The plugin cuts its texts by characters, of which JSON makes six bytes at most.
        self._lines = Lines(6 * (TEXT_MAX + self._output_max) + 1024 * 1024)
        self._cases = Cases(attempt)
        self._due: dict[str, None] = {}  # collected, without an outcome
        self._tests: dict[str, _Test] = {}  # those that run now
        self._is_up = False
        self._end: _End | None = None
        self._stderr = bytearray()
        self._told = PluginLines(_decode, "pytest.event")
        self._is_explained = self._has_record = False

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read. What pytest itself prints is output."""
        events: list[DriverEvent] = []
        if stream == "stderr":
            self._stderr += data
            del self._stderr[:-_STDERR_MAX]
        elif stream == EVENTS:
            for line in self._lines.feed(data):
                self._line(line, now, events)
        return events

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """SIGINT, on which pytest ends its session; then SIGTERM."""
        return Stop(signals.SIGINT, self._suite.limits.grace), Stop(signals.SIGTERM, TERM_WAIT_S)

    def running(self) -> str | None:
        """The test that runs longest."""
        return next((test.case for test in self._tests.values()), None)

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """What was collected and had no outcome, and what the exit says that no record does."""
        events: list[DriverEvent] = []
        for line in self._lines.eof():
            self._line(line, now, events)
        how = f"pytest was ended by {signal}" if signal else f"pytest exited with code {code}"
        state, why = self._left_over(how, reason)
        for nodeid in self._due:
            self._add(events, now, nodeid, state, message=why, test=self._tests.get(nodeid))
        if self._end is not None:
            if reason is None:
                self._judge_exit(self._end, code, signal, how, now, events)
        elif not self._due:
            self._judge_silence(how, reason, now, events)
        self._due.clear()
        self._tests.clear()
        return [event for event in events if isinstance(event, TestFinished | Warned)]

    def _left_over(self, how: str, reason: str | None) -> tuple[State, str]:
        """State and message of what was collected and had no outcome."""
        if reason is not None:
            return "aborted", reason
        if self._end is None:
            return "lost", f"{how}, in the middle of its session"
        if self._end.failfast:
            return "skipped", "not run: pytest was to stop at a failure"
        return "blocked", f"not run: {how}"

    def _judge_silence(self, how: str, reason: str | None, now: float, events: list[DriverEvent]) -> None:
        """The session has no end, and nothing is known of what it was to run yet."""
        if reason is not None:
            self._add(events, now, "", "aborted", kind="rest", name=UNREPORTED, message=reason)
        elif self._is_up:
            why = f"{how}, in the middle of its session"
            self._add(events, now, "", "lost", kind="rest", name=UNREPORTED, message=why)
        else:
            said = [line.strip() for line in plain(bytes(self._stderr)).splitlines() if line.strip()]
            self._crash(events, now, "blocked", f"{how}: {said[-1]}" if said else f"{how}, and said nothing")

    def _judge_exit(
        self, end: _End, code: int | None, signal: str | None, how: str, now: float, events: list[DriverEvent]
    ) -> None:
        if end.exitstatus == _NO_TESTS and self._has_record:
            return  # every file was skipped as a whole, which is told
        if end.exitstatus in _ENDS:
            self._crash(events, now, "blocked", _ENDS[end.exitstatus])
        elif signal is not None:
            self._crash(events, now, "lost", f"{how}, after its session")
        elif code and not self._is_explained:
            self._crash(events, now, "blocked", f"{how}, and no test failed")

    # The lines of the pipe

    def _line(self, data: bytes, now: float, events: list[DriverEvent]) -> None:
        match line := self._told.read(data, events):
            case _Session():
                self._is_up = True
            case _Collected():
                self._due.update(dict.fromkeys(line.ids))
                tests = tuple(_split(nodeid) for nodeid in line.ids)
                events.append(TestsSelected(run=self._run, suite=self._suite.id, tests=tests, attempt=self._attempt))
            case _Ignored():
                self._add(events, now, line.id, "skipped", kind="rest", name=UNREPORTED, message=line.message)
            case _Uncollected():
                details = {"longrepr": clip(plain(line.text.encode()), TEXT_MAX)} if line.text else {}
                self._crash(events, now, "blocked", line.message or "", nodeid=line.id, details=details, at=line.at)
            case _Start():
                self._start(line.id, now, events)
            case _Phase():
                self._phase(line, now, events)
            case _Finish():
                self._tests.pop(line.id, None)
            case _End():
                self._end = line

    def _start(self, nodeid: str, now: float, events: list[DriverEvent]) -> _Test:
        file, name = _split(nodeid)
        test = self._tests[nodeid] = _Test(self._cases.case(file, name), now)
        started = TestStarted(
            run=self._run,
            suite=self._suite.id,
            case=test.case,
            name=name,
            file=file,
            started=now,
            attempt=self._attempt,
        )
        events.append(started)
        return test

    def _phase(self, phase: _Phase, now: float, events: list[DriverEvent]) -> None:
        if phase.outcome == "rerun":
            return  # pytest-rerunfailures: its last try is what counts
        state, message = _judged(phase)
        if phase.sub is not None:
            name = f"{_split(phase.id)[1]} › {phase.sub}"
            self._add(events, now, phase.id, state, name=name, message=message, **self._facts(phase))
        elif phase.when == "teardown":
            if phase.outcome == "failed":
                name = f"teardown of {_split(phase.id)[1]}"
                self._add(
                    events, now, phase.id, "blocked", kind="hook", name=name, message=message, **self._facts(phase)
                )
        elif phase.when == "setup" and phase.outcome == "passed":
            if phase.id in self._tests:
                self._tests[phase.id].setup_s = phase.duration or 0.0
        else:
            test = self._tests.get(phase.id) or self._start(phase.id, now, events)
            is_known = phase.xfail is not None and state == "todo"
            facts = self._facts(phase, test.setup_s)
            self._due.pop(phase.id, None)
            test.rev += 1
            self._add(events, now, phase.id, state, test=test, message=message, known_failure=is_known, **facts)

    def _facts(self, phase: _Phase, setup_s: float = 0.0) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if phase.text:
            details["longrepr"] = clip(plain(phase.text.encode()), TEXT_MAX)
        if phase.properties:
            details["properties"] = phase.properties
        return {
            "details": details,
            "at": phase.at and clip(phase.at, MESSAGE_MAX),
            "output": clip(plain(phase.output.encode()), self._output_max),
            "duration": None if phase.duration is None else phase.duration + setup_s,
        }

    # Records

    def _crash(
        self, events: list[DriverEvent], now: float, state: State, what: str, nodeid: str = "", **more: Any
    ) -> None:
        what = what or "cannot be collected"
        self._add(events, now, nodeid, state, kind="crash", name=what, message=what, **more)

    def _add(
        self,
        events: list[DriverEvent],
        now: float,
        nodeid: str,
        state: State,
        *,
        kind: Literal["test", "hook", "crash", "rest"] = "test",
        name: str | None = None,
        test: _Test | None = None,
        message: str | None = None,
        **more: Any,
    ) -> None:
        if message and state in ("aborted", "lost"):
            message = f"{state}: {message}"
        file, own_name = _split(nodeid)
        name = own_name if name is None else title(name)
        record = TestFinished(
            run=self._run,
            suite=self._suite.id,
            case=test.case if test else self._cases.case(file, name),
            name=name,
            file=file,
            kind=kind,
            state=state,
            started=test.started if test else None,
            ended=now,
            attempt=self._attempt,
            message=message and first_line(plain(message.encode())),
            rev=max(1, test.rev) if test else 1,
            **more,
        )
        self._has_record = True
        self._is_explained = self._is_explained or state in ("failed", "blocked", "lost")
        events.append(record)


def _split(nodeid: str) -> tuple[str | None, str]:
    """File and name of a node id: what stands before the first `::`, and the rest."""
    file, _, name = nodeid.partition("::")
    return title(file) or None, title(name) or title(file)


def _judged(phase: _Phase) -> tuple[State, str | None]:
    """State and message of a phase that decides."""
    if phase.xfail is not None and phase.outcome == "skipped":
        return "todo", phase.xfail.removeprefix("reason: ") or phase.message
    if phase.outcome == "passed":
        return "passed", None
    if phase.outcome == "skipped":
        return "skipped", phase.message
    # With pytest-xdist a worker that dies in a test gives a phase without a name.
    return "failed" if phase.when == "call" else "blocked", phase.message
