"""Runner `gator`: a tree of jobs, run by the agent itself as a child, which tells of each job on a pipe.

    plan -> (start -> output -> end) for each job -> its exit

A job is a test: its name is its ident, its file the path of the groups above it.

Source: protocols/suites.md, "pytest, TAP, command" (gator); the lines of the pipe: agent/gator/told.py.
"""

import signal as signals
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from agent.core.errors import ProtocolMisuse
from agent.core.events import State, TestFinished, TestsSelected, TestStarted, Warned
from agent.core.lines import Lines
from agent.suites.messages import Suite
from agent.suites.runners.driver import (
    MESSAGE_MAX,
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
    plain,
    title,
)

EVENTS: Final = "events"  # the pipe
LINE_MAX: Final = 16 * 1024 * 1024  # bytes of a line: the plan of a tree at its largest, a million jobs, is cut
STOP_S: Final = 10.0  # a tree of jobs has 5 s from TERM to KILL itself
USAGE: Final = 2  # exit code: the spec cannot be used
LOST, STOPPED = 254, 255  # codes of jobs
_STDERR_MAX: Final = 4096  # bytes that are kept, to say why nothing began


def launch(suite: Suite, project: Path, scratch: Path, run: str, *, only: Sequence[Only] = ()) -> Launch:
    """The agent as `agent gator`, in the place of a shell's. Its databases stay beside the run's result."""
    if only:
        raise ProtocolMisuse("runner gator cannot run a part of its jobs", remedy="Nothing was started.")
    (spec,) = suite.files
    if not (project / spec).is_file():
        raise CannotLaunch(f"there is no spec {spec!r} in {project}", remedy="Correct `files` or `cwd`.")
    # -P: a folder of the project that is called agent is not this one.
    own = (sys.executable, "gator") if getattr(sys, "frozen", False) else (sys.executable, "-P", "-m", "agent", "gator")
    tracking = str(scratch.parent / "tracking")
    return Launch(
        argv=(*own, *suite.args, "--quiet", "--tracking", tracking, "--events-fd", f"@pipe:{EVENTS}", spec),
        set_env={"EMISSARY_RUN": run, "EMISSARY_SUITE": suite.id},
        unset_env=("GATOR_PARENT",),
        pipes=(EVENTS,),
    )


class _Plan(msgspec.Struct, frozen=True, tag_field="event", tag="plan"):
    jobs: list[list[str]]


class _Start(msgspec.Struct, frozen=True, tag_field="event", tag="start"):
    path: list[str]
    ident: str


class _Output(msgspec.Struct, frozen=True, tag_field="event", tag="output"):
    path: list[str]
    ident: str
    text: str


class _End(msgspec.Struct, frozen=True, tag_field="event", tag="end"):
    path: list[str]
    ident: str
    result: str
    code: int
    pruned: bool
    why: str | None
    started: float | None
    ended: float
    metrics: dict[str, int | float] = {}


class _Dropped(msgspec.Struct, frozen=True, tag_field="event", tag="dropped"):
    count: int


_Line: TypeAlias = _Plan | _Start | _Output | _End | _Dropped
_decode = msgspec.json.Decoder(_Line).decode
_At: TypeAlias = tuple[str, ...]


