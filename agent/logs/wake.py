"""What wakes the logs that are followed: inotify, and one look at all paths a second, which needs neither of them.

Threads: the look at all paths and the reading of directories are one worker's, since a disk (NFS) may hang. It waits
between two looks too, and comes back when there is something to do: a second in which nothing happens costs no turn of
the loop. It reads what the sources say of themselves, and changes no more than its own looks. A worker that hangs keeps
what is on that mount for ever; another looks at the rest. Where a path leads to is asked for, and each watch begun, in
other threads: what is on this machine is heard while a mount hangs.

Source: protocols/logs.md 5.
"""

import math
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TypeVar, TypeVarTuple

import trio
from inotify_simple import INotify, flags, parse_events

from agent._native import ffi, lib
from agent.core.inotify import open_inotify, unwatch
from agent.core.mounts import MOUNTS, is_within, place_of
from agent.core.supervise import HUNG_S, Health
from agent.logs.follow import DISK, Blocks, Followed
from agent.logs.paths import Globs, fixed

if TYPE_CHECKING:
    from outcome import Outcome

    from agent._native import CData

POLL_S = 1.0
GATHER_S = 0.06  # between two looks at what grows quickly: few large blocks cost less than many
HEARD = 1 << 16  # bytes of inotify's events that are read at once
RESCAN = 10  # looks: so often `rescan` is told what it knows
MAX_HELD = 256 << 20  # bytes of deleted files, all together
AT_ONCE_S = 0.25  # longer than a disk takes that does not hang
MOUNTED = 8  # threads that wait for one mount: if it hangs, only what is on it waits for them
MAX_HUNG = 8  # places where the disk did not answer once; with one more, what is not there waits for it too

_HEARD = flags.MODIFY | flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ATTRIB
_NEW = int(flags.CREATE | flags.MOVED_TO)  # as numbers, which cost a tenth of flags
_WRITTEN, _OVERFLOW, _IGNORED = int(flags.MODIFY), int(flags.Q_OVERFLOW), int(flags.IGNORED)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Worker:
    """Looks at what is at one place, where the disk hung once; at first at all that is at no other's.

    What is looked at now are `sources`, in that order, and their looks.
    """

    def __init__(self) -> None:
        self.place: str | None = None
        self.globs, self.new = Globs(), threading.Event()  # there is something else to look at, or for
        self.sources: list[Followed] = []
        self.looks: Sequence[tuple[CData, CData]] = ()

    def asked(self) -> str | None:
        """What it waits for, if for a disk."""
        asked = (source.tail.path for source, (look, _) in zip(self.sources, self.looks, strict=True) if look.asked)
        return next(asked, self.globs.asked)


