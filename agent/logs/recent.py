"""The last lines of a log that cannot be read again (journal, kernel), for what is told of the lines before a match.

Source: protocols/logs.md 2.1, "Context by backtracking", and 5, "Journal and kernel".
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from itertools import accumulate

from agent.logs.context import (
    RECENT,
    Anchor,
    Anchors,
    Around,
    Ask,
    Captures,
    Place,
    Search,
    Size,
    T,
    look_back,
    record_before,
)
from agent.logs.matched import finish
from agent.logs.regex import Matcher, Regex
from agent.logs.rules import CompiledRule

MAX_BYTES = 1 << 20  # of all lines and their fields


def with_fields(captures: Captures, fields: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """The captures; a group that is named as a field and took nothing, as `(?<_PID>)`, has the field's value."""
    return {name: value or fields.get(name, value) for name, value in captures.items()}


class _Line:
    __slots__ = ("fields", "known", "offset", "size", "text")

    def __init__(self, offset: int, text: bytes, fields: Mapping[str, bytes]) -> None:
        self.offset, self.text, self.fields = offset, text, fields
        self.size = len(text) + sum(map(len, fields.values()))
        self.known: dict[Regex, dict[str, bytes | None] | None] = {}  # what each `until` captured in it


class Recent:
    """A memory of at most RECENT lines. `is_whole`: what came before its first line is not lost, for there is nothing.

    Threads: a search may run in one while nothing is added.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self._lines: deque[_Line] = deque()
        self._bytes = 0
        self._matcher = Matcher()

    def add(self, offset: int, text: bytes, fields: Mapping[str, bytes]) -> None:
        """The next line; those of one record have its `offset`."""
        line = _Line(offset, text, fields)
        self._lines.append(line)
        self._bytes += line.size
        while len(self._lines) > RECENT or self._bytes > MAX_BYTES:
            self._bytes -= self._lines.popleft().size
            self.is_whole = False

    def forget_matches(self) -> None:
        """The rules are others now."""
        for line in self._lines:
            line.known = {}

    def around(self, rule: CompiledRule, captures: Captures) -> tuple[Around, bool]:
        """What stands before a match in the line that comes next. True: the memory ended before the search did."""
        starts = list(accumulate((len(line.text) + 1 for line in self._lines), initial=0))
        indexes = [self._index(regex, rule.spec.context.same, starts) for regex in rule.until]
        search = look_back(rule, Place(1, starts[-1]), captures, indexes)
        around, is_cut = self._finish(search)
        lines = list(self._lines)
        anchors = [
            anchor._replace(place=Place(1, lines[bisect_right(starts, anchor.place.offset) - 1].offset))
            for anchor in around.anchors
        ]
        return around._replace(anchors=anchors), is_cut and not self.is_whole

    def record_before(self, rule: CompiledRule, text: bytes) -> list[bytes]:
        """The lines of the multi-line record that the line which comes next is in, that line left out."""
        if not (rule.spec.multiline and rule.start and rule.continuation):
            return []
        end = sum(len(line.text) + 1 for line in self._lines)
        search = record_before(rule.spec.multiline, rule.start, rule.continuation, self._matcher, Place(1, end), text)
        return self._finish(search)[0]

    def _index(self, regex: Regex, same: list[str], starts: list[int]) -> Anchors:
        """The lines that match an `until`. Each is matched by it once while it is remembered."""
        anchors = Anchors([name for name in same if name in regex.groups], Place(1, 0))
        for line, start in zip(self._lines, starts, strict=False):
            if regex not in line.known:
                found = self._matcher.match(regex, line.text)
                line.known[regex] = None if found is None else with_fields(found, line.fields)
            captures = line.known[regex]
            if captures is not None:
                anchors.add(Anchor(Place(1, start), line.text, captures))
        return anchors

    def _finish(self, search: Search[T]) -> tuple[T, bool]:
        """Run a search over the lines as if they were a file of their own. True: it would have gone on before them."""
        data = b"".join(line.text + b"\n" for line in self._lines)
        is_cut = False

        def answer(wish: Ask | Size) -> bytes | None:
            nonlocal is_cut
            if isinstance(wish, Size):
                is_cut = True
                return None
            return data[wish.start : wish.start + wish.size]

        return finish(search, answer), is_cut
