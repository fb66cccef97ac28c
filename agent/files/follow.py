"""The file monitor on trio: reads inotify, has the looks taken in a worker thread, hands out what is to be told.

Threads: one worker at a time takes looks (agent/files/disk.py); the monitor itself belongs to the trio thread. A worker
that hangs, as where a server of files is gone, is left to itself: another takes the looks elsewhere, and those at the
same place fail until it comes back.

Source: protocols/emissary.md, "Entitlement and file monitor".
"""

import logging
import os
import select
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NoReturn

import trio
from inotify_simple import INotify

from agent.core.errors import shown
from agent.core.events import FileChanged, FileGap
from agent.core.inotify import open_inotify, unwatch
from agent.core.mounts import MOUNTS, is_within, place_of, point_of
from agent.core.supervise import HUNG_S, Health
from agent.files.disk import carry_out
from agent.files.looks import (
    Drop,
    Look,
    Looked,
    Ready,
    Survey,
    Surveyed,
    Watch,
    without_answer,
)
from agent.files.watch import POLL_S, Monitor

log = logging.getLogger(__name__)

READ = 256 * 1024  # bytes of inotify at a time: 8,000 messages, which take some 10 ms
GATHER_S = 0.01  # what comes within that time is read at once
MAX_HUNG = 8  # places where the disk does not answer; with one more it answers nowhere

Tell = Callable[[FileChanged | FileGap], Awaitable[None]]


class _Batch:
    """Looks that one worker takes, until it is done or left."""

    def __init__(self, looks: Sequence[Survey | Look]) -> None:
        self.results: list[Surveyed | Looked] = []  # in their order
        self.done = trio.Event()
        self._is_left, self._steps = False, 0
        self._looks = looks

    async def answered(self) -> list[Surveyed | Looked]:
        """The results: all, or those before the one that stands still for HUNG_S. Then the worker is left."""
        before = -1
        while not self.done.is_set() and self._steps > before:
            before = self._steps
            with trio.move_on_after(HUNG_S):
                await self.done.wait()
        self._is_left = True
        return list(self.results)

    def take(self, notify: INotify | None, allow: Sequence[str]) -> None:
        """The worker's part. What it finds after it was left is not wanted."""
        for result in carry_out(self._looks, notify, allow, self._step):
            if self._is_left:
                return
            self.results.append(result)
            self._step()

    def _step(self) -> None:
        self._steps += 1


