"""AVA, driver `tap`: records out of what its TAP reporter writes.

A record is published as its line comes, judged by what the line says. What the line cannot say is settled at the end,
by the plan and the totals, and corrected: which `# SKIP` is of a title, which failures are hooks, what was never run.

    N (plan)   = passed + failed + skipped + todo + never run
    hooks      = results + remaining - N           `remaining` is told for files that ended well
    unreported = N - results that are tests

Source: protocols/suites.md, "AVA, driver tap" (the numbers of its rows stand in comments).
"""

import re
import signal as signals
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from agent.core.events import State, TestFinished, Warned
from agent.suites.messages import Suite
from agent.suites.runners import ava_lines
from agent.suites.runners.ava_files import Files
from agent.suites.runners.ava_lines import AvaLines, Item
from agent.suites.runners.driver import (
    UNREPORTED,
    Cases,
    DriverEvent,
    LastEvent,
    Only,
    Stop,
    clip,
    first_line,
    plain,
    title,
)

SKIP: Final = " # SKIP"
TERM_WAIT_S: Final = 5.0  # row 17
STDERR_MAX: Final = 4096  # bytes of the last output that a lost run shows
_KEPT_MAX: Final = 8 * 1024 * 1024  # bytes of failures kept whole until the plan; beyond it, without details and log
_OPEN_MAX: Final = 100_000  # records that the plan may correct; further ones stay as they were told
_WAITING_MAX: Final = 100  # crashes that wait for the line which names their file
_WARNINGS_MAX: Final = 5

# Row 13. A test with such a title has YAML.
_EXITED = re.compile(r"(.+) exited (?:with a non-zero exit code: \d+|due to \w+)")
_NO_TESTS = re.compile(r'No tests found in (.+?)(?:, make sure to import "ava" at the top of your test file)?')
_NON_ERRORS = {"uncaught-exception", "unhandled-rejection", "internal-error"}
_OUR_SIGNALS = (" exited due to SIGINT", " exited due to SIGTERM", " exited due to SIGKILL")
# AVA gives hooks around each test the test's title, and only those.
_HOOK = re.compile(r"(?:^|› )(?:(?:before|after)(?:\.always)? hook|(?:beforeEach|afterEach)(?:\.always)? hook for .+)$")
_AT = re.compile(r"(?:^|[( ])(?:file://)?(/[^()]*:\d+:\d+)\)?$")


def said(details: dict[str, Any]) -> str | None:
    """What AVA's error says in one line: its message, or the assertion, with what was thrown."""
    told = details.get("formatted") or details.get("message") or details.get("assertion") or details.get("text")
    text = first_line(str(told or ""))
    values = details.get("details")
    if text and isinstance(values, dict):
        # "Error thrown in test" and "Rejected promise returned by test" alone say nothing.
        for label, value in values.items():
            if str(label).startswith(text):
                return first_line(f"{text}: {' '.join(str(value).split())}")
    return text or first_line(str(details.get("name") or ""))


def place(at: object) -> str | None:
    """`/path/file.js:24:8` out of a line of a stack; null where it points into AVA or Node."""
    match = _AT.search(str(at)[-1024:])
    return clip(match[1], 1024) if match and "/ava/lib/" not in match[1] else None


