"""Matches as lines of JSON, in the order of the lines they are on, each with what comes behind it.

A match that waits for what follows holds back those behind it: at most until that is complete, the log ends, or
MAX_HELD bytes wait. All others are written by the native formatter.

Source: protocols/logs.md 2.4 (`agent logs scan`).
"""

import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator
from typing import Any

import msgspec
from msgspec.structs import replace

from agent.logs.behind import Behind
from agent.logs.classify import Classifier
from agent.logs.context import Around, Following, Place, Search, look_back, record_before
from agent.logs.format import Formatter
from agent.logs.matched import classed, shown, told, wants_context
from agent.logs.regex import Matcher
from agent.logs.rules import CompiledRule, RuleSet
from agent.logs.scanner import LIMIT, Found, Match, Scanner, Worker
from agent.logs.templates import Miner

MAX_HELD = 16 << 20  # bytes
DRAINED = 8  # files of a path that are read to their ends at the same time

Searches = Generator[Search[Any], Any, None]
"""Yields searches, and is sent what each has found."""


class _Held:
    """A match that waits for what follows."""

    def __init__(self, match: dict[str, Any], rule: CompiledRule, behind: Behind) -> None:
        self.match, self.rule, self.behind = match, rule, behind
        self.is_over = False

    def line(self) -> bytes:
        if self.rule.spec.context.after:
            self.match["after"] = list(map(shown, self.behind.following.after))
        if self.rule.spec.multiline:
            self.match["record"] = list(map(shown, [*self.behind.record, *self.behind.following.record]))
        return msgspec.json.encode(self.match) + b"\n"


class Written:
    """Where the matches of all logs go. With `counts` only `lines` are counted, for each rule by its number.

    `limits` counts the lines on which a rule gave up. `write` takes whole lines, and keeps no view of them. By `known`
    each match is told with its template, and with its class where the rule has none.
    """

    def __init__(
        self,
        rules: RuleSet,
        write: Callable[[bytes | memoryview], object],
        *,
        counts: bool,
        numbers: bool,
        known: tuple[Miner, Classifier] | None = None,
    ) -> None:
        self.rules, self.counts, self.numbers = rules, counts, numbers and not counts
        self.worker = Worker(Scanner([rule.regex for rule in rules.rules], [rule.clauses for rule in rules.rules]))
        self.lines = array("Q", bytes(8 * len(rules.rules)))  # that matched, of each rule
        self.limits: Counter[int] = Counter()
        self.matcher = Matcher()
        self.waiting = {  # rules whose matches are more than their line
            number
            for number, rule in enumerate(rules.rules)
            if known or wants_context(rule) or rule.spec.context.after or rule.spec.multiline
        }
        self.needs_past = any(wants_context(rule) or rule.spec.multiline for rule in rules.rules)
        self.known = known
        self._write = write
        self._formatter: Formatter | None = None
        self._queue: deque[_Held | bytes] = deque()
        self._held = 0  # bytes in the queue

    def formatter(self, path: str, origin: tuple[int, int], generation: int) -> Formatter:
        """The native formatter for one file."""
        if self._formatter is None:
            self._formatter = Formatter(self.rules.rules, path, origin, generation)
            return self._formatter
        return self._formatter.elsewhere(path, origin, generation)

    def put(self, line: bytes | memoryview | _Held) -> None:
        """The next in order. A view is done with when this returns."""
        if not self._queue and not isinstance(line, _Held):
            self._write(line)
            return
        if isinstance(line, memoryview):
            line = bytes(line)
        self._queue.append(line)
        self._held += len(line) if isinstance(line, bytes) else len(line.match["text"])
        while self._held > MAX_HELD:
            first = self._queue[0]
            assert isinstance(first, _Held)
            first.is_over = True
            self.flush()

    def flush(self) -> None:
        """Write what no longer waits."""
        while self._queue:
            first = self._queue[0]
            if isinstance(first, _Held):
                if not first.is_over:
                    return
                self._held -= len(first.match["text"])
                self._write(first.line())
            else:
                self._held -= len(first)
                self._write(first)
            self._queue.popleft()


class _File:
    """One file of a log. `number` is that of the next line."""

    def __init__(self, origin: tuple[int, int], generation: int) -> None:
        self.origin, self.generation, self.number = origin, generation, 1
        self.formatter: Formatter | None = None


