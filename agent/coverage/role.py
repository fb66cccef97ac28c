"""Coverage on trio: the link to the Drill admin, the sources of the runs, and the loop that collects what they saw.

Answers the actions `coverage_open` and `coverage_close` of whoever starts runners, and `coverage` of control. Suites
that ask for coverage get it without an admin too: then there is no link, and no session.

Source: protocols/drill.md; seeds/drill-coverage-event-flow.md.
"""

import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import trio
from trio_websocket import WebSocketConnection

from agent.core import link
from agent.core.bus import Bus, Handler
from agent.core.channel import Tell
from agent.core.covered import (
    CoverageArmed,
    CoverageDisarmed,
    CoverageLost,
    CoverageReport,
    CoverageSession,
    CoverageWarning,
)
from agent.core.errors import ActionError, AgentError
from agent.core.events import Alert, AlertCleared, TestStarted
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.store import Store
from agent.core.supervise import Health
from agent.coverage.attach import Attachment, Sent, Settle
from agent.coverage.catalog import Catalog, Delta, Unit
from agent.coverage.kept import Kept
from agent.coverage.merged import Merged
from agent.coverage.messages import MAX_TEXT, AgentConfig, attach_header, read_asked
from agent.coverage.session import Status
from agent.coverage.sessions import Act, Announce, Empty, Machine, Map, Part, Ping, Say
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources import Warned
from agent.coverage.watched import Closed, Make, Opened, Watched

log = logging.getLogger(__name__)

NAME, UNDELIVERED = "coverage", "coverage.undelivered"
KEEP_S = 10.0  # s between checkpoints
ANNOUNCE_S = 10.0  # s at least between two announcements of classes that are found as a product loads them
OWED_S = 60.0  # s for which the end of a session cannot be told, then an Alert
COLLECT_S = 60.0  # s for a hang of one look, or of taking a profile apart; a look gives the disk up before
PREPARE_S = 300.0  # s for reading the files of a run's product: its runner waits for that
CLOSE_S = 2.0  # s for an admin to take leave of a build
LARGE = 256 * 1024  # characters of a frame that is read in a thread: whole profiles come in ADD_SESSION_DATA
MAX_REASONS = 16  # runs that are over of which is remembered why they saw nothing


