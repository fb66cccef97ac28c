"""Runner `tap`: any program that prints TAP 12, 13 or 14 on its stdout.

Lines become records as they are read. A result waits for the next line only where a diagnostic block is likely: after
`not ok`, until one came without; after `ok`, once one came with. A block that comes after all corrects what was told.

Subtests are indented by four spaces and stand before the line of their parent; their records are `parent › child`. The
parent's name is known beforehand from `# Subtest: name`, which stands at the parent's indentation (TAP 14, Node) or at
the children's (Perl). Without such a line the children wait for their parent.

Source: protocols/suites.md, "pytest, TAP, command"; the TAP 14 specification.
"""

import math
import re
import signal as signals
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.core.errors import ProtocolMisuse
from agent.core.events import State, TestFinished, Warned
from agent.core.lines import Lines
from agent.suites.messages import Suite
from agent.suites.runners.command import argv
from agent.suites.runners.driver import (
    LOG_MAX,
    MESSAGE_MAX,
    TITLE_MAX,
    UNREPORTED,
    WARNINGS_MAX,
    YAML_MAX,
    Cases,
    DriverEvent,
    LastEvent,
    Launch,
    Only,
    Stop,
    clip,
    first_line,
    plain,
    title,
)

LINE_MAX: Final = 256 * 1024  # bytes of a line that are read
DEPTH_MAX: Final = 32  # subtests in each other; deeper lines are output
WAITING_MAX: Final = 1000  # children that wait for their parent's name; beyond, they are told without it

_RESULT = re.compile(rb"(not )?ok(?:[ \t]+(\d{1,9})(?=[ \t]|$))?(?:[ \t]+-(?=[ \t]|$))?(?:[ \t]+(.*))?$", re.DOTALL)
_PLAN = re.compile(rb"1\.\.(\d{1,9})[ \t]*(?:#[ \t]*(.*))?$")
_VERSION = re.compile(rb"TAP version (\d{1,3})$", re.IGNORECASE)
_SUBTEST = re.compile(rb"# ?Subtest(?::[ \t]*(.*))?$", re.IGNORECASE)
_BAIL_OUT = re.compile(rb"Bail out!(.*)", re.IGNORECASE)
# The first `#` that white space precedes: an escaped one has a backslash there. "skipped" is as good as "skip".
_DIRECTIVE = re.compile(r"(?:^|\s)#\s*(?:(skip)\S*|(todo)(?=\s|$))\s*(.*)$", re.IGNORECASE | re.DOTALL)
_SKIP_PLAN = re.compile(r"skip\S*\s*(.*)", re.IGNORECASE)
_TIME = re.compile(r"(?:^|\s)# time=(\d{1,12}(?:\.\d{1,12})?)(m?s)$")  # node-tap says it in the line, not in a block
_ONLY_TIME = re.compile(rb"duration_ms: (\d{1,12}(?:\.\d{1,12})?)\s*$")  # all that Node says of a test that passed
_ESCAPED = re.compile(r"\\([#\\])")

_BAD: Final = frozenset[State]({"failed", "blocked", "aborted", "lost"})


def launch(suite: Suite, project: Path, scratch: Path, run: str, *, only: Sequence[Only] = ()) -> Launch:
    """Run `command`, `args` and `files`, one after the other. Raises CannotLaunch."""
    if only:
        raise ProtocolMisuse("runner tap cannot run a part of its tests", remedy="Nothing was started.")
    return Launch(argv=argv(suite, project), set_env={"EMISSARY_RUN": run, "EMISSARY_SUITE": suite.id})


@dataclass(slots=True)
class _Level:
    """The lines of one indentation. `name` is that of their subtest, null until the parent's line tells it."""

    name: str | None
    announced: str | None = None  # the name of the subtest that begins below
    seen: int = 0
    plan: int | None = None
    skip: str | None = None  # why, of `1..0 # SKIP why`
    is_bad: bool = False
    waiting: list[TestFinished] = field(default_factory=list)


