"""The log monitor on trio: which files are followed by which rules, and what is told of their lines.

Answers watch_log, unwatch_log and list_logs. What a client watches is taken up again after a restart. A running suite's
`watch.logs` are followed while it runs. Events carry the run and the test that are active, where there is one alone.
Checkpoints are committed with the events before them: after a crash lines are read again, and give the same ids.

Source: protocols/logs.md 2.2, 2.3, 5 and 7; protocols/suites.md, "The suite document" (`watch`).
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import trio
from msgspec.structs import replace

from agent.core.bus import Bus
from agent.core.errors import ActionError
from agent.core.events import (
    Alert,
    AlertCleared,
    LogRules,
    LogSource,
    RunReceived,
    RunRefused,
    RunStarted,
    SuiteFinished,
    TestFinished,
    TestStarted,
)
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.store import Store
from agent.core.supervise import Health
from agent.core.underway import underway
from agent.logs import lint, paths, streams
from agent.logs.active import Active
from agent.logs.disk import is_new
from agent.logs.follow import Followed
from agent.logs.learning import Learning
from agent.logs.matched import shown
from agent.logs.messages import (
    LabelLog,
    Logs,
    Reloaded,
    RuleCounts,
    SearchLog,
    UnwatchLog,
    Watching,
    WatchLog,
)
from agent.logs.records import Records
from agent.logs.rules import RuleErrors, RuleSet, find_set, from_tables, read_files
from agent.logs.search import rule_of, search
from agent.logs.settings import LogsSettings
from agent.logs.source import Done, Rules, Source, Together, Want
from agent.logs.tail import Tail
from agent.logs.wake import AT_ONCE_S, Follower
from agent.logs.watches import JOURNAL, KERNEL, KeptWatches, Watch, of_client, of_settings

log = logging.getLogger(__name__)

MAX_SOURCES = 1024
MAX_WATCHES = 256  # of clients
SETTLE_S = 5.0  # s that a run's last lines may take
KEPT = "logs.watches"
SOURCE = "logs.source:"  # and its path
ALERT = "logs.rules"

T = TypeVar("T")


async def run(
    bus: Bus,
    store: Store,
    settings: LogsSettings,
    health: Health,
    *,
    model: Path,
    metrics: Metrics,
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish LogMatched and the other events of logs.md 2.3 for what is watched, until cancelled.

    `model` is the path of the model file.
    """
    async with trio.open_nursery() as nursery:
        learning = Learning(model, bus, store, clock)
        await learning.load()
        logs = _Logs(bus, store, settings, health, metrics, clock, nursery, learning)
        nursery.start_soon(learning.run)
        # Before the first line: one of a test that just began must carry its name.
        await nursery.start(logs.follow_tests)
        await nursery.start(logs.follower.run)
        nursery.start_soon(logs.begin)
        with trio.move_on_after(2 * SETTLE_S):  # not for ever: a disk may hang, which ask() tells of
            await logs.begun.wait()
        logs.start_pending()
        with ExitStack() as answering:
            for action, handler in {
                "watch_log": logs.watch_log,
                "unwatch_log": logs.unwatch_log,
                "list_logs": logs.list_logs,
                "search_log": logs.search_log,
                "label_log": logs.label_log,
                "reload_rules": logs.reload_rules,
            }.items():
                answering.enter_context(bus.answer(action, handler))
            await nursery.start(logs.follow_runs)
            task_status.started()
            await trio.sleep_forever()


