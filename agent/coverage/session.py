"""One session of the Drill admin: what it was started with, its probes, how it is kept and shown. Pure.

Source: protocols/drill.md, "State machine".
"""

import math
from typing import Literal

import msgspec

from agent.coverage.catalog import Delta
from agent.coverage.merged import Budget, Merged
from agent.coverage.messages import StartSession

State = Literal["starting", "running", "stopping", "owed"]


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A session in a checkpoint. `since` is epoch seconds; `entries` are class id, test, probes in hex."""

    id: str
    test_type: str
    test_name: str | None
    realtime: bool
    since: float
    owed: bool
    by_all: bool
    seen: bool
    folded: bool
    entries: list[tuple[str, str, str]]


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A session as status shows it. `since` is epoch seconds; `waiting`: the admin may not have all it has seen."""

    session: str
    state: State
    test_type: str
    test_name: str | None
    realtime: bool
    since: float
    entries: int
    waiting: bool


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `coverage`. Without an admin `link` and `build` are null.

    `classes` is the number that is announced, `armed` whether runners that start now are covered, `runs` are those
    whose runners are.
    """

    link: Literal["offline", "attached", "loaded", "enabled"] | None
    build: str | None
    armed: bool
    classes: int
    sessions: tuple[Shown, ...]
    runs: tuple[str, ...]


class Session:
    """One session. `since` is epoch seconds; `revision` grows whenever what a checkpoint keeps of it changes."""

    def __init__(self, asked: StartSession, budget: Budget, since: float, began: float) -> None:
        self.id, self.test_type, self.test_name = asked.session_id, asked.test_type, asked.test_name
        self.realtime = asked.is_realtime
        self.since, self.began = since, began
        self.merged = Merged(budget)
        self.state: State = "starting"
        self.revision = 0
        self.seen = False  # any probe
        self.refused: set[str] = set()  # classes for which there was no room
        self.final_at = math.inf
        self.by_all = False  # ended by STOP_ALL
        self.last_ping: int | None = None  # the one that was sent behind the word that it is finished

    @classmethod
    def restored(cls, saved: Saved, budget: Budget, now: float) -> "Session":
        """A session of an earlier process. One that was being stopped has collected all there will be."""
        asked = StartSession(saved.id, saved.test_type, saved.test_name, saved.realtime)
        session = cls(asked, budget, saved.since, now)
        session.state = "owed" if saved.owed else "running"
        session.by_all, session.seen, session.merged.folded = saved.by_all, saved.seen, saved.folded
        session.merged.add(Delta(class_id, int(probes, 16), test) for class_id, test, probes in saved.entries)
        return session

    def saved(self) -> Saved:
        """What is kept of it over a restart."""
        return Saved(
            id=self.id,
            test_type=self.test_type,
            test_name=self.test_name,
            realtime=self.realtime,
            since=self.since,
            owed=self.state in ("stopping", "owed"),
            by_all=self.by_all,
            seen=self.seen,
            folded=self.merged.folded,
            entries=[(class_id, test, f"{probes:x}") for class_id, test, probes in self.merged.entries()],
        )

    def shown(self) -> Shown:
        """The session for status."""
        return Shown(
            session=self.id,
            state=self.state,
            test_type=self.test_type,
            test_name=self.test_name,
            realtime=self.realtime,
            since=self.since,
            entries=len(self.merged),
            waiting=self.state == "owed" or not self.merged.told,
        )