class Follower:
    """All logs. `rescan` gets what globs find, by glob: when that changes, and every few seconds; not those of a disk
    that hangs. `found` is what all of them found last. The `blocks` are for all logs.
    """

    def __init__(self, rescan: Callable[[dict[str, list[str]]], Awaitable[None]], health: Health) -> None:
        self.blocks = Blocks()
        self._rescan, self._health = rescan, health
        self._looks: dict[Followed, tuple[CData, CData]] = {}  # a struct look, and its path
        self._names: dict[tuple[str, str], list[Followed]] = {}  # by folder, and the name that inotify tells
        self._sought, self.found = Counter[str](), dict[str, list[str]]()
        self._places: dict[Followed | str, set[tuple[str, str]]] = {}  # of each source and glob, once they are known
        self._wanted: Counter[str] = Counter()
        self._folders: dict[int, str] = {}
        self._watching: dict[str, trio.Event] = {}  # folders that are about to be
        self._hearing: dict[Followed, trio.Event] = {}  # set when what happens at its path is heard of
        self._notify: INotify | None = None
        self._mounted: dict[str, trio.CapacityLimiter] = {}
        self._nursery: trio.Nursery
        self._workers: list[_Worker] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Wake the logs, for ever. Without an inotify instance they are looked at each second alone."""
        with open_inotify() as self._notify:
            async with trio.open_nursery() as self._nursery:
                if self._notify is not None:
                    self._nursery.start_soon(self._hear, self._notify)
                self._nursery.start_soon(self._poll)
                task_status.started()
                await trio.sleep_forever()
        raise AssertionError("polling never ends")

    def add(self, source: Followed) -> None:
        """Wake it, while run() runs."""
        self._looks[source] = _first_look(source.tail.path)
        source.disk = self._disk_of(source.tail.path)
        self._hearing[source] = trio.Event()
        self._nursery.start_soon(self._find_places, source)
        self._look_anew()

    async def hears(self, source: Followed) -> None:
        """Returns when what happens at its path is heard of, or cannot be: then it is time for a first look at it."""
        if source in self._hearing:  # else it was dropped already
            await self._hearing[source].wait()

    def drop(self, source: Followed) -> None:
        del self._looks[source], self._hearing[source]
        for folder, name in self._places.pop(source, ()):
            self._names[folder, name].remove(source)
            if not self._names[folder, name]:
                del self._names[folder, name]
            self._want_no_more(folder)

    def seek(self, pattern: str) -> None:
        """Have what a glob finds told, while run() runs."""
        self._sought[pattern] += 1
        self._nursery.start_soon(self._find_places, pattern)
        self._look_anew()

    def seek_no_more(self, pattern: str) -> None:
        """As often as it was sought."""
        self._sought -= Counter((pattern,))
        if pattern not in self._sought:
            for folder, _ in self._places.pop(pattern, ()):
                self._want_no_more(folder)

    async def _find_places(self, one: Followed | str) -> None:
        """Hear of what happens at a source's path and where that leads to, or where a glob begins."""
        hearing = None if isinstance(one, str) else self._hearing.get(one)
        if isinstance(one, str):
            places = await self.ask(fixed(one), lambda: {(os.path.realpath(fixed(one)), "")})
        else:
            places = await self.ask(one.tail.path, _places, one.tail.path)
        if one in self._places or not (one in self._looks or one in self._sought):  # it was dropped meanwhile
            return
        self._places[one] = places
        for folder, name in places:
            if not isinstance(one, str):
                self._names.setdefault((folder, name), []).append(one)
            self._wanted[folder] += 1
        if self._notify is not None:
            for folder in {folder for folder, _ in places}:
                await self._watch(self._notify, folder)
        if hearing is not None:
            hearing.set()

    def _want_no_more(self, folder: str) -> None:
        """As often as it was wanted."""
        self._wanted[folder] -= 1
        if self._wanted[folder]:
            return
        del self._wanted[folder]
        for wd in [wd for wd, watched in self._folders.items() if watched == folder]:
            del self._folders[wd]
            if self._notify is not None and wd not in self._folders:
                unwatch(self._notify, wd)

    def _watch_folders(self) -> None:
        """Those that the kernel does not watch yet: they may not have been there."""
        if self._notify is not None:
            for folder in self._wanted.keys() - self._folders.values() - self._watching.keys():
                self._nursery.start_soon(self._watch, self._notify, folder)

    async def _watch(self, notify: INotify, folder: str) -> None:
        """Have the kernel tell of it; returns when it does, or cannot."""
        if folder in self._watching:
            await self._watching[folder].wait()
        if folder in self._watching or folder in self._folders.values():
            return
        self._watching[folder] = watched = trio.Event()
        try:
            wd: int = await self.ask(folder, notify.add_watch, folder, _HEARD)
        except OSError:  # what is there is looked at each second, and then this is tried again
            return
        finally:
            del self._watching[folder]
            watched.set()
        if folder in self._wanted:
            self._folders[wd] = folder
            self._look_anew()  # what was told by a number that was not known yet was not heard
        elif wd not in self._folders:
            unwatch(notify, wd)

    async def ask(self, path: str, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """What a function finds out about a path, in a thread: its disk may hang."""
        with self._health.asking(path):
            return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=self._disk_of(path))

    def _disk_of(self, path: str) -> trio.CapacityLimiter:
        """The threads that may wait for what is mounted there."""
        place = place_of(path, MOUNTS.read_text(errors="surrogateescape"))
        return DISK if place == path else self._mounted.setdefault(place, trio.CapacityLimiter(MOUNTED))

    async def ask_first(self, path: str, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """The same before anything else goes on here, if the disk answers within AT_ONCE_S."""
        found: list[Outcome[T]] = []
        answered = threading.Event()

        def deliver(outcome: "Outcome[T]") -> None:
            found.append(outcome)
            answered.set()

        trio.lowlevel.start_thread_soon(partial(function, *args), deliver)
        if not answered.wait(AT_ONCE_S):
            await self.ask(path, answered.wait)
        return found[0].unwrap()

    async def _hear(self, notify: INotify) -> NoReturn:
        fd = notify.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            is_busy, heard = False, dict[Followed, None]()
            for wd, mask, _, name in parse_events(os.read(fd, HEARD)):  # type: ignore[no-untyped-call]
                if mask & _OVERFLOW:
                    for source in self._looks:
                        source.wake(lost=True)
                        heard[source] = None
                    self._look_anew()
                if mask & _IGNORED:
                    self._folders.pop(wd, None)
                    continue
                for source in self._names.get((self._folders.get(wd, ""), name), ()):
                    is_busy |= source.grows_fast
                    source.wake(wrote=mask == _WRITTEN, came=mask & _NEW != 0)
                    heard[source] = None
                if mask & _NEW:
                    self._look_anew()
            for source in heard:
                source.go_on()
            if is_busy:
                await trio.sleep(GATHER_S)  # meanwhile the kernel makes one event of a thousand writes

    def _look_anew(self) -> None:
        """There is something else to look at, or for."""
        for worker in self._workers:
            worker.new.set()

    async def _poll(self) -> None:
        worker, one, told_at, before = _Worker(), trio.CapacityLimiter(1), -math.inf, dict[str, list[str]]()
        self._workers.append(worker)
        try:
            while True:
                is_new = worker.new.is_set()
                worker.new.clear()
                self._watch_folders()
                patterns = self._give(worker)
                if worker.place is not None and not worker.sources and not patterns:
                    break
                sources, looks = worker.sources, worker.looks
                look = partial(_look, worker.globs, patterns, sources, looks, before, worker.new, at_once=is_new)
                waits_s = RESCAN * POLL_S if sources or patterns else math.inf
                async with trio.open_nursery() as nursery:
                    if worker.place is None:
                        nursery.start_soon(self._leave, worker, waits_s + HUNG_S)
                    with self._health.asking(worker.asked, within_s=waits_s):
                        found, changed = await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=one)
                    nursery.cancel_scope.cancel()
                now = trio.current_time()
                if found != before or now >= told_at + RESCAN * POLL_S:
                    self.found = {glob: self.found.get(glob, []) for glob in self._sought} | found
                    await self._rescan(found)
                    told_at = now
                before = found
                waiting = [source for source in sources if source.is_waiting]
                for source in {*waiting, *(sources[number] for number in changed)}:
                    source.poll()
                draining = [source for source in self._looks if source.is_waiting and source.tail.draining()]
                if sum(source.tail.held for source in draining) > MAX_HELD:
                    max(draining, key=lambda source: source.tail.held).give_up()
        finally:
            self._workers.remove(worker)
            worker.new.set()  # its thread ends too

    def _give(self, worker: _Worker) -> list[str]:
        """Have it look at what is at its place next, or at no other's; returns the globs to look for."""
        others = [other.place for other in self._workers if other.place is not None]

        def is_its(path: str) -> bool:
            if worker.place is not None:
                return is_within(path, worker.place)
            return not any(is_within(path, place) for place in others)

        worker.sources = [source for source in self._looks if is_its(source.tail.path)] if others else [*self._looks]
        worker.looks = [self._looks[source] for source in worker.sources]
        return [pattern for pattern in self._sought if is_its(pattern)]

    async def _leave(self, worker: _Worker, hangs_s: float) -> None:
        """If it is not done by then, it hangs: leave what hangs with it to that worker, and the rest to another."""
        await trio.sleep(hangs_s)
        path = worker.asked()
        while path is None:  # it has much to look at, but looks
            await trio.sleep(POLL_S)
            path = worker.asked()
        if len(self._workers) > MAX_HUNG:
            return
        worker.place = place_of(path, MOUNTS.read_text(errors="surrogateescape"))
        for source in self._looks:
            if not is_within(source.tail.path, worker.place):
                self._looks[source] = _first_look(source.tail.path)  # that worker may still come to the one it has
        self._nursery.start_soon(self._poll)


