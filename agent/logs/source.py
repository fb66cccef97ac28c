"""One followed log: its lines against the rules of all who watch it, and what is told of them and what stands around.

Checkpoints are put behind the events that they cover, so that no transaction has them alone. With them is kept who
began to watch where, and which matches still wait for the lines that follow them.

Source: protocols/logs.md 2.1, 2.3, 3 ("Limits") and 5.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Literal

import msgspec
import trio
from msgspec.structs import replace

from agent.core.bus import Bus
from agent.core.events import LogContext, LogGap, LogMatched, LogSource
from agent.core.metrics import Metrics
from agent.core.store import Store
from agent.logs.acts import Gap, Report, Scan
from agent.logs.analysis import Analysis, Lines
from agent.logs.behind import Behind
from agent.logs.context import Anchor, Anchors, Following, Place, look_back, record_before
from agent.logs.follow import DIRECT, Followed
from agent.logs.identity import Checkpoint
from agent.logs.limits import Pauses, Rates
from agent.logs.literals import clauses
from agent.logs.matched import shown, suppressed, told, wants_context
from agent.logs.messages import SourceState
from agent.logs.regex import Matcher, Regex
from agent.logs.rules import CompiledRule, RuleSet
from agent.logs.scanner import LIMIT, PARTIAL, WINDOW, End, Found, Match, Scanner, Worker

log = logging.getLogger(__name__)

KEEP_S = 1.0  # s between two checkpoints where nothing else is told
MAX_WAITING = 1000  # matches of a source whose context is not complete
SPARSE = 8192  # bytes of a block for each line that is indexed; where there are more, a search in the block is cheaper
FEW = 16  # lines that are indexed of any block
LF = 0x0A
LEVELS = {"found": logging.DEBUG, "rotated": logging.DEBUG, "unreadable": logging.WARNING, "lagging": logging.WARNING}
LIVE = 1 << 20  # bytes behind: no more, and lines are taken to have been written just now

Active = Callable[[str | None], tuple[str | None, str | None]]


class Rules:
    """A rule set, compiled for one pass when that is needed."""

    def __init__(self, rules: RuleSet) -> None:
        self.rules = rules.rules
        self.ns_per_line: dict[str, float] | None = None  # by id, when they were measured
        self.mask = rules.mask

    @cached_property
    def scanner(self) -> Scanner:
        return Scanner([rule.regex for rule in self.rules], [rule.clauses for rule in self.rules])


class Want(msgspec.Struct, frozen=True):
    """What one watch wants of a source: its rules, from a line on (None: all lines that are read), for a run or not.

    It has seen its generation up to `seen`, if that is read again for others.
    `is_remote`: not of a file that a symbolic link at the path leads to.
    """

    rules: Rules
    run: str | None = None
    is_remote: bool = False
    since: Place | None = None
    seen: Place | None = None

    def has(self, place: Place) -> bool:
        """Does it want the line that begins there?"""
        if self.seen and place.generation == self.seen.generation and place < self.seen:
            return False
        return self.since is None or place >= self.since


class Together:
    """The rules of some watches as one, compiled for one pass; each of them once.

    `of` are the numbers of each set's rules. Behind them the scanner has the `until` regexes whose lines are indexed:
    `indexed`, each with the captures that it is looked up by; `chains` are their numbers for each rule.
    """

    def __init__(self, sets: tuple[Rules, ...]) -> None:
        self.sets = sets
        numbers: dict[bytes, int] = {}
        rules: list[CompiledRule] = []
        of: list[frozenset[int]] = []
        for one in sets:
            its = set()
            for rule in one.rules:
                key = msgspec.json.encode(rule.spec)
                if key not in numbers:
                    numbers[key] = len(rules)
                    rules.append(rule)
                its.add(numbers[key])
            of.append(frozenset(its))
        self.rules, self.of = tuple(rules), tuple(of)
        # Of these more than the matched line is told, of what follows it.
        self.followed = {n for n, rule in enumerate(rules) if rule.spec.context.after or rule.spec.multiline}
        self.indexed: list[tuple[Regex, tuple[str, ...]]] = []
        self.chains = [[self._number(rule, until) for until in rule.until] for rule in rules]
        self._scanner = sets[0].scanner if len(sets) == 1 and not self.indexed else None

    def _number(self, rule: CompiledRule, until: Regex) -> int | None:
        """None: it would run on every line, which is too dear."""
        if not clauses(until.pattern, utf=until.utf):
            return None
        same = tuple(name for name in rule.spec.context.same if name in until.groups)
        for number, (regex, names) in enumerate(self.indexed):
            if (regex.pattern, regex.utf, names) == (until.pattern, until.utf, same):
                return number
        self.indexed.append((until, same))
        return len(self.indexed) - 1

    @cached_property
    def scanner(self) -> Scanner:
        regexes = [*(rule.regex for rule in self.rules), *(regex for regex, _ in self.indexed)]
        literals = [*(rule.clauses for rule in self.rules), *(clauses(r.pattern, utf=r.utf) for r, _ in self.indexed)]
        return self._scanner or Scanner(regexes, literals)

    def mask(self, path: str, wanted: frozenset[int]) -> bytearray:
        """What to leave out: rules that do not apply to it or are not wanted, and what is indexed for them."""
        mask = bytearray(n not in wanted or not rule.applies_to(path) for n, rule in enumerate(self.rules))
        used = {number for out, chain in zip(mask, self.chains, strict=True) if not out for number in chain}
        return mask + bytearray(number not in used for number in range(len(self.indexed)))


NOTHING = Together(())  # one for all sources: compiled, it takes a third of a mebibyte


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A match that waits for what follows it, on disk."""

    id: str
    rule: str
    tags: list[tuple[str | None, str | None]]
    count: int
    generation: int
    next: int
    skips: bool
    record: list[bytes]
    after: list[bytes]
    more: list[bytes]
    in_record: bool


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How far a source was matched. `past` are the last files that are done, `since` is what each watch wants of it.

    `begun` is when it was followed first, epoch seconds.
    """

    generation: int = 0
    checkpoints: list[Checkpoint] = []
    past: list[Checkpoint] = []
    since: dict[str, tuple[Place | None, Place | None]] = {}
    waiting: list[_Kept] = []
    begun: float | None = None


class _Waiting:
    """A match whose context is not complete, with the runs and tests that it belongs to."""

    def __init__(self, behind: Behind, tags: list[tuple[str | None, str | None]]) -> None:
        self.behind, self.tags, self.count = behind, tags, 1

    @property
    def rule(self) -> CompiledRule:
        return self.behind.following.rule

    def kept(self) -> _Kept:
        behind, following = self.behind, self.behind.following
        return _Kept(
            id=behind.id, rule=self.rule.spec.id, tags=self.tags, count=self.count, generation=behind.generation,
            next=behind.next, skips=behind.skips, record=behind.record, after=list(following.after),
            more=list(following.record), in_record=following.in_record,
        )  # fmt: skip


class Source:
    """Matches the lines of one file, and tells what there is to tell. `followed` is set before the first block.

    `key` is where its checkpoints are kept; `active` gives the run and the test that an event belongs to, of a run
    where one is given. `wants` are those who watch it, by watch; a change is taken up by use().
    """

    followed: Followed

    def __init__(
        self, path: str, key: str, active: Active, analysis: Analysis, *, bus: Bus, store: Store, metrics: Metrics
    ) -> None:
        self.path, self.key, self._active, self._analysis = shown(os.fsencode(path)), key, active, analysis
        self.stream = analysis.stream(self.path, lambda: active(None), trio.current_time())
        self._analysed = (0, 0)  # generation and offset: to there lines were looked at
        self._bus, self._store, self._metrics = bus, store, metrics
        self.scope = trio.CancelScope()
        self.wants: dict[str, Want] = {}
        self.matches: Counter[str] = Counter()
        self.suppressed: Counter[str] = Counter()
        self.limit_errors: Counter[str] = Counter()
        self._matcher = Matcher()
        self._waiting: list[_Waiting] = []
        self._kept: Done | None = None
        self._begun: float | None = None
        self._keep_at = -math.inf
        self._has_told = False
        self._keeps_at: float | None = None
        self._is_asked = False  # it is taken down when the store writes
        self.together = self._rules = NOTHING
        self._rates = Rates([], 0.0)
        self._next: tuple[Together, list[Want]] | None = None
        self._since: dict[str, tuple[Place | None, Place | None]] = {}  # of each that watches
        self._take(self.together, [], trio.current_time())

    def use(self, together: Together) -> None:
        """From the next block on: the rules of all `wants`, in that order."""
        self.together, self._next = together, (together, list(self.wants.values()))
        self._since = {id: (want.since, want.seen) for id, want in self.wants.items()}
        self.followed.links = any(not want.is_remote for want in self.wants.values())
        self._has_told = True  # who watches from where is kept with the checkpoint

    def join(self, id: str, want: Want, start: Literal["end", "start"] | int) -> None:
        """Somebody comes later. What is read again for him the others have seen. use() is still to come."""
        seen = self.followed.join("end")
        since = self.followed.join(start)
        if seen and since and since < seen:
            self.wants = {other: replace(its, seen=max(seen, its.seen or seen)) for other, its in self.wants.items()}
        self.wants[id] = replace(want, since=since)

    def resume(self, done: Done) -> None:
        """Go on with what waited when the agent ended; keep when the source was begun. After use()."""
        self._begun = done.begun
        rules = {rule.spec.id: rule for rule in self.together.rules}
        for kept in done.waiting:
            if kept.rule in rules:
                following = Following(rules[kept.rule], self._matcher, trio.current_time())
                following.resume(kept.after, kept.more, in_record=kept.in_record)
                behind = Behind(kept.id, following, kept.record, Place(kept.generation, kept.next))
                behind.skips = kept.skips
                waiting = _Waiting(behind, kept.tags)
                waiting.count = kept.count
                self._waiting.append(waiting)
            else:
                self._tell_context(kept.id, kept.tags, kept.after, [*kept.record, *kept.more], kept.count)
        self.keep()

    def _take(self, together: Together, wants: Sequence[Want], now: float) -> None:
        self._tell_suppressed(math.inf)
        self._rules, self._wants = together, list(wants)
        self._worker = Worker(together.scanner)
        self._rates = Rates([rule.spec.rate for rule in together.rules], now)
        self._pauses = Pauses(together.mask(self.path, frozenset(range(len(together.rules)))))
        local = [of for want, of in zip(wants, together.of, strict=True) if not want.is_remote]
        self._linked = together.mask(self.path, frozenset().union(*local))
        self._indexes: list[Anchors] = []  # none, until a block comes
        self._at = Place(0, 0)  # how far is indexed

    def shown(self) -> SourceState:
        """The log in the answer to list_logs."""
        tail = self.followed.tail
        offset = max((done.offset for done in tail.checkpoints() if done.generation == tail.generation), default=0)
        return SourceState(
            path=self.path,
            state=tail.state,
            generation=tail.generation,
            size=offset + tail.lag,
            offset=offset,
            lag=tail.lag,
            gaps=tail.gaps,
            sampled=self.stream.every,
        )

    # ---- what the follower calls -------------------------------------------------------------------------------------

    async def scan(self, act: Scan) -> tuple[int, int]:
        if self._next:
            (together, wants), self._next = self._next, None
            await self.followed.in_thread(partial(getattr, together, "scanner"))  # compiling takes its time
            self._take(together, wants, self.followed.now)
        if self._is_asked and (self._waiting or self._rules.followed):  # in mid-block these are ahead of the checkpoint
            self._store.put(self.key, self._take_down())
        if self._rules.indexed and not self._indexes:
            self._index_from(Place(act.generation, act.offset))
        at, before = 0, act.before
        while at < len(act.data):
            part, mask, now = act.data[at:], self._pauses.mask, self.followed.now
            if act.file in self.followed.linked:
                mask = bytearray(map(max, mask, self._linked))
            if len(part) <= DIRECT:
                found = self._worker.scan(part, before=before, end=act.end, suspended=mask)
            else:
                scan = partial(self._worker.scan, part, before=before, end=act.end, suspended=mask)
                found = await self.followed.in_thread(scan)
            lines = self._lines(act, at, part[: found.consumed], before, now)
            if found.count or self._waiting:
                await self._look_at(act, at, part, found, lines, now)
            lines.end()
            self._has_told |= lines.has_forecast  # else the lines that it is based on might be read again
            if self._worker.scanner.is_due:
                await self.followed.in_thread(self._worker.scanner.choose_anew)
            at, before = at + found.consumed, found.before
            if self._rules.indexed:
                self._at = max(self._at, Place(act.generation, act.offset + at))
            if not found.is_full or (found.count and not self.followed.room()):
                break  # else a block of short lines has more events than memory should hold
        return at, before

    def _lines(self, act: Scan, at: int, block: memoryview, before: int, now: float) -> Lines:
        """Have lines looked at that are whole, and were not before."""
        place = (act.generation, act.offset + at)
        is_ended = len(block) and (block[len(block) - 1] == LF or act.end is End.LINE)
        is_live = self.followed.tail.lag <= LIVE
        if before or act.end is End.PARTIAL or not is_ended or place < self._analysed:
            return self._analysis.unread(self.stream, block, is_live=is_live and place >= self._analysed)
        self._analysed = (act.generation, act.offset + at + len(block))
        return self._analysis.read(self.stream, block, act.generation, place[1].__add__, now, is_live=is_live)

    def tell(self, act: Report | Gap) -> None:
        if isinstance(act, Gap):
            event = LogGap(path=self.path, generation=act.generation, from_=act.start, to=act.to, why=act.why)
            log.warning("lines may be lost path=%s from=%d why=%s", self.path, act.start, act.why)
            self._metrics.count("logs_gaps_total")
            self._bus.publish(event)
            self._indexes = []
        else:
            level, detail = LEVELS.get(act.what, logging.INFO), f" detail={act.detail}" if act.detail else ""
            log.log(level, "log %s path=%s generation=%d%s", act.what, self.path, act.generation, detail)
            self._bus.publish(LogSource(path=self.path, what=act.what, generation=act.generation, detail=act.detail))
        self._has_told = True

    def keep(self) -> None:
        """Have it kept how far it came: with what was told, else now and then."""
        now = self.followed.now
        # A file must be known by its content before a line of it is told.
        if not self._has_told and self._kept and all(one.head_size for one in self._kept.checkpoints):
            if now < self._keep_at + KEEP_S:
                self._keeps_at = self._keep_at + KEEP_S
                return
            if self._reached() == self._kept:
                self._keeps_at = None
                return
        self._keep_at, self._has_told, self._keeps_at, self._is_asked = now, False, None, True
        self._store.keep_up(self.key, self._take_down)

    def _take_down(self) -> Done:
        self._kept, self._is_asked = self._reached(), False
        return self._kept

    def _reached(self) -> Done:
        tail = self.followed.tail
        return Done(
            generation=tail.generation,
            checkpoints=tail.checkpoints(),
            past=tail.past,
            since=self._since,
            waiting=[waiting.kept() for waiting in self._waiting] if self._waiting else [],
            begun=self._begun,
        )

    def due(self) -> float:
        times = [waiting.behind.following.due for waiting in self._waiting] if self._waiting else []
        times += [due for due in (self._rates.due(), self._pauses.due(), self._keeps_at) if due is not None]
        return min(times, default=math.inf)

    def tick(self, now: float) -> None:
        over: list[_Waiting] = []
        if self._waiting:
            over = [one for one in self._waiting if one.behind.following.is_complete or one.behind.following.due <= now]
        if over:
            self._waiting = [waiting for waiting in self._waiting if waiting not in over]
            self._end_waiting(over)
        if self._rates.due() is not None:
            self._tell_suppressed(now)
        if self._pauses.resume(now):
            self._index_from(self._at)  # that of an `until` that was left out has not all lines
        if over or (self._keeps_at is not None and self._keeps_at <= now):
            self.keep()

    def end(self) -> None:
        """Tell what is known of the matches whose context is not complete, and keep how far it came."""
        self._end_waiting(self._waiting)
        self._waiting = []
        self._tell_suppressed(math.inf)
        self._analysis.leave(self.stream)
        self._has_told = True
        self.keep()

    # ---- matches -----------------------------------------------------------------------------------------------------

    async def _look_at(self, act: Scan, at: int, part: memoryview, found: Found, lines: Lines, now: float) -> None:
        offset, rules = act.offset + at, self._rules.rules
        indexes = bool(self._indexes) and self._may_index(
            act, offset, found, sum(number >= len(rules) for number in found.rules())
        )
        wants_data = self._waiting or (self._rules.followed and not self._rules.followed.isdisjoint(found.rules()))
        data = bytes(part[: found.consumed]) if wants_data else b""
        matches = list(found)
        told_of = set[int]()  # those that are in a record of one before
        dry: dict[int, list[int]] = {}  # by rule whose rate is used up: lines of more matches, dropped for this block
        for index, match in enumerate(matches):
            if not match.flags and match.rule in dry:
                dry[match.rule].append(offset + match.line_at)
                continue
            place = Place(act.generation, offset + match.line_at - match.window_at)
            if match.rule >= len(rules):
                if match.flags & LIMIT:
                    self._until_gave_up(match.rule, place)
                elif indexes and not match.flags & PARTIAL and not match.window_at and place >= self._at:
                    text, captures = self._text(match, part, found)
                    self._indexes[match.rule - len(rules)].add(Anchor(place, text, captures))
                continue
            rule = rules[match.rule]
            if index in told_of or not self.followed.tail.is_new(act, place.offset, rule.spec.id, match.flags):
                continue
            if match.flags & LIMIT:
                self._gave_up(match.rule, act.generation)
            elif waiting := self._having(rule, match, data, act.generation, offset):
                waiting.count += 1
            elif tags := self._tags(match.rule, place, act.file):
                self.matches[rule.spec.id] += 1
                suppressed = self._rates.take(match.rule, place.offset, now)
                if suppressed is None:
                    dry |= {} if rule.spec.multiline else {match.rule: []}
                    self._dropped(rule, 1)
                    continue
                text, captures = self._text(match, part, found)
                around = None
                if wants_context(rule):
                    around = await self.followed.search(look_back(rule, place, captures, self._chain(match.rule)))
                event = told(
                    rule, self.path, act.origin, *place, text, captures, match.flags,
                    suppressed=suppressed, around=around,
                )  # fmt: skip
                is_whole = not match.flags & (PARTIAL | WINDOW)
                event = lines.told(event, match.line_at, text, captures, is_whole=is_whole)
                waiting = None
                if match.rule in self._rules.followed:
                    waiting = await self._wait_behind(event, rule, place, text, tags)
                if waiting and rule.spec.multiline:
                    for other in range(index + 1, len(matches)):
                        more = matches[other]
                        if more.rule == match.rule and not more.flags & LIMIT:
                            if not waiting.behind.takes(rule.spec.id, data, act.generation, offset, more.line_at):
                                break
                            told_of.add(other)
                            waiting.count += 1
                self._tell(event if waiting is None else replace(event, count=waiting.count), tags)
        for number, lines_at in dry.items():
            if lines_at:
                self.matches[rules[number].spec.id] += len(lines_at)
                self._rates.drop(number, len(lines_at), lines_at[-1])
                self._dropped(rules[number], len(lines_at))
        for waiting in self._waiting:
            waiting.behind.feed(data, act.generation, offset)

    def _dropped(self, rule: CompiledRule, count: int) -> None:
        """So many matches were, by its rate limit."""
        self.suppressed[rule.spec.id] += count
        self._metrics.count("logs_suppressed_total", count)

    def _text(self, match: Match, part: memoryview, found: Found) -> tuple[bytes, dict[str, bytes | None]]:
        text = bytes(part[match.line_at : match.line_at + match.line_size])
        rules = self._rules.rules
        regex = rules[match.rule].regex if match.rule < len(rules) else self._rules.indexed[match.rule - len(rules)][0]
        return text, found.captured(match, text, regex.groups)

    def _tags(self, rule: int, place: Place, file: int) -> list[tuple[str | None, str | None]]:
        """The runs and tests that a match belongs to: of each run that watches for it, else those that are active."""
        if len(self._wants) == 1 and not self.followed.linked and (want := self._wants[0]).has(place):
            return [self._active(want.run)]
        runs = {
            want.run: None
            for want, of in zip(self._wants, self._rules.of, strict=True)
            if rule in of and want.has(place) and not (want.is_remote and file in self.followed.linked)
        }
        if len(runs) > 1:
            runs.pop(None, None)
        return [self._active(run) for run in runs]

    def _chain(self, rule: int) -> list[Anchors | None]:
        """The indexes of each `until` of a rule."""
        chain, out = self._rules.chains[rule], self._pauses.mask[len(self._rules.rules) :]
        return [
            None if number is None or out[number] or not self._indexes else self._indexes[number] for number in chain
        ]

    def _tell(self, event: LogMatched, tags: Sequence[tuple[str | None, str | None]]) -> None:
        for run, test in tags:
            self._bus.publish(event if run is None and test is None else replace(event, run=run, test=test))
        self._has_told = True
        self._metrics.count("logs_matches_total")

    async def _wait_behind(
        self,
        event: LogMatched,
        rule: CompiledRule,
        place: Place,
        text: bytes,
        tags: list[tuple[str | None, str | None]],
    ) -> _Waiting:
        """Have what follows the match told."""
        record: list[bytes] = []
        if rule.spec.multiline and rule.start and rule.continuation:
            back = record_before(rule.spec.multiline, rule.start, rule.continuation, self._matcher, place, text)
            record = [*await self.followed.search(back), text]
        if len(self._waiting) == MAX_WAITING:
            self._end_waiting([self._waiting.pop(0)])
        following = Following(rule, self._matcher, trio.current_time())
        waiting = _Waiting(Behind(event.id, following, record, place), tags)
        self._waiting.append(waiting)
        return waiting

    def _having(self, rule: CompiledRule, match: Match, data: bytes, generation: int, offset: int) -> _Waiting | None:
        """The match of that rule, told before, whose record the line belongs to."""
        for waiting in self._waiting:
            if waiting.behind.takes(rule.spec.id, data, generation, offset, match.line_at):
                return waiting
        return None

    def _gave_up(self, rule: int, generation: int) -> None:
        spec = self._rules.rules[rule].spec
        self.limit_errors[spec.id] += 1
        self._metrics.count("logs_limit_errors_total", rule=spec.id)
        if self._pauses.failed(rule, trio.current_time()):
            detail = f"rule {spec.id} gives up too often and is left out for a minute"
            self._bus.publish(LogSource(path=self.path, what="limit", generation=generation, detail=detail))

    # ---- the index of recent lines -----------------------------------------------------------------------------------

    def _until_gave_up(self, number: int, place: Place) -> None:
        """On a line that belongs into its index, if it was not there before."""
        if place < self._at:
            return
        index, rules = number - len(self._rules.rules), self._rules.rules
        chains = enumerate(self._rules.chains)
        ids = {rules[rule].spec.id for rule, chain in chains if index in chain and not self._pauses.mask[rule]}
        for id in ids:
            self.limit_errors[id] += 1
            self._metrics.count("logs_limit_errors_total", rule=id)
        if self._indexes:
            self._indexes[index].give_up(place)
        if self._pauses.failed(number, trio.current_time()):
            what = f"an until of rule {', '.join(sorted(ids))} gives up too often and is not indexed for a minute"
            self._bus.publish(LogSource(path=self.path, what="limit", generation=place.generation, detail=what))

    def _index_from(self, place: Place) -> None:
        self._indexes, self._at = [Anchors(same, place) for _, same in self._rules.indexed], place

    def _may_index(self, act: Scan, offset: int, found: Found, lines: int) -> bool:
        """Are the `until` lines of the block to be indexed? Else the index begins anew behind them."""
        if not lines or not self._indexes:
            return False
        if act.generation < self._at.generation:  # out of order
            self._index_from(self._at)
            return False
        if lines > max(FEW, found.consumed // SPARSE):
            self._index_from(max(self._at, Place(act.generation, offset + found.consumed)))
            return False
        return True

    # ---- what is told later ------------------------------------------------------------------------------------------

    def _tell_suppressed(self, now: float) -> None:
        for event in suppressed(self.path, self._rules.rules, self._rates.tell(now)):
            self._bus.publish(event)

    def _end_waiting(self, over: Sequence[_Waiting]) -> None:
        for one in over:
            following = one.behind.following
            record = [*one.behind.record, *following.record]
            self._tell_context(one.behind.id, one.tags, following.after, record, one.count)

    def _tell_context(
        self,
        id: str,
        tags: Sequence[tuple[str | None, str | None]],
        after: Sequence[bytes],
        record: Sequence[bytes],
        count: int,
    ) -> None:
        texts = tuple(map(shown, after)), tuple(map(shown, record))
        for run, test in tags:
            event = LogContext(
                path=self.path, match=id, after=texts[0], record=texts[1], count=count, run=run, test=test
            )
            self._bus.publish(event)
        self._has_told = True
