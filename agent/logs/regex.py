"""PCRE2 regexes: compile one, match a line. The scanner runs them by the thousand; here is one at a time.

    AgentError
    └── RegexError          the pattern is refused, and where it is wrong

Source: protocols/logs.md 2.1 and 3, "PCRE2".
"""

from agent._native import ffi, lib
from agent.core.errors import AgentError
from agent.logs.literals import may_match_a_line

UNSET = 0xFFFFFFFF  # the start of a capture that took no part; native/native.h


class RegexError(AgentError):
    """A pattern cannot be used."""


class Regex:
    """A compiled pattern. Matches bytes, or with `utf` UTF-8 in which invalid bytes match nothing.

    `groups` are the names of its named groups by number, `jit` whether it runs as machine code. `interpret` forbids
    that, as a system does that refuses executable memory. Threads may share it. Raises RegexError, also for a pattern
    that needs a line feed, which is in no line.
    """

    def __init__(self, pattern: str, *, utf: bool = False, interpret: bool = False) -> None:
        text, fault = pattern.encode(), ffi.new("struct regex_fault *")
        flags = (lib.REGEX_UTF if utf else 0) | (lib.REGEX_INTERPRET if interpret else 0)
        handle = lib.regex_compile(text, len(text), flags, fault)
        if not handle:
            said, near = ffi.string(fault.text).decode(), _near(text, int(fault.at))
            raise RegexError(f"{said}, at {near}", remedy="Correct the regex (PCRE2 syntax).")
        if not may_match_a_line(pattern, utf=utf):
            raise RegexError(
                "needs a line feed, and a line is matched without the one that ends it: it would never match",
                remedy="Leave the line feed out, or write $ for the end of the line.",
            )
        self.pattern, self.utf = pattern, utf
        self.handle = ffi.gc(handle, lib.regex_free)
        names = [ffi.string(lib.regex_group(handle, i)).decode() for i in range(lib.regex_groups(handle))]
        self.groups = tuple(names)
        self.jit = bool(lib.regex_jit(handle))


class Matcher:
    """What one thread needs to match lines with regexes."""

    def __init__(self) -> None:
        self._scratch = ffi.gc(lib.scratch_new(), lib.scratch_free)
        if not self._scratch:
            raise MemoryError
        self._captures = ffi.new("uint32_t[]", 2 * lib.REGEX_PATTERN_MAX)

    def match(self, regex: Regex, line: bytes) -> dict[str, bytes | None] | None:
        """The named captures of the first match in a line without its end; None: no match, or given up at a limit."""
        if lib.regex_match(regex.handle, self._scratch, line, len(line), 0, self._captures) != 1:
            return None
        spans = ffi.unpack(self._captures, 2 * len(regex.groups))
        return {
            name: None if start == UNSET else line[start : start + size]
            for name, start, size in zip(regex.groups, spans[::2], spans[1::2], strict=True)
        }


def version() -> str:
    """Which PCRE2 it is, as "10.42"."""
    text = ffi.new("char[64]")
    lib.regex_version(text)
    return ffi.string(text).decode().split()[0]


def _near(text: bytes, at: int) -> str:
    """The place in a pattern, for people."""
    if at >= len(text):
        return "the end"
    return f"byte {at}, before {text[at : at + 20].decode(errors='backslashreplace')!r}"
