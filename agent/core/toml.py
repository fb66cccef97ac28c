"""TOML files with the line of every header and key, so that whatever is wrong in one can be shown where it stands.

tomllib tells no positions; one pass over the text finds them. Read files here when errors must name file, line and key:
settings, hardware profiles, rule files.

    AgentError
    └── TomlError           the file cannot be read, or is not TOML

Source: protocols/packaging.md 6.
"""

import bisect
import errno
import os
import re
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.core.errors import AgentError

MAX_FILE = 1 << 20  # bytes
MAX_DEPTH = 32  # tables and lists in each other; tomllib recurses, and is quadratic in the parts of a dotted key
MAX_BARE = 100  # characters of a number or date; Python refuses to read integers of more than 4300 digits
MAX_SHOWN = 200  # characters of a key in a message

At = tuple[str | int, ...]
"""Where a value stands in its document: keys, and indices of lists and arrays of tables."""


class TomlError(AgentError):
    """A file cannot be used as TOML; whoever reads it says which file.

    `line` is 0 where nothing could be read, `key` is dotted, and "" where no key is to blame.
    """

    def __init__(self, line: int, key: str, what: str, *, remedy: str) -> None:
        super().__init__(what, remedy=remedy)
        self.line, self.key = line, key


class Document(msgspec.Struct, frozen=True):
    """What a file says, and where. `lines` lacks what begins on the line of its container."""

    data: dict[str, Any]
    lines: dict[At, int]

    def line(self, at: At) -> int:
        """The line of the value at `at`, else of the nearest container; 1 at the least."""
        while at not in self.lines:
            at = at[:-1]
        return self.lines[at]


def read(path: Path, *, follow_links: bool = True) -> Document:
    """Read a regular file of at most MAX_FILE bytes; never waits on a pipe. Raises TomlError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise TomlError(0, "", "is not a regular file", remedy="Put the content into one.")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise TomlError(0, "", "there is no such file", remedy="Create it, or name the right one.") from None
    except OSError as err:
        if err.errno == errno.ELOOP and not follow_links:
            raise TomlError(0, "", "is a symbolic link", remedy="Name the file that it points to.") from None
        why = f"cannot be read: {os.strerror(err.errno or 0)}"
        raise TomlError(0, "", why, remedy="Let the agent's user read it.") from None
    if len(data) > MAX_FILE:
        raise TomlError(0, "", f"is larger than {MAX_FILE >> 20} MiB", remedy="Split it.")
    try:
        return parse(data.decode())
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise TomlError(line, "", f"byte 0x{data[err.start]:02x} is not UTF-8", remedy="Save it as UTF-8.") from None


def parse(text: str) -> Document:
    """Parse a document; a byte order mark is skipped. Raises TomlError."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    scan = _Scan(text)
    try:
        scan.run()
        return Document(tomllib.loads(text), scan.lines)
    except _TooMuch as err:
        line = scan.line()
        raise TomlError(line, scan.near(line), str(err), remedy="Write text in quotes, and nest less.") from None
    except tomllib.TOMLDecodeError as err:
        # The message is all that has the position: "Invalid value (at line 3, column 5)", "... (at end of document)".
        said, _, where = str(err).rpartition(" (at ")
        remedy = next((remedy for start, remedy in _REMEDIES.items() if said.startswith(start)), "Correct the line.")
        if found := re.match(r"line (\d+), column (\d+)", where):
            line, where = int(found[1]), f"in column {found[2]}"
        else:  # what was never closed began with the last key
            line, where = scan.begun[-1][0] if scan.begun else 1, "at the end of the file"
        what = f"not TOML: {said[:1].lower()}{said[1:200]} {where}"
        raise TomlError(line, scan.near(line), what, remedy=remedy) from None


_REMEDIES = {
    "Invalid value": "Write text in quotes.",
    "Unescaped '\\'": "Write text with a backslash in single quotes.",
    "Cannot": "Say it once.",
}


def name(step: str | int) -> str:
    """A step of a path as a person writes it: a bare key, one in quotes, or an index in brackets."""
    if isinstance(step, int):
        return f"[{step}]"
    return step if re.fullmatch(r"[A-Za-z0-9_-]+", step) else quoted(step)


def joined(names: Sequence[str]) -> str:
    """The dotted key: `logs.watch[0].path`."""
    return "".join(name if name.startswith("[") else f".{name}" for name in names).removeprefix(".")


def quoted(text: str) -> str:
    """A basic string on one line: JSON's, but for DEL. What is not Unicode (a variable's bytes) shows as \\udc80."""
    text = text.encode(errors="backslashreplace").decode()
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


class _TooMuch(Exception):
    """What would keep Python's own readers busy for ever, or end in an error that has no line."""


class _Lost(Exception):
    """Not TOML from here on. tomllib will say so, and better."""


