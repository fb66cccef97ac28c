"""One followed log: its lines against the rules, and what is told of them and of what stands around them.

Checkpoints are put behind the events that they cover, so that no transaction has them alone.

Source: protocols/logs.md 2.1, 2.3, 3 ("Limits") and 5.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.events import LogContext, LogGap, LogSource, LogSuppressed
from agent.core.metrics import Metrics
from agent.core.store import Store
from agent.logs.behind import Behind
from agent.logs.context import Following, Place, look_back, record_before
from agent.logs.follow import DIRECT, Followed
from agent.logs.identity import Checkpoint
from agent.logs.limits import Pauses, Rates
from agent.logs.matched import captured, identify, shown, told, wants_context
from agent.logs.regex import Matcher
from agent.logs.rules import RuleSet
from agent.logs.scanner import LIMIT, Found, Match, Scanner, Worker
from agent.logs.tail import Gap, Report, Scan, Tail

log = logging.getLogger(__name__)

KEEP_S = 1.0  # s between two checkpoints where nothing else is told


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How far a source was matched. `past` are the last files that are done."""

    generation: int
    checkpoints: list[Checkpoint]
    past: list[Checkpoint] = []


class Rules:
    """A rule set, compiled for one pass."""

    def __init__(self, rules: RuleSet) -> None:
        self.rules = rules.rules
        self.ns_per_line: dict[str, float] | None = None  # by id, when they were measured
        self.mask = rules.mask
        self.scanner = Scanner([rule.regex for rule in rules.rules], [rule.clauses for rule in rules.rules])