class TapDriver:
    """One run of a TAP producer."""

    def __init__(self, run: str, suite_id: str, *, grace_s: float = 10) -> None:
        self._run, self._suite, self._grace_s = run, suite_id, grace_s
        self._lines, self._cases = Lines(LINE_MAX), Cases()
        self._is_first, self._escapes = True, False  # the first line, which may have a mark; `\\#` stands for `#`
        self._levels = [_Level("")]
        self._bailed: str | None = None
        self._last: TestFinished | None = None  # the result that a block may follow; null for a parent without a record
        self._last_level = -1  # its indentation; -1: no block can come now
        self._last_ok = True  # what it began with
        self._held = False  # it waits for its block, and has no case yet
        self._log: list[str] = []  # comments between it and its block
        self._block_follows = {True: False, False: True}  # was the last `ok`, `not ok` followed by a block?
        self._block: list[bytes] | None = None
        self._block_size = self._block_indent = 0
        self._warnings = 0
        self._is_explained = False  # some record is a reason to exit with a code

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read. Only stdout is TAP; lines of it that are none are output, as is all of stderr."""
        events: list[DriverEvent] = []
        if stream == "stdout":
            self._read(self._lines.feed(data), now, events)
        return events

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """SIGTERM, and `grace_s` to end."""
        return (Stop(signals.SIGTERM, self._grace_s),)

    def running(self) -> str | None:
        """TAP tells ends only."""
        return None

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """What the plan, the exit and our own stop say of the tests that were not told."""
        events: list[DriverEvent] = []
        self._read(self._lines.eof(), now, events)
        self._end_block(events)
        self._release(events)
        self._close_below(0, events)
        self._close_plan(code, signal, reason, now, events)
        if reason is None and signal is not None and not self._is_explained:
            self._crash("lost", f"the runner was ended by {signal}", now, events)
        elif reason is None and code and not self._is_explained:
            self._crash("blocked", f"the runner exited with code {code}, and no test failed", now, events)
        return [event for event in events if isinstance(event, TestFinished | Warned)]

    def _close_plan(
        self, code: int | None, signal: str | None, reason: str | None, now: float, events: list[DriverEvent]
    ) -> None:
        top = self._levels[0]
        if self._bailed is not None:
            why = f"Bail out! {self._bailed}".strip()
            if top.plan is not None and top.seen >= top.plan:
                self._crash("blocked", why, now, events)
            else:
                self._rest("blocked", top.plan and top.plan - top.seen, why, now, events)
        elif top.plan is None:
            self._rest(
                "aborted" if reason else "lost", None, reason or f"no plan; {_ending(code, signal)}", now, events
            )
        elif top.seen < top.plan:
            missing = top.plan - top.seen
            why = f"{missing} of {top.plan} planned tests were not reported; {_ending(code, signal)}"
            self._rest("aborted" if reason else "lost", missing, reason or why, now, events)
        elif top.seen > top.plan:
            self._crash("blocked", f"{top.seen} tests reported, {top.plan} planned", now, events)
        elif top.skip is not None:
            self._rest("skipped", None, top.skip or None, now, events)
        elif top.plan == 0:
            self._crash("blocked", "no tests", now, events)

    def _read(self, lines: Sequence[bytes], now: float, events: list[DriverEvent]) -> None:
        if self._is_first and lines:
            self._is_first = False
            lines = [lines[0].removeprefix(b"\xef\xbb\xbf"), *lines[1:]]
        for raw in lines:
            line = raw[:-1] if raw[-1:] == b"\r" else raw
            if self._block is not None and self._take_block(line, events):
                continue
            if self._bailed is not None:
                return
            if line[:1] == b" ":
                bare = line.lstrip(b" ")
                self._indented(len(line) - len(bare), bare, now, events)
            else:
                self._line(0, line, now, events)

    def _indented(self, indent: int, line: bytes, now: float, events: list[DriverEvent]) -> None:
        level, odd = divmod(indent, 4)
        if line.startswith(b"---") and line.strip() == b"---" and 0 <= self._last_level * 4 < indent:
            self._block, self._block_size, self._block_indent = [], 0, indent
        elif line.startswith(b"#   ") and self._held and level == self._last_level:
            self._comment(line)
        elif odd or level > min(len(self._levels), DEPTH_MAX):
            self._no_block(events)
        else:
            self._line(level, line, now, events)

    def _line(self, level: int, line: bytes, now: float, events: list[DriverEvent]) -> None:
        """A line without its indentation, which is at most one level deeper than the open ones."""
        first = line[:1]
        if first == b"#" and self._held and line.startswith(b"#   ") and level == self._last_level:
            self._comment(line)
            return
        if self._last_level >= 0:
            self._no_block(events)
        if first in (b"o", b"n") and (found := _RESULT.match(line)):
            self._result(level, found, now, events)
        elif first == b"1" and (found := _PLAN.match(line)):
            self._plan(self._opened(level), found, events)
        elif first == b"#" and (found := _SUBTEST.match(line)):
            self._announce(level, found)
        elif first in (b"B", b"b") and (found := _BAIL_OUT.match(line)):
            self._bailed = first_line(plain(found[1])) or ""
        elif first in (b"T", b"t") and (found := _VERSION.match(line)):
            self._escapes = self._escapes or int(found[1]) >= 14

    # Results

    def _result(self, level: int, found: re.Match[bytes], now: float, events: list[DriverEvent]) -> None:
        here = self._opened(level) if level else self._levels[0]
        here.seen += 1
        here.announced = None
        negation, number, rest = found.groups()
        is_ok, text = negation is None, plain(rest) if rest else ""
        state: State = "passed" if is_ok else "failed"
        duration = reason = None
        if "#" in text:
            text, duration = _timed(text)
            if directive := _DIRECTIVE.search(text):
                state = "skipped" if directive[1] else "passed" if is_ok else "todo"
                text, reason = text[: directive.start()], first_line(self._unescaped(directive[3]))
                if (state == "skipped") != is_ok:
                    self._warn(
                        "tap.directive", f"{directive[0].strip()!r} after {'ok' if is_ok else 'not ok'!r}", events
                    )
        name = title(self._unescaped(text) if "\\" in text else text) or f"test {int(number or here.seen)}"
        self._last_level, self._last_ok, self._last = level, is_ok, None
        if len(self._levels) > level + 1:
            below = self._close(level, name, now, events)
            here.is_bad = here.is_bad or below.is_bad
            if below.seen and (below.is_bad or state != "failed"):
                return  # its children say it all
            if not below.seen and below.skip is not None and is_ok:
                state, reason = "skipped", below.skip or None
        if state in _BAD:
            here.is_bad = True
        self._held = self._block_follows[is_ok] or (level > 0 and any(outer.name is None for outer in self._levels))
        self._last = TestFinished(
            run=self._run,
            suite=self._suite,
            case="" if self._held or level else self._cases.case(None, name),
            name=name,
            file=None,
            state=state,
            ended=now,
            duration=duration,
            message=reason,
        )
        if self._held:
            return
        if level:
            self._last = self._tell(level, self._last, events)
        else:
            self._is_explained = self._is_explained or here.is_bad
            events.append(self._last)

    def _unescaped(self, text: str) -> str:
        return _ESCAPED.sub(r"\1", text) if self._escapes else text

    def _tell(self, level: int, record: TestFinished, events: list[DriverEvent]) -> TestFinished:
        """Give a record the names of its parents, and publish it once they are all known."""
        name = record.name
        for at in range(level, 0, -1):
            outer = self._levels[at]
            if outer.name is None:
                outer.waiting.append(msgspec.structs.replace(record, name=name))
                if len(outer.waiting) >= WAITING_MAX:
                    self._name(at, "", events)
                return record
            if outer.name:
                name = title(f"{outer.name} › {name}")
        told = msgspec.structs.replace(record, name=name, case=self._cases.case(None, name))
        self._is_explained = self._is_explained or told.state in _BAD
        events.append(told)
        return told

    def _crash(self, state: State, what: str, now: float, events: list[DriverEvent]) -> None:
        record = TestFinished(
            run=self._run,
            suite=self._suite,
            case="",
            name=title(what),
            file=None,
            kind="crash",
            state=state,
            ended=now,
            message=first_line(_explained(state, what)),
        )
        self._add(record, events)

    def _rest(self, state: State, count: int | None, why: str | None, now: float, events: list[DriverEvent]) -> None:
        record = TestFinished(
            run=self._run,
            suite=self._suite,
            case="",
            name=UNREPORTED,
            file=None,
            kind="rest",
            state=state,
            ended=now,
            count=count,
            message=why and first_line(_explained(state, why)),
        )
        self._add(record, events)

    def _add(self, record: TestFinished, events: list[DriverEvent]) -> None:
        """A record of the deepest open level that no line was read for."""
        self._levels[-1].is_bad = self._levels[-1].is_bad or record.state in _BAD
        self._tell(len(self._levels) - 1, record, events)

    def _warn(self, code: str, text: str, events: list[DriverEvent]) -> None:
        self._warnings += 1
        if self._warnings <= WARNINGS_MAX:
            events.append(Warned(code, clip(text, TITLE_MAX)))

    # Subtests

    def _opened(self, level: int) -> _Level:
        if level == len(self._levels):
            self._levels.append(_Level(self._levels[-1].announced))
        return self._levels[level]

    def _announce(self, level: int, found: re.Match[bytes]) -> None:
        self._escapes = True
        name = title(self._unescaped(plain(found[1] or b""))) or None
        if level == len(self._levels) and self._levels[-1].announced is None:
            self._levels[-1].announced = name  # as Perl writes it
        else:
            self._opened(level).announced = name

    def _name(self, at: int, name: str, events: list[DriverEvent]) -> None:
        """Now it is known whose children wait at that level."""
        level = self._levels[at]
        level.name, waiting, level.waiting = name, level.waiting, []
        for record in waiting:
            self._tell(at, record, events)

    def _close(self, level: int, name: str, now: float, events: list[DriverEvent]) -> _Level:
        """The line of their parent has come: the subtest of the lines one level deeper is over."""
        self._close_below(level + 1, events)
        below = self._levels[-1]
        if below.name is None:
            self._name(level + 1, name, events)
        if below.plan is None:
            self._warn("tap.plan", f"subtest {name!r} has no plan", events)
        elif below.seen < below.plan:
            missing = below.plan - below.seen
            self._rest("lost", missing, f"{missing} of {below.plan} planned tests were not reported", now, events)
        elif below.seen > below.plan:
            self._crash("blocked", f"{below.seen} tests reported, {below.plan} planned", now, events)
        return self._levels.pop()

    def _close_below(self, level: int, events: list[DriverEvent]) -> None:
        """Subtests whose parent never had its line."""
        while len(self._levels) > level + 1:
            if self._levels[-1].name is None:
                self._name(len(self._levels) - 1, "", events)
            below = self._levels.pop()
            self._levels[-1].is_bad = self._levels[-1].is_bad or below.is_bad

    def _plan(self, here: _Level, found: re.Match[bytes], events: list[DriverEvent]) -> None:
        if here.plan is not None:
            self._warn(
                "tap.plan", f"a second plan, {found[0].decode('utf-8', 'replace')!r}, after 1..{here.plan}", events
            )
            return
        here.plan = int(found[1])
        skip = _SKIP_PLAN.match(plain(found[2] or b"")) if here.plan == 0 else None
        here.skip = None if skip is None else first_line(self._unescaped(skip[1])) or ""

    # Diagnostic blocks

    def _take_block(self, line: bytes, events: list[DriverEvent]) -> bool:
        """False if the line is not part of the block, which is then over without its end."""
        assert self._block is not None
        body = line[self._block_indent :]
        if line[: self._block_indent].strip(b" "):
            self._end_block(events)
            return False
        if body.rstrip() == b"...":
            self._end_block(events)
        elif self._block_size <= YAML_MAX:  # one byte more tells diagnostics.read() that it is too large
            self._block.append(body)
            self._block_size += len(body) + 1
        return True

    def _end_block(self, events: list[DriverEvent]) -> None:
        if self._block is None:
            return
        block, self._block = self._block, None
        self._block_follows[self._last_ok] = True
        if self._last is not None:
            details = _details(block)
            duration = _seconds(details.get("duration_ms"))
            self._last = msgspec.structs.replace(
                self._last,
                details=details,
                message=_message(details) or self._last.message,
                at=_place(details),
                duration=self._last.duration if duration is None else duration,
                log=tuple(self._log),
            )
            if not self._held:
                self._last = msgspec.structs.replace(self._last, rev=self._last.rev + 1)
                events.append(self._last)
        self._release(events)

    def _no_block(self, events: list[DriverEvent]) -> None:
        """The line after a result begins no block."""
        if self._last_level < 0:
            return
        self._block_follows[self._last_ok] = False
        if self._held:
            self._release(events)
        self._last, self._last_level = None, -1

    def _release(self, events: list[DriverEvent]) -> None:
        if self._held and self._last is not None:
            if self._log and not self._last.log:
                self._last = msgspec.structs.replace(self._last, log=tuple(self._log))
            self._tell(self._last_level, self._last, events)
        self._last, self._last_level, self._held = None, -1, False
        self._log.clear()

    def _comment(self, line: bytes) -> None:
        if sum(map(len, self._log)) < LOG_MAX:
            self._log.append(clip(plain(line[4:]), MESSAGE_MAX))


def _timed(text: str) -> tuple[str, float | None]:
    """A description without `# time=12.3ms` at its end, and that time in seconds."""
    found = _TIME.search(text)
    if found is None:
        return text, None
    return text[: found.start()], float(found[1]) / (1000 if found[2] == "ms" else 1)


def _details(block: list[bytes]) -> dict[str, Any]:
    if len(block) == 1 and (found := _ONLY_TIME.match(block[0])):
        return {"duration_ms": float(found[1])}
    from agent.suites.runners import diagnostics  # with YAML's parser: a service starts without it

    return diagnostics.read(plain(b"\n".join(block)))


def _message(details: dict[str, Any]) -> str | None:
    """What a block says in one line; Node calls it `error`."""
    for key in ("message", "error"):
        if isinstance(value := details.get(key), str) and (line := first_line(value)):
            return line
    return None


def _place(details: dict[str, Any]) -> str | None:
    """Where it was, as `file:line:column`: a text (tape), a mapping (node-tap) or `location` (Node)."""
    place = details.get("at", details.get("location"))
    if isinstance(place, dict):
        parts = [place.get(key) for key in ("fileName", "lineNumber", "columnNumber")]
        place = ":".join(str(part) for part in parts if part is not None)
    return first_line(place) if isinstance(place, str) else None


def _seconds(milliseconds: object) -> float | None:
    if isinstance(milliseconds, int | float) and not isinstance(milliseconds, bool) and 0 <= milliseconds < math.inf:
        return milliseconds / 1000
    return None


def _explained(state: State, why: str) -> str:
    return f"{state}: {why}" if state in ("aborted", "lost") else why


def _ending(code: int | None, signal: str | None) -> str:
    return f"the runner was ended by {signal}" if signal else f"the runner exited with code {code}"
