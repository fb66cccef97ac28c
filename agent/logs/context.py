"""What stands around a match: anchors found by walking back, the lines between, lines that follow, multi-line records.

Nothing is read here. A search is a generator: it yields an Ask for bytes or for the Size of the generation before, and
is sent the answer. Positions are (generation, offset); generations rise by one.

Source: protocols/logs.md 2.1, "Context by backtracking" and "Multi-line records".
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from agent._native import lib
from agent.core.engine import ENGINE, room
from agent.logs.literals import LITERAL_MAX, LITERAL_MIN, Clause, Literal, clauses
from agent.logs.messages import Context, Multiline
from agent.logs.regex import Matcher, Regex
from agent.logs.rules import CompiledRule
from agent.logs.scanner import LIMIT, End, Scanner, Worker

BLOCK = 1 << 18  # bytes of one Ask
REACH = 64 << 20  # bytes that are walked back at most
BUDGET = 4 * REACH  # bytes that all steps of a chain may look at together
CANDIDATES = 10_000  # tried in all steps of a chain
LIMITS = 100  # lines that an `until` may give up on, each after a part of a millisecond, or several without JIT
LINES = 8192  # counted by one native call
RECENT = 4096  # lines that an index remembers

Captures = Mapping[str, bytes | None]
T = TypeVar("T")


class Ask(NamedTuple):
    """Send the bytes of a generation from `start` on, `size` of them; fewer at its end."""

    generation: int
    start: int
    size: int


class Size(NamedTuple):
    """Send the size of that generation, if it is still open or found beside; else None."""

    generation: int


Search = Generator[Ask | Size, bytes | int | None, T]


class Place(NamedTuple):
    """Where a line begins."""

    generation: int
    offset: int


class Anchor(NamedTuple):
    """A line that matches `until`, without its end."""

    place: Place
    text: bytes
    captures: dict[str, bytes | None]


class Around(NamedTuple):
    """What was found before a match. `anchors` nearest first; `before` oldest first.

    `elided` lines were left out between. `looked` bytes were walked back. `found` is False when there is an `until` and
    no chain of anchors fits. On `limit_errors` lines an `until` gave up, so nobody knows; LIMITS end the search.
    """

    found: bool
    anchors: list[Anchor]
    before: list[bytes]
    elided: int
    looked: int
    limit_errors: int = 0


class Anchors:
    """The last RECENT lines of one source that match one `until`, found by the values of captures without a search."""

    def __init__(self, same: Sequence[str], since: Place) -> None:
        self.same, self.since = tuple(same), since
        self._lines: deque[Anchor] = deque()
        self._by_values: dict[tuple[bytes | None, ...], deque[Anchor]] = {}
        self._unknown: deque[Place] = deque(maxlen=RECENT)

    def give_up(self, place: Place) -> None:
        """At a limit: nobody knows whether the line there matches."""
        self._unknown.append(place)

    def unknown(self, after: Place, before: Place) -> int:
        """How many such lines there are between two places."""
        return sum(after <= place < before for place in self._unknown)

    def add(self, anchor: Anchor) -> None:
        """A line that comes after all that were added; the oldest goes when there are too many."""
        if len(self._lines) == RECENT:
            oldest = self._lines.popleft()
            self.since = self._lines[0].place
            having = self._by_values[self._key(oldest.captures)]
            having.popleft()
            if not having:
                del self._by_values[self._key(oldest.captures)]
        self._lines.append(anchor)
        self._by_values.setdefault(self._key(anchor.captures), deque()).append(anchor)

    def before(self, place: Place, bound: Captures) -> Iterator[Anchor]:
        """Those before a place whose captures agree, nearest first. All there are from `since` on."""
        if all(name in bound for name in self.same):
            having = self._by_values.get(self._key(bound), deque())
        else:
            having = self._lines
        for anchor in reversed(having):
            if anchor.place < place and _agree(anchor.captures, bound):
                yield anchor

    def _key(self, captures: Captures) -> tuple[bytes | None, ...]:
        return tuple(captures.get(name) for name in self.same)


def look_back(
    rule: CompiledRule, place: Place, captures: Captures, indexes: Sequence[Anchors | None] = ()
) -> Search[Around]:
    """The context before a match of `rule` on the line at `place`. `indexes`: one for each `until`, if any."""
    spec = rule.spec.context
    walking = _Walking(place)
    anchors: list[Anchor] | None = []
    bound = {name: captures[name] for name in spec.same if captures.get(name) is not None}
    if rule.until:
        anchors = yield from _chain(rule, walking, bound, indexes)
    begin = anchors[-1].place if anchors else None
    if anchors:
        for anchor in anchors:
            bound |= {name: anchor.captures[name] for name in spec.same if name in anchor.captures}
    before, elided = yield from _lines_between(spec, walking, begin, [value for value in bound.values() if value])
    return Around(anchors is not None, anchors or [], before, elided, walking.reached, walking.limit_errors)


class _Walking:
    """How far a search has gone, over all generations, and how much it has looked at."""

    def __init__(self, start: Place) -> None:
        self.start = start
        self.reached, self.looked, self.limit_errors = 0, 0, 0
        self.sizes: dict[int, int | None] = {}

    def ask(self, generation: int, start: int, size: int) -> Search[bytes]:
        data = yield Ask(generation, start, size)
        assert isinstance(data, bytes)
        self.looked += len(data)
        self.reached = max(self.reached, self.distance(Place(generation, start)))
        return data

    def size(self, generation: int) -> Search[int | None]:
        """Of an earlier generation."""
        if generation not in self.sizes:
            size = yield Size(generation)
            assert size is None or isinstance(size, int)
            self.sizes[generation] = size
        return self.sizes[generation]

    def distance(self, place: Place) -> int:
        """Bytes from there to the match."""
        between = sum(self.sizes.get(number) or 0 for number in range(place.generation, self.start.generation))
        return between + self.start.offset - place.offset


def _chain(
    rule: CompiledRule, walking: _Walking, bound: dict[str, bytes | None], indexes: Sequence[Anchors | None]
) -> Search[list[Anchor] | None]:
    """One anchor for each `until`, each before the last; None: no chain fits. A step that finds none goes back one."""

    def walk(step: int, start: Place, bound: dict[str, bytes | None]) -> _Walk:
        return _Walk(rule.until[step], walking, start, bound, indexes[step] if step < len(indexes) else None)

    walks = [walk(0, walking.start, bound)]
    found: list[Anchor] = []
    for _ in range(CANDIDATES):
        anchor = yield from walks[-1].advance()
        if anchor:
            found.append(anchor)
            if len(found) == len(rule.until):
                return found
            more = {name: anchor.captures[name] for name in rule.spec.context.same if name in anchor.captures}
            walks.append(walk(len(found), anchor.place, {**more, **walks[-1].bound}))
        else:
            walks.pop()
            if not walks:
                return None
            found.pop()
    return None


class _Walk:
    """Gives the lines before a place that match a regex and agree with what is bound, nearest first."""

    def __init__(
        self, regex: Regex, walking: _Walking, start: Place, bound: dict[str, bytes | None], index: Anchors | None
    ) -> None:
        self.regex, self.walking, self.bound = regex, walking, bound
        self.start = self.end = start
        self.pending: Iterator[Anchor] = iter(())
        self.worker: Worker | None = None
        if index and index.since < start:
            self.pending, self.end = self._indexed(index), index.since

    def _indexed(self, index: Anchors) -> Iterator[Anchor]:
        end = self.start
        for anchor in index.before(end, self.bound):
            self.walking.limit_errors += index.unknown(anchor.place, end)
            end = anchor.place
            yield anchor
        self.walking.limit_errors += index.unknown(index.since, end)

    def advance(self) -> Search[Anchor | None]:
        while True:
            anchor = next(self.pending, None)
            if anchor:
                return anchor
            if self.end.offset == 0:
                size = yield from self.walking.size(self.end.generation - 1)
                if size is None:
                    return None
                self.end = Place(self.end.generation - 1, size)
                if size == 0:
                    continue
            if self.walking.distance(self.end) >= REACH or self.walking.looked >= BUDGET:
                return None
            if self.walking.limit_errors >= LIMITS:
                return None
            yield from self._block()

    def _block(self) -> Search[None]:
        """Match the block before."""
        generation, end = self.end
        start = max(0, end - BLOCK)
        data = yield from self.walking.ask(generation, start, end - start)
        cut = data.find(b"\n") + 1 if start else 0
        if 0 < cut < len(data):
            start, data = start + cut, data[cut:]
        # Else a line longer than the block; its parts are matched as lines.
        if self.worker is None:
            self.worker = Worker(Scanner([self.regex], [self._clauses()], b""))
        self.end = Place(generation, start)
        self.pending = reversed(self._matches(self.worker, data))

    def _clauses(self) -> list[Clause]:
        """A bound value stands in each line that agrees; it tells more than the regex's own literals."""
        values = [value for name, value in self.bound.items() if value and name in self.regex.groups]
        longest = max((value[:LITERAL_MAX] for value in values), key=len, default=b"")
        if len(longest) >= LITERAL_MIN and b"\n" not in longest:
            return [(Literal(longest),)]
        return clauses(self.regex.pattern, utf=self.regex.utf)

    def _matches(self, worker: Worker, data: bytes) -> list[Anchor]:
        anchors: list[Anchor] = []
        at = before = 0
        while at < len(data):
            part = memoryview(data)[at:]
            found = worker.scan(part, before=before, end=End.LINE)
            for match in found:
                if match.flags & LIMIT:
                    self.walking.limit_errors += 1
                    continue
                text = bytes(part[match.line_at : match.line_at + match.line_size])
                values = [None if span is None else text[span[0] : sum(span)] for span in found.spans(match)]
                captures = dict(zip(self.regex.groups, values, strict=True))
                if _agree(captures, self.bound):
                    place = Place(self.end.generation, self.end.offset + at + match.line_at)
                    anchors.append(Anchor(place, text, captures))
            at, before = at + found.consumed, found.before
        return anchors


