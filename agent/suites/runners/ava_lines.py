"""What AVA's TAP reporter writes, cut into items: bytes in, items out. Nothing here judges; ava_tap.py does.

A result is up to three things one after the other, of which AVA writes all at once:

    not ok 7 - title          -> Passed at once; Failed or Todo with what follows
    #   a line of t.log()     (three spaces; blank lines are not prefixed)  -> Logged after Passed
      ---                     (two spaces)
        name: AssertionError  (four or more)
      ...

Source: protocols/suites.md, "AVA, driver tap" rows 1, 3, 5, 6, 10, 11, 12, 22, 23.
"""

import re
from typing import Final, TypeAlias

import msgspec

from agent.core.lines import CutLine, Lines
from agent.suites.runners.driver import LOG_MAX, YAML_MAX

LINE_MAX: Final = 64 * 1024  # bytes; what a line has beyond is dropped
# Bytes of a block: the first part whole, then of each key its first lines, so that the message after a long difference
# can still be read.
_BLOCK_MAX: Final = YAML_MAX * 3 // 4
_KEYS_MAX: Final = YAML_MAX // 4
_LINES_OF_KEY: Final = 8

_RESULT = re.compile(rb"(ok|not ok) [0-9]{1,10} -(?: (.*))?", re.DOTALL)
_PLAN = re.compile(rb"1\.\.([0-9]{1,10})")
_TOTAL = re.compile(rb"# (tests|pass|skip|fail) ([0-9]{1,10})")
_REMAINING = re.compile(rb"# ([0-9]{1,10}) tests? remaining in (.+)", re.DOTALL)
_TODO: Final = b" # TODO"
# A key and its quoted value, without an end: an escape, or a quote in quotes, is there whole or not at all.
_QUOTED = re.compile(
    rb" *(?:'(?:[^']|'')*'|[^'\":]+): "
    rb"(?:(\")(?:[^\"\\]|\\(?:x..|u.{4}|U.{8}|[^xuU]))*|(')(?:[^']|'')*)",
    re.DOTALL,
)


class Passed(msgspec.Struct, frozen=True, gc=False):
    """An `ok` line; a skip is one too, and its title then ends with ` # SKIP`."""

    title: bytes


class Logged(msgspec.Struct, frozen=True):
    """What the test of the last Passed had logged."""

    log: tuple[bytes, ...]


class Failed(msgspec.Struct, frozen=True):
    """A `not ok` line with its log and its YAML block; `yaml` is null where there was none."""

    title: bytes
    log: tuple[bytes, ...]
    yaml: bytes | None


class Todo(msgspec.Struct, frozen=True):
    """A `not ok … # TODO` line with neither log nor YAML. The title comes without the directive."""

    title: bytes


class Remaining(msgspec.Struct, frozen=True):
    """`# 2 tests remaining in <file>`: selected tests that never ran."""

    count: int
    file: bytes


class Plan(msgspec.Struct, frozen=True):
    """`1..N`, at the end."""

    count: int


class Total(msgspec.Struct, frozen=True):
    """One of the counts after the plan: `tests`, `pass`, `skip` or `fail`."""

    word: str
    count: int


class Noise(msgspec.Struct, frozen=True):
    """A line that AVA does not write, or one without its end."""

    line: bytes


Item: TypeAlias = Passed | Logged | Failed | Todo | Remaining | Plan | Total | Noise


