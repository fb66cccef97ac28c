"""AVA, driver `events`: records out of what AVA tells the observer in plugins/emissary_ava.mjs, one JSON object a line.

TAP is read beside it. It is what counts where no event has come FALLBACK_S after its first result: an AVA that does not
know the observer, or a project that has one of its own.

    selected-test -> (test-register-log-reference: TestStarted) -> test-passed | test-failed
                  -> skipped, todo at once
    what was selected and has not ended is told by name in finish()

Source: protocols/suites.md, "AVA, driver events".
"""

import base64
import binascii
import signal as signals
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from agent.core.events import State, TestFinished, TestsSelected, TestStarted, Warned
from agent.core.lines import CutLine, Lines
from agent.core.payload import UNREADABLE
from agent.suites.messages import Suite
from agent.suites.runners.ava import EVENTS
from agent.suites.runners.ava_tap import STDERR_MAX, TERM_WAIT_S, AvaTap, how, said, unexplained
from agent.suites.runners.driver import (
    LOG_MAX,
    MESSAGE_MAX,
    UNREPORTED,
    Cases,
    DriverEvent,
    LastEvent,
    Only,
    Stop,
    clip,
    plain,
    title,
)

FALLBACK_S: Final = 2.0
LINE_MAX: Final = 1024 * 1024  # bytes of an event; the observer cuts its texts to 64 Ki characters each
_WARNINGS_MAX: Final = 5

_OUR_SIGNALS = {"SIGINT", "SIGTERM", "SIGKILL"}


class Told(msgspec.Struct, frozen=True, rename="camel"):
    """An event of AVA's as the observer writes it. Files are relative to the folder AVA was started in."""

    type: str
    test_file: str | None = None
    title: str = ""
    skip: bool = False
    todo: bool = False
    known_failing: bool = False
    duration: float | None = None  # ms
    logs: list[str] = []
    err: dict[str, Any] | None = None
    non_zero_exit_code: int | None = None
    signal: str | None = None
    forced_exit: bool = False
    period: float | None = None  # ms
    pending_tests: dict[str, list[str]] = {}
    chunk: str = ""  # base64
    reason: str = ""
    total: int = 0  # files


class _Test:
    """A test that was selected and has not ended."""

    __slots__ = ("case", "message", "name", "output", "started")

    def __init__(self, case: str, name: str) -> None:
        self.case, self.name = case, name
        self.started: float | None = None
        self.message: str | None = None  # why it will not end, as far as AVA told
        self.output = b""


class _File:
    """What is known of a file. Tests that have ended are forgotten."""

    def __init__(self) -> None:
        self.declared = 0
        self.is_crashed = self.has_failed_hook = False
        self.tests: dict[str, _Test] = {}
        self.running: dict[str, _Test] = {}
        self.output = b""  # what came while none or several of its tests ran