def _agree(captures: Captures, bound: Captures) -> bool:
    return all(captures[name] == value for name, value in bound.items() if name in captures)


def _lines_between(
    spec: Context, walking: _Walking, begin: Place | None, values: list[bytes]
) -> Search[tuple[list[bytes], int]]:
    """The lines from the farthest anchor, itself left out, to the match; without one the last `before` lines."""
    near = yield from _lines_before(walking, walking.start, spec.before, spec.max_bytes)
    if begin is None:
        return near[-spec.max_lines :], max(0, len(near) - spec.max_lines)
    budget = _Middle(spec.max_lines, spec.max_bytes)
    is_far = walking.distance(begin) > BLOCK
    holding = (_holding(values) if is_far else _all_lines) if spec.lines == "same" else None
    counter = _LineCounter() if is_far else None
    is_first = True
    for generation in range(begin.generation, walking.start.generation + 1):
        at = begin.offset if generation == begin.generation else 0
        is_last = generation == walking.start.generation
        end = walking.start.offset if is_last else (yield from walking.size(generation)) or 0
        while at < end:
            data = yield from walking.ask(generation, at, min(BLOCK, end - at))
            if not data:
                break
            cut = data.rfind(b"\n") + 1
            if cut and at + cut < end:
                data = data[:cut]  # else the last line, or one longer than the block
            at += len(data)
            if is_first:
                data, is_first = data[data.find(b"\n") + 1 :], False
            if holding:
                lines = [line for line in holding(data) if all(value in line for value in values)]
            elif counter and budget.head_is_full and end - at > spec.max_bytes:
                budget.elided += counter.count(data)  # none of them can be among the last
                continue
            else:
                lines = _all_lines(data)
            for line in lines:
                budget.add(line.removesuffix(b"\r"))
    kept, elided = budget.done()
    if spec.lines == "same" and spec.before:
        kept += [line for line in near if line not in kept[-len(near) :]]
    return kept, elided


