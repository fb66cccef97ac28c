"""What a restart of the agent must not lose: the sessions with their merged probes, and of which build's classes.

Source: protocols/drill.md, "State machine" (lost link); ARCHITECTURE.md, rule 4.
"""

import logging
from collections.abc import Iterable
from functools import partial

import msgspec
import trio

from agent.core.store import Store
from agent.coverage.catalog import Unit
from agent.coverage.session import Saved, Session

log = logging.getLogger(__name__)

SETTLE_S = 1.0  # s: an admin waits for the answer to its START
SESSIONS, CATALOG, BUILD = "coverage.sessions", "coverage.catalog", "coverage.build"


class Kept:
    """The checkpoints of the role. Only what changed since the last one is written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._revisions: dict[str, int] = {}

    async def read(self) -> tuple[str, list[Unit], list[Saved]]:
        """What an earlier process left: as which build it had attached, the classes, and the sessions."""
        await self._store.commit()
        try:
            build = await self._store.get(BUILD, str) or ""
            units = await self._store.get(CATALOG, list[Unit]) or []
            names = await self._store.get(SESSIONS, list[str]) or []
            found = [await self._store.get(_key(name), Saved) for name in names]
        except msgspec.DecodeError as err:  # of another version
            log.error("coverage: checkpoint unreadable, open sessions are lost error=%s", err)  # noqa: TRY400
            return "", [], []
        sessions = [saved for saved in found if saved is not None]
        self._revisions = {saved.id: -1 for saved in sessions}
        return build, units, sessions

    def keep_build(self, build: str) -> None:
        """The agent attaches as this build."""
        self._store.put(BUILD, build)

    async def keep_catalog(self, units: Iterable[Unit]) -> None:
        """The classes that are announced are these."""
        encoded = await trio.to_thread.run_sync(partial(msgspec.json.encode, list(units)))
        self._store.put(CATALOG, msgspec.Raw(encoded))

    async def settle(self) -> None:
        """Wait until all is on the disk; a full one is not waited for."""
        with trio.move_on_after(SETTLE_S):
            await self._store.commit()

    def keep(self, sessions: Iterable[Session]) -> None:
        """These are all sessions there are, as they are now. On a full disk that waits for the next call.

        What is put there waits in memory: the same session each time once more.
        """
        if self._store.full:
            return
        now = {session.id: session for session in sessions if session.state != "starting"}
        for name in self._revisions.keys() - now.keys():
            self._store.forget(_key(name))
        for name, session in now.items():
            if self._revisions.get(name) != session.revision:
                self._store.put(_key(name), session.saved())
        if now.keys() != self._revisions.keys():
            self._store.put(SESSIONS, list(now))
        self._revisions = {name: session.revision for name, session in now.items()}


def _key(session: str) -> str:
    return f"coverage.session.{session}"
