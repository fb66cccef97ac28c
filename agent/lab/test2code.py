"""The plugin part of the lab's Drill admin: the classes, sessions and coverage of one build of an agent. Pure.

A session is active, then finishing (SESSION_FINISHED was heard; late data still counts), then finished; or cancelled.

Source: protocols/drill.md, "The lab's admin"; seeds/drill-coverage-event-flow.md, "Flow", "Exception".
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal
from uuid import uuid4

import msgspec

from agent.core.head import HttpError
from agent.lab.drillwire import (
    Action,
    AddSessionData,
    AddTests,
    AgentAction,
    AgentSession,
    AstEntity,
    Cancel,
    CancelAll,
    CoverageDataPart,
    CoverMessage,
    Init,
    InitDataPart,
    Initialized,
    ScopeInitialized,
    SessionCancelled,
    SessionChanged,
    SessionFinished,
    SessionsCancelled,
    SessionsFinished,
    SessionStarted,
    Start,
    StartPayload,
    Stop,
    StopAll,
    SyncMessage,
)

log = logging.getLogger(__name__)

GRACE_S = 0.5  # s after SESSION_FINISHED in which data still counts (test2code-plugin 0.7 waits as long)
MAX_CLASSES = 1_000_000
MAX_ENTRIES = 1_000_000  # of a class and a test, in one session
MAX_SESSIONS = 64  # active, of an agent: protocols/drill.md, "Limits and security"
MAX_ENDED = 200  # sessions kept after their end, of one build; the oldest go first


class Totals(msgspec.Struct, frozen=True):
    """How much was reached: classes with a probe, and their probes."""

    classes: int = 0
    covered: int = 0


class Session(msgspec.Struct, kw_only=True):
    """A session on the admin's side.

    `reached` has a byte for each probe (0 or 1), as an int, by class and test. `totals` and `tests` are as of the last
    recalculation. `parts`, `objects` and `flushes` (SESSION_CHANGED) count what was heard; `strange` are objects of
    classes that were not announced, not with that many probes, or too many; `late` are parts behind the end.
    """

    start: AgentSession
    state: Literal["active", "finishing", "finished", "cancelled"] = "active"
    started: bool = False
    settles: float = 0.0
    reached: dict[tuple[str, str], int] = {}
    totals: Totals = Totals()
    tests: dict[str, Totals] = {}
    parts: int = 0
    objects: int = 0
    flushes: int = 0
    strange: int = 0
    late: int = 0


class Plugin:
    """The classes and sessions of one build of an agent."""

    def __init__(self, build: str) -> None:
        self.build = build
        self.initialized = False
        self.classes: dict[str, AstEntity] = {}
        self.probes: dict[str, int] = {}  # how many each class has
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.unknown = 0  # parts of sessions that are none
        self._expected = 0
        self._former: dict[str, int] = {}  # `probes` of the announcement before

    # -- the user's side

    def carry_out(self, action: Action) -> AgentAction:
        """What the agent is told.

        Raises HttpError 404 for a session that is not active, 409 for one that is there, and for one too many.
        """
        match action:
            case Start(payload=given):
                return AgentAction("START_AGENT_SESSION", self._start(given))
            case Stop(payload=given):
                self._active(given.session_id)
                return AgentAction("STOP", given)
            case Cancel(payload=given):
                self._cancel(self._active(given.session_id))
                return AgentAction("CANCEL", given)
            case AddSessionData(payload=given):
                self._active(given.session_id)
                return AgentAction("ADD_SESSION_DATA", given)
            case AddTests(payload=tests):
                self._active(tests.session_id)
                return AgentAction("ADD_SESSION_TESTS", tests)
            case StopAll():
                return AgentAction("STOP_ALL")
            case CancelAll():
                for session in self.sessions.values():
                    if session.state == "active":
                        self._cancel(session)
                return AgentAction("CANCEL_ALL")

    def _start(self, given: StartPayload) -> AgentSession:
        ident = given.session_id or str(uuid4())
        known = self.sessions.get(ident)
        if known is not None and known.state != "cancelled":
            raise HttpError(409, f"session {ident!r} exists already ({known.state})")
        active = [one for one in self.sessions.values() if one.state == "active"]
        if len(active) >= MAX_SESSIONS:
            raise HttpError(409, f"{MAX_SESSIONS} sessions are active, which is the limit: end one of them first")
        others = (one for one in active if one.start.is_global)
        if given.is_global and (other := next(others, None)):
            raise HttpError(409, f"session {other.start.session_id!r} is active and global; there can be one such")
        start = AgentSession(ident, given.test_type, given.test_name, given.is_realtime, given.is_global)
        self.sessions.pop(ident, None)
        self.sessions[ident] = Session(start=start)
        ended = [one for one, session in self.sessions.items() if session.state in ("finished", "cancelled")]
        for one in ended[:-MAX_ENDED]:
            del self.sessions[one]
        return start

    def _active(self, ident: str) -> Session:
        session = self.sessions.get(ident)
        if session is None or session.state != "active":
            raise HttpError(404, f"no session {ident!r} is active")
        return session

    @staticmethod
    def _cancel(session: Session) -> None:
        session.state = "cancelled"
        session.reached = {}
        session.totals, session.tests = Totals(), {}

    # -- the agent's side

    def hear(self, message: CoverMessage, now: float) -> None:
        """Take what the agent said. `now` in seconds that only grow."""
        self.settle(now)
        match message:
            case Init(classes_count=count, init=init):
                if self.initialized:
                    self._former = dict(self.probes)
                self.initialized, self._expected = False, count
                if init:
                    self.classes, self.probes = {}, {}
            case InitDataPart(ast_entities=entities):
                if len(self.classes) + len(entities) > MAX_CLASSES:
                    log.warning(
                        "more than %d classes announced build=%s: the rest is left out", MAX_CLASSES, self.build
                    )
                    return
                for entity in entities:
                    name = f"{entity.path}/{entity.name}"
                    self.classes[name], self.probes[name] = entity, sum(method.count for method in entity.methods)
            case Initialized():
                self.initialized = True
                self._drop_changed()
                if len(self.classes) != self._expected:
                    log.warning("classes announced=%d of=%d build=%s", len(self.classes), self._expected, self.build)
            case SessionStarted(session_id=ident):
                if session := self.sessions.get(ident):
                    session.started = True
            case CoverageDataPart():
                self._merge(message)
            case SessionChanged(session_id=ident):
                session = self.sessions.get(ident)
                if session and session.state == "active":
                    session.flushes += 1
                    self._recalculate(session)
            case SessionFinished(session_id=ident):
                self._finishing((ident,), now)
            case SessionsFinished(ids=idents):
                self._finishing(idents, now)
            case SyncMessage(active_sessions=idents):
                self._take_up(idents)
            case SessionCancelled(session_id=ident):
                self._cancelled((ident,))
            case SessionsCancelled(ids=idents):
                self._cancelled(idents)
            case ScopeInitialized():
                pass  # one scope is all there is here

    def reached(self, sessions: Iterable[Session]) -> dict[str, int]:
        """What they reached of the classes that are announced, by class; as in Session.reached."""
        merged: dict[str, int] = {}
        for session in sessions:
            for (name, _), flags in session.reached.items():
                if name in self.probes:
                    merged[name] = merged.get(name, 0) | flags
        return merged

    def settle(self, now: float) -> None:
        """Finish the sessions whose grace is over: recalculate, and take nothing more."""
        for session in self.sessions.values():
            if session.state == "finishing" and now >= session.settles:
                session.state = "finished"
                self._recalculate(session)

    def _take_up(self, idents: tuple[str, ...]) -> None:
        """Sessions that the agent has and we do not: we were restarted. How they were started is not known any more."""
        room = MAX_SESSIONS - sum(session.state == "active" for session in self.sessions.values())
        for ident in idents[: max(room, 0)]:
            if ident not in self.sessions:
                self.sessions[ident] = Session(start=AgentSession(ident, "", None, False, False), started=True)

    def _drop_changed(self) -> None:
        """What was reached of a class that has another number of probes now is not known any more."""
        changed = {name for name, count in self._former.items() if self.probes.get(name, count) != count}
        for session in self.sessions.values() if changed else ():
            session.reached = {key: flags for key, flags in session.reached.items() if key[0] not in changed}

    def _finishing(self, idents: tuple[str, ...], now: float) -> None:
        for ident in idents:
            if (session := self.sessions.get(ident)) and session.state == "active":
                session.state, session.settles = "finishing", now + GRACE_S

    def _cancelled(self, idents: tuple[str, ...]) -> None:
        """The agent dropped them: it was asked to, is switched off, or has too many."""
        for ident in idents:
            if (session := self.sessions.get(ident)) and session.state == "active":
                self._cancel(session)

    def _merge(self, part: CoverageDataPart) -> None:
        session = self.sessions.get(part.session_id)
        if session is None or session.state == "cancelled":
            self.unknown += 1
            return
        if session.state != "active":
            session.late += 1
            if session.state == "finished":
                return
        session.parts += 1
        session.objects += len(part.data)
        for one in part.data:
            key = (one.class_name, one.test_name)
            is_full = len(session.reached) >= MAX_ENTRIES and key not in session.reached
            if is_full or self.probes.get(one.class_name) != len(one.probes):
                session.strange += 1
                continue
            flags = int.from_bytes(bytes(one.probes), "little")
            session.reached[key] = session.reached.get(key, 0) | flags

    def _recalculate(self, session: Session) -> None:
        by_class: dict[str, int] = {}
        by_test: dict[str, list[int]] = {}
        for (name, test), flags in session.reached.items():
            by_class[name] = by_class.get(name, 0) | flags
            by_test.setdefault(test, []).append(flags)
        session.totals = _total(by_class.values())
        session.tests = {test: _total(flags) for test, flags in by_test.items()}


def _total(flags: Iterable[int]) -> Totals:
    counts = [one.bit_count() for one in flags]
    return Totals(sum(map(bool, counts)), sum(counts))


def flags_of(reached: int, count: int) -> list[bool]:
    """One flag for each of `count` probes, of what a session keeps for a class."""
    return [byte != 0 for byte in reached.to_bytes(count, "little")]
