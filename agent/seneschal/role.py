"""The Seneschal link on trio: offers out, runs in, every end told; the heartbeat has a task of its own.

Source: protocols/emissary.md, "Seneschal", "The envelope" (`seq`).
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar, get_args

import msgspec
import trio

import agent
from agent.core import link
from agent.core.bus import Bus, Subscription
from agent.core.channel import Channel
from agent.core.channel import Refused as PeerSaidNo
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerBrokeProtocol
from agent.core.events import (
    AnyEvent,
    LinkChanged,
    Logged,
    ReservationChanged,
    RunRecalled,
    RunReceived,
    RunRefused,
    RunStarted,
    SlotsChanged,
    SuiteFinished,
    decode,
)
from agent.core.held import Held
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.store import Outbox, Owed, Store
from agent.core.supervise import Health
from agent.seneschal import reports
from agent.seneschal.machine import Abort, Act, Kept, Machine, Moment, Say, Start
from agent.seneschal.messages import (
    MAX_SUITE,
    Accepted,
    Available,
    Cancel,
    Complete,
    Refused,
    Register,
    Registered,
    Run,
    Severity,
    Update,
    Updated,
)
from agent.seneschal.settings import SeneschalSettings

log = logging.getLogger(__name__)

SINK = "seneschal"
TICK_S = 1.0  # how often leases and offers are looked at
SUITES_S = 10.0  # s for the suites role to come up before we register without its slots
DELIVERY_S = 60.0  # s for a hang of one delivery or order; an answer is waited for 10 s
MAX_LOGS = 1000  # messages that wait to be posted; then the oldest are left out
ENDS = ("SuiteFinished", "RunRefused", "RunRecalled")
T = TypeVar("T")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What `register` says of this machine. `server` is the control URL."""

    server: str
    profile: dict[str, Any] = {}
    labels: tuple[str, ...] = ()


