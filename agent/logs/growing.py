"""Files that are scanned as they grow and rotate: `agent logs scan --follow`. From their beginning, until a signal.

Large blocks are matched on the loop too, unlike in the service: only a signal waits for them here, and what is there at
a signal is matched in any case. A thread for each would be a tenth of what following costs.

Source: protocols/logs.md 2.4 and 5.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Sequence

import trio

from agent.core.supervise import Health
from agent.logs.acts import Gap, Report, Scan
from agent.logs.follow import Blocks, Followed
from agent.logs.scanner import Match
from agent.logs.tail import Tail
from agent.logs.wake import Follower
from agent.logs.written import Log, Searches, Written

SETTLE_S = 5.0  # s that what is there at a signal may take


async def follow(
    written: Written, paths: Sequence[str], *, tell: Callable[[str, str], None], scanned: Callable[[int, float], None]
) -> bool:
    """Write the matches of these files until SIGINT or SIGTERM. False: one cannot be read at the end.

    `tell(path, what)` takes what happens to them, `scanned(bytes, cpu_s)` is called when some were. Raises what
    `written` raises, in groups.
    """
    turn = trio.Semaphore(1)
    follower = Follower(_no_globs, Health("scan"))
    logs = [_Growing(written, path, turn, tell, scanned, follower.blocks) for path in dict.fromkeys(paths)]
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(follower.run)
            for log in logs:
                follower.add(log.followed)
                nursery.start_soon(log.followed.run)
            async for _ in signals:
                break
            with trio.move_on_after(SETTLE_S):
                for log in logs:
                    await log.followed.settle(is_last=True)
            nursery.cancel_scope.cancel()
    for log in logs:
        log.tick(math.inf)
    return not any(log.is_unreadable for log in logs)


async def _no_globs(found: dict[str, list[str]]) -> None:
    """There are none to look for new files of."""


def _has_room() -> bool:
    return True  # who reads our output makes us wait by reading slowly


class _Growing:
    """One path; what Followed calls."""

    def __init__(
        self,
        written: Written,
        path: str,
        turn: trio.Semaphore,
        tell: Callable[[str, str], None],
        scanned: Callable[[int, float], None],
        blocks: Blocks,
    ) -> None:
        self._rules = written.rules.rules
        self._path, self._worker, self._turn, self._tell, self._scanned = path, written.worker, turn, tell, scanned
        absolute = os.path.abspath(path)
        self._log = Log(written, path, absolute)
        self.is_unreadable = False
        tail = Tail(absolute, start="start", begun=time.time())
        self.followed = Followed(tail, self, Health("scan"), links=True, room=_has_room, blocks=blocks)
        if not os.path.exists(absolute):
            tell(path, "is not there yet")

    async def scan(self, act: Scan) -> tuple[int, int]:
        at, before = 0, act.before

        def is_new(line: int, match: Match) -> bool:
            return self.followed.tail.is_new(act, line, self._rules[match.rule].spec.id, match.flags)

        try:  # one worker for all: its results are good until it scans again
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self.followed.own_turn()
            await self._turn.acquire()
        try:
            self._log.at(act.origin, act.generation)
            is_full = True
            while is_full:
                part, started = act.data[at:], time.thread_time()
                found = self._worker.scan(part, before=before, end=act.end, suspended=self._log.mask)
                cpu_s = time.thread_time() - started
                if self._worker.scanner.is_due:
                    await self.followed.in_thread(self._worker.scanner.choose_anew)
                await self._drive(self._log.take(found, part, act.offset + at, is_new, trio.current_time()))
                self._scanned(found.consumed, cpu_s)
                at, before, is_full = at + found.consumed, found.before, found.is_full
        finally:
            self._turn.release()
        return at, before

    async def _drive(self, searches: Searches) -> None:
        try:
            search = next(searches)
            while True:
                search = searches.send(await self.followed.search(search))
        except StopIteration:
            return

    def tell(self, act: Report | Gap) -> None:
        if isinstance(act, Gap):
            self._tell(self._path, f"lines may be lost from byte {act.start} on: {act.why}")
            return
        self.is_unreadable = act.what == "unreadable" or (self.is_unreadable and act.what == "lagging")
        if act.what != "found":
            self._tell(self._path, f"{act.what}{': ' if act.detail else ''}{act.detail}")

    def keep(self) -> None:
        """A scan begins anew each time."""

    def due(self) -> float:
        return self._log.due()

    def tick(self, now: float) -> None:
        if self._log.due() <= now:
            self._log.tick(now)
            self._scanned(0, 0.0)
