"""The last lines of a log that cannot be read again (journal, kernel), for what is told of the lines before a match.

Source: protocols/logs.md 2.1, "Context by backtracking", and 5, "Journal and kernel".
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping

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
    __slots__ = ("at", "fields", "known", "offset", "size", "text")

    def __init__(self, at: int, offset: int, text: bytes, fields: Mapping[str, bytes]) -> None:
        self.at = at  # bytes of all lines before it, forgotten ones too
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
        self._bytes = self._end = 0
        self._matcher = Matcher()

    def add(self, offset: int, text: bytes, fields: Mapping[str, bytes]) -> None:
        """The next line; those of one record have its `offset`."""
        line = _Line(self._end, offset, text, fields)
        self._end += len(text) + 1
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
        begin = self._begin
        indexes = [self._index(regex, rule.spec.context.same) for regex in rule.until]
        around, is_cut = self._finish(look_back(rule, Place(1, self._end - begin), captures, indexes))
        lines = list(self._lines) if around.anchors else []
        starts = [line.at - begin for line in lines]
        anchors = [
            anchor._replace(place=Place(1, lines[bisect_right(starts, anchor.place.offset) - 1].offset))
            for anchor in around.anchors
        ]
        return around._replace(anchors=anchors), is_cut and not self.is_whole

    def record_before(self, rule: CompiledRule, text: bytes) -> list[bytes]:
        """The lines of the multi-line record that the line which comes next is in, that line left out."""
        if not (rule.spec.multiline and rule.start and rule.continuation):
            return []
        end, multiline = Place(1, self._end - self._begin), rule.spec.multiline
        search = record_before(multiline, rule.start, rule.continuation, self._matcher, end, text)
        return self._finish(search)[0]

    @property
    def _begin(self) -> int:
        """Where the first line begins that is remembered."""
        return self._lines[0].at if self._lines else self._end

    def _index(self, regex: Regex, same: list[str]) -> Anchors:
        """The lines that match an `until`. Each is matched by it once while it is remembered."""
        anchors, begin = Anchors([name for name in same if name in regex.groups], Place(1, 0)), self._begin
        for line in self._lines:
            if regex not in line.known:
                found = self._matcher.match(regex, line.text)
                line.known[regex] = None if found is None else with_fields(found, line.fields)
            captures = line.known[regex]
            if captures is not None:
                anchors.add(Anchor(Place(1, line.at - begin), line.text, captures))
        return anchors

    def _finish(self, search: Search[T]) -> tuple[T, bool]:
        """Run a search over the lines as if they were a file of their own. True: it would have gone on before them."""
        is_cut = False

        def answer(wish: Ask | Size) -> bytes | None:
            nonlocal is_cut
            if isinstance(wish, Size):
                is_cut = True
                return None
            start = self._begin + wish.start
            end, texts, at = start + wish.size, list[bytes](), start
            for line in reversed(self._lines):  # most searches end with the last few
                if line.at < end:
                    texts.append(line.text + b"\n")
                    at = line.at
                if line.at <= start:
                    break
            return b"".join(reversed(texts))[start - at : end - at]

        return finish(search, answer), is_cut