class GatorDriver:
    """One run of a tree."""

    def __init__(self, suite: Suite, run: str, *, attempt: int = 1) -> None:
        self._suite, self._run, self._attempt = suite, run, attempt
        self._lines = Lines(LINE_MAX)
        self._cases = Cases(attempt)
        self._due: dict[_At, None] = {}  # planned, without an end
        self._running: dict[_At, tuple[str, float]] = {}  # case, start
        self._output: dict[_At, str] = {}
        self._is_planned = self._has_bad = False
        self._told = PluginLines(_decode, "gator.event")
        self._stderr = bytearray()

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read. What the agent itself prints is output."""
        events: list[DriverEvent] = []
        if stream == "stderr":
            self._stderr += data
            del self._stderr[:-_STDERR_MAX]
        elif stream == EVENTS:
            for line in self._lines.feed(data):
                self._line(line, now, events)
        return events

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """SIGTERM: the tree ends its jobs and tells of each."""
        return (Stop(signals.SIGTERM, max(self._suite.limits.grace, STOP_S), alone=True),)

    def running(self) -> str | None:
        """The job that runs longest."""
        return next((case for case, _ in self._running.values()), None)

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """What was planned and has no end, and what the exit says that no record does."""
        events: list[DriverEvent] = []
        for line in self._lines.eof():
            self._line(line, now, events)
        how = f"agent gator was ended by {signal}" if signal else f"agent gator exited with code {code}"
        state: State = "lost" if reason is None else "aborted"
        for at in list(self._due):
            self._add(events, at, state, now, message=f"{state}: {reason or how}")
        if not self._is_planned:
            said = [text.strip() for text in plain(bytes(self._stderr)).splitlines() if text.strip()]
            if reason is not None:
                self._add_other(events, "aborted", "rest", UNREPORTED, f"aborted: {reason}", now)
            else:
                state = "blocked" if code == USAGE else "lost"
                self._add_other(events, state, "crash", said[-1] if said else how, said[-1] if said else how, now)
        elif (code or signal) and reason is None and not self._has_bad:
            self._add_other(events, "blocked", "crash", how, f"{how}, and no job failed", now)
        self._due.clear()
        self._running.clear()
        return [event for event in events if isinstance(event, TestFinished | Warned)]

    def _line(self, data: bytes, now: float, events: list[DriverEvent]) -> None:
        match line := self._told.read(data, events):
            case _Plan():
                self._is_planned = True
                self._due = {tuple(at): None for at in line.jobs if at}
                tests = tuple(_named(at) for at in self._due)
                events.append(TestsSelected(run=self._run, suite=self._suite.id, tests=tests, attempt=self._attempt))
            case _Start():
                self._start((*line.path, line.ident), now, events)
            case _Output():
                self._output[(*line.path, line.ident)] = clip(line.text, self._suite.limits.test_output)
            case _End():
                self._end(line, now, events)
            case _Dropped():
                text = f"{line.count} events of jobs were not told: they came faster than they were read"
                events.append(Warned("gator.dropped", text))

    def _start(self, at: _At, now: float, events: list[DriverEvent]) -> None:
        if at not in self._due or at in self._running:
            return  # it is tried again: the first start counts
        file, name = _named(at)
        case = self._cases.case(file, name)
        self._running[at] = case, now
        events.append(
            TestStarted(
                run=self._run,
                suite=self._suite.id,
                case=case,
                name=name,
                file=file,
                started=now,
                attempt=self._attempt,
            )
        )

    def _end(self, line: _End, now: float, events: list[DriverEvent]) -> None:
        at = (*line.path, line.ident)
        if at not in self._due:
            return
        state, message = _judged(line)
        duration = None if line.started is None else max(0.0, line.ended - line.started)
        details: dict[str, object] = {"code": line.code}
        if metrics := {name: value for name, value in line.metrics.items() if value}:
            details["metrics"] = metrics
        self._add(events, at, state, now, message=message, duration=duration, details=details)

    def _add(
        self,
        events: list[DriverEvent],
        at: _At,
        state: State,
        now: float,
        *,
        message: str | None,
        duration: float | None = None,
        details: dict[str, object] | None = None,
    ) -> None:
        file, name = _named(at)
        case, started = self._running.pop(at, (None, None))
        self._due.pop(at, None)
        self._has_bad = self._has_bad or state not in ("passed", "skipped")
        events.append(
            TestFinished(
                run=self._run,
                suite=self._suite.id,
                case=case or self._cases.case(file, name),
                name=name,
                file=file,
                state=state,
                started=started,
                ended=now,
                duration=duration,
                attempt=self._attempt,
                message=None if message is None else clip(message, MESSAGE_MAX),
                details=details or {},
                output=plain(self._output.pop(at, "").encode("utf-8", "replace")),
            )
        )

    def _add_other(
        self, events: list[DriverEvent], state: State, kind: str, name: str, message: str, now: float
    ) -> None:
        name = title(name) or "agent gator"
        events.append(
            TestFinished(
                run=self._run,
                suite=self._suite.id,
                case=self._cases.case(None, name),
                name=name,
                file=None,
                kind="rest" if kind == "rest" else "crash",
                state=state,
                ended=now,
                attempt=self._attempt,
                message=clip(message, MESSAGE_MAX),
            )
        )


def _named(at: _At) -> tuple[str | None, str]:
    """File and name of a job: the path of its groups, and its ident."""
    return title("/".join(at[:-1])) or None, title(at[-1]) or UNREPORTED


def _judged(line: _End) -> tuple[State, str | None]:
    if line.result == "SUCCESS":
        return "passed", None
    if line.result == "ABORTED":
        return ("skipped", line.why) if line.pruned else ("aborted", f"aborted: {line.why or 'not begun'}")
    if line.code == LOST:
        return "blocked", line.why or "its wrapper was lost"
    if line.code == STOPPED:
        return "aborted", "aborted: stopped"
    if line.why:
        return "failed", line.why
    errors = line.metrics.get("msg_error", 0) + line.metrics.get("msg_critical", 0)
    return "failed", f"exited with code {line.code}" if line.code else f"{errors:g} messages of errors"