class AvaLines:
    """Cuts AVA's standard output into items. How the bytes were chunked never changes them."""

    def __init__(self) -> None:
        self._lines = Lines(LINE_MAX)
        self._items: list[Item] = []
        self._passed = False  # log lines that come now belong to an `ok` line
        self._failed: bytes | None = None  # the title of a `not ok` line that may go on
        self._log: list[bytes] = []
        self._log_room = LOG_MAX
        self._yaml: list[bytes] | None = None  # the block that is being read
        self._yaml_room = self._keys_room = 0
        self._lines_left = 0  # of the key that is being read
        self._planned = False

    def feed(self, data: bytes) -> list[Item]:
        """Take what was read; return what is complete, in order."""
        items: list[Item] = []
        self._items = items
        for line in self._lines.feed(data):
            # The one line that a healthy run has by the thousand.
            if line.startswith(b"ok ") and self._yaml is None and self._failed is None:
                number, dash, title = line[3:].partition(b" - ")
                if dash and number.isdigit():
                    if self._log:
                        self._close()
                    self._passed = True
                    items.append(Passed(title))
                    continue
            self._take(line)
        return items

    @property
    def begun(self) -> bytes | None:
        """The title of a `not ok` line that has come, and that the next line will end or go on with."""
        return self._failed

    def eof(self) -> list[Item]:
        """No more will come. A line without its end is noise: its title may be half of one."""
        cut = self._lines.eof()
        self._items = []
        self._close()
        return [*self._items, *map(Noise, cut)]

    def _take(self, line: bytes) -> None:
        if self._yaml is not None:
            if line == b"  ...":
                self._close()
                return
            if line.startswith(b"    ") or not line.strip():
                self._keep_yaml(self._yaml, line)
                return
            self._close()  # AVA died within the block
        if line.startswith(b"#   "):
            self._keep_log(line[4:])
            return
        if not line.strip():
            if self._log:
                self._keep_log(line)
            return
        if line == b"  ---" and self._failed is not None:
            self._yaml, self._yaml_room, self._keys_room = [], _BLOCK_MAX, _KEYS_MAX
            return
        self._close()
        self._begin(line)

    def _begin(self, line: bytes) -> None:
        items = self._items
        if line.startswith((b"ok ", b"not ok ")) and (match := _RESULT.fullmatch(line)):
            title = match[2] or b""
            if match[1] == b"ok":
                self._passed = True
                items.append(Passed(title))
            else:
                self._failed = title
        elif line.startswith(b"# "):
            # A finished hook's line has one space too, and says nothing that is needed.
            if not self._planned and (match := _REMAINING.fullmatch(line)):
                items.append(Remaining(int(match[1]), match[2]))
            elif self._planned and (match := _TOTAL.fullmatch(line)):
                items.append(Total(match[1].decode(), int(match[2])))
        elif not self._planned and (match := _PLAN.fullmatch(line)):
            self._planned = True
            items.append(Plan(int(match[1])))
        elif not line.startswith(b"TAP version "):
            items.append(Noise(line))

    def _keep_log(self, line: bytes) -> None:
        """Lines after a finished hook's are dropped: no record is theirs."""
        if (self._passed or self._failed is not None) and self._log_room > 0:
            self._log.append(line[: self._log_room])
            self._log_room -= len(line) + 1

    def _keep_yaml(self, yaml: list[bytes], line: bytes) -> None:
        if isinstance(line, CutLine) and (quoted := _QUOTED.match(line)):
            line = quoted[0] + (quoted[1] or quoted[2])
        self._lines_left = _LINES_OF_KEY if line[4:5].strip() else self._lines_left - 1
        if self._yaml_room >= len(line):
            self._yaml_room -= len(line)
            yaml.append(line[4:])
        elif self._lines_left > 0 and self._keys_room >= len(line):
            self._yaml_room, self._keys_room = 0, self._keys_room - len(line)
            yaml.append(line[4:])

    def _close(self) -> None:
        """The result that was open has all that belongs to it."""
        log = tuple(self._log)
        if self._failed is not None:
            title, self._failed = self._failed, None
            if self._yaml is None and not log and title.endswith(_TODO):
                self._items.append(Todo(title.removesuffix(_TODO)))
            else:
                yaml = None if self._yaml is None else b"\n".join(self._yaml)
                self._items.append(Failed(title, log, yaml))
        elif log:
            self._items.append(Logged(log))
        self._passed, self._yaml = False, None
        if log:
            self._log, self._log_room = [], LOG_MAX
