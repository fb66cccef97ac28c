"""Drill's agent with its plugin part, as a state machine: what the admin says, what the sources saw, what we say. Pure.

    link      offline -> attached -> loaded -> enabled        the last two survive a lost link
    session   starting -> running -> stopping -> owed         and away, when the pong proves that its end was read

Sessions wait for collections: whoever drives the sources looks at `due`, collects, hands over what is new by `saw`, and
says that it has by `collected`. What was seen by a collection that began before a session did is not the session's.

What comes back are acts, to be done in their order: text to send, rows to encode and send, a ping, a profile to map,
and events to publish. Times are seconds of a clock that never steps; `clock` is for the `ts` of messages.

Source: seeds/drill-coverage-event-flow.md, "Flow", "Exception (Step 8)"; protocols/drill.md, "The wire", "State
machine".
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

from agent.core.covered import CoverageLost, CoverageSession, CoverageWarning
from agent.coverage import messages
from agent.coverage.catalog import Delta, Unit
from agent.coverage.merged import UNSPECIFIED, Batch, Budget
from agent.coverage.messages import PLUGIN, CoverMessage, delivered, said
from agent.coverage.session import Saved, Session

log = logging.getLogger(__name__)

MAX_SESSIONS = 64
STOP_S = 30.0  # s from a STOP to the final collect, at most

Link = Literal["offline", "attached", "loaded", "enabled"]
StopReply = Literal["finished", "sessions-finished", "both"]


class Say(msgspec.Struct, frozen=True):
    """Send this frame."""

    frame: str


class Announce(msgspec.Struct, frozen=True):
    """Encode these classes as INIT_DATA_PARTs, and send them."""

    units: Sequence[Unit]


class Part(msgspec.Struct, frozen=True):
    """Encode these entries as COVERAGE_DATA_PARTs, and send them."""

    session: str
    batches: Sequence[Batch]


class Ping(msgspec.Struct, frozen=True):
    """Send a websocket ping, and call `pong` with its number when it is answered."""

    number: int


class Map(msgspec.Struct, frozen=True):
    """Make deltas of data that somebody else collected, and call `added` with them."""

    session: str
    data: str
    order: "Order"


class Empty(msgspec.Struct, frozen=True):
    """The session ends without having seen anything: tell a person why."""

    session: str


Act: TypeAlias = Say | Announce | Part | Ping | Map | Empty | CoverageSession | CoverageWarning | CoverageLost


class Order:
    """A message that is acknowledged when it is done: for `waits` of its sessions that is not yet so.

    `acks` are the destinations; none is left when the connection that it came on is lost.
    """

    def __init__(
        self, kind: Literal["start", "stop", "stop_all", "map"], acks: tuple[str, ...], waits: Iterable[str] = ()
    ) -> None:
        self.kind, self.acks, self.waits = kind, acks, set(waits)
        self.ended: list[str] = []


class Machine:
    """The agent of one admin. `units` are the classes that it announces, `max_pending` bytes for all entries.

    `alive` says whether a covered process lives: then the last of its probes may be `hook_s` behind.
    """

    def __init__(
        self,
        *,
        alive: Callable[[], bool],
        clock: Callable[[], float],
        stop_reply: StopReply = "finished",
        flush_s: float = 2.0,
        hook_s: float = 1.0,
        max_pending: int = 64 * 2**20,
    ) -> None:
        self._alive, self._clock = alive, clock
        self._stop_reply: StopReply = stop_reply
        self._flush_s, self._hook_s = flush_s, hook_s
        self._budget = Budget(max_pending, self._make_room)
        self.units: dict[str, Unit] = {}
        self.counts: dict[str, int] = {}  # of their probes: a flush wants all, and the units lie all over the memory
        self.sessions: dict[str, Session] = {}
        self.connected = self.loaded = self.enabled = False
        self.synced = False  # the admin is known to have read our classes
        self._announced_by = math.inf  # the ping behind them
        self._orders: list[Order] = []
        self.flush_at = math.inf  # when running sessions are to be told of next
        self._number = 0

    # ---- the link --------------------------------------------------------------------------------------------------

    @property
    def link(self) -> Link:
        if not self.connected:
            return "offline"
        return "enabled" if self.enabled else "loaded" if self.loaded else "attached"

    def attached(self) -> list[Act]:
        """A connection stands. Where the plugin was enabled before: what the admin may have missed."""
        self.connected = True
        return self._catch_up() if self.enabled else []

    def lost(self) -> None:
        """The connection is gone. Sessions go on; what is not known to be read is dirty again.

        An admin that may not have our classes must load and enable us again: `synced` says so.
        """
        self.connected = False
        if not self.synced:
            self.new_build()
        for session in self.sessions.values():
            session.merged.lost()
            session.last_ping = None
        for order in self._orders:
            order.acks = ()

    def new_build(self) -> None:
        """The next attach is for another build: its plugin is loaded and enabled by the admin anew."""
        self.loaded = self.enabled = self.synced = False
        self._announced_by = math.inf

    def pong(self, number: int) -> list[Act]:
        """The ping of that number is answered."""
        acts: list[Act] = []
        if number >= self._announced_by:
            self.synced = True
        for session in list(self.sessions.values()):
            session.merged.pong(number)
            if session.last_ping is not None and session.last_ping <= number and session.merged.told:
                self.sessions.pop(session.id).merged.clear()
                acts.append(CoverageSession(session=session.id, state="done"))
        return acts

    # ---- what the admin says ---------------------------------------------------------------------------------------

    def do(self, asked: messages.Asked, now: float) -> list[Act]:
        """Take a frame as it was read. Each message is acknowledged when it is done, whatever it is."""
        frame = asked.frame
        if not frame.type:
            log.warning("drill: a frame cannot be read, nothing is done error=%s", asked.why)
            return []
        if frame.type != "MESSAGE":
            log.debug("drill: not for an agent type=%.100s destination=%.100s", frame.type, frame.destination)
            return []
        match frame.destination:
            case "/plugin/action":
                return self._plugin_action(asked, now)
            case "/plugin/togglePlugin":
                return self._toggle(frame)
            case "/agent/load":
                return self._load(frame)
            case "/plugin/state":
                return [self._say(messages.SyncMessage(list(self.sessions))), Say(delivered(frame.destination))]
            case "/plugin/unload" | "/plugin/resetPlugin" | "/agent/unload":
                acts, _ = self._cancel(list(self.sessions))
                if frame.destination != "/plugin/resetPlugin":
                    self.loaded = self.enabled = False
                return [*acts, Say(delivered(frame.destination))]
            case (
                "/agent/logging/update-config"
                | "/agent/change-header-name"
                | "/agent/set-packages-prefixes"
                | "/agent/update-config"
                | "/agent/update-parameters"
                | "/agent/load-classes-data"
                | "/agent/toggle"
                | "/plugin/updatePluginConfig"
            ):
                log.debug("drill: %s text=%.200s", frame.destination, frame.text)  # nothing of it changes what we do
            case _:
                log.warning("drill: unknown topic, acknowledged and not done topic=%.200s", frame.destination)
        return [Say(delivered(frame.destination))]

    def _load(self, frame: messages.Frame) -> list[Act]:
        done = Say(delivered(frame.destination))
        try:
            plugin = messages.read_load(frame.text).meta.id
        except msgspec.DecodeError as err:
            log.warning("drill: %s cannot be read, acknowledged and not done error=%s", frame.destination, err)
            return [done]
        if plugin != PLUGIN:
            log.warning("drill: no such plugin here, acknowledged and not loaded plugin=%.100s", plugin)
            return [done]
        self.loaded = True
        return [Say(delivered(f"/agent/plugin/{PLUGIN}/loaded")), done]

    def _toggle(self, frame: messages.Frame) -> list[Act]:
        done = Say(delivered(frame.destination))
        try:
            toggle = messages.read_toggle(frame.text)
        except msgspec.DecodeError as err:
            log.warning("drill: %s cannot be read, acknowledged and not done error=%s", frame.destination, err)
            return [done]
        if toggle.plugin_id != PLUGIN:
            log.warning("drill: no such plugin here, acknowledged and not toggled plugin=%.100s", toggle.plugin_id)
            return [done]
        self.enabled = not self.enabled if toggle.force_value is None else toggle.force_value
        acks = [Say(delivered(f"/agent/plugin/{PLUGIN}/toggle")), done]
        if not self.enabled:
            acts, ids = self._cancel(list(self.sessions))
            return [*acts, self._say(messages.SessionsCancelled(ids, self._ts())), *acks]
        return [*self._announce(), *acks, *self._catch_up()]

    def _plugin_action(self, asked: messages.Asked, now: float) -> list[Act]:
        acks = asked.acks
        match asked.action:
            case None:
                log.warning("drill: an action cannot be read, acknowledged and not done error=%s", asked.why)
                return _acks(acks)
            case messages.StartAgentSession(asked_for):
                return self._start(asked_for, acks, now)
            case messages.StopAgentSession(which):
                return self._stop([which.session_id], "stop", acks, now)
            case messages.StopAllAgentSessions():
                return self._stop(list(self.sessions), "stop_all", acks, now)
            case messages.CancelAgentSession(which):
                acts, _ = self._cancel([which.session_id])
                cancelled = self._say(messages.SessionCancelled(which.session_id, self._ts()))
                return [*acts, cancelled, *_acks(acks)]
            case messages.CancelAllAgentSessions():
                acts, ids = self._cancel(list(self.sessions))
                return [*acts, self._say(messages.SessionsCancelled(ids, self._ts())), *_acks(acks)]
            case messages.AddAgentSessionData(given):
                if given.session_id not in self.sessions:
                    text = "ADD_SESSION_DATA for a session that is not open; its data is dropped"
                    return [CoverageWarning(session=given.session_id, text=text), *_acks(acks)]
                order = Order("map", acks)
                self._orders.append(order)
                return [Map(given.session_id, given.data, order)]
            case messages.AddAgentSessionTests():
                return _acks(acks)
            case messages.InitActiveScope(scope):
                acts, _ = self._cancel(list(self.sessions))
                ready = messages.ScopeInitialized(scope.id, scope.name, scope.prev_id, self._ts())
                return [*acts, self._say(ready), *_acks(acks)]

    # ---- sessions --------------------------------------------------------------------------------------------------

    def _start(self, asked: messages.StartSession, acks: tuple[str, ...], now: float) -> list[Act]:
        session = self.sessions.get(asked.session_id)
        if session is None and len(self.sessions) >= MAX_SESSIONS:
            text = f"{MAX_SESSIONS} sessions are open, which is the limit; this one is not started. Stop others first."
            refused = self._say(messages.SessionCancelled(asked.session_id, self._ts()))
            return [CoverageWarning(session=asked.session_id, text=text), refused, *_acks(acks)]
        if session is None:
            self.sessions[asked.session_id] = session = Session(asked, self._budget, self._clock(), now)
        elif session.state != "starting":
            if session.state == "running":
                session.merged.soil()  # an admin that starts it once more was restarted, and has nothing of it
            return [self._started(session), *_acks(acks)]
        self._orders.append(Order("start", acks, [session.id]))
        return []

    def _started(self, session: Session) -> Say:
        return self._say(messages.SessionStarted(session.id, session.test_type, session.realtime, self._ts()))

    def _stop(self, ids: list[str], kind: Literal["stop", "stop_all"], acks: tuple[str, ...], now: float) -> list[Act]:
        """End these sessions: after a last collection, or at once when that was before, or nobody knows of them."""
        order = Order(kind, acks)
        at = now + min(self._hook_s + 0.1, STOP_S) if self._alive() else now
        acts: list[Act] = []
        for name in ids:
            session = self.sessions.get(name)
            if session is None or session.state == "owed":
                order.ended.append(name)
                continue
            order.waits.add(name)
            session.final_at = min(session.final_at, at)
            session.by_all = kind == "stop_all"
            if session.state == "running":
                acts += self._become(session, "stopping")
        self._orders.append(order)
        return [*acts, *self._settle()]

    def _cancel(self, ids: Iterable[str]) -> tuple[list[Act], list[str]]:
        """Drop these sessions, and what waited for them; the ids of those that there were."""
        acts: list[Act] = []
        cancelled = [name for name in ids if name in self.sessions]
        for name in cancelled:
            self.sessions.pop(name).merged.clear()
            acts.append(CoverageSession(session=name, state="cancelled"))
            for order in self._orders:
                order.waits.discard(name)
                if name in order.ended:
                    order.ended.remove(name)
        return [*acts, *self._settle()], cancelled

    def _become(self, session: Session, state: Literal["running", "stopping", "owed"]) -> list[Act]:
        session.state = state
        session.revision += 1
        return [CoverageSession(session=session.id, state=state)]

    def _settle(self) -> list[Act]:
        """What waits for no session any more is done: say so, and acknowledge it."""
        acts: list[Act] = []
        for order in [order for order in self._orders if not order.waits and order.kind != "map"]:
            self._orders.remove(order)
            if order.kind == "start":
                ready = [self.sessions[name] for name in order.ended if name in self.sessions]
                acts += [self._started(session) for session in ready if self.connected]
            elif self.connected:
                # What is owed of a plugin that is not enabled (we were restarted) comes once its classes are announced.
                names = [name for name in order.ended if self.enabled or name not in self.sessions]
                if names or not order.ended:
                    acts += self._finish(names, order.kind == "stop_all")
            acts += _acks(order.acks)
        return acts

    def _finish(self, names: Sequence[str], by_all: bool) -> list[Act]:
        """The rest of these sessions, then the word that they are finished. Its ping proves that both were read."""
        acts: list[Act] = []
        owed = [self.sessions[name] for name in names if name in self.sessions]
        for session in owed:
            unknown = {class_id for class_id, _, _ in session.merged.entries() if class_id not in self.units}
            if lost := session.merged.forget(unknown):
                why = "their files are no part of the product as it is announced"
                acts.append(CoverageLost(session=session.id, classes=len(lost), why=why))
            acts += self._part(session)
            session.last_ping = self._number + 1
        if by_all:
            acts.append(self._say(messages.SessionsFinished(names, self._ts())))
        else:
            for name in names:
                if self._stop_reply in ("finished", "both"):
                    acts.append(self._say(messages.SessionFinished(name, self._ts())))
                if self._stop_reply in ("sessions-finished", "both"):
                    acts.append(self._say(messages.SessionsFinished([name], self._ts())))
        return [*acts, self.ping()] if owed else acts

    # ---- data ------------------------------------------------------------------------------------------------------

    def due(self) -> float:
        """When the next collection is wanted; infinity without a session that waits for one."""
        at = math.inf
        for session in self.sessions.values():
            match session.state:
                case "starting":
                    at = min(at, session.began)
                case "running":
                    at = min(at, self.flush_at)
                case "stopping":
                    at = min(at, session.final_at)
        return at

    def final(self, began: float) -> bool:
        """Is a collection that begins now the last one for some session?"""
        return any(session.state == "stopping" and session.final_at <= began for session in self.sessions.values())

    def begins(self, began: float) -> bool:
        """Is a collection that begins now the border before which nothing counts, for some session?"""
        return any(session.state == "starting" and session.began <= began for session in self.sessions.values())

    def saw(self, deltas: Sequence[Delta]) -> list[Act]:
        """Merge what a source has seen by now. A collection is that of each source, and then `collected`."""
        acts: list[Act] = []
        for session in self.sessions.values():
            if session.state in ("running", "stopping"):
                acts += self._merge(session, deltas)
        return acts

    def collected(self, began: float, now: float) -> list[Act]:
        """A collection that began at `began` is over: what is due of sessions is sent, begun and ended."""
        acts: list[Act] = []
        sessions = list(self.sessions.values())
        for session in [each for each in sessions if each.state == "starting" and each.began <= began]:
            if not any(other.state == "running" for other in sessions):
                self.flush_at = now + self._flush_s
            acts += self._become(session, "running")
            for order in self._orders:
                if order.kind == "start" and session.id in order.waits:
                    order.waits.remove(session.id)
                    order.ended.append(session.id)
            acts += self._settle()
            if session.final_at < math.inf:  # a STOP came meanwhile
                acts += self._become(session, "stopping")
        if began >= self.flush_at:
            acts += self._flush()
            self.flushed(now)
        return [*acts, *self._finals(began)]

    def _finals(self, began: float) -> list[Act]:
        acts: list[Act] = []
        over = [each for each in self.sessions.values() if each.state == "stopping" and each.final_at <= began]
        for session in over:
            acts += self._become(session, "owed")
            if not session.seen:
                acts.append(Empty(session.id))
            for order in self._orders:
                if order.kind in ("stop", "stop_all") and session.id in order.waits:
                    order.waits.remove(session.id)
                    order.ended.append(session.id)
        return [*acts, *self._settle()] if over else acts

    def flushed(self, now: float) -> None:
        """The last flush has ended: the time to the next one counts from now."""
        is_running = any(session.state in ("starting", "running") for session in self.sessions.values())
        self.flush_at = now + self._flush_s if is_running else math.inf

    def added(self, mapped: Map, deltas: Sequence[Delta], why: str = "") -> list[Act]:
        """The deltas of an ADD_SESSION_DATA, or `why` there are none."""
        self._orders.remove(mapped.order)
        acts: list[Act] = []
        session = self.sessions.get(mapped.session)
        if session is None or session.state == "owed":
            why = "the session ended while the data that was added to it was read; that data is dropped"
        else:
            acts += self._merge(session, deltas)
        if why:
            acts.append(CoverageWarning(session=mapped.session, text=f"ADD_SESSION_DATA: {why}"))
        return [*acts, *_acks(mapped.order.acks)]

    def announce(self, units: Iterable[Unit]) -> list[Act]:
        """The product has these classes too, or has them anew. What was seen of a former text of them is dropped."""
        changed = set()
        for unit in units:
            former = self.units.get(unit.class_id)
            if former is not None and former.methods != unit.methods:
                changed.add(unit.class_id)
            self.units[unit.class_id], self.counts[unit.class_id] = unit, unit.probe_count
        acts: list[Act] = []
        for session in self.sessions.values():
            if lost := session.merged.forget(changed):
                session.revision += 1
                why = "their files were changed while the session was open"
                acts.append(CoverageLost(session=session.id, classes=len(lost), why=why))
        if self.link == "enabled":
            acts += [*self._announce(), *self._catch_up()]
        return acts

    def _merge(self, session: Session, deltas: Sequence[Delta]) -> list[Act]:
        if not any(delta.probes for delta in deltas):
            return []
        session.seen = True
        session.revision += 1
        refused = session.merged.add(deltas, session.test_name or UNSPECIFIED) - session.refused
        if not refused:
            return []
        session.refused |= refused
        why = "coverage.max_pending_mib is reached; tests were told apart no more, then new classes refused"
        return [CoverageLost(session=session.id, classes=len(refused), why=why)]

    def _make_room(self, need: int) -> bool:
        """Tests are told apart no more, in the largest session first, until `need` bytes more are no too many."""
        for session in sorted(self.sessions.values(), key=lambda each: -each.merged.size):
            if self._budget.used + need <= self._budget.limit:
                break
            if not session.merged.folded:
                log.warning("drill: names of tests are given up for want of room session=%s", session.id)
                session.merged.fold()
        return self._budget.used + need <= self._budget.limit

    def _flush(self) -> list[Act]:
        acts: list[Act] = []
        if self.link == "enabled":
            for session in self.sessions.values():
                if session.state == "running":
                    part = self._part(session)
                    acts += part
                    if session.realtime:
                        counts = [sum(len(batch.classes) for batch in each.batches) for each in part]
                        acts += [self._say(messages.SessionChanged(session.id, count)) for count in counts]
        return [*acts, self.ping()] if acts else acts

    def _part(self, session: Session) -> list[Part]:
        batches = session.merged.take(self.counts.keys())
        if not batches:
            return []
        session.merged.sent(batches, self._number + 1)
        return [Part(session.id, batches)]

    def ping(self) -> Ping:
        """One more ping, with a number of its own."""
        self._number += 1
        return Ping(self._number)

    def _announce(self) -> list[Act]:
        """All classes, anew; and so all that was seen of them."""
        for session in self.sessions.values():
            session.merged.soil()
        init = messages.Init(len(self.units), f"{len(self.units)} classes follow")
        self.synced, self._announced_by = False, self._number + 1
        return [
            self._say(init),
            Announce(tuple(self.units.values())),
            self._say(messages.Initialized("all classes are told")),
            self.ping(),
        ]

    def _catch_up(self) -> list[Act]:
        """What the admin may not have: dirty entries of all sessions, then the ends that it was not told."""
        acts = self._flush()
        sessions = list(self.sessions.values())
        for session in sessions:
            if session.state == "owed" and not session.by_all:
                acts += self._finish([session.id], by_all=False)
        if by_all := [session.id for session in sessions if session.state == "owed" and session.by_all]:
            acts += self._finish(by_all, by_all=True)
        return acts

    def restore(self, saved: Saved, now: float) -> None:
        """Go on with a session of an earlier process."""
        self.sessions[saved.id] = Session.restored(saved, self._budget, now)
        self.flushed(now)

    def _say(self, message: CoverMessage) -> Say:
        return Say(said(message))

    def _ts(self) -> int:
        return int(self._clock() * 1000)


def _acks(destinations: Iterable[str]) -> list[Act]:
    return [Say(delivered(destination)) for destination in destinations]
