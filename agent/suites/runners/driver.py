"""What every runner's driver gives: how to launch the runner, and its bytes turned into records.

A driver is pure: one object for one run (one attempt of it), bytes and times in, events out. It starts nothing and
kills nothing; suites/role.py does, in this order:

    launch    -> Launch         the command, its environment, extra pipes, files for the scratch folder
    feed      -> events         for every block read from stdout, stderr or an extra pipe
    stop      -> (Stop, ...)    only when we end the run: the signals, in order
    finish    -> events         the process has ended and the pipes are drained

Every runner has a `launch` (a Launcher) and a class or two that are Drivers.
Source: protocols/suites.md, "The driver's interface", "Records, events, result".
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

import msgspec

from agent.core.errors import AgentError
from agent.core.events import TestFinished, TestsSelected, TestStarted, Warned
from agent.core.lines import CutLine
from agent.core.payload import UNREADABLE
from agent.suites.messages import Suite

T = TypeVar("T")
DriverEvent: TypeAlias = TestsSelected | TestStarted | TestFinished | Warned
LastEvent: TypeAlias = TestFinished | Warned

UNREPORTED: Final = "(not reported)"  # the name of a `rest`: tests known only by number
TITLE_MAX: Final = 1024  # bytes of a name; the sheet's "title 1 KiB"
MESSAGE_MAX: Final = 1024  # bytes of a record's message
TEXT_MAX: Final = 64 * 1024  # bytes of one text among a record's details
LOG_MAX: Final = 64 * 1024  # bytes of a record's log, all lines together
YAML_MAX: Final = 256 * 1024  # bytes of a TAP diagnostic block that are read
CASES_MAX: Final = 200_000  # cases remembered, to number repetitions; some 30 MB
WARNINGS_MAX: Final = 100  # of lines that cannot be read

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
_REPETITION = re.compile(r"(.*)#([1-9]\d{0,8})", re.DOTALL)
CUT: Final = "… (cut)"  # what `clip` ends a text with


class CannotLaunch(AgentError):
    """The runner is not there or must not be started like this: the run is blocked with this text, at once."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a runner.

    `argv` is run in the suite's `cwd`, without a shell. Of the environment `unset_env` goes first, then `set_env`
    comes. `pipes` names extra pipes from the runner to us: the child gets the number of its writing end in
    `EMISSARY_PIPE_<NAME in capitals>`, and what is read is fed under that name. `files` are to be put into the
    scratch folder before the start, by names relative to it.
    """

    argv: tuple[str, ...]
    set_env: dict[str, str] = {}
    unset_env: tuple[str, ...] = ()
    pipes: tuple[str, ...] = ()
    files: dict[str, bytes] = {}


class Only(msgspec.Struct, frozen=True):
    """One thing to run again: a whole file (`name` null), or one test by the `file` and `name` of its record."""

    file: str | None
    name: str | None = None


class Stop(msgspec.Struct, frozen=True):
    """A signal for the runner, and how long it may then take to end, in seconds.

    `alone`: not for its process group; a runner that ends its own workers tells what became of them.
    """

    signal: int
    wait_s: float
    alone: bool = False


class PluginLines(Generic[T]):
    """What a runner's plugin tells, a line of JSON each. A line that is none is warned of, the first hundred times."""

    def __init__(self, decode: Callable[[bytes], T], code: str) -> None:
        self._decode, self._code = decode, code
        self._unread = 0

    def read(self, line: bytes, events: list[DriverEvent]) -> T | None:
        """What it says; None: a warning was added to `events`, or one too many."""
        try:
            if isinstance(line, CutLine):
                raise msgspec.DecodeError(f"a line of {len(line) + line.dropped} bytes")
            return self._decode(line)
        except UNREADABLE as err:
            self._unread += 1
            if self._unread <= WARNINGS_MAX:
                events.append(Warned(self._code, clip(f"{err} in {plain(line[:200])!r}", MESSAGE_MAX)))
            return None


class Launcher(Protocol):
    """The form of every driver module's `launch`."""

    def __call__(self, suite: Suite, project: Path, scratch: Path, run: str, *, only: Sequence[Only] = ()) -> Launch:
        """How to start the runner for this suite.

        `project` is the folder the runner starts in (the source with the suite's `cwd`), `scratch` an empty folder of
        the run. Both exist; files of `project` are looked at, nothing is written. `only` narrows the run to what is
        resumed or retried. Raises CannotLaunch, DocumentError (an argument the suite must not give).
        """


class Driver(Protocol):
    """One attempt of one run: the runner's bytes in, records out. Nothing it is fed makes it raise."""

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read from `stream` ("stdout", "stderr" or a pipe's name). `now` is epoch seconds.

        How the bytes were chunked never changes the events, their times apart.
        """

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """We end the run. The signals in order; after the last one's wait the tree is killed."""

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """The process has ended and its pipes are drained: the last events. To be called once.

        `code` is its exit code, `signal` the name ("SIGKILL") of the signal that ended it, else null. `reason` says why
        we ended it; null: it ended by itself.
        """

    def running(self) -> str | None:
        """The case of the test that runs now, where the runner tells of starts."""


class Cases:
    """Gives each record of a run its `case`, unique within the run.

    `file › name`, or `name` where the file is unknown; `#2` on repetition; `@2` for a second attempt.
    """

    def __init__(self, attempt: int = 1) -> None:
        self.attempt = attempt
        self._seen: dict[str, int] = {}
        self._beyond = 0  # cases that came when CASES_MAX were remembered

    def case(self, file: str | None, name: str) -> str:
        """The case of the next record of that file and name. Repeated calls give repetitions."""
        plain = f"{file} › {name}" if file else name
        count = self._seen.get(plain, 0) + 1
        if count == 1 and "#" in plain and (found := _REPETITION.fullmatch(plain)):
            count += self._seen.get(found[1], 0) >= int(found[2])  # that case is another test's repetition
        while count > 1 and f"{plain}#{count}" in self._seen:
            count += 1  # that one is another test's name
        if count > 1 or len(self._seen) < CASES_MAX:
            self._seen[plain] = count
        else:
            self._beyond += 1
            count = CASES_MAX + self._beyond  # not remembered, and so numbered in any case: a case stays unique
        repeated = f"{plain}#{count}" if count > 1 else plain
        return f"{repeated}@{self.attempt}" if self.attempt > 1 else repeated

    def is_known(self, file: str | None, name: str) -> bool:
        """Was there a record of that file and name?"""
        return (f"{file} › {name}" if file else name) in self._seen


def clip(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, cut between characters and marked where something is gone."""
    if len(text) * 4 <= limit:
        return text
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text
    return data[: max(0, limit - len(CUT.encode()))].decode("utf-8", "ignore") + CUT


def plain(data: bytes) -> str:
    """Bytes of a runner as text: UTF-8, wrong bytes replaced, ANSI sequences removed."""
    text = data.decode("utf-8", "replace")
    return _ANSI.sub("", text) if "\x1b" in text else text


def title(text: str) -> str:
    """A test's name as it stands in records: white space collapsed, ANSI removed, at most TITLE_MAX bytes."""
    # Nearly all are so already; what is not printable includes escape and any white space but the blank.
    if text.isprintable() and "  " not in text and len(text) * 4 <= TITLE_MAX and text == text.strip():
        return text
    return clip(" ".join(_ANSI.sub("", text).split()), TITLE_MAX)


def first_line(text: str) -> str | None:
    """The first line that says something, for a record's `message`; null if none does."""
    for line in text.splitlines():
        if line.strip():
            return clip(line.strip(), MESSAGE_MAX)
    return None