class Log:
    """One log while it is scanned: the file at a path, and those that come after it there.

    `base` is the offset of the first byte that a search can ask for, and has for its 0; `is_cut` is set by who answers
    when one asked for more.
    """

    def __init__(self, written: Written, path: str, absolute: str) -> None:
        self.path, self.mask = path, written.rules.mask(absolute)
        self.base, self.is_cut = 0, False
        self._to = written
        self._files: dict[int, _File] = {}  # by generation
        self._file = _File((0, 0), 0)
        self._open: list[_Held] = []

    def at(self, origin: tuple[int, int], generation: int) -> None:
        """What comes now is of this file."""
        if generation not in self._files:
            self._files = {known: file for known, file in self._files.items() if known > generation - DRAINED}
            self._files[generation] = _File(origin, generation)
        self._file = self._files[generation]

    def take(
        self,
        found: Found,
        data: memoryview,
        offset: int,
        is_new: Callable[[int, Match], bool],
        now: float,
        *,
        is_last: bool = False,
    ) -> Searches:
        """The matches in a block that begins at `offset`. `is_new`: was the rule not told yet of the line there?

        `is_last`: the block's last line ends with it.
        """
        to = self._to
        is_plain = not found.flags
        consumed = b""
        if to.counts and is_plain:
            found.count_by_rule(to.lines)
        elif is_plain and (not to.waiting or to.waiting.isdisjoint(found.rules())):
            found.count_by_rule(to.lines)
            for piece in self._format().lines(found, data, offset, self._numbers(found, data) if to.numbers else None):
                to.put(piece)
        else:
            consumed = bytes(data[: found.consumed])
            numbers = self._numbers(found, data) if to.numbers else None
            for index, match in enumerate(list(found)):
                line = offset + match.line_at - match.window_at
                if not is_new(line, match):
                    continue
                if match.flags & LIMIT:
                    to.limits[match.rule] += 1
                    continue
                to.lines[match.rule] += 1
                if to.counts or self._is_in_record(match, consumed, offset):
                    continue
                text = bytes(data[match.line_at : match.line_at + match.line_size])
                captures = found.captured(match, text, to.rules.rules[match.rule].regex.groups)
                number = numbers[index] if numbers else None
                yield from self._match(match, line, text, captures, number, now)
        if to.numbers:
            self._file.number += bytes(data[: found.consumed]).count(b"\n")
        if self._open:
            consumed = consumed or bytes(data[: found.consumed])
            if is_last and consumed and not consumed.endswith(b"\n"):
                consumed += b"\n"
            for held in self._open:
                held.behind.feed(consumed, self._file.generation, offset)
            self.tick(-math.inf)

    def due(self) -> float:
        """When tick() has something to do."""
        return min((held.behind.following.due for held in self._open), default=math.inf)

    def tick(self, now: float) -> None:
        """Wait no longer for what is complete, or was due by `now` (infinite: the log is at its end)."""
        over = [held for held in self._open if held.behind.following.is_complete or held.behind.following.due <= now]
        for held in over:
            held.is_over = True
            self._open.remove(held)
        self._to.flush()

    def _match(
        self, match: Match, line: int, text: bytes, captures: dict[str, bytes | None], number: int | None, now: float
    ) -> Searches:
        rule, around = self._to.rules.rules[match.rule], None
        place = Place(self._file.generation, line - self.base)
        if wants_context(rule):
            self.is_cut = False
            found: Around = yield look_back(rule, place, captures)
            around = found._replace(anchors=[one._replace(place=self._real(one.place)) for one in found.anchors])
        event = told(
            rule,
            self.path,
            self._file.origin,
            self._file.generation,
            line,
            text,
            captures,
            match.flags,
            line=number,
            around=around,
            is_cut=self.is_cut,
        )
        if self._to.known:
            miner, classifier = self._to.known
            template = miner.mine_line(text)
            event = classed(replace(event, template=template), classifier.guess(template, text))
        members = msgspec.to_builtins(event)
        del members["run"], members["test"]  # of the service
        if around is None:
            del members["context"]  # as the native formatter has it
        if not (rule.spec.context.after or rule.spec.multiline):
            self._to.put(msgspec.json.encode(members) + b"\n")
            return
        record: list[bytes] = []
        if rule.spec.multiline and rule.start and rule.continuation:
            search = record_before(rule.spec.multiline, rule.start, rule.continuation, self._to.matcher, place, text)
            before: list[bytes] = yield search
            record = [*before, text]
        following = Following(rule, self._to.matcher, now)
        behind = Behind(event.id, following, record, Place(self._file.generation, line))
        held = _Held(members, rule, behind)
        self._open.append(held)
        self._to.put(held)

    def _real(self, place: Place) -> Place:
        return Place(place.generation, place.offset + self.base)

    def _is_in_record(self, match: Match, data: bytes, offset: int) -> bool:
        """Is the line in the record of an earlier match of the rule? Then that one counts it."""
        rule = self._to.rules.rules[match.rule].spec.id
        for held in self._open:
            if held.behind.takes(rule, data, self._file.generation, offset, match.line_at):
                held.match["count"] += 1
                return True
        return False

    def _format(self) -> Formatter:
        file = self._file
        if file.formatter is None:
            file.formatter = self._to.formatter(self.path, file.origin, file.generation)
        return file.formatter

    def _numbers(self, found: Found, data: memoryview) -> list[int]:
        """The number of each match's line."""
        numbers, counted, number = [], 0, self._file.number
        for match in found:
            number += bytes(data[counted : match.line_at]).count(b"\n")
            counted = match.line_at
            numbers.append(number)
        return numbers