async def run(
    bus: Bus,
    store: Store,
    settings: SeneschalSettings,
    ident: str,
    health: Health,
    *,
    dial: link.Dial,
    about: About,
    metrics: Metrics,
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve the Seneschal, for ever. Ends of runs are owed to it from `started` on.

    Answers the action `reservations`: {} -> {"reservations": [{id, state, run}]}, those that are not returned.
    """
    box = store.owe(SINK, is_owed)
    await store.commit()
    at = Moment(trio.current_time(), clock())
    kept = await store.get(SINK, Kept) or Kept()
    machine = Machine(ident, kept, at, abort_on_lease_lost=settings.on_lease_lost == "abort")
    side = _Side(bus, store, box, machine, settings, ident, about, health, metrics, clock)
    kinds = (RunStarted, RunRefused, SuiteFinished, SlotsChanged, LinkChanged, Logged)
    with bus.subscribe(*kinds) as events, bus.answer("reservations", side.reservations):
        await side.resume()
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.follow, events)
            nursery.start_soon(side.tick)
            nursery.start_soon(side.held.run)
            await link.keep(
                SINK, dial, side.answer, side.talk, publish=bus.publish, metrics=metrics, random=random.Random()
            )
    raise AssertionError("a link never ends")


def is_owed(event: AnyEvent) -> bool:
    """Must the Seneschal be told? Of an end only the journal knows whose run it was."""
    match event:
        case RunStarted():
            return event.origin == reports.ORIGIN and event.reservation is not None and event.attempt == 1
        case RunRefused():
            return event.origin == reports.ORIGIN
        case SuiteFinished() | RunRecalled():
            return True
        case _:
            return False


class _Side:
    """Our side of the link, over all its connections: the machine, and what carries out its acts."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        box: Outbox,
        machine: Machine,
        settings: SeneschalSettings,
        ident: str,
        about: About,
        health: Health,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._bus, self._store, self._box, self._machine = bus, store, box, machine
        self._settings, self._ident, self._about = settings, ident, about
        self._health, self._metrics, self._clock = health, metrics, clock
        self.held = Held(bus, store, box, clock=clock)
        self._kept: Kept | None = None
        self._suites_up = trio.Event()
        self._logged: dict[str, int] = dict.fromkeys(get_args(Severity), 0)
        self._offers: Available | None = None  # what is still to be told; a newer one replaces it
        self._offers_changed = trio.Event()

    def _now(self) -> Moment:
        return Moment(trio.current_time(), self._clock())

    async def reservations(self, payload: dict[str, Any]) -> Mapping[str, Any]:
        """Handler of the action."""
        return {"reservations": msgspec.to_builtins(self._machine.current())}

    # ---- the machine's acts ----------------------------------------------------------------------------------------

    async def _do(self, acts: list[Act]) -> None:
        """Carry out acts, in order; what must outlive a restart is given to the store before."""
        kept = self._machine.kept(self._now())
        if kept != self._kept:
            self._kept = kept
            self._store.put(SINK, kept)
        for act in acts:
            match act:
                case Say():
                    self._offers = act.payload
                    self._offers_changed.set()
                case Start():
                    await self._start(act)
                case Abort():
                    await self._abort(act)
                case RunRecalled():
                    await self._recall(act)
                case ReservationChanged() | RunRefused():
                    self._bus.publish(act)

    async def _start(self, act: Start) -> None:
        order = {
            "suite": act.suite,
            "run": act.run,
            "reservation": act.reservation,
            "deadline": act.deadline,
            "origin": reports.ORIGIN,
        }
        try:
            with self._health.busy(limit=DELIVERY_S):
                await self._bus.ask("run_suite", order)
        except ActionError:
            await self._do(self._machine.refused(act.run, self._now()))
            raise

    async def _abort(self, act: Abort) -> None:
        try:
            await self._bus.ask("cancel", {"run": act.run, "reason": act.reason})
        except ActionError as err:  # it ended in this moment
            log.info("not cancelled run=%s reason=%s", act.run, err.reason)

    async def _recall(self, recalled: RunRecalled) -> None:
        """Owe the run's end once more, unless it is owed as it is."""
        await self._store.commit()
        if any(owed.event.run == recalled.run and owed.event.kind in ENDS for owed in await self._box.peek(limit=1000)):
            return
        self._bus.publish(recalled)

    async def _look_at_slots(self) -> reports.Live:
        live = await self._live()
        await self._do(self._machine.slots(live.free, live.slots, live.draining, self._now()))
        return live

    async def _live(self) -> reports.Live:
        try:
            live = read(await self._bus.ask("runs", {}), reports.Live)
        except ActionError as err:
            # That role is not up: no slots yet. Or it failed, and the bus has made an alert of it: the link goes on.
            log.debug("no runs known reason=%s", err.reason)
            return reports.Live()
        self._suites_up.set()
        return live

    # ---- what goes on without a connection -------------------------------------------------------------------------

    async def resume(self) -> None:
        """Bring the reservations of the former life in line with what the journal says of their runs."""
        await self._do(self._machine.resumed(self._now()))
        for name in self._machine.runs():
            rows = await self._store.read(run=name, kinds=["RunReceived", "RunStarted", "RunRefused", "SuiteFinished"])
            kinds, at = {row.kind for row in rows}, self._now()
            if "SuiteFinished" in kinds:
                await self._do(self._machine.finished(name, at))
                # It may have ended before anybody here was there to owe it.
                await self._recall(RunRecalled(run=name, why="it ended while this role was down"))
            elif "RunRefused" in kinds or "RunReceived" not in kinds:  # the latter: the order never got to the disk
                await self._do(self._machine.refused(name, at))
            elif "RunStarted" in kinds:
                await self._do(self._machine.started(name, at))
        await self._look_at_slots()

    async def follow(self, events: Subscription[Any]) -> None:
        """What happens on this machine."""
        async for event in events:
            at = self._now()
            match event:
                case RunStarted():
                    await self._do(self._machine.started(event.run, at, again=event.attempt > 1))
                case RunRefused():
                    await self._do(self._machine.refused(event.run, at))
                case SuiteFinished():
                    await self._do(self._machine.finished(event.run, at))
                case LinkChanged(name="mimir"):
                    await self._do(self._machine.mimir(event.state == "ready", at))
                    continue
                case LinkChanged():
                    continue
                case Logged():
                    self._logged[event.severity] += 1
                    continue
            await self._look_at_slots()

    async def tick(self) -> NoReturn:
        """Leases lapse and offers grow old."""
        while True:
            await trio.sleep(TICK_S)
            await self._do(self._machine.tick(self._now()))

    # ---- requests of the Seneschal ---------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Mapping[str, Any]:
        """Answer one request."""
        match request.action:
            case "run":
                return await self._ordered(read(request.payload, Run))
            case "cancel":
                cancel = read(request.payload, Cancel)
                return await self._bus.ask("cancel", {"run": cancel.run, "reason": cancel.reason})
            case "stop" | "status":
                return await self._bus.ask(request.action, {})
            case _:
                raise ActionError("unknown_action", f"{request.action!r} is none of run, cancel, stop, status")

    async def _ordered(self, order: Run) -> Mapping[str, Any]:
        size = len(msgspec.json.encode(order.suite))
        if size > MAX_SUITE:
            raise ActionError(
                "too_big", f"a suite of {size} bytes; at most {MAX_SUITE} fit, larger sources go by archive or git"
            )
        await self._store.commit()
        known = await self._store.read(run=order.run, kinds=["RunReceived", "RunRefused"], limit=1)
        if known:
            event = decode(known[0].kind, known[0].data)
            if isinstance(event, RunReceived | RunRefused) and event.origin != reports.ORIGIN:
                raise ActionError("bad_payload", f"key run: {order.run} is known here, ordered by {event.origin}")
            await self._recall(RunRecalled(run=order.run, why="it was ordered once more"))
        else:
            await self._do(self._machine.ordered(order, self._now()))
        await self._store.commit()
        return {}

    # ---- one connection --------------------------------------------------------------------------------------------

    async def talk(self, channel: Channel) -> None:
        """Register, tell what is owed, then offer, beat and tell until the connection ends."""
        self._machine.upgraded()
        try:
            channel.state("registering")
            with trio.move_on_after(SUITES_S):
                await self._suites_up.wait()
            live, asked = await self._live(), self._now()
            registered = _answer(channel, await channel.ask("register", self._hello(live)), Registered)
            every_s = min(self._settings.heartbeat, registered.heartbeat)
            channel.expect(max(registered.deadline, 2 * every_s))  # a shorter one would end a line that is well
            channel.state("replaying")
            await self._box.heard(registered.last_seq)
            here = {run.run for run in live.runs}
            await self._do(self._machine.registered(registered, here, asked, self._now()))
            await self._store.commit()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat, channel, every_s)
                nursery.start_soon(self._tell_offers, channel)
                nursery.start_soon(self._tell_logs, channel)
                await self._tell_owed(channel)
        finally:
            self._offers = None
            self._machine.closed(self._now())

    def _hello(self, live: reports.Live) -> dict[str, Any]:
        hello = Register(
            ident=self._ident,
            server=self._about.server,
            version=agent.__version__,
            instance=self._store.instance,
            slots=live.slots,
            profile=self._about.profile,
            labels=self._about.labels,
            runners=live.runners,
            runs=live.reports(),
        )
        return _payload(hello)

    async def _beat(self, channel: Channel, every_s: float) -> NoReturn:
        while True:
            live = await self._look_at_slots()
            logged = {f"msg_{severity.lower()}": n for severity, n in self._logged.items()}
            own = {"slots_free": live.free, "clock_skew": round(self._machine.skew, 3)}
            beat = Update(ident=self._ident, metrics={**live.metrics(), **logged, "own": own}, runs=live.reports())
            asked = self._now()
            updated = _answer(channel, await channel.ask("update", _payload(beat)), Updated)
            self._machine.updated(updated, asked, self._now())
            await self._do([])
            await trio.sleep(every_s)

    async def _tell_offers(self, channel: Channel) -> NoReturn:
        while True:
            await self._offers_changed.wait()
            self._offers_changed = trio.Event()
            await self._store.commit()  # the numbers of the offers are on disk before they are told
            if self._offers is not None:
                offers, self._offers = self._offers, None
                await channel.ask("available", _payload(offers))

    async def _tell_logs(self, channel: Channel) -> NoReturn:
        """Posted, and only while there is a connection: the journal has them all."""
        with self._bus.subscribe(Logged, limit=MAX_LOGS) as events:
            async for event in events:
                await channel.post("log", _payload(reports.log_entry(event)))
        raise AssertionError("a subscription never ends")

    async def _tell_owed(self, channel: Channel) -> NoReturn:
        after = 0
        while True:
            rows = await self._box.peek(after)
            if not rows:
                if self._machine.link == "replaying":
                    channel.state("ready")
                    await self._do(self._machine.replayed(self._now()))
                await self.held.settle()
                rows = await self._box.due(after)
            for owed in rows:
                await self._deliver(channel, owed)
                after = owed.n

    async def _deliver(self, channel: Channel, owed: Owed) -> None:
        try:
            message = await self._message(owed)
        except (KeyError, msgspec.DecodeError) as err:  # journalled by another version
            self.held.hold(owed.n, f"{owed.event.kind} cannot be read: {err}")
            return
        if message is not None:
            try:
                with self._health.busy(limit=DELIVERY_S):
                    await channel.ask(type(message).__name__.lower(), _payload(message))
            except PeerSaidNo as err:
                self._metrics.count("seneschal_refused_total")
                self.held.hold(owed.n, err.reason)
                return
            if not isinstance(message, Accepted):
                self._machine.told(message.run)
        self._box.ack(owed.n)

    async def _message(self, owed: Owed) -> Accepted | Refused | Complete | None:
        """What is said for an owed event; None where there is nothing to say (another's run)."""
        event = decode(owed.event.kind, owed.event.data)
        match event:
            case RunRecalled():
                return await self._recalled(owed.n, event.run)
            case SuiteFinished() if not await self._is_ours(event.run):
                return None
            case _:
                return self._report(owed.n, event)

    def _report(self, n: int, event: AnyEvent) -> Accepted | Refused | Complete | None:
        match event:
            case RunStarted():
                return reports.accepted(n, event)
            case RunRefused():
                return reports.refused(n, event)
            case SuiteFinished():
                late = self._machine.is_late(event.run, self._now())
                return reports.complete(n, event, self._ident, self._about.server, late=late)
            case _:
                return None

    async def _recalled(self, n: int, run: str) -> Accepted | Refused | Complete | None:
        """How a run stands: its end, else its decision; None while that is not made."""
        for kinds in (["SuiteFinished", "RunRefused"], ["RunStarted"]):
            if rows := await self._store.read(run=run, kinds=kinds, limit=1):
                return self._report(n, decode(rows[0].kind, rows[0].data))
        if await self._store.read(run=run, kinds=["RunReceived"], limit=1):
            return None
        return reports.unknown(n, run, self._ident)

    async def _is_ours(self, run: str) -> bool:
        rows = await self._store.read(run=run, kinds=["RunReceived", "RunStarted"], limit=1)
        event = decode(rows[0].kind, rows[0].data) if rows else None
        # Of a run whose beginning was pruned the end is told: one end too many does no harm, one too few does.
        return not isinstance(event, RunReceived | RunStarted) or event.origin == reports.ORIGIN


def _payload(message: msgspec.Struct) -> dict[str, Any]:
    payload: dict[str, Any] = msgspec.to_builtins(message)
    return payload


def _answer(channel: Channel, payload: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return read(payload, kind)
    except ActionError as err:
        raise PeerBrokeProtocol(f"{channel.peer} answered: {err.what}", remedy="Look at its version.") from err