class AvaTap:
    """The Driver for what `launch` of ava.py starts with driver `tap`. Standard error belongs to the run, not to tests.

    `only` is what the launch was narrowed to.
    """

    def __init__(self, suite: Suite, run: str, *, attempt: int = 1, only: Sequence[Only] = ()) -> None:
        self._suite, self._run, self._attempt = suite, run, attempt
        self._grace_s = suite.limits.grace
        self._files = Files([one.file for one in only if one.file] or suite.files)
        self._before_stop: str | None = None  # the title that had come, not yet its end, when we stopped the run
        self._lines, self._cases = AvaLines(), Cases(attempt)
        self._now = 0.0
        self._tests = 0  # results that are tests or hooks
        self._crashes = 0  # lines that are crashes, `exited` lines among them
        self._last: TestFinished | None = None  # the last `ok`, whose log may follow
        self._skips: list[TestFinished] = []
        self._failures: list[TestFinished] = []  # tests or hooks
        self._has_failed = False
        self._kept = 0  # bytes of them
        self._waiting: list[TestFinished] = []  # crashes whose file's `exited` line has not come
        self._crashed_files: set[str] = set()
        self._is_crashed = False
        self._remaining: list[tuple[str, int]] = []
        self._plan: int | None = None
        self._totals: dict[str, int] = {}
        self._noise = 0
        self._stderr = b""
        self._stopped: str | None = None
        self._is_cut = False  # we ended it before its plan: files that had not begun are not in the plan

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read from "stdout" or "stderr"."""
        self._now = now
        if stream != "stdout":
            self._stderr = (self._stderr + data)[-STDERR_MAX:]
            return []
        events: list[LastEvent] = []
        for item in self._lines.feed(data):
            if type(item) is ava_lines.Passed:  # nearly all, so they do not wait for the match below
                self._pass(item.title.decode("utf-8", "replace"), events)
            else:
                self._take(item, events)
        return [*events]

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """SIGINT first: AVA then prints its plan. SIGTERM ends it without."""
        if self._stopped is None and (begun := self._lines.begun) is not None:
            self._before_stop = title(plain(begun))
        self._stopped = self._stopped or reason
        self._is_cut = self._plan is None
        return Stop(signals.SIGINT, self._grace_s, alone=True), Stop(signals.SIGTERM, TERM_WAIT_S)

    def running(self) -> str | None:
        """TAP tells of no starts."""
        return None

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """Settle what the plan decides, and say what is missing."""
        self._now, self._stopped = now, reason or self._stopped
        events: list[LastEvent] = []
        for item in self._lines.eof():
            self._take(item, events)
        if self._noise > _WARNINGS_MAX:
            events.append(Warned("ava.noise", f"{self._noise} lines on AVA's standard output are not AVA's"))
        if self._plan is None:
            self._choose_hooks(0, events)
            events.append(self._silent(code, signal))
        else:
            self._settle_skips(events)
            hooks = self._choose_hooks(self._tests + sum(n for _, n in self._remaining) - self._plan, events)
            missing = self._rest(self._plan - self._tests + len(hooks), hooks, events)
            if self._is_cut and not missing:
                message = f"aborted: {self._stopped}"
                events.append(self._record(None, UNREPORTED, state="aborted", kind="rest", message=message))
            self._check_counts(events)
            ended_badly = code != 0 or signal is not None
            is_explained = self._has_failed or self._is_crashed or missing or self._stopped is not None
            if ended_badly and not is_explained:
                events.append(self._unexplained(code, signal))
        return events

    def _take(self, item: Item, events: list[LastEvent]) -> None:
        """Any item but Passed."""
        match item:
            case ava_lines.Failed():
                self._fail(item, events)
            case ava_lines.Logged():
                self._log(item.log, events)
            case ava_lines.Todo():
                file, name = self._files.split(title(plain(item.title)))
                self._tests += 1
                events.append(self._record(file, name, state="todo"))
            case ava_lines.Remaining():
                if len(self._remaining) < _OPEN_MAX:
                    self._remaining.append((self._files.known(plain(item.file)), item.count))
            case ava_lines.Plan():
                self._plan = item.count
            case ava_lines.Total():
                self._totals[item.word] = item.count
            case ava_lines.Noise():
                self._hear(plain(item.line), events)

    def _pass(self, text: str, events: list[LastEvent]) -> None:
        self._tests += 1
        is_skip = text.endswith(SKIP)
        file, name = self._files.split(title(text.removesuffix(SKIP) if is_skip else text))
        record = TestFinished(
            run=self._run,
            suite=self._suite.id,
            case=self._cases.case(file, name),
            name=name,
            file=file,
            state="skipped" if is_skip else "passed",
            ended=self._now,
            attempt=self._attempt,
        )
        if is_skip and len(self._skips) < _OPEN_MAX:
            self._skips.append(record)
        self._last = record
        events.append(record)

    def _log(self, log: tuple[bytes, ...], events: list[LastEvent]) -> None:
        """The record went out as its line came; now it has its log. A skip has none: the directive was of the title."""
        if self._last is None:
            return
        changed = msgspec.structs.replace(self._last, log=tuple(map(plain, log)), rev=2)
        if changed.state == "skipped":
            self._skips = [skip for skip in self._skips if skip is not self._last]
            changed = msgspec.structs.replace(changed, state="passed", name=title(changed.name + SKIP))
        events.append(changed)
        self._last = None

    def _fail(self, item: ava_lines.Failed, events: list[LastEvent]) -> None:
        from agent.suites.runners import diagnostics  # with YAML's parser: a service starts without it

        text = title(plain(item.title))
        details = {} if item.yaml is None else diagnostics.read(item.yaml.decode("utf-8", "replace"))
        if item.yaml is None and (exited := _EXITED.fullmatch(text)):
            self._exited(self._files.known(exited[1]), text, events)
        elif item.yaml is None and (empty := _NO_TESTS.fullmatch(text)):
            self._crash(self._files.known(empty[1]), text, {}, events, is_waiting=False)
        elif self._is_crash(text, details):
            self._crash(None, text, details, events, is_waiting=not text.endswith(" exited due to undefined"))
        else:
            self._tests += 1
            file, name = self._files.split(text)
            record = self._record(
                file,
                name,
                state="failed",
                message=said(details),
                details=details,
                at=place(details.get("at")),
                log=tuple(map(plain, item.log)),
            )
            events.append(record)
            size = len(record.case) + len(item.yaml or b"") + sum(map(len, item.log))
            self._kept += size
            if self._kept > _KEPT_MAX:
                self._kept -= size
                record = msgspec.structs.replace(record, details={}, log=())
            self._has_failed = True
            if len(self._failures) < _OPEN_MAX:
                self._failures.append(record)

    def _is_crash(self, text: str, details: dict[str, Any]) -> bool:
        name, message = str(details.get("name") or ""), str(details.get("message") or "")
        if text in _NON_ERRORS:
            return message == "Non-native error"
        if text.endswith(" exited due to undefined"):
            return str(details.get("code")).startswith("ERR_WORKER")  # a worker thread that died, as of memory
        if not name:
            return False
        code = re.match(r" \[\w+\]", text.removeprefix(name))
        line = message.split("\n", 1)[0]
        return text == title(name + (code[0] if code else "") + (f": {line}" if line else ""))

    def _crash(
        self, file: str | None, text: str, details: dict[str, Any], events: list[LastEvent], *, is_waiting: bool
    ) -> None:
        self._crashes += 1
        self._is_crashed = True
        file = file or self._files.single
        if exited := _EXITED.fullmatch(text):
            file = self._files.known(exited[1])
        is_ours = self._stopped is not None and text.endswith(_OUR_SIGNALS) and text != self._before_stop
        record = self._record(
            file,
            text,
            state="aborted" if is_ours else "blocked",
            kind="crash",
            message=f"aborted: {self._stopped}" if is_ours else said(details) or text,
            details=details,
            at=place(details.get("at")),
        )
        if file:
            self._crashed_files.add(file)
        if is_waiting:
            self._waiting = [*self._waiting[1 - _WAITING_MAX :], record]
        events.append(record)

    def _exited(self, file: str, text: str, events: list[LastEvent]) -> None:
        """Give its file to the oldest crash without one, rather to those that name it; a crash by itself if none is."""
        mark = f"/{file}"
        named = [crash for crash in self._waiting if mark in f"{crash.details.get('at')} {crash.name}"]
        own = named or self._waiting[:1]
        if not own:
            self._crash(file, text, {}, events, is_waiting=False)
            return
        self._crashes += 1
        self._crashed_files.add(file)
        self._waiting = [crash for crash in self._waiting if not any(crash is one for one in own)]
        events += [msgspec.structs.replace(crash, file=file, rev=2) for crash in own if crash.file != file]

    def _hear(self, line: str, events: list[LastEvent]) -> None:
        if "Using configuration from " in line:  # row 1
            return
        self._noise += 1
        if self._noise <= _WARNINGS_MAX:
            events.append(Warned("ava.noise", f"not AVA's, on its standard output: {clip(line, 200)}"))

    def _record(self, file: str | None, name: str, *, state: State, **more: Any) -> TestFinished:
        return TestFinished(
            run=self._run,
            suite=self._suite.id,
            case=self._cases.case(file, name),
            name=name,
            file=file,
            state=state,
            ended=self._now,
            attempt=self._attempt,
            **more,
        )

    def _settle_skips(self, events: list[LastEvent]) -> None:
        """Row 6: skips come first, so those beyond the total passed, and `# SKIP` is of their title."""
        if "fail" not in self._totals:
            return  # cut before the totals were all there
        for skip in self._skips[self._totals.get("skip", 0) :]:
            events.append(msgspec.structs.replace(skip, state="passed", name=title(skip.name + SKIP), rev=2))

    def _choose_hooks(self, count: int, events: list[LastEvent]) -> list[TestFinished]:
        """Which failures are hooks: `count` of them, by their titles.

        The count is too low where the remaining tests were not all told (a file crashed, we stopped AVA, no plan): then
        those with AVA's own titles are hooks, too.
        """
        titled = [failure for failure in self._failures if _HOOK.search(failure.name)]
        if self._is_crashed or self._plan is None or self._stopped is not None:
            count = max(count, len(titled))
        if count <= 0:
            return []
        unfinished = {file for file, _ in self._remaining}
        ranked = sorted(
            range(len(self._failures)),
            key=lambda i: (
                not _HOOK.search(self._failures[i].name),
                not self._is_around_a_test(self._failures[i]),
                self._failures[i].file not in unfinished,
                -i,
            ),
        )
        chosen = [self._failures[i] for i in sorted(ranked[:count])]
        for hook in chosen:
            events.append(msgspec.structs.replace(hook, kind="hook", state="blocked", rev=2))
        return chosen

    def _is_around_a_test(self, failure: TestFinished) -> bool:
        """Does the title end with ` for ` and the title of a test that has a result?"""
        at = failure.name.find(" for ")
        while at >= 0:
            if self._cases.is_known(failure.file, failure.name[at + 5 :]):
                return True
            at = failure.name.find(" for ", at + 1)
        return False

    def _rest(self, missing: int, hooks: list[TestFinished], events: list[LastEvent]) -> bool:
        """Tests known only by number: those that a file tells, then the others. Was there any?"""
        left = missing
        hooked = {hook.file for hook in hooks}
        for file, told in self._remaining:
            count = min(told, left)
            if count <= 0:
                continue
            left -= count
            if self._stopped is not None:
                self._missing(file, count, "aborted", f"aborted: {self._stopped}", events)
            elif file in hooked or (None in hooked and file not in hooked) or file in self._crashed_files:
                self._missing(file, count, "blocked", "a hook failed, or the file crashed", events)
            elif self._has_failed or self._is_crashed:
                self._missing(file, count, "skipped", "not run: AVA stopped at the first failure", events)
            else:
                self._missing(file, count, "blocked", "AVA did not run them", events)
        if left > 0:
            if self._stopped is not None:
                self._missing(None, left, "aborted", f"aborted: {self._stopped}", events)
            elif self._is_crashed:
                only = next(iter(self._crashed_files)) if len(self._crashed_files) == 1 else None
                self._missing(only, left, "blocked", "the file crashed before they ended", events)
            else:
                self._missing(self._files.single, left, "lost", "lost: planned, and AVA told no result", events)
        return missing > 0

    def _missing(self, file: str | None, count: int, state: State, message: str, events: list[LastEvent]) -> None:
        events.append(self._record(file, UNREPORTED, state=state, kind="rest", count=count, message=message))

    def _check_counts(self, events: list[LastEvent]) -> None:
        """`# fail` counts the crashes, too: does it know as many as we?"""
        if self._plan is None or "fail" not in self._totals:
            events.append(Warned("ava.counts", "AVA's totals after the plan are missing"))
            return
        totals = self._totals
        crashes = totals["fail"] - self._plan + totals.get("pass", 0) + totals.get("skip", 0)
        if crashes != self._crashes:
            events.append(
                Warned("ava.counts", f"AVA counted {crashes} crashes, its lines tell {self._crashes}: see the crashes")
            )

    def _silent(self, code: int | None, signal: str | None) -> TestFinished:
        """No plan: AVA did not come to its end, and nobody knows how many tests there were."""
        if self._stopped is not None:
            state: State = "aborted"
            message = f"aborted: {self._stopped}"
        else:
            state = "lost"
            message = f"lost: AVA ended {how(code, signal)} without a plan"
        return self._record(
            None, UNREPORTED, state=state, kind="rest", message=message, output=plain(self._stderr).strip()
        )

    def _unexplained(self, code: int | None, signal: str | None) -> TestFinished:
        self._is_crashed = True
        text = unexplained(code, signal, has_selected=self._plan != 0)
        return self._record(None, text, state="blocked", kind="crash", message=text, output=plain(self._stderr).strip())


def how(code: int | None, signal: str | None) -> str:
    """How a process ended, in words."""
    return f"by {signal}" if signal else f"with exit code {code}"


def unexplained(code: int | None, signal: str | None, *, has_selected: bool) -> str:
    """The name of the crash for an end that no record explains."""
    why = ", and no result says why" if has_selected else ": no file or title matched, or no test was selected"
    return f"AVA ended {how(code, signal)}{why}"