def _holding(values: list[bytes]) -> Callable[[bytes], list[bytes]]:
    """Finds the lines of a block that hold the longest of the values."""
    longest = max((value[:LITERAL_MAX] for value in values), key=len, default=b"")
    if len(longest) < LITERAL_MIN or b"\n" in longest:
        return _all_lines
    worker = Worker(Scanner([Regex("")], [[(Literal(longest),)]], b""))

    def find(data: bytes) -> list[bytes]:
        lines: list[bytes] = []
        at = 0
        while at < len(data):
            found = worker.scan(memoryview(data)[at:], end=End.LINE)
            lines += [data[at + match.line_at : at + match.line_at + match.line_size] for match in found]
            at += found.consumed
        return lines

    return find


def _all_lines(data: bytes) -> list[bytes]:
    return data.removesuffix(b"\n").split(b"\n") if data else []


class _LineCounter:
    """Counts newlines several times as fast as bytes.count does."""

    def __init__(self) -> None:
        self._ends = room("size_t[]", LINES)

    def count(self, data: bytes) -> int:
        count, start, found = 0, 0, LINES
        while found == LINES:
            found = lib.line_ends(ENGINE, data, start, len(data), self._ends, LINES)
            count += found
            start = self._ends[found - 1] + 1 if found else 0
        return count