class Follower:
    """Runs a Monitor. `tell` gets every event, in order; what it waits for, the monitor waits for.

    `lack` hears how many directories have no watch of the kernel's and are polled, when that is another number.
    """

    def __init__(
        self,
        tell: Tell,
        health: Health,
        *,
        allow: Sequence[str] = (),
        lack: Callable[[int], None] = lambda short: None,
    ) -> None:
        self.monitor = Monitor()
        self._tell, self._health, self._allow, self._lack = tell, health, allow, lack
        self._short = 0
        self._wake, self._idle = trio.Event(), trio.Event()
        self._ready: dict[str, trio.Event] = {}
        self._notify: INotify | None = None
        self._hung: list[str] = []  # no look is taken there, or below
        self._threads = trio.CapacityLimiter(MAX_HUNG + 2)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Follow what is watched, for ever. Where the kernel gives no inotify instance, everything is polled.

        At its end nobody waits any longer.
        """
        try:
            with open_inotify() as self._notify:
                async with trio.open_nursery() as nursery:
                    if self._notify is not None:
                        nursery.start_soon(self._hear, self._notify)
                    await nursery.start(self._mind_mounts)
                    task_status.started()
                    await self._work(nursery)
        finally:
            for id in list(self._ready):
                self._release(id)
            self._idle.set()
        raise AssertionError("work never ends")

    async def watch(self, watch: Watch) -> None:
        """Returns when everything that happens from now on is told."""
        ready = self._ready[watch.id] = trio.Event()
        self.monitor.watch(watch)
        self._wake.set()
        await ready.wait()

    def unwatch(self, id: str) -> None:
        """Watch no longer. Who still waits for it in `watch` is released."""
        self.monitor.unwatch(id)
        self._release(id)
        self._wake.set()

    async def settle(self) -> None:
        """Returns when what has happened so far is told."""
        while self._notify is not None and self._read(self._notify):
            pass
        self.monitor.hurry()
        self._idle = trio.Event()
        self._wake.set()
        await self._idle.wait()

    async def _hear(self, notify: INotify) -> NoReturn:
        while True:
            await trio.lowlevel.wait_readable(notify.fileno())
            if not self._read(notify):
                await trio.sleep(GATHER_S)

    async def _mind_mounts(self, *, task_status: trio.TaskStatus[None]) -> NoReturn:
        """Look where file systems came and went: what is watched there is another thing then, and inotify is silent."""
        with MOUNTS.open(errors="surrogateescape") as table:
            changes = select.poll()
            changes.register(table, select.POLLPRI)
            mounted = _mounted(table.read())
            task_status.started()
            while True:
                await trio.sleep(POLL_S)
                if changes.poll(0):
                    table.seek(0)
                    before, mounted = mounted, _mounted(table.read())
                    self.monitor.mounted(
                        {os.path.basename(point) for _, point in before ^ mounted}, trio.current_time()
                    )
                    self._wake.set()

    def _read(self, notify: INotify) -> bool:
        """Read once; is there perhaps more?"""
        try:
            data = os.read(notify.fileno(), READ)
        except BlockingIOError:
            return False
        self.monitor.feed(data, trio.current_time())
        self._wake.set()
        return len(data) > READ - 4096

    async def _work(self, nursery: trio.Nursery) -> NoReturn:
        while True:
            acts = self.monitor.acts(trio.current_time())
            if not acts:
                self._idle.set()
                if (short := self.monitor.short) != self._short:
                    self._short = short
                    self._lack(short)
                with trio.move_on_at(self.monitor.next_at()):
                    await self._wake.wait()
                self._wake = trio.Event()
                continue
            looks: list[Survey | Look] = []
            for act in acts:
                match act:
                    case Survey() | Look():
                        looks.append(act)
                    case Drop(wd) if self._notify is not None:
                        unwatch(self._notify, wd)
                    case Ready(id):
                        self._release(id)
                    case FileChanged() | FileGap():
                        await self._tell(act)
            if not looks:
                continue
            results = await self._take(looks, nursery)
            now = trio.current_time()
            for result in results:
                if isinstance(result, Looked):
                    self.monitor.looked(result, now)
                else:
                    self.monitor.surveyed(result, now)

    async def _take(self, looks: list[Survey | Look], nursery: trio.Nursery) -> list[Surveyed | Looked]:
        """What each found. Where the disk hangs, only the first who asks waits for it."""
        results: list[Surveyed | Looked] = []
        while True:
            results += [without_answer(look) for look in looks if self._is_hung(look.path)]
            looks = [look for look in looks if not self._is_hung(look.path)]
            if not looks:
                return results
            batch = _Batch(looks)
            nursery.start_soon(self._carry_out, batch)
            found = await batch.answered()
            results += found
            looks = looks[len(found) :]
            if looks:
                self._hangs(looks[0].path, batch, nursery)

    async def _carry_out(self, batch: _Batch) -> None:
        take = partial(batch.take, self._notify, self._allow)
        await trio.to_thread.run_sync(take, limiter=self._threads, abandon_on_cancel=True)
        batch.done.set()

    def _is_hung(self, path: str) -> bool:
        return any(is_within(path, place) for place in self._hung)

    def _hangs(self, path: str, batch: _Batch, nursery: trio.Nursery) -> None:
        """Ask no more for what is at this place until the worker of the batch is back: its mount, else the path."""
        place = place_of(path, MOUNTS.read_text(errors="surrogateescape"))
        if len(self._hung) >= MAX_HUNG:
            place = "/"
        self._hung.append(place)
        nursery.start_soon(self._until_answered, place, batch)

    async def _until_answered(self, place: str, batch: _Batch) -> None:
        log.warning("the disk does not answer path=%s", shown(place))
        with self._health.asking(shown(place)):
            await batch.done.wait()
        log.info("the disk answers again path=%s", shown(place))
        self._hung.remove(place)
        self.monitor.answered(place)
        self._wake.set()

    def _release(self, id: str) -> None:
        ready = self._ready.pop(id, None)
        if ready is not None:
            ready.set()


def _mounted(mountinfo: str) -> set[tuple[str, str]]:
    """Number and place of each mount."""
    return {(line.split(" ", 1)[0], point_of(line)) for line in mountinfo.splitlines()}