async def run(
    coverage: "Coverage",
    settings: CoverageSettings,
    ident: str,
    health: Health,
    *,
    dial: link.Dial | None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Cover what is to be covered, for ever. Without `dial` no admin is told of it.

    A start after a failure goes on with all that `coverage` has.
    """
    await coverage.begin(settings, ident, health, has_admin=dial is not None)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(coverage.follow_tests)
            nursery.start_soon(coverage.collect_all)
            nursery.start_soon(coverage.keep_all)
            task_status.started()
            await coverage.read_product()
            if dial is None:
                await trio.sleep_forever()
            while True:
                with trio.CancelScope() as coverage.build_over:
                    await link.redial(
                        NAME,
                        dial,
                        coverage.attached,
                        publish=coverage.publish,
                        random=random.Random(),
                        max_message=MAX_TEXT,
                        headers=coverage.headers,
                    )
    finally:
        coverage.keep()


class Coverage:
    """What outlives a connection, and a failure of the role: runners go on meanwhile, and tell what they reach.

    `make` gives a source by its name, for a catalog and a folder. `leave` ends it.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        *,
        make: Make,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.publish = bus.publish
        self._bus, self._make, self._metrics, self._clock = bus, make, metrics, clock
        self._folder = store.folder / "coverage"
        self._kept = Kept(store)
        self._settings = CoverageSettings()
        self._has_admin = False
        self._ident, self._health = "", Health(NAME)
        self._begun_with: tuple[CoverageSettings, str, bool] | None = None  # all of the start is done
        self._has_begun = False
        self._answering = ExitStack()
        self._machine = self._new_machine()
        self._runs: dict[str, Watched] = {}
        self._product: Watched | None = None  # what runs by itself
        self._uncovered: set[str] = set()  # runs whose runners were started without
        self._reasons: dict[str, str] = {}  # of runs that are over: why they saw nothing
        self._attachment: Attachment | None = None
        self._one = trio.Lock()  # who may ask the sources
        self._woken = trio.Event()  # something changed that may move the next collection
        self._looked = -math.inf
        self._announced = 0  # classes of the product's catalog that are
        self._announced_at = -math.inf
        self._is_armed = False
        self._build = self._attached_build = ""
        self._renew = trio.CancelScope()  # of the connection
        self.build_over = trio.CancelScope()  # of the link: the next build need not wait as one that was lost must
        self._owed_since, self._is_alerting = math.inf, False

    async def begin(self, settings: CoverageSettings, ident: str, health: Health, *, has_admin: bool) -> None:
        """The role starts. With other settings than before, sessions are taken up as a new process does."""
        self._health = health
        asked = settings, ident, has_admin
        async with self._one:
            if not self._has_begun:  # what a former process left
                await trio.to_thread.run_sync(partial(shutil.rmtree, self._folder / "runs", ignore_errors=True))
            if asked != self._begun_with:
                self.keep()
                self._begun_with = None
                self._settings, self._ident, self._has_admin = asked
                await self._resume()
                self._begun_with = asked
        if not self._has_begun:
            self._has_begun = True
            actions = {"coverage_open": self.open, "coverage_close": self.close, "coverage": self.show}
            for action, handler in actions.items():
                self._answering.enter_context(self._bus.answer(action, partial(self._answer, handler)))

    def _new_machine(self) -> Machine:
        settings = self._settings
        return Machine(
            alive=lambda: any(each.alive() for each in self._all()),
            clock=self._clock,
            stop_reply=settings.stop_reply,
            flush_s=settings.flush_s,
            hook_s=settings.hook_s,
            max_pending=settings.max_pending_mib * 2**20,
        )

    async def _resume(self) -> None:
        """Take up the sessions of the store."""
        build, units, sessions = await self._kept.read() if self._has_admin else ("", [], [])
        machine = self._new_machine()
        for saved in sessions:
            machine.restore(saved, trio.current_time())
        self._machine, self._attached_build = machine, build if sessions else ""
        self._perform(machine.announce(units))
        if self._product is not None:
            await self._product.remove()
            self._product = None
        self._arm()

    async def read_product(self) -> None:
        """Read what is known of the product without any run. A disk that hangs is waited for, and told of."""
        settings = self._settings
        if self._product is None and (self._has_admin or "jacoco" in settings.sources):
            names: tuple[SourceName, ...] = settings.sources if self._has_admin else ("jacoco",)
            product = Watched(settings, names, self._folder / "product", self._make, self._asking, stays=True)
            await product.prepare([Path(root) for root in settings.roots if Path(root).is_absolute()])
            async with self._one:
                self._product, self._announced = product, 0
                await product.let_count(self._is_wanted())
                await self._announce(product.units())
        await self._count_build()

    def _asking(self, path: str) -> AbstractContextManager[None]:
        return self._health.asking(path)

    async def leave(self) -> None:
        """The agent ends: sources hold sockets and folders, which end with it."""
        self._answering.close()
        with trio.CancelScope(shield=True):
            for watched in self._all():
                await watched.keep()
                await watched.remove()

    # ---- actions ---------------------------------------------------------------------------------------------------

    async def _answer(self, handler: Handler, payload: dict[str, Any]) -> Mapping[str, Any]:
        try:
            return await handler(payload)
        except ActionError:
            raise
        except Exception as err:  # it is carried out in the task of who asks, whose work is not to fail for it
            log.exception("an action of the coverage failed")
            raise ActionError("internal", f"{type(err).__name__} in the coverage: {err}; the log has more") from err

    async def open(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{run, dir, report?}` -> {"env": what its runners get}; nothing when they need not be covered."""
        asked = read(payload, Opened)
        if not asked.report and not self._is_armed:
            self._uncovered.add(asked.run)
            return {"env": {}}
        own = [name for name in self._settings.sources if name != "jacoco"]  # which listens to what runs by itself
        project, folder = Path(asked.dir), self._folder / "runs" / asked.run
        kept = Path(asked.kept) if asked.kept else None
        try:
            watched = Watched(
                self._settings, own, folder, self._make, self._asking, project=project, kept=kept, report=asked.report
            )
            try:
                with trio.fail_after(PREPARE_S):
                    await watched.prepare([project / root for root in self._settings.roots])
                async with self._one:
                    self._runs[asked.run] = watched
                    await watched.let_count(self._is_wanted())
                    if self._has_admin:
                        await self._announce(watched.units())
            except BaseException:  # the run is cancelled, say
                self._runs.pop(asked.run, None)
                with trio.CancelScope(shield=True):
                    await watched.remove()
                raise
        except trio.TooSlowError as err:
            why = f"the files of its product are not read after {PREPARE_S:g} s: many of them, or a disk that hangs"
            raise ActionError("internal", f"cannot prepare the coverage of {asked.run}: {why}") from err
        except OSError as err:
            raise ActionError("internal", f"cannot prepare the coverage of {asked.run}: {err}") from err
        self._woken.set()
        return {"env": watched.env()}

    async def close(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{run, artifacts}` -> {} or, of a run that asked for a report, "files", "lines", "covered", "warnings"."""
        asked = read(payload, Closed)
        self._uncovered.discard(asked.run)
        watched = self._runs.get(asked.run)
        if watched is None:
            return {}
        try:
            try:
                await self._collect(last_of=asked.run)
            except Exception as err:  # the report has what was seen before
                log.exception("the last look at a run failed run=%s", asked.run)
                watched.warn(f"What ran last may be missing: {type(err).__name__}: {err}")
            self._reasons[asked.run] = watched.why_empty()
            while len(self._reasons) > MAX_REASONS:
                del self._reasons[next(iter(self._reasons))]
        finally:  # whoever asked may wait no longer
            with trio.CancelScope(shield=True):
                async with self._one:
                    del self._runs[asked.run]
                    await watched.remove()
                    await self._let_count()
                if asked.resumes:
                    await watched.keep()
        if watched.seen is None or asked.resumes:
            return {}
        return await self._report(asked, watched, watched.seen)

    async def _report(self, asked: Closed, watched: Watched, seen: Merged) -> dict[str, Any]:
        """Write the report of a run that is over."""
        if not len(seen):
            reasons = [watched.why_empty(), self._product.why_no_jvm() if self._product is not None else ""]
            text = " ".join(filter(None, reasons)) or "Nothing of the product was reached."
            watched.warn(text)
            self.publish(CoverageWarning(session=asked.run, text=text))
        units = watched.reported()
        if self._product is not None:
            of_product, reached = self._product.units(), {class_id for class_id, _, _ in seen.entries()}
            if not reached.isdisjoint(of_product.keys() - units.keys()):
                units |= of_product
        try:
            totals = await watched.write(Path(asked.artifacts), units, self._clock())
        except OSError as err:
            raise ActionError("internal", f"cannot write the coverage of {asked.run}: {err}") from err
        self.publish(CoverageReport(run=asked.run, **msgspec.structs.asdict(totals)))
        return {**msgspec.structs.asdict(totals), "warnings": watched.warnings}

    async def show(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> the link's state, the build, all sessions, and the runs that are covered."""
        status = Status(
            link=self._machine.link if self._has_admin else None,
            build=(self._attached_build or self._build) if self._has_admin else None,
            armed=self._is_armed,
            classes=len(self._machine.units),
            sessions=tuple(session.shown() for session in self._machine.sessions.values()),
            runs=tuple(sorted(self._runs)),
        )
        answer: dict[str, Any] = msgspec.to_builtins(status)
        return answer

    # ---- the link --------------------------------------------------------------------------------------------------

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Who attaches, with which build. The admin shall load and enable us until it has read this build's classes.

        While a session is open it is the build which the admin has that session of, though more classes are known now.
        """
        if self._is_build_over():
            self._attached_build = self._build
            self._kept.keep_build(self._build)
            self._machine.new_build()
        settings = self._settings
        config = AgentConfig(
            id=settings.agent_id or self._ident,
            instance_id=settings.instance_id or f"{self._ident}-1",
            build_version=self._attached_build,
            service_group_id=settings.service_group,
        )
        needs_sync = not self._machine.synced
        return (("AgentConfig", attach_header(config)), ("needSync", "true" if needs_sync else "false"))

    async def attached(self, ws: WebSocketConnection, tell: Tell) -> None:
        """Serve one connection; ends the link when the next one shall be for another build."""
        machine = self._machine

        def pong(number: int) -> None:
            self._perform(machine.pong(number))

        def tell_link() -> None:
            tell("ready" if machine.link == "enabled" else "registering")

        async def receive(message: str | bytes) -> None:
            small = len(message) < LARGE
            asked = read_asked(message) if small else await trio.to_thread.run_sync(read_asked, message)
            acts = machine.do(asked, trio.current_time())
            self._perform(acts)
            tell_link()
            for act in acts:
                if isinstance(act, Map):
                    await self._map(act)

        self._attachment = Attachment(ws, machine.counts, pong=pong, idle=machine.ping, settle=self._kept.settle)
        try:
            with trio.CancelScope() as self._renew:
                self._perform(machine.attached())
                tell_link()
                self._renew_when_idle()
                await self._attachment.serve(receive)
            with trio.move_on_after(CLOSE_S):
                await ws.aclose()
            self.build_over.cancel()
        finally:
            self._attachment = None
            machine.lost()
            self.keep()

    async def _map(self, asked: Map) -> None:
        deltas: list[Delta] = []
        why = "no source here can read it"
        async with self._one:
            for watched in self._all():
                try:
                    with self._health.busy(limit=COLLECT_S):
                        deltas += await trio.to_thread.run_sync(watched.map_profile, asked.data)
                    why = ""
                except AgentError as err:
                    why = str(err)
                    break
        if not why and not deltas:
            why = "it names none of the product's files"
        self._perform(self._machine.added(asked, deltas, why))

    def _perform(self, acts: Iterable[Act]) -> None:
        """Do what the machine wants; a Map is done by who read the message."""
        sent: list[Sent] = []
        is_kept = True
        for act in acts:
            match act:
                case Say() | Announce() | Part() | Ping():
                    sent.append(act)
                case Empty(session):
                    self.publish(CoverageWarning(session=session, text=self._why_empty()))
                case CoverageSession():
                    is_kept = is_kept and act.state == "stopping"
                    self.publish(act)
                    self._metrics.count("coverage_sessions_total", state=act.state)
                    if act.state == "running" and self._uncovered:
                        runs = ", ".join(sorted(self._uncovered))
                        text = f"{runs}: started before the session, and not covered. Start it after, or arm always."
                        self.publish(CoverageWarning(session=act.session, text=text))
                case CoverageWarning() | CoverageLost():
                    self.publish(act)
                case Map():
                    pass
        if not is_kept:  # before the admin hears of it: who is killed then still knows the session, or its end
            self.keep()
            sent.insert(0, Settle())
        if sent and self._attachment is not None:
            self._attachment.put(sent)
        self._arm()
        self._renew_when_idle()
        self._woken.set()

    def _why_empty(self) -> str:
        reasons = [f"{name}: {why}" for name, why in self._reasons.items() if why]
        reasons += [f"{name}: {watched.why_empty()}" for name, watched in self._runs.items()]
        if self._uncovered:
            runs = ", ".join(sorted(self._uncovered))
            reasons.append(f"{runs}: started before the session, and not covered.")
        reasons = reasons or ["no runner was started while the session was open."]
        if self._product is not None:
            reasons.append(self._product.why_no_jvm())
        return " ".join(["Nothing was collected:", *filter(None, reasons)])

    def _renew_when_idle(self) -> None:
        """Attach anew for another build, once no session of the old one is open any more."""
        if self._is_build_over():
            self._renew.cancel()

    def _is_build_over(self) -> bool:
        has_sessions = self._attached_build and self._machine.sessions
        return self._build != self._attached_build and not has_sessions

    # ---- sources ---------------------------------------------------------------------------------------------------

    def _all(self) -> list[Watched]:
        return [*self._runs.values(), *([] if self._product is None else [self._product])]

    def _is_wanted(self) -> bool:
        """Does anybody want what the sources see?"""
        waiting = (session.state != "owed" for session in self._machine.sessions.values())
        return any(waiting) or any(watched.seen is not None for watched in self._runs.values())

    async def _let_count(self) -> None:
        is_wanted = self._is_wanted()
        for watched in self._all():
            await watched.let_count(is_wanted)

    def _arm(self) -> None:
        is_armed = self._has_admin and (
            self._settings.arm == "always"
            or any(session.state in ("starting", "running") for session in self._machine.sessions.values())
        )
        if is_armed != self._is_armed:
            self._is_armed = is_armed
            self.publish(CoverageArmed(sources=self._settings.sources) if is_armed else CoverageDisarmed())

    async def follow_tests(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Runners tell which files hold tests: what runs in a process of such a file is credited to it."""
        with self._bus.subscribe(TestStarted) as events:
            task_status.started()
            async for event in events:
                if event.file is not None and (watched := self._runs.get(event.run)):
                    watched.has_tests(event.file)

    async def collect_all(self) -> NoReturn:
        """Collect when a session waits for it, and each period while runners live that are covered."""
        while True:
            self._woken = trio.Event()
            at = self._machine.due()
            if self._runs:
                at = min(at, self._looked + self._settings.flush_s)
            with trio.move_on_at(at):
                async with trio.open_nursery() as nursery:
                    if self._product is not None:
                        nursery.start_soon(self._product.attend)
                    await self._woken.wait()
                    nursery.cancel_scope.cancel()
                continue
            flush_at = self._machine.flush_at
            await self._collect()
            if self._machine.flush_at != flush_at:
                if self._attachment is not None:
                    await self._attachment.drained()
                self._machine.flushed(trio.current_time())

    async def _collect(self, last_of: str | None = None) -> None:
        """One collection. `last_of` is a run whose runners have ended."""
        async with self._one:
            began = trio.current_time()
            final = self._machine.final(began)
            if self._product is not None:
                with self._health.busy(limit=COLLECT_S):
                    await self._product.collect(self._take_shared, final=final)
            for name, watched in list(self._runs.items()):
                with self._health.busy(limit=COLLECT_S):
                    await watched.collect(self._take, final=final or name == last_of)
            await self._announce_found(final)
            await self._let_count()
            if self._machine.begins(began):
                for watched in self._all():
                    await watched.count_anew()
            self._tell()
            self._perform(self._machine.collected(began, trio.current_time()))
            await self._let_count()
            self._looked = trio.current_time()
        if self._machine.link == "offline":
            self.keep()

    def _take(self, deltas: Sequence[Delta]) -> None:
        """At once, for a source tells it only once: a failure of another one must not lose it."""
        self._perform(self._machine.saw(deltas))

    def _take_shared(self, deltas: Sequence[Delta]) -> None:
        self._take(deltas)
        for watched in self._runs.values():
            watched.see(deltas)

    def _tell(self) -> None:
        for name, watched in [*self._runs.items(), *([] if self._product is None else [("", self._product)])]:
            concerned = [watched] if name else list(self._runs.values())
            for what in watched.told():
                if isinstance(what, Warned):
                    text = "" if what.passes else what.text
                    self.publish(CoverageWarning(session=name, text=what.text))
                else:
                    text = f"Of {what.classes} classes coverage is lost: {what.why}."
                    self.publish(CoverageLost(session=name, classes=what.classes, why=what.why))
                for each in concerned if text else ():
                    each.warn(text)

    # ---- classes ---------------------------------------------------------------------------------------------------

    async def _announce_found(self, final: bool) -> None:
        """Classes that the product has loaded by now (Java's are not known before)."""
        now = trio.current_time()
        if self._product is None or not self._has_admin or len(self._product.units()) == self._announced:
            return
        if final or now >= self._announced_at + ANNOUNCE_S:
            self._announced_at, self._announced = now, len(self._product.units())
            await self._announce(self._product.units())

    async def _announce(self, units: Mapping[str, Unit]) -> None:
        known = self._machine.units
        if new := [unit for name, unit in units.items() if known.get(name) is not unit and known.get(name) != unit]:
            self._perform(self._machine.announce(new))
            await self._kept.keep_catalog(known.values())
            await self._count_build()

    async def _count_build(self) -> None:
        """What the build is called: as the settings say, else by its classes."""
        catalog = Catalog()
        catalog.units = dict(self._machine.units)
        digest = self._settings.build_version or f"cat-{await trio.to_thread.run_sync(catalog.digest)}"
        self._build = digest
        self._renew_when_idle()

    # ---- what outlives us ------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Put the sessions into the store, as they are now."""
        if self._has_admin:
            self._kept.keep(self._machine.sessions.values())

    async def keep_all(self) -> NoReturn:
        """Checkpoints, and the word that sessions are not told to the admin."""
        while True:
            await trio.sleep(KEEP_S)
            self.keep()
            for watched in list(self._runs.values()):
                await watched.keep()
            self._watch_owed()

    def _watch_owed(self) -> None:
        """An Alert while sessions have ended whose coverage the admin cannot be told. It stands in /healthz."""
        owed = sorted(name for name, session in self._machine.sessions.items() if session.state == "owed")
        now = trio.current_time()
        if owed and self._owed_since == math.inf:
            self._owed_since = now
        if owed and not self._is_alerting and now >= self._owed_since + OWED_S:
            self._is_alerting = True
            text = f"coverage of {len(owed)} sessions is not delivered to the Drill admin: {', '.join(owed)[:500]}"
            remedy = "See that the admin runs and knows this agent; nothing is lost meanwhile."
            since = self._clock() - (now - self._owed_since)
            self.publish(Alert(code=UNDELIVERED, text=text, remedy=remedy, since=since))
        if not owed:
            self._owed_since = math.inf
            if self._is_alerting:
                self._is_alerting = False
                self.publish(AlertCleared(code=UNDELIVERED))