_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*+)*+")
_KEY = re.compile(r"""[ \t]*+(?:([A-Za-z0-9_-]++)|("(?:[^"\\\n]|\\.)*+")|'([^'\n]*+)')[ \t]*+""")
_BARE = re.compile(r"""[^\s,\]}#"']++(?:\ \d\d:[^\s,\]}#"']++)?""")  # a date may have a space before its time
_END = re.compile(r"[ \t\r]*+(?:#[^\n]*+)?(?:\n|\Z)")
_STRING = re.compile(
    r"""
      \"\"\"(?:[^"\\]|\\.|"(?!""))*+"{3,5}
    | '''(?:[^']|'(?!''))*+'{3,5}
    | "(?:[^"\\\n]|\\.)*+"
    | '[^'\n]*+'
    """,
    re.VERBOSE | re.DOTALL,
)


class _Scan:
    """Walks a document and fills `lines`. Tolerant: whatever tomllib takes is walked to its end, and more besides."""

    def __init__(self, text: str) -> None:
        self.lines: dict[At, int] = {(): 1}
        self.begun: list[tuple[int, At]] = []  # headers and keys in their order, those said twice too
        self._text, self._pos = text, 0
        self._starts = [found.end() for found in re.finditer("\n", text)]
        self._open: At = ()  # the pair whose value is being walked
        self._entries: dict[At, int] = {}  # arrays of tables -> how many headers they have so far

    def line(self) -> int:
        """Where it is."""
        return bisect.bisect_right(self._starts, self._pos) + 1

    def near(self, line: int) -> str:
        """The last key of a line, else the one whose value was never walked to its end; "" if there is neither."""
        at = next((at for begun, at in reversed(self.begun) if begun == line), self._open)
        return joined([name(step) for step in at])[:MAX_SHOWN]

    def run(self) -> None:
        """Raises _TooMuch."""
        table: At = ()
        try:
            while self._peek():
                if self._text.startswith("[[", self._pos):
                    table = self._header("[[", "]]")
                elif self._peek() == "[":
                    table = self._header("[", "]")
                else:
                    self._pair(table)
                    self._take(_END)
                    self._open = ()
        except _Lost:
            return

    def _peek(self) -> str:
        """Skip spaces, newlines and comments; the character after them, "" at the end."""
        self._take(_BLANK)
        return self._text[self._pos : self._pos + 1]

    def _take(self, what: re.Pattern[str]) -> re.Match[str]:
        found = what.match(self._text, self._pos)
        if not found:
            raise _Lost
        self._pos = found.end()
        return found

    def _expect(self, what: str) -> None:
        if not self._text.startswith(what, self._pos):
            raise _Lost
        self._pos += len(what)

    def _header(self, begin: str, end: str) -> At:
        line = self.line()
        at: At = ()
        self._expect(begin)
        *outer, last = self._keys(0)
        self._expect(end)
        for key in outer:
            at = (*at, key)
            self.lines.setdefault(at, line)
            if at in self._entries:  # below [[x]], [x.y] means the last x
                at = (*at, self._entries[at] - 1)
        at = (*at, last)
        if begin == "[[":
            self.lines.setdefault(at, line)
            self._entries[at] = self._entries.get(at, 0) + 1
            at = (*at, self._entries[at] - 1)
        self.lines[at] = line
        self.begun.append((line, at))
        return at

    def _pair(self, table: At) -> None:
        self._peek()
        line, at = self.line(), table
        for key in self._keys(len(table)):
            at = (*at, key)
            self.lines.setdefault(at, line)
        self.begun.append((line, at))
        self._expect("=")
        self._open = self._open or at
        self._value(at, line)

    def _keys(self, depth: int) -> list[str]:
        keys: list[str] = []
        while True:
            bare, basic, literal = self._take(_KEY).groups()
            keys.append(bare or literal or (_unescaped(basic) if basic else ""))
            if depth + len(keys) > MAX_DEPTH:
                raise _TooMuch(f"a key of more than {MAX_DEPTH} parts")
            if not self._text.startswith(".", self._pos):
                return keys
            self._pos += 1

    def _value(self, at: At, line: int) -> None:
        if len(at) > MAX_DEPTH:
            raise _TooMuch(f"nested deeper than {MAX_DEPTH}")
        match self._peek():
            case '"' | "'":
                self._take(_STRING)
            case "[":
                self._items("]", at, line)
            case "{":
                self._items("}", at, line)
            case _:
                start = self._pos
                if len(self._take(_BARE)[0]) > MAX_BARE:
                    self._pos = start
                    raise _TooMuch(f"a value of more than {MAX_BARE} characters without quotes")

    def _items(self, end: str, at: At, line: int) -> None:
        self._pos += 1
        index = 0
        while self._peek() != end:
            if end == "}":
                self._pair(at)
            else:
                here = self.line()
                if here != line:
                    self.lines[*at, index] = here
                self._value((*at, index), here)
                index += 1
            if self._peek() != end:
                self._expect(",")
        self._pos += 1


def _unescaped(basic: str) -> str:
    """The text of a basic string as it stands in the document, quotes and all."""
    if "\\" not in basic:
        return basic[1:-1]
    try:
        return str(tomllib.loads(f"k = {basic}")["k"])
    except tomllib.TOMLDecodeError:
        raise _Lost from None
