"""The file monitor on trio: reads inotify, has the looks taken in a worker thread, hands out what is to be told.

Threads: one worker at a time takes looks (agent/files/disk.py); the monitor itself belongs to the trio thread.

Source: protocols/emissary.md, "Entitlement and file monitor".
"""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NoReturn

import trio
from inotify_simple import INotify

from agent.core.events import FileChanged, FileGap
from agent.core.inotify import open_inotify, unwatch
from agent.core.supervise import Health
from agent.files.disk import carry_out
from agent.files.looks import Drop, Look, Looked, Ready, Survey, Watch
from agent.files.watch import Monitor

log = logging.getLogger(__name__)

READ = 256 * 1024  # bytes of inotify at a time: 8,000 messages, which take some 10 ms
GATHER_S = 0.01  # what comes within that time is read at once
BATCH_S = 60.0  # s for a hang of one batch of looks

Tell = Callable[[FileChanged | FileGap], Awaitable[None]]


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
        self._one = trio.CapacityLimiter(1)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Follow what is watched, for ever. Where the kernel gives no inotify instance, everything is polled."""
        with open_inotify() as self._notify:
            async with trio.open_nursery() as nursery:
                if self._notify is not None:
                    nursery.start_soon(self._hear, self._notify)
                task_status.started()
                await self._work()
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
        if self._notify is not None:
            self._read(self._notify)
        self.monitor.hurry()
        self._idle = trio.Event()
        self._wake.set()
        await self._idle.wait()

    async def _hear(self, notify: INotify) -> NoReturn:
        while True:
            await trio.lowlevel.wait_readable(notify.fileno())
            if not self._read(notify):
                await trio.sleep(GATHER_S)

    def _read(self, notify: INotify) -> bool:
        """Read once; is there perhaps more?"""
        try:
            data = os.read(notify.fileno(), READ)
        except BlockingIOError:
            return False
        self.monitor.feed(data, trio.current_time())
        self._wake.set()
        return len(data) > READ - 4096

    async def _work(self) -> NoReturn:
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
            with self._health.busy(limit=BATCH_S):
                take = partial(carry_out, looks, self._notify, self._allow)
                results = await trio.to_thread.run_sync(take, limiter=self._one, abandon_on_cancel=True)
            now = trio.current_time()
            for result in results:
                if isinstance(result, Looked):
                    self.monitor.looked(result, now)
                else:
                    self.monitor.surveyed(result, now)

    def _release(self, id: str) -> None:
        ready = self._ready.pop(id, None)
        if ready is not None:
            ready.set()
