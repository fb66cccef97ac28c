"""One log of records instead of bytes, the journal's or the kernel's: its lines against the rules, and what is told.

A record is one event for each rule that matches it, however many of its lines do. Its cursor is put behind its events
with nothing between, so that one transaction has both: after a crash no record is told twice, and none is left out.

Source: protocols/logs.md 2.3, 3 ("Limits") and 5, "Journal and kernel".
"""

import logging
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple, NoReturn

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.events import LogContext, LogGap, LogMatched, LogSource
from agent.core.metrics import Metrics
from agent.core.store import Store
from agent.core.supervise import Health
from agent.logs.analysis import Analysis, Lines
from agent.logs.context import Following
from agent.logs.follow import BLOCK_S, DIRECT
from agent.logs.limits import Pauses, Rates
from agent.logs.matched import shown, suppressed, told, wants_context
from agent.logs.messages import SourceState
from agent.logs.recent import Recent, with_fields
from agent.logs.regex import Matcher
from agent.logs.scanner import LIMIT, WINDOW, End, Found, Match, Worker
from agent.logs.source import KEEP_S, Rules

log = logging.getLogger(__name__)

MAX_WAITING = 1000  # matches whose context is not complete
MAX_VALUE = 4096  # bytes of a field that are kept for captures

_FIELD = re.compile(r"[A-Z0-9_]+")


class Record(NamedTuple):
    """`cursor` is what ids are made of, `offset` the record's number in its log."""

    cursor: str
    offset: int
    message: bytes
    fields: Mapping[str, bytes]


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A match that waits for what follows it, on disk: the lines so far."""

    id: str
    rule: str
    run: str | None
    test: str | None
    count: int
    before: list[bytes]
    after: list[bytes]
    record: list[bytes]
    in_record: bool


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """How far a log was matched: to the record of `cursor` and `offset`. An empty cursor: from its beginning.

    `waiting` are the matches whose context was not complete then.
    """

    generation: int
    cursor: str
    offset: int
    waiting: list[Waiting] = []


class _Found(NamedTuple):
    """The first match of a rule in a record, with the line (of the record) and the bytes it is in."""

    line: int
    text: bytes
    flags: int
    captures: dict[str, bytes | None]


class _Block:
    """The lines of some records together. `starts` of each line; `firsts`: the number of each record's first line."""

    def __init__(self, records: Sequence[Record], texts: Sequence[Sequence[bytes]]) -> None:
        lines = [line for of_record in texts for line in of_record]
        self._records = records
        self.data = memoryview(b"".join(line + b"\n" for line in lines))
        self.starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
        self.firsts = list(accumulate(map(len, texts), initial=0))

    def offset(self, start: int) -> int:
        """The number, in its log, of the record whose line begins there."""
        return self._records[bisect_right(self.firsts, bisect_right(self.starts, start) - 1) - 1].offset


class _Open:
    """A match whose context is not complete."""

    def __init__(
        self, id: str, following: Following, before: list[bytes], scope: tuple[str | None, str | None]
    ) -> None:
        self.id, self.following, self.before, self.scope = id, following, before, scope
        self.count = 1
        self.is_told = False  # the match itself

    def kept(self) -> Waiting:
        following = self.following
        return Waiting(
            id=self.id,
            rule=following.rule.spec.id,
            run=self.scope[0],
            test=self.scope[1],
            count=self.count,
            before=self.before,
            after=following.after,
            record=following.record,
            in_record=following.in_record,
        )