class Source:
    """Matches the lines of one file, and tells what there is to tell. `followed` is set before the first block.

    `key` is where its checkpoints are kept, `active` gives the run and the test that its events belong to.
    """

    followed: Followed

    def __init__(
        self,
        path: str,
        rules: Rules,
        key: str,
        active: Callable[[], tuple[str | None, str | None]],
        *,
        bus: Bus,
        store: Store,
        metrics: Metrics,
    ) -> None:
        self.path, self.key, self._active = path, key, active
        self._bus, self._store, self._metrics = bus, store, metrics
        self.scope = trio.CancelScope()
        self.matches: Counter[str] = Counter()
        self.suppressed: Counter[str] = Counter()
        self.limit_errors: Counter[str] = Counter()
        self._next = rules
        self._matcher = Matcher()
        self._open: list[Behind] = []
        self._kept: Done | None = None
        self._keep_at = -math.inf
        self._has_told = False
        self._keeps_at: float | None = None
        self._take_rules()

    def use(self, rules: Rules) -> None:
        """From the next block on."""
        self._next = rules

    def _take_rules(self) -> None:
        now, self._rules = trio.current_time(), self._next
        self._worker = Worker(self._rules.scanner)
        self._rates = Rates([rule.spec.rate for rule in self._rules.rules], now)
        self._pauses = Pauses(self._rules.mask(self.path))

    # ---- what the follower calls -------------------------------------------------------------------------------------

    async def scan(self, act: Scan) -> tuple[int, int]:
        if self._next is not self._rules:
            self._tell_dropped(math.inf)
            self._take_rules()
        at, before = 0, act.before
        while at < len(act.data):
            part = act.data[at:]
            scan = partial(self._worker.scan, part, before=before, end=act.end, suspended=self._pauses.mask)
            found = scan() if len(part) <= DIRECT else await trio.to_thread.run_sync(scan)
            if found.count or self._open:
                await self._take(act, at, part, found)
            at, before = at + found.consumed, found.before
            if not found.consumed:
                break
        return at, before

    def tell(self, act: Report | Gap) -> None:
        if isinstance(act, Gap):
            event = LogGap(path=self.path, generation=act.generation, from_=act.start, to=act.to, why=act.why)
            log.warning("lines may be lost path=%s from=%d why=%s", self.path, act.start, act.why)
            self._metrics.count("logs_gaps_total")
            self._bus.publish(event)
        else:
            self._bus.publish(LogSource(path=self.path, what=act.what, generation=act.generation, detail=act.detail))
        self._has_told = True

    def keep(self, tail: Tail) -> None:
        done = Done(generation=tail.generation, checkpoints=tail.checkpoints(), past=tail.past)
        if done == self._kept:
            return
        now = trio.current_time()
        # A file must be known by its content before a line of it is told.
        kept = self._kept.checkpoints if self._kept else []
        is_pressing = self._has_told or not all(one.head_size for one in kept)
        if not is_pressing and now < self._keep_at + KEEP_S:
            self._keeps_at = self._keep_at + KEEP_S
            return
        self._kept, self._keep_at, self._has_told, self._keeps_at = done, now, False, None
        self._store.put(self.key, done)

    def due(self) -> float:
        times = [open.following.due for open in self._open]
        times += [due for due in (self._rates.due(), self._pauses.due(), self._keeps_at) if due is not None]
        return min(times, default=math.inf)

    def tick(self, now: float) -> None:
        over = [open for open in self._open if open.following.is_complete or open.following.due <= now]
        self._open = [open for open in self._open if open not in over]
        self._end_open(over)
        self._tell_dropped(now)
        self._pauses.resume(now)
        if self._keeps_at is not None and self._keeps_at <= now:
            self.keep(self.followed.tail)

    def _tell_dropped(self, now: float) -> None:
        for dropped in self._rates.tell(now):
            rule = self._rules.rules[dropped.rule].spec.id
            self._bus.publish(
                LogSuppressed(
                    path=self.path,
                    rule=rule,
                    count=dropped.dropped,
                    first_offset=dropped.first_offset,
                    last_offset=dropped.last_offset,
                )
            )

    def end(self) -> None:
        """Tell what is known of the matches whose context is not complete, and keep how far it came."""
        self._end_open(self._open)
        self._open, self._has_told = [], True
        self.keep(self.followed.tail)

    # ---- matches -----------------------------------------------------------------------------------------------------

    async def _take(self, act: Scan, at: int, part: memoryview, found: Found) -> None:
        offset = act.offset + at
        wants_data = bool(self._open) or any(
            rule.spec.multiline or rule.spec.context.after for rule in map(self._rules.rules.__getitem__, found.rules())
        )
        data = bytes(part[: found.consumed]) if wants_data else b""
        for match in list(found):
            line = offset + match.line_at - match.window_at
            if not self.followed.tail.is_new(act, line, match.rule, match.flags):
                continue
            rule = self._rules.rules[match.rule]
            if match.flags & LIMIT:
                self._gave_up(match.rule, act.generation)
            elif not self._is_in_record(match, data, act.generation, offset):
                self.matches[rule.spec.id] += 1
                suppressed = self._rates.take(match.rule, line, trio.current_time())
                if suppressed is None:
                    self.suppressed[rule.spec.id] += 1
                    self._metrics.count("logs_suppressed_total")
                else:
                    text = bytes(part[match.line_at : match.line_at + match.line_size])
                    captures = captured(text, rule.regex.groups, found.spans(match))
                    await self._match(act, match, Place(act.generation, line), text, captures, suppressed)
        for open in self._open:
            open.feed(data, act.generation, offset)
        self.tick(trio.current_time())

    async def _match(
        self, act: Scan, match: Match, place: Place, text: bytes, captures: dict[str, bytes | None], suppressed: int
    ) -> None:
        rule, around = self._rules.rules[match.rule], None
        if wants_context(rule):
            look = look_back(rule, place, captures)
            around = await self.followed.search(look)
        run, test = self._active()
        self._bus.publish(
            told(
                rule,
                self.path,
                act.origin,
                *place,
                text,
                captures,
                match.flags,
                suppressed=suppressed,
                around=around,
                run=run,
                test=test,
            )
        )
        self._has_told = True
        self._metrics.count("logs_matches_total")
        if rule.spec.context.after or rule.spec.multiline:
            record: list[bytes] = []
            if rule.spec.multiline and rule.start and rule.continuation:
                back = record_before(rule.spec.multiline, rule.start, rule.continuation, self._matcher, place, text)
                record = [*await self.followed.search(back), text]
            id = identify(act.origin, *place, rule.spec.id)
            following = Following(rule, self._matcher, trio.current_time())
            self._open.append(Behind(id, following, record, place))

    def _is_in_record(self, match: Match, data: bytes, generation: int, offset: int) -> bool:
        """Does the line belong to the record of a match that was told?"""
        rule = self._rules.rules[match.rule].spec.id
        return any(open.takes(rule, data, generation, offset, match.line_at) for open in self._open)

    def _gave_up(self, rule: int, generation: int) -> None:
        spec = self._rules.rules[rule].spec
        self.limit_errors[spec.id] += 1
        self._metrics.count("logs_limit_errors_total", rule=spec.id)
        if self._pauses.failed(rule, trio.current_time()):
            detail = f"rule {spec.id} gives up too often and is left out for a minute"
            self._bus.publish(LogSource(path=self.path, what="limit", generation=generation, detail=detail))

    def _end_open(self, over: Sequence[Behind]) -> None:
        for open in over:
            run, test = self._active()
            self._bus.publish(
                LogContext(
                    path=self.path,
                    match=open.id,
                    after=tuple(map(shown, open.following.after)),
                    record=tuple(map(shown, [*open.record, *open.following.record])),
                    run=run,
                    test=test,
                )
            )