class _Logs:
    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: LogsSettings,
        health: Health,
        metrics: Metrics,
        clock: Callable[[], float],
        nursery: trio.Nursery,
        learning: Learning,
    ) -> None:
        self._bus, self._store, self._metrics, self._active = bus, store, metrics, Active()
        self._settings, self._health, self._clock, self._nursery = settings, health, clock, nursery
        self._labelling, self._analysis = learning.labelling, learning.analysis
        self.follower, self.begun = Follower(self._rescan, health), trio.Event()
        self._watches: dict[str, Watch] = {}
        self._sources: dict[str, Source] = {}  # by path
        self._pending: dict[str, Done] | None = {}  # how far those were that begin at the start, until they do
        self._globs: set[str] = set()  # watches, of which new files are looked for
        self._since: dict[str, float] = {}  # at the start, by watch: until when what globs find was followed
        self._passed: dict[str, tuple[int, int, int]] = {}  # found by globs, and followed already by another name
        self._refused: set[str] = set()  # for want of room, which is told once
        self._records: dict[str, Records] = {}  # by watch
        self._rules: dict[str, Rules] = {}  # by watch
        self._kept = KeptWatches()
        self._of_run: dict[str, trio.Event] = {}  # of runs whose logs are followed: set when it is over
        self._clients = trio.CapacityLimiter(4)  # threads that ask what these want to know
        learning.measure(metrics)
        metrics.gauge("logs_sources", lambda: len(self._sources) + len(self._records))
        metrics.gauge("logs_lag_bytes", lambda: sum(log.followed.tail.lag for log in self._sources.values()))

    # ---- rules -------------------------------------------------------------------------------------------------------

    def _read_rules(self, watch: Watch, known: dict[tuple[Path, ...], Rules]) -> Rules:
        """The rules of a watch; those of the same files are shared. Raises RuleErrors and ActionError."""
        if watch.tables is not None:
            return Rules(from_tables("watch_log", watch.tables))
        own, those = lint.files_of(self._settings.rules), list[Path]()
        for name in watch.sets:
            named = find_set(name, own) if watch.is_remote else lint.files_named(name, own, watch.base)
            if not named:
                raise ActionError("not_found", f"no rule set is called {name!r}", remedy="Name a file of logs.rules.")
            those += named
        files = tuple(those if watch.sets else own)
        if files not in known:
            known[files] = Rules(read_files(files))
        return known[files]

    async def reload_rules(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> `{rules, slow}`: read all again. A watch whose rules are wrong keeps those it had, which is told."""
        known: dict[tuple[Path, ...], Rules] = {}
        wrong: list[str] = []
        for id, watch in self._watches.items():
            try:
                self._rules[id] = self._read_rules(watch, known)
            except (RuleErrors, ActionError) as err:
                wrong.append(str(err))
        if wrong:
            self._blame("\n".join(dict.fromkeys(wrong)))
        else:
            self._bus.publish(AlertCleared(code=ALERT))
        for source in self._sources.values():
            source.wants = {id: replace(want, rules=self._rules[id]) for id, want in source.wants.items()}
            self._use(source)
        for id, records in self._records.items():
            records.use(self._rules[id])
        answer: dict[str, Any] = msgspec.to_builtins(self._tell_rules())
        return answer

    def _tell_rules(self) -> Reloaded:
        """Say how many rules hold, and which of them are slow."""
        rules = {rule.spec.id: rule for rules in self._rules.values() for rule in rules.rules}
        self._analysis.use(rule.spec for rule in rules.values())
        slow = [rule.spec.id for rule in lint.slow(rules.values())]
        if slow:
            log.warning("rules without a literal run on every line rules=%s", ",".join(slow))
        self._bus.publish(LogRules(rules=len(rules), slow=tuple(slow)))
        return Reloaded(len(rules), slow)

    async def _measure(self) -> None:
        """Measure what the rules cost that were not measured yet, within a second."""
        until = time.perf_counter() + lint.BUDGET_S
        for rules in set(self._rules.values()):
            left = until - time.perf_counter()
            if rules.ns_per_line is None and left > 0:
                rules.ns_per_line = await trio.to_thread.run_sync(lint.measure, rules.rules, time.perf_counter, left)

    def _blame(self, text: str) -> None:
        log.error("rules cannot be used error=%s", text)
        remedy = "Correct them, and reload. What was in force stays."
        self._bus.publish(Alert(code=ALERT, text=text, remedy=remedy, since=self._clock()))

    # ---- watches -----------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Follow what the settings name and what clients watched before."""
        await self._store.commit()
        self._kept = await self._store.get(KEPT, KeptWatches) or KeptWatches()
        if seen := await self._seen():
            self._since = dict.fromkeys(self._kept.begun, seen)
        self._bus.publish(AlertCleared(code=ALERT))  # of rules that were wrong before these settings
        own = sorted(self._settings.watch, key=lambda one: bool(one.glob))
        wanted = [(one.path or one.glob or "", partial(of_settings, one)) for one in own]
        wanted += [(one.path or one.glob or "", partial(of_client, id, one)) for id, one in self._kept.watches.items()]
        until = trio.current_time() + SETTLE_S
        async with trio.open_nursery() as nursery:
            for path, watch_of in wanted:
                nursery.start_soon(self._begin_first, path, watch_of, begun := trio.Event())
                with trio.move_on_at(max(until, trio.current_time() + AT_ONCE_S)):  # once for all disks that hang
                    await begun.wait()
        if self._watches:
            self._tell_rules()
        self.start_pending()
        with trio.move_on_after(SETTLE_S):  # not for ever: a disk may hang
            for source in list(self._sources.values()):
                await source.followed.begun.wait()
        self.begun.set()

    def start_pending(self) -> None:
        """Follow what was found so far; that of which the disk tells later is followed then."""
        pending, self._pending, self._since = self._pending or {}, None, {}
        for path, done in pending.items():
            self._start(self._sources[path], done)

    async def _seen(self) -> float:
        """When the agent before this one is known to have lived, epoch seconds."""
        times = [self._kept.seen]
        for key in await self._store.keys(f"{SOURCE}/") if self._kept.begun else ():
            done: Done = await self._store.get(key, Done) or Done()
            times += [done.begun or 0.0, *(one.written for one in [*done.checkpoints, *done.past])]
        return max(times)

    async def _begin_first(self, path: str, watch_of: Callable[[], Watch], begun: trio.Event) -> None:
        watch = await self.follower.ask(path, watch_of)
        if not watch.is_remote or watch.id in self._kept.watches:  # it did not end meanwhile
            await self._begin(watch, await self._rules_or_none(watch))
            if watch.is_glob:
                await self._begin_gone(watch)
        begun.set()

    async def _begin_gone(self, watch: Watch) -> None:
        """Follow what a glob found before and finds no more, renamed or not, and what came and was rotated since."""
        there = {source.key for path, source in self._sources.items() if SOURCE + path != source.key}  # no UTF-8
        for key in {*await self._store.keys(f"{SOURCE}/")} - there:
            path = key.removeprefix(SOURCE)
            if fnmatch(path, watch.pattern) and not await self.follower.ask(path, os.path.lexists, path):
                done: Done = await self._store.get(key, Done) or Done()
                if watch.id in done.since:
                    await self._follow(watch, path, "start")
        if since := self._since.get(watch.id):
            for path in await self.follower.ask(watch.pattern, paths.rotated, watch.pattern, since):
                if path not in self._sources:
                    await self._follow(watch, path, "start")

    async def _rules_or_none(self, watch: Watch) -> Rules:
        """Its rules; none where they cannot be used, which is told."""
        try:
            return self._read_rules(watch, {})
        except (RuleErrors, ActionError) as err:
            if watch.run:
                await self._warn(watch.run, f"its logs are watched without rules: {err}")
            else:
                self._blame(str(err))
            return Rules(RuleSet(()))

    async def _begin(self, watch: Watch, rules: Rules) -> None:
        self._watches[watch.id], self._rules[watch.id] = watch, rules
        if watch.pattern in (JOURNAL, KERNEL):
            self._read_records(watch)
            return
        start = "start" if watch.id in self._kept.begun else watch.start
        if watch.id not in self._kept.begun and watch.run is None:
            self._keep(replace(self._kept, begun=[*self._kept.begun, watch.id]))
        if not watch.is_glob:
            await self._follow(watch, watch.pattern, watch.sizes.get(watch.pattern, start))
            return
        found = [*watch.sizes] if watch.run else await self.follower.ask(watch.pattern, paths.matching, watch.pattern)
        for path in found:
            if start != "start" or path in watch.sizes or await self._is_new(path):
                await self._follow(watch, path, watch.sizes.get(path, start))
        if watch.id in self._watches:  # it did not end meanwhile
            self._globs.add(watch.id)
            self.follower.seek(watch.pattern)

    async def _rescan(self, found: dict[str, list[str]]) -> None:
        """New files of globs, and those that are there no more; `found` is what globs find now."""
        if self._pending is not None:  # they are being looked for
            return
        for watch in [self._watches[id] for id in self._globs]:
            for path in found.get(watch.pattern, ()):
                if watch.id not in self._watches:  # it ended meanwhile
                    break
                source = self._sources.get(path)
                if (source is None and await self._is_new(path)) or (source and watch.id not in source.wants):
                    await self._follow(watch, path, "start")
        for source in list(self._sources.values()):
            tail = source.followed.tail
            is_over = tail.state == "ABSENT" and all(done.is_gone for done in tail.checkpoints())
            if is_over and source.followed.begun.is_set() and source.wants.keys() <= self._globs:
                self._drop(source)
                self._keep(replace(self._kept, seen=self._clock()))
        there = {path for named in self.follower.found.values() for path in named}
        self._passed = {path: known for path, known in self._passed.items() if path in there}

    async def _is_new(self, path: str) -> bool:
        tails = [source.followed.tail for source in self._sources.values()]
        known = [(tail.path, done) for tail in tails for done in [*tail.checkpoints(), *tail.past]]
        return await self.follower.ask(path, is_new, path, known, self._passed)

    async def _follow(self, watch: Watch, path: str, start: Literal["end", "start"] | int) -> None:
        if watch.is_remote and (why := await self.follower.ask(path, paths.refused, path, self._settings.roots)):
            log.warning("not followed path=%s why=%s", path, why)
            return
        key = SOURCE + shown(os.fsencode(path))
        done: Done = await self._store.get(key, Done) or Done()
        if (source := self._sources.get(path)) and self._pending is None:
            with trio.move_on_after(SETTLE_S):
                await source.followed.settle()  # the end that it begins at is that of now
        if watch.id not in self._watches:  # it ended meanwhile
            return
        source, rules = self._sources.get(path), self._rules[watch.id]  # who watched it may have gone meanwhile
        if source:
            want = Want(rules, watch.run, watch.is_remote)
            if self._pending is not None:
                since, seen = self._pending[path].since.get(watch.id, (None, None))
                source.wants[watch.id] = replace(want, since=since, seen=seen)
            else:
                source.join(watch.id, want, start)
            self._use(source)
            return
        if len(self._sources) >= MAX_SOURCES:
            if path not in self._refused:
                self._refused.add(path)
                detail = f"{MAX_SOURCES} logs are followed already"
                self._bus.publish(LogSource(path=key.removeprefix(SOURCE), what="limit", generation=0, detail=detail))
            return
        bus, store, metrics = self._bus, self._store, self._metrics
        source = Source(path, key, self._active.now, self._analysis, bus=bus, store=store, metrics=metrics)
        self._sources[path] = source
        alive = {watch.id, *self._watches, *self._kept.watches, *(f"s-{one.name}" for one in self._settings.watch)}
        if alive.isdisjoint(done.since):  # of watches that are over
            done = Done()
        before = done.begun or (self._since.get(watch.id) if watch.is_glob else None)
        begun, again = before or self._clock(), before is not None
        tail = Tail(path, done.checkpoints, start, generation=done.generation, past=done.past, begun=begun, again=again)
        done = replace(done, begun=begun)
        source.followed = Followed(
            tail,
            source,
            self._health,
            links=not watch.is_remote,
            room=lambda: self._store.has_room,
            blocks=self.follower.blocks,
        )
        source.wants[watch.id] = Want(rules, watch.run, watch.is_remote, *done.since.get(watch.id, (None, None)))
        self._use(source)
        if self._pending is None:
            self._start(source, done)
        else:
            self._pending[path] = done

    def _use(self, source: Source) -> None:
        """Have it match the rules of all who watch it; sources of the same rules share what is compiled."""
        sets = tuple(want.rules for want in source.wants.values())
        known = (other.together for other in self._sources.values() if other.together.sets == sets)
        source.use(next(known, None) or Together(sets))

    def _start(self, source: Source, done: Done) -> None:
        source.resume(done)
        self.follower.add(source.followed)
        self._nursery.start_soon(self._run, source)

    def _read_records(self, watch: Watch) -> None:
        """Have the records of the journal or the kernel matched."""
        records = Records(
            watch.pattern,
            self._rules[watch.id],
            f"{SOURCE}{watch.id}:{watch.pattern}",
            lambda: self._active.now(watch.run),
            self._analysis,
            bus=self._bus,
            store=self._store,
            metrics=self._metrics,
            health=self._health,
        )
        self._records[watch.id] = records
        self._nursery.start_soon(
            records.run, partial(streams.follow, name=watch.id.removeprefix("s-"), bus=self._bus, clock=self._clock)
        )

    async def _run(self, source: Source) -> None:
        with source.scope:
            try:
                await self.follower.hears(source.followed)
                await source.followed.run()
            finally:
                if self._sources.get(source.followed.tail.path) is source:  # else it was dropped, and is forgotten
                    source.end()

    def _end(self, id: str) -> None:
        """Follow it no longer."""
        watch = self._watches.pop(id)
        del self._rules[id]
        if id in self._globs:
            self._globs.remove(id)
            self.follower.seek_no_more(watch.pattern)
        for source in [source for source in self._sources.values() if id in source.wants]:
            del source.wants[id]
            if source.wants:
                self._use(source)
            else:
                self._drop(source)

    def _drop(self, source: Source) -> None:
        """Nobody watches it any more, or it is gone."""
        source.end()
        del self._sources[source.followed.tail.path]
        source.scope.cancel()
        self.follower.drop(source.followed)
        self._store.forget(source.key)

    def _keep(self, kept: KeptWatches) -> None:
        self._kept = kept
        self._store.put(KEPT, kept)

    # ---- actions -----------------------------------------------------------------------------------------------------

    async def watch_log(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{path | glob, rules?, from?}` -> `{watch, sources}`: the lines that come from now on are matched."""
        asked = read(payload, WatchLog)
        if (asked.path is None) == (asked.glob is None):
            raise ActionError("bad_payload", "expected one of path and glob")
        named = asked.path or asked.glob or ""
        where = await self._allowed(named, named if asked.path else paths.fixed(named))
        if asked.path and (why := await self._find_out(named, partial(paths.unfit, where))):
            raise ActionError("bad_payload", f"{named}: {why}")
        if isinstance(asked.from_, int) and asked.from_ < 0:
            raise ActionError("bad_payload", f"key from: {asked.from_} is less than 0")
        if len(self._kept.watches) >= MAX_WATCHES:
            raise ActionError("too_big", f"clients watch {MAX_WATCHES} logs already", remedy="Unwatch some.")
        watch = await self._find_out(named, partial(of_client, "", asked))
        watch.id = id = f"m{self._kept.last + 1}"
        try:
            rules = self._read_rules(watch, {})
        except RuleErrors as err:
            raise ActionError("bad_payload", str(err).removesuffix(".")) from err
        self._keep(replace(self._kept, last=self._kept.last + 1, watches={**self._kept.watches, id: asked}))
        await self._begin(watch, rules)
        followed = [source.followed for source in self._sources.values() if id in source.wants]
        for one in followed:
            with trio.move_on_after(SETTLE_S):
                await one.settle()  # the end that it begins at is that of now
        answer: dict[str, Any] = msgspec.to_builtins(Watching(watch=id, sources=len(followed)))
        return answer

    async def unwatch_log(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{watch}` -> {}"""
        id = read(payload, UnwatchLog).watch
        if id not in self._kept.watches:
            raise ActionError("not_found", f"watch {id} is not known here")
        if id in self._watches:  # else it waits for a disk since the start
            self._end(id)
        watches = {key: value for key, value in self._kept.watches.items() if key != id}
        self._keep(replace(self._kept, watches=watches, begun=[begun for begun in self._kept.begun if begun != id]))
        return {}

    async def list_logs(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> each source, and each rule."""
        await self._measure()
        took = {id: ns for rules in self._rules.values() for id, ns in (rules.ns_per_line or {}).items()}
        everywhere: list[Source | Records] = [*self._sources.values(), *self._records.values()]
        rules = [
            RuleCounts(
                rule=id,
                matches=sum(one.matches[id] for one in everywhere),
                suppressed=sum(one.suppressed[id] for one in everywhere),
                limit_errors=sum(one.limit_errors[id] for one in everywhere),
                ns_per_line=took.get(id),
            )
            for id in dict.fromkeys(rule.spec.id for rules in self._rules.values() for rule in rules.rules)
        ]
        sources, learned = [one.shown() for one in everywhere], self._analysis.shown()
        answer: dict[str, Any] = msgspec.to_builtins(Logs(sources, rules, learned))
        return answer

    async def label_log(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{event | text, class}` -> `{updated}`: the line is of that class (null: a normal one), which is learned."""
        asked = read(payload, LabelLog)
        await self._labelling.learn(asked, self._analysis)
        return {"updated": True}

    async def search_log(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{path, regex | rule, ...}` -> `{matches, scanned, complete, next, ...}`: what stands in a log's history."""
        asked = read(payload, SearchLog)
        if (asked.regex is None) == (asked.rule is None):
            raise ActionError("bad_payload", "expected one of regex and rule")
        path = await self._allowed(asked.path, asked.path)
        rule = rule_of(asked, (rule.spec for rules in self._rules.values() for rule in rules.rules))
        try:
            found = await self._find_out(asked.path, partial(search, asked, path, rule), within_s=asked.budget_s)
        except OSError as err:
            code = "not_found" if isinstance(err, FileNotFoundError) else "bad_payload"
            raise ActionError(code, f"{asked.path}: {err.strerror}") from err
        for match in found.matches:
            match["template"] = self._analysis.find(match["text"].encode())
        answer: dict[str, Any] = msgspec.to_builtins(found)
        return answer

    async def _allowed(self, named: str, where: str) -> str:
        """The real path of what a client names, whose fixed part is `where`. Raises ActionError."""
        if not named.startswith("/") or "\0" in named:
            raise ActionError("bad_payload", f"expected an absolute path, got {named[:200]!r}")
        real: str = await self._find_out(named, partial(os.path.realpath, where))
        if why := await self._find_out(named, partial(paths.outside, real, self._settings.roots)):
            raise ActionError("forbidden", f"{named}: {why}")
        return real

    async def _find_out(self, path: str, function: Callable[[], T], *, within_s: float = 0.0) -> T:
        """What a client asks of a path. Raises ActionError where a disk does not answer, and what the function does."""
        with self._health.asking(path, within_s=within_s), trio.move_on_after(within_s + SETTLE_S):
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._clients)
        raise ActionError("busy", f"{path}: the disk does not answer, or those that clients asked before it do not")

    # ---- runs --------------------------------------------------------------------------------------------------------

    async def follow_tests(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Know which runs and tests are active."""
        with self._bus.subscribe(RunStarted, TestStarted, TestFinished, SuiteFinished) as events:
            task_status.started()
            async for event in events:
                self._active.feed(event)

    async def follow_runs(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Follow the logs of each run while it runs."""
        with self._bus.subscribe(RunReceived, RunRefused, SuiteFinished) as events:
            task_status.started()
            for received in await underway(self._bus, self._store):
                self._active.tests.setdefault(received.run, set())
                self._begin_run(received)
            async for event in events:
                match event:
                    case RunReceived():
                        self._begin_run(event)
                    case SuiteFinished(run=run) | RunRefused(run=run) if run in self._of_run:
                        self._of_run.pop(run).set()

    def _begin_run(self, received: RunReceived) -> None:
        run, wanted = received.run, received.suite.get("watch")
        if run not in self._of_run and isinstance(wanted, dict) and isinstance(wanted.get("logs"), list | tuple):
            self._of_run[run] = trio.Event()
            self._nursery.start_soon(self._follow_run, received, self._of_run[run])  # which may have to wait for a disk

    async def _follow_run(self, received: RunReceived, is_over: trio.Event) -> None:
        run = received.run
        # Its processes begin later: what they write is seen from its beginning.
        asked = run, received.suite, received.base
        watches, refused = await self.follower.ask_first(f"watch.logs of run {run}", paths.of_run, *asked)
        for why in refused:
            await self._warn(run, why)
        if watches:
            rules = await self._rules_or_none(watches[0])  # the same for all of them
            for watch in watches:
                await self._begin(watch, rules)
        await is_over.wait()
        with trio.move_on_after(SETTLE_S):
            async with trio.open_nursery() as nursery:  # what the last test wrote belongs to the run
                for source in self._sources.values():
                    if not source.wants.keys().isdisjoint(watch.id for watch in watches):
                        nursery.start_soon(partial(source.followed.settle, is_last=True))
        for watch in watches:
            self._end(watch.id)

    async def _warn(self, run: str, text: str) -> None:
        """Have it told in the run's result."""
        log.warning("run=%s %s", run, text)
        with suppress(ActionError):  # it was refused, or is over: it has no result that could tell
            await self._bus.ask("warn_run", {"run": run, "code": "watch.logs", "text": text})