class _Middle:
    """Keeps the first and the last lines within a limit; what is left out is the middle, and counted."""

    def __init__(self, max_lines: int, max_bytes: int) -> None:
        self.head: list[bytes] = []
        self.tail: deque[bytes] = deque()
        self.elided = 0
        self.head_is_full = False
        self.head_room = [(max_lines + 1) // 2, max_bytes // 2]
        self.tail_room = [max_lines // 2, max_bytes // 2]

    def add(self, line: bytes) -> None:
        if not self.head_is_full and self.head_room[0] and len(line) <= self.head_room[1]:
            self.head.append(line)
            self.head_room = [self.head_room[0] - 1, self.head_room[1] - len(line)]
            return
        self.head_is_full = True
        self.tail.append(line)
        self.tail_room = [self.tail_room[0] - 1, self.tail_room[1] - len(line)]
        while self.tail and min(self.tail_room) < 0:
            gone = self.tail.popleft()
            self.elided += 1
            self.tail_room = [self.tail_room[0] + 1, self.tail_room[1] + len(gone)]

    def done(self) -> tuple[list[bytes], int]:
        return [*self.head, *self.tail], self.elided


def _lines_before(walking: _Walking, end: Place, count: int, max_bytes: int) -> Search[list[bytes]]:
    """At most `count` lines that end before a line's start, of max_bytes together."""
    lines: deque[bytes] = deque()
    room = max_bytes
    back = _LinesBack(walking, end)
    while len(lines) < count:
        line = yield from back.advance()
        if line is None or len(line) > room:
            break
        room -= len(line)
        lines.appendleft(line)
    return list(lines)


class _LinesBack:
    """The lines before a place, nearest first; those longer than a block in parts."""

    def __init__(self, walking: _Walking, end: Place) -> None:
        self.walking, self.end = walking, end
        self.lines: list[bytes] = []

    def advance(self) -> Search[bytes | None]:
        while not self.lines:
            generation, end = self.end
            if end == 0:
                size = yield from self.walking.size(generation - 1)
                if size is None:
                    return None
                self.end = Place(generation - 1, size)
                continue
            if self.walking.distance(self.end) >= REACH:
                return None
            start = max(0, end - BLOCK // 16)
            data = yield from self.walking.ask(generation, start, end - start)
            cut = data.find(b"\n") + 1 if start else 0
            if 0 < cut < len(data):
                start, data = start + cut, data[cut:]
            self.end = Place(generation, start)
            self.lines = [line.removesuffix(b"\r") for line in data.removesuffix(b"\n").split(b"\n")]
        return self.lines.pop()


def record_before(
    spec: Multiline, start: Regex, continuation: Regex, matcher: Matcher, place: Place, line: bytes
) -> Search[list[bytes]]:
    """The lines of a record before the matched one: back to `start`, while lines match `continuation`."""
    back = _LinesBack(_Walking(place), place)
    lines: deque[bytes] = deque()
    room = spec.max_bytes
    while matcher.match(start, line) is None and matcher.match(continuation, line) is not None:
        earlier = yield from back.advance()
        if earlier is None or len(lines) + 1 >= spec.max_lines or len(earlier) > room:
            break
        if matcher.match(start, earlier) is None and matcher.match(continuation, earlier) is None:
            break
        room -= len(earlier)
        lines.appendleft(earlier)
        line = earlier
    return list(lines)


class Following:
    """What comes behind a match: its `after` lines, and the rest of its record. Complete at `due` at the latest."""

    def __init__(self, rule: CompiledRule, matcher: Matcher, now: float) -> None:
        self.rule, self._matcher = rule, matcher
        self.after: list[bytes] = []
        self.record: list[bytes] = []
        multiline = rule.spec.multiline
        self._max_lines = multiline.max_lines if multiline else 0
        self._room = multiline.max_bytes if multiline else 0
        self._after, self._after_room = rule.spec.context.after, rule.spec.context.max_bytes
        self.in_record = multiline is not None
        waits = [rule.spec.context.wait_s] if rule.spec.context.after else []
        self.due = now + max([*waits, *([multiline.wait_s] if multiline else [])], default=0)

    @property
    def is_complete(self) -> bool:
        return not self.in_record and len(self.after) >= self._after

    def resume(self, after: Sequence[bytes], record: Sequence[bytes], *, in_record: bool) -> None:
        """Go on with the lines that came before; `in_record`: the record is not over."""
        self.after, self.record, self.in_record = list(after), list(record), in_record
        self._room -= sum(map(len, record))
        self._after_room -= sum(map(len, after))

    def feed(self, line: bytes) -> bool:
        """The next line of the source, without its end. Is all here now?"""
        if len(self.after) < self._after:
            self._after_room -= len(line)
            if self._after_room < 0:
                self._after = len(self.after)  # no more than max_bytes
            else:
                self.after.append(line)
        self.in_record = self.in_record and self._belongs(line)
        if self.in_record:
            self.record.append(line)
            self._room -= len(line)
        return self.is_complete

    def _belongs(self, line: bytes) -> bool:
        start, more = self.rule.start, self.rule.continuation
        if not start or not more or len(self.record) >= self._max_lines or len(line) > self._room:
            return False
        return self._matcher.match(start, line) is None and self._matcher.match(more, line) is not None