class AvaEvents:
    """The Driver for what `launch` of ava.py starts with driver `events`.

    AVA tells which file wrote an output, not which test. It is the test's if just one of the file runs; else it goes
    to what fails next in that file. `only` is what the launch was narrowed to; with names in it, other tests that a
    pattern let run give no records.
    """

    def __init__(self, suite: Suite, run: str, *, attempt: int = 1, only: Sequence[Only] = ()) -> None:
        self._suite, self._run, self._attempt = suite, run, attempt
        self._tap = AvaTap(suite, run, attempt=attempt, only=only)
        self._held: list[DriverEvent] = []  # TAP's, until it is known which of the two counts
        self._first_held: float | None = None
        self._mode: Literal["open", "events", "tap"] = "open"
        self._lines, self._cases = Lines(LINE_MAX), Cases(attempt)
        self._decoder = msgspec.json.Decoder(Told)
        self._only = {(one.file, one.name) for one in only if one.name is not None}
        self._now = 0.0
        self._files: dict[str | None, _File] = {}
        self._running: dict[tuple[str | None, str], str] = {}  # cases, the longest-running first
        self._total = 0  # files that AVA would run
        self._has_selected = False
        self._has_ended = False  # AVA's own `end`
        self._is_explained = False  # something failed, or crashed
        self._unread = 0
        self._stderr = b""
        self._stopped: str | None = None

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read from "events", "stdout" or "stderr"."""
        self._now = now
        events: list[DriverEvent] = []
        if stream == EVENTS:
            for line in self._lines.feed(data):
                self._read(line, events)
        elif self._mode == "tap":
            return self._tap.feed(stream, data, now)
        elif self._mode == "open":
            told = self._tap.feed(stream, data, now)
            self._held += told
            if self._first_held is None and any(isinstance(event, TestFinished) for event in told):
                self._first_held = now
        if stream == "stderr":
            self._stderr = (self._stderr + data)[-STDERR_MAX:]
        if self._mode == "open" and self._first_held is not None and now - self._first_held >= FALLBACK_S:
            self._fall_back("AVA told no events: its results are read as TAP", events)
        return events

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """SIGINT first, as with driver `tap`."""
        self._stopped = self._stopped or reason
        self._tap.stop(reason)
        return Stop(signals.SIGINT, self._suite.limits.grace, alone=True), Stop(signals.SIGTERM, TERM_WAIT_S)

    def running(self) -> str | None:
        """The test that has been running for the longest time."""
        return next(iter(self._running.values()), None)

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """Say what became of the tests that were selected and have not ended."""
        self._now, self._stopped = now, reason or self._stopped
        events: list[DriverEvent] = []
        for line in self._lines.eof():
            self._read(line, events)
        if self._mode == "open":
            held = self._first_held is not None
            self._fall_back("AVA told no events: its results are read as TAP" if held else None, events)
        if self._mode == "tap":
            return [*_last(events), *self._tap.finish(code, signal, reason, now)]
        if self._unread > _WARNINGS_MAX:
            events.append(Warned("ava.events", f"{self._unread} lines on the events' pipe could not be read"))
        was_explained, states = self._is_explained, set()
        for name, file in self._files.items():
            for test in file.tests.values():
                state, message = self._fate(file, test)
                states.add(state)
                events.append(
                    self._record(
                        name,
                        test.name,
                        case=test.case,
                        state=state,
                        message=message,
                        started=test.started,
                        output=plain(test.output),
                    )
                )
        unbegun = self._total - len(self._files.keys() - {None})
        if not self._has_ended and self._stopped is not None and "aborted" not in states:
            message = f"aborted: {self._stopped}"  # files that had not begun are not known
            events.append(self._record(None, UNREPORTED, state="aborted", kind="rest", message=message))
        elif self._stopped is None:
            is_explained = was_explained or bool(states)
            if self._has_ended:
                if unbegun > 0 and is_explained:
                    message = (
                        f"not run: AVA stopped at the first failure, {unbegun} of {self._total} files had not begun"
                    )
                    events.append(self._record(None, UNREPORTED, state="skipped", kind="rest", message=message))
                if code != 0 and not is_explained:
                    what = unexplained(code, signal, has_selected=self._has_selected)
                    events.append(self._runner_crash(what, "blocked"))
            elif unbegun > 0 or not is_explained:
                left = f": {unbegun} of {self._total} files had not begun" if unbegun > 0 else ""
                events.append(self._runner_crash(f"AVA ended {how(code, signal)} before it was done{left}", "lost"))
        return _last(events)

    def _fall_back(self, why: str | None, events: list[DriverEvent]) -> None:
        self._mode = "tap"
        if why is not None:
            events.append(Warned("ava.events", why))
        events += self._held
        self._held = []

    def _read(self, line: bytes, events: list[DriverEvent]) -> None:
        if self._mode == "tap":
            return
        try:
            told = self._decoder.decode(line)
        except UNREADABLE as error:
            self._unread += 1
            if self._unread <= _WARNINGS_MAX:
                long = f" of {len(line) + line.dropped} bytes" if isinstance(line, CutLine) else ""
                events.append(Warned("ava.events", f"a line{long} on the events' pipe cannot be read: {error}"))
            return
        if told.type == "unusable" and self._mode == "open":
            self._fall_back(f"{title(told.reason)}: its results are read as TAP", events)
            return
        self._mode, self._held = "events", []
        self._take(told, events)

    def _take(self, told: Told, events: list[DriverEvent]) -> None:
        file = self._file(told.test_file)
        match told.type:
            case "declared-test":
                file.declared += 1
            case "selected-test":
                self._select(told, file, events)
            case "test-register-log-reference":
                self._start(told, file, events)
            case "test-passed" | "test-failed":
                self._end(told, file, events)
            case "hook-failed":
                file.has_failed_hook = self._is_explained = True
                events.append(self._judged(told, file, title(told.title), state="blocked", kind="hook"))
            case "uncaught-exception" | "unhandled-rejection" | "internal-error" | "shared-worker-error":
                self._crash(told, file, said_first(told), events)
            case "missing-ava-import":
                what = f'No tests found in {told.test_file}, make sure to import "ava" at the top of your test file'
                self._crash(told, file, what, events)
            case "process-exit":
                for test in file.tests.values():
                    test.message = "blocked: process.exit() was called in its file"
                self._crash(told, file, f"process.exit() was called in {told.test_file}", events)
            case "worker-failed" if told.err is not None:
                self._crash(told, file, said_first(told), events)
            case "worker-failed" if told.non_zero_exit_code:
                what = f"{told.test_file} exited with a non-zero exit code: {told.non_zero_exit_code}"
                self._crash(told, file, what, events)
            case "worker-failed":
                self._crash(told, file, f"{told.test_file} exited due to {told.signal}", events)
            case "worker-finished":
                if not file.declared and not told.forced_exit:
                    self._crash(told, file, f"No tests found in {told.test_file}", events)
            case "timeout":
                self._time_out(told)
            case "worker-stdout" | "worker-stderr":
                self._hear(told, file)
            case "line-number-selection-error":
                events.append(Warned("ava.lines", f"{told.test_file}: {said(told.err or {})}"))
            case "files":
                self._total = told.total
            case "end":
                self._has_ended = True
            case _:
                pass  # starting, hook-finished, interrupt: they decide nothing

    def _file(self, name: str | None) -> _File:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = _File()
        return file

    def _select(self, told: Told, file: _File, events: list[DriverEvent]) -> None:
        self._has_selected = True
        name = title(told.title)
        if self._only and (told.test_file, name) not in self._only:
            return
        if told.skip or told.todo:
            events.append(self._record(told.test_file, name, state="skipped" if told.skip else "todo"))
        elif told.title not in file.tests:
            file.tests[told.title] = _Test(self._cases.case(told.test_file, name), name)
            tests = ((told.test_file, name),)
            events.append(TestsSelected(run=self._run, suite=self._suite.id, tests=tests, attempt=self._attempt))

    def _start(self, told: Told, file: _File, events: list[DriverEvent]) -> None:
        test = file.tests.get(told.title)
        if test is None:
            return  # not asked for
        test.started = self._now
        file.running[told.title] = test
        self._running[told.test_file, told.title] = test.case
        events.append(
            TestStarted(
                run=self._run,
                suite=self._suite.id,
                case=test.case,
                name=test.name,
                file=told.test_file,
                started=self._now,
                attempt=self._attempt,
            )
        )

    def _end(self, told: Told, file: _File, events: list[DriverEvent]) -> None:
        test = file.tests.pop(told.title, None)
        file.running.pop(told.title, None)
        self._running.pop((told.test_file, told.title), None)
        name = title(told.title)
        if test is None:
            if self._only and (told.test_file, name) not in self._only:
                return
            test = _Test(self._cases.case(told.test_file, name), name)
        state: State = "passed" if told.type == "test-passed" else "failed"
        if state == "failed":
            self._is_explained = True
        events.append(self._judged(told, file, name, state=state, test=test))

    def _crash(self, told: Told, file: _File, what: str, events: list[DriverEvent]) -> None:
        """One for a file: what is told after the first follows from it."""
        self._is_explained = True
        if file.is_crashed:
            return
        file.is_crashed = True
        is_ours = self._stopped is not None and told.signal in _OUR_SIGNALS
        record = self._judged(told, file, title(what), state="aborted" if is_ours else "blocked", kind="crash")
        if is_ours:
            record = msgspec.structs.replace(record, message=f"aborted: {self._stopped}")
        events.append(record if record.message else msgspec.structs.replace(record, message=record.name))

    def _time_out(self, told: Told) -> None:
        seconds = (told.period or 0) / 1000
        for name, titles in told.pending_tests.items():
            for raw in titles:
                if (file := self._files.get(name)) and (test := file.tests.get(raw)):
                    test.message = f"lost: no test had ended for {seconds:g} s, AVA's own timeout"

    def _hear(self, told: Told, file: _File) -> None:
        try:
            chunk = base64.b64decode(told.chunk, validate=True)
        except (binascii.Error, ValueError):
            self._unread += 1
            return
        if keep := self._suite.limits.test_output:
            writer = next(iter(file.running.values())) if len(file.running) == 1 else file
            writer.output = (writer.output + chunk)[-keep:]

    def _fate(self, file: _File, test: _Test) -> tuple[State, str]:
        """What became of a test that was selected and has not ended."""
        if self._stopped is not None:
            return "aborted", f"aborted: {self._stopped}"
        if file.is_crashed:
            return "blocked", test.message or "blocked: its file crashed"
        if file.has_failed_hook:
            return "blocked", "blocked: a hook failed"
        if self._has_ended:
            if self._is_explained:
                return "skipped", "not run: AVA stopped at the first failure"
            return "blocked", "blocked: AVA did not run it"
        return "lost", test.message or "lost: AVA died before it ended"

    def _judged(
        self,
        told: Told,
        file: _File,
        name: str,
        *,
        state: State,
        kind: Literal["test", "hook", "crash"] = "test",
        test: _Test | None = None,
    ) -> TestFinished:
        """A record with all that AVA told."""
        from agent.suites.runners import diagnostics  # with YAML's parser: a service starts without it

        err = dict(told.err or {})
        at = err.pop("at", None)
        err.pop("line", None)
        output = test.output if test else b""
        if state != "passed" and not output:
            output, file.output = file.output, b""
        return self._record(
            told.test_file,
            name,
            case=test.case if test else None,
            kind=kind,
            state=state,
            started=test.started if test else None,
            duration=None if told.duration is None else told.duration / 1000,
            message=said(err),
            details=diagnostics.bounded(err),
            at=clip(str(at), MESSAGE_MAX) if at else None,
            log=_lines(told.logs),
            output=plain(output),
            known_failure=told.known_failing,
        )

    def _record(
        self, file: str | None, name: str, *, state: State, case: str | None = None, **more: Any
    ) -> TestFinished:
        return TestFinished(
            run=self._run,
            suite=self._suite.id,
            case=case if case is not None else self._cases.case(file, name),
            name=name,
            file=file,
            state=state,
            ended=self._now,
            attempt=self._attempt,
            **more,
        )

    def _runner_crash(self, what: str, state: State) -> TestFinished:
        message = f"lost: {what}" if state == "lost" else what
        return self._record(None, what, state=state, kind="crash", message=message, output=plain(self._stderr).strip())


def said_first(told: Told) -> str:
    """The name of a crash, as TAP would give it: the first line of the error's stack, or the event's type."""
    return str((told.err or {}).get("line") or told.type)


def _lines(logs: Sequence[str]) -> tuple[str, ...]:
    """`t.log()` calls as lines, LOG_MAX bytes at the most."""
    text = clip(plain("\n".join(logs).encode("utf-8", "replace")), LOG_MAX) if logs else ""
    return tuple(text.split("\n")) if text else ()


def _last(events: Sequence[DriverEvent]) -> list[LastEvent]:
    """No test starts when the runner has ended: a start that was read last is not told."""
    return [event for event in events if not isinstance(event, TestStarted | TestsSelected)]