def _first_look(path: str) -> "tuple[CData, CData]":
    """A struct look that has seen nothing, and its path, which lives as long."""
    named = ffi.new("char[]", os.fsencode(path))
    return ffi.new("struct look *", {"path": named}), named


def _places(path: str) -> set[tuple[str, str]]:
    """Folders and names in them: where the path stands, and where it leads to. Blocks.

    No folder has two names here: inotify tells of each by one number.
    """
    folder, name = os.path.split(path)
    return {(os.path.realpath(folder), name), os.path.split(os.path.realpath(path))}


def _look(
    globs: Globs,
    patterns: list[str],
    sources: list[Followed],
    looks: "Sequence[tuple[CData, CData]]",
    before: dict[str, list[str]],
    new: threading.Event,
    *,
    at_once: bool,
) -> tuple[dict[str, list[str]], list[int]]:
    """What the globs find, and the numbers of the paths where something changed since the last time. Blocks.

    Looks each second, or `at_once` and then each second, until there is something to tell, `new` is set or a source
    waits; RESCAN times at most. Where there is nothing to look at, it waits for `new`.
    """
    again, changed = ffi.new("struct look *[]", [look for look, _ in looks]), ffi.new("uint32_t[]", len(looks))
    count, found = 0, before
    for number in range(RESCAN):
        if number or not at_once:
            new.wait(POLL_S if looks or patterns else None)
        count, found = lib.look_again(again, len(looks), changed), globs.find(patterns)
        if count or found != before or new.is_set() or any(source.is_waiting for source in sources):
            break
    return found, ffi.unpack(changed, count)