class Records:
    """Matches the records of one log, `path` "journal:" or "kmsg:", and tells what there is to tell.

    `key` is where its checkpoint is kept, `active` gives the run and the test that its events belong to. Which records
    come is the business of streams.py; `state` is what it says of the log.
    """

    def __init__(
        self,
        path: str,
        rules: Rules,
        key: str,
        active: Callable[[], tuple[str | None, str | None]],
        analysis: Analysis,
        *,
        bus: Bus,
        store: Store,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self.path, self.key, self._active, self._analysis = path, key, active, analysis
        self._stream = analysis.stream(path, active, trio.current_time())
        self._bus, self._store, self._metrics, self._health = bus, store, metrics, health
        self.scope = trio.CancelScope()
        self.state: Literal["READING", "IDLE", "ERROR", "PAUSED", "ABSENT"] = "ABSENT"
        self.reached: Reached | None = None
        self.is_begun = False
        self.matches: Counter[str] = Counter()
        self.suppressed: Counter[str] = Counter()
        self.limit_errors: Counter[str] = Counter()
        self._gaps = 0
        self._recent = Recent()
        self._matcher = Matcher()
        self._open: list[_Open] = []
        self._next = rules
        self._is_kept = True  # what was reached
        self._keep_at = -math.inf
        self._came = trio.Event()
        self._take_rules()

    def use(self, rules: Rules) -> None:
        """From the next records on."""
        self._next = rules

    async def run(self, stream: Callable[["Records"], Awaitable[NoReturn]]) -> None:
        """Go on where the checkpoint says, with what `stream` brings, until cancelled by `scope`."""
        with self.scope:
            self._resume(await self._store.get(self.key, Reached))
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_time)
                    await stream(self)
            finally:
                self._end_open(self._open)
                self._open = []
                self._keep()

    def _resume(self, reached: Reached | None) -> None:
        """Go on waiting for what follows the last matches."""
        self.reached = reached
        rules = {rule.spec.id: rule for rule in self._rules.rules}
        for kept in reached.waiting if reached else ():
            if kept.rule in rules:
                following = Following(rules[kept.rule], self._matcher, trio.current_time())
                following.resume(kept.after, kept.record, in_record=kept.in_record)
                open = _Open(kept.id, following, kept.before, (kept.run, kept.test))
                open.count, open.is_told = kept.count, True
                self._open.append(open)
            else:
                self._tell_context(kept)

    def shown(self) -> SourceState:
        """The log in the answer to list_logs. Offsets are numbers of records; how many are to come nobody knows."""
        reached = self.reached or Reached(generation=0, cursor="", offset=0)
        return SourceState(
            path=self.path,
            state=self.state,
            generation=reached.generation,
            size=reached.offset,
            offset=reached.offset,
            lag=0,
            gaps=self._gaps,
            sampled=self._stream.every,
        )

    # ---- what a stream calls -----------------------------------------------------------------------------------------

    async def room(self) -> None:
        """Wait while matches cannot be taken: the disk is behind."""
        self.state = "PAUSED"
        await self._store.room()
        self.state = "IDLE"

    def begin(self, reached: Reached) -> None:
        """Records come from behind this one on: the one reached before, or another, which is told."""
        self.is_begun, self.state = True, "IDLE"
        if reached != self.reached:
            self.reached, self._is_kept = reached, False
            self._bus.publish(LogSource(path=self.path, what="found", generation=reached.generation))
            self._keep()

    def tell(self, what: Literal["unreadable", "recovered"], detail: str = "") -> None:
        """A LogSource event."""
        self._bus.publish(LogSource(path=self.path, what=what, generation=self._generation, detail=detail))

    def lose(self, start: int, to: int | None, why: str) -> None:
        """A LogGap event: the records from `start` up to `to`, itself left out, or possibly some."""
        self._gaps += 1
        self._metrics.count("logs_gaps_total")
        log.warning("records may be lost path=%s from=%d why=%s", self.path, start, why)
        self._bus.publish(LogGap(path=self.path, generation=self._generation, from_=start, to=to, why=why))

    def remember(self, records: Iterable[Record], *, is_whole: bool = False) -> None:
        """Records that were matched before, the latest last. `is_whole`: there are none before them."""
        self._recent.is_whole = is_whole
        for record in records:
            for text in _lines(record.message):
                self._recent.add(record.offset, text, self._wanted_of(record.fields))

    async def take(self, records: Sequence[Record]) -> None:
        """Match the next records, and keep how far that is. There was a begin()."""
        self.state = "READING"
        if self._next is not self._rules:
            self._tell_dropped(math.inf)
            self._take_rules()
        texts = [_lines(record.message) for record in records]
        block = _Block(records, texts)
        found = await self._scan(records, block)
        lines = self._analysis.read(
            self._stream, block.data, self._generation, block.offset, trio.current_time(), is_live=True
        )
        for number, record in enumerate(records):
            told = partial(self._told, lines, block, block.firsts[number])
            events = await self._record(record, texts[number], found[number], told)
            self.reached, self._is_kept = self._behind(record), False
            for event in events:
                self._bus.publish(event)
            for open in self._open:
                open.is_told = True
            if events:
                self._keep()
        lines.end()
        if lines.has_forecast:
            self._keep()  # else the lines that it is based on might be read again
        self.tick(trio.current_time())
        self.state = "IDLE"
        self._came.set()

    # ---- matching ----------------------------------------------------------------------------------------------------

    def _take_rules(self) -> None:
        self._rules = self._next
        self._worker = Worker(self._rules.scanner)
        self._rates = Rates([rule.spec.rate for rule in self._rules.rules], trio.current_time())
        self._pauses = Pauses(self._rules.mask(self.path))
        regexes = [regex for rule in self._rules.rules for regex in (rule.regex, *rule.until)]
        self._wanted = {name for regex in regexes for name in regex.groups if _FIELD.fullmatch(name)}
        self._recent.forget_matches()

    def _wanted_of(self, fields: Mapping[str, bytes]) -> dict[str, bytes]:
        """Those that a regex names."""
        return {name: fields[name][:MAX_VALUE] for name in self._wanted if name in fields}

    async def _scan(self, records: Sequence[Record], block: "_Block") -> list[dict[int, list[_Found]]]:
        """For each record the lines that matched, by rule; of a rule that gave up on a line it is told."""
        found: list[dict[int, list[_Found]]] = [{} for _ in records]
        data, starts, firsts = block.data, block.starts, block.firsts
        at, before = 0, 0
        while at < len(data):
            part = data[at:]
            scan = partial(self._worker.scan, part, before=before, end=End.LINE, suspended=self._pauses.mask)
            with self._health.busy(limit=BLOCK_S):
                result = scan() if len(part) <= DIRECT else await trio.to_thread.run_sync(scan)
            for match in result:
                line = bisect_right(starts, at + match.line_at - match.window_at) - 1
                number = bisect_right(firsts, line) - 1
                having = found[number].setdefault(match.rule, [])
                if match.flags & LIMIT:
                    self._gave_up(match.rule)
                elif not having or having[-1].line != line - firsts[number]:  # windows of a long line overlap
                    text = bytes(part[match.line_at : match.line_at + match.line_size])
                    having.append(self._taken(line - firsts[number], text, match, result, records[number]))
            at, before = at + result.consumed, result.before
        return [{rule: matched for rule, matched in of.items() if matched} for of in found]

    def _taken(self, line: int, text: bytes, match: Match, found: Found, record: Record) -> _Found:
        captures = found.captured(match, text, self._rules.rules[match.rule].regex.groups)
        return _Found(line, text, match.flags, with_fields(captures, self._wanted_of(record.fields)))

    @property
    def _generation(self) -> int:
        return self.reached.generation if self.reached else 0

    def _behind(self, record: Record) -> Reached:
        return Reached(generation=self._generation, cursor=record.cursor, offset=record.offset)

    def _told(self, lines: Lines, block: "_Block", first: int, event: LogMatched, found: _Found) -> LogMatched:
        """The event of a match in a record, whose first line is the `first` of the block, as analysis has it."""
        at = block.starts[first + found.line]
        return lines.told(event, at, found.text, found.captures, is_whole=not found.flags & WINDOW)

    async def _record(
        self,
        record: Record,
        lines: Sequence[bytes],
        matched: dict[int, list[_Found]],
        analysed: Callable[[LogMatched, _Found], LogMatched],
    ) -> list[LogMatched]:
        """What is to be told of a record, line after line; its lines are remembered, and follow what came before."""
        events: list[LogMatched] = []
        fields = self._wanted_of(record.fields)
        for number, line in enumerate(lines):
            known = {open: len(open.following.record) for open in self._open}
            for open in known:
                open.following.feed(line)
            inside = {
                open.following.rule.spec.id: open
                for open, length in known.items()
                if len(open.following.record) > length
            }
            for rule, found in matched.items():
                id = self._rules.rules[rule].spec.id
                if found[0].line == number and id in inside:
                    inside[id].count += len(found)
                elif found[0].line == number:
                    events += await self._match(rule, found, record, analysed)
            self._recent.add(record.offset, line, fields)
        return events

    async def _match(
        self,
        rule: int,
        found: list[_Found],
        record: Record,
        analysed: Callable[[LogMatched, _Found], LogMatched],
    ) -> list[LogMatched]:
        compiled, first, now = self._rules.rules[rule], found[0], trio.current_time()
        self.matches[compiled.spec.id] += 1
        suppressed = self._rates.take(rule, record.offset, now)
        if suppressed is None:
            self.suppressed[compiled.spec.id] += 1
            self._metrics.count("logs_suppressed_total")
            return []
        self._metrics.count("logs_matches_total")
        around, is_cut = None, False
        if wants_context(compiled):
            look = partial(self._recent.around, compiled, first.captures)
            around, is_cut = await trio.to_thread.run_sync(look) if compiled.until else look()
        run, test = self._active()
        event = told(
            compiled,
            self.path,
            record.cursor,
            self._generation,
            record.offset,
            first.text,
            first.captures,
            first.flags,
            count=len(found),
            suppressed=suppressed,
            around=around,
            is_cut=is_cut,
            run=run,
            test=test,
        )
        event = analysed(event, first)
        if compiled.spec.context.after or compiled.spec.multiline:
            before: list[bytes] = []
            if compiled.spec.multiline:
                before = [*await trio.to_thread.run_sync(self._recent.record_before, compiled, first.text), first.text]
            following = Following(compiled, self._matcher, trio.current_time())
            if len(self._open) == MAX_WAITING:
                self._end_open([self._open.pop(0)])
            self._open.append(_Open(event.id, following, before, (run, test)))
        return [event]

    def _gave_up(self, rule: int) -> None:
        spec = self._rules.rules[rule].spec
        self.limit_errors[spec.id] += 1
        self._metrics.count("logs_limit_errors_total", rule=spec.id)
        if self._pauses.failed(rule, trio.current_time()):
            detail = f"rule {spec.id} gives up too often and is left out for a minute"
            self._bus.publish(LogSource(path=self.path, what="limit", generation=self._generation, detail=detail))

    # ---- time --------------------------------------------------------------------------------------------------------

    async def _keep_time(self) -> NoReturn:
        while True:
            self._came = trio.Event()
            with trio.move_on_at(self._due()):
                await self._came.wait()
            if self.state != "READING":
                self.tick(trio.current_time())

    def _due(self) -> float:
        if self.state == "READING":
            return math.inf  # take() does it at its end: a record is told and kept as a whole
        times = [open.following.due for open in self._open if open.is_told]
        times += [due for due in (self._rates.due(), self._pauses.due()) if due is not None]
        if not self._is_kept:
            times.append(self._keep_at + KEEP_S)
        return min(times, default=math.inf)

    def tick(self, now: float) -> None:
        """Tell and keep what is due."""
        ready = [open for open in self._open if open.is_told]
        over = [open for open in ready if open.following.is_complete or open.following.due <= now]
        self._open = [open for open in self._open if open not in over]
        self._end_open(over)
        if over:
            self._keep()  # with what was told, or it would be told again
        self._tell_dropped(now)
        self._pauses.resume(now)
        if not self._is_kept and self._keep_at + KEEP_S <= now:
            self._keep()

    def _tell_dropped(self, now: float) -> None:
        for event in suppressed(self.path, self._rules.rules, self._rates.tell(now)):
            self._bus.publish(event)

    def _keep(self) -> None:
        if self.reached and not self._is_kept:
            self._is_kept, self._keep_at = True, trio.current_time()
            waiting = [open.kept() for open in self._open if open.is_told]
            self._store.put(self.key, msgspec.structs.replace(self.reached, waiting=waiting))

    def _end_open(self, over: Sequence[_Open]) -> None:
        for open in over:
            self._tell_context(open.kept())

    def _tell_context(self, match: Waiting) -> None:
        self._bus.publish(
            LogContext(
                path=self.path,
                match=match.id,
                after=tuple(map(shown, match.after)),
                record=tuple(map(shown, [*match.before, *match.record])),
                count=match.count,
                run=match.run,
                test=match.test,
            )
        )
        self._is_kept = False  # that it was told


def _lines(message: bytes) -> list[bytes]:
    """The lines of a message; one at least."""
    return [line.removesuffix(b"\r") for line in message.removesuffix(b"\n").split(b"\n")]
