"""Following logs on trio: carries out what a Tail asks for, wakes it by inotify and by one look at all files a second.

Threads: blocks of more than 64 KiB are read in a worker, and so is what a search walks back.

Source: protocols/logs.md 3 ("Blocks") and 5.
"""

import errno
import logging
import os
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol

import trio
from inotify_simple import INotify, flags

from agent.core.inotify import open_inotify
from agent.core.supervise import Health
from agent.logs.context import Ask, Search, Size, T
from agent.logs.matched import finish
from agent.logs.tail import (
    HEAD,
    Act,
    Checkpoint,
    Close,
    FindSiblings,
    Gap,
    Open,
    Read,
    Report,
    Scan,
    Sibling,
    Stat,
    Tail,
)

log = logging.getLogger(__name__)

POLL_S = 1.0
DIRECT = 1 << 16  # bytes that are read and matched without a thread
MAX_HELD = 256 << 20  # bytes of files that left their paths, all together
MAX_SIBLINGS = 100
BLOCK_S = 30.0  # s for a hang of one block
COMPRESSED = (".gz", ".xz", ".bz2", ".zst", ".lz4", ".Z")

_HEARD = flags.MODIFY | flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ATTRIB
_NEW = flags.CREATE | flags.MOVED_TO


class Matching(Protocol):
    """Who takes the blocks of one source."""

    async def scan(self, act: Scan) -> tuple[int, int]:
        """How much was matched in all, and `before` at the end of it."""

    def tell(self, act: Report | Gap) -> None: ...

    def keep(self, checkpoints: Sequence[Checkpoint], generation: int) -> None:
        """Called after each act that may move them."""

    def due(self) -> float:
        """When tick() is to be called, in trio time."""

    def tick(self, now: float) -> None: ...


class Followed:
    """One path. `links`: its last step may be a symbolic link. `room` tells whether matches can be taken."""

    def __init__(
        self, tail: Tail, matching: Matching, health: Health, *, links: bool, room: Callable[[], Awaitable[bool]]
    ) -> None:
        self.tail, self._matching, self._health, self._room = tail, matching, health, room
        self._flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if links else os.O_NOFOLLOW)
        self._wake, self._idle = trio.Event(), trio.Event()
        self._acts: deque[Act] = deque()
        self._fds: dict[int, int] = {}
        self._file_of: dict[int, int] = {}  # generation to the number of its file, while that is open
        self._origins: dict[int, tuple[int, int]] = {}
        self._seen: Stat | int | None = None
        self._is_paused = False
        self._ticked: float | None = None

    async def run(self) -> NoReturn:
        """Follow it, until cancelled."""
        self._wake.set()
        try:
            while True:
                if self._wake.is_set():
                    self._wake = trio.Event()
                    await self._look()
                elif not self._acts:
                    await self._wait()
                    continue
                if self._acts:
                    self._acts.extendleft(reversed(await self._carry_out(self._acts.popleft())))
                    self._matching.keep(self.tail.checkpoints(), self.tail.generation)
                    self._matching.tick(trio.current_time())
        finally:
            for fd in self._fds.values():
                os.close(fd)

    async def settle(self) -> None:
        """Returns when what is there now was matched."""
        self._idle = trio.Event()
        self._wake.set()
        await self._idle.wait()

    def wake(self) -> None:
        """Something happened at the path."""
        self._wake.set()

    def check(self) -> None:
        """Wake it if the path is not as it was seen last, or something is waited for."""
        if self.tail.draining() or self._is_paused or self.tail.state == "ERROR" or _stat(self.tail.path) != self._seen:
            self._wake.set()

    def give_up(self) -> None:
        """Let go of the oldest file that left the path."""
        self._acts.extend(self.tail.give_up(trio.current_time()))
        self._wake.set()

    def search(self, search: Search[T]) -> T:
        """Run a search back from a match. Blocks; for threads, while scan() is awaited."""
        beside: dict[int, int] = {}

        def fd_of(generation: int) -> int | None:
            if generation in self._file_of:
                return self._fds[self._file_of[generation]]
            if generation not in beside and generation in self._origins:
                for sibling in _siblings(self.tail.path):
                    if (sibling.stat.dev, sibling.stat.ino) == self._origins[generation]:
                        beside[generation] = os.open(sibling.path, self._flags)
                        break
            return beside.get(generation)

        def answer(wish: Ask | Size) -> bytes | int | None:
            fd = fd_of(wish.generation)
            if isinstance(wish, Size):
                return None if fd is None else os.fstat(fd).st_size
            return b"" if fd is None else os.pread(fd, wish.size, wish.start)

        try:
            return finish(search, answer)
        finally:
            for fd in beside.values():
                os.close(fd)

    async def _wait(self) -> None:
        """Until something happens, or a timer is due."""
        due = self.tail.due()
        if due is None or due == self._ticked:  # it was due already: the next look does it
            due = float("inf")
        self._idle.set()
        with trio.move_on_at(min(due, self._matching.due())):
            await self._wake.wait()
        now = trio.current_time()
        self._matching.tick(now)
        if due <= now:
            self._ticked = due
            self._acts.extend(self.tail.tick(now))

    async def _look(self) -> None:
        self._seen, now = _stat(self.tail.path), trio.current_time()
        if self._is_paused and await self._room():
            self._is_paused = False
            self._acts.extend(self.tail.resume(now))
        self._acts.extend(self.tail.look(self._seen, now))
        for number in self.tail.draining():
            self._acts.extend(self.tail.look_at(number, _stat_of(os.fstat(self._fds[number])), now))

    async def _carry_out(self, act: Act) -> Sequence[Act]:
        match act:
            case Open(number, path):
                return self._open(number, path)
            case Close(number):
                os.close(self._fds.pop(number))
                self._file_of = {generation: file for generation, file in self._file_of.items() if file != number}
            case Read():
                return await self._read(act)
            case Scan():
                return await self._scan(act)
            case FindSiblings():
                found = await trio.to_thread.run_sync(_siblings, self.tail.path)
                return self.tail.siblings(found, trio.current_time())
            case Report() | Gap():
                self._matching.tell(act)
        return []

    def _open(self, number: int, path: str) -> Sequence[Act]:
        now = trio.current_time()
        try:
            fd = os.open(path, self._flags)
        except OSError as err:
            return self.tail.failed(number, err.errno or errno.EIO, now)
        self._fds[number] = fd
        found = _stat_of(os.fstat(fd))
        try:
            head = os.pread(fd, HEAD, 0) if found.kind == "file" else b""
        except OSError as err:
            del self._fds[number]
            os.close(fd)
            return self.tail.failed(number, err.errno or errno.EIO, now)
        return self.tail.opened(number, found, head, now)

    async def _read(self, act: Read) -> Sequence[Act]:
        fd = self._fds[act.file]

        def read() -> tuple[bytes, bytes]:
            return os.pread(fd, act.size, act.at), os.pread(fd, HEAD, 0) if act.head else b""

        try:
            if os.fstat(fd).st_size - act.at > DIRECT:
                with self._health.busy(limit=BLOCK_S):
                    data, head = await trio.to_thread.run_sync(read)
            else:
                data, head = read()
        except OSError as err:
            return self.tail.failed(act.file, err.errno or errno.EIO, trio.current_time())
        return self.tail.read(act.file, data, head, trio.current_time())

    async def _scan(self, act: Scan) -> Sequence[Act]:
        self._file_of = {generation: file for generation, file in self._file_of.items() if file != act.file}
        self._file_of[act.generation] = act.file
        if act.generation not in self._origins:
            self._origins = {known: origin for known, origin in self._origins.items() if known >= act.generation - 1}
            self._origins[act.generation] = act.origin
        with self._health.busy(limit=BLOCK_S):
            consumed, before = await self._matching.scan(act)
        acts = self.tail.scanned(act.file, consumed, before, trio.current_time())  # at once: what was told is done
        await trio.lowlevel.checkpoint()
        if not self._is_paused and not await self._room():
            self._is_paused = True
            self.tail.pause()
        return acts


class Follower:
    """All sources. `rescan` is called each second, and when a file came into a directory of one of them."""

    def __init__(self, rescan: Callable[[], Awaitable[None]]) -> None:
        self.sources: list[Followed] = []
        self._rescan = rescan
        self._names: dict[tuple[str, str], list[Followed]] = {}
        self._wanted: set[str] = set()
        self._folders: dict[int, str] = {}
        self._notify: INotify | None = None
        self._new = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Wake the sources, for ever. Without an inotify instance they are looked at each second alone."""
        with open_inotify() as self._notify:
            async with trio.open_nursery() as nursery:
                if self._notify is not None:
                    nursery.start_soon(self._hear, self._notify)
                task_status.started()
                await self._poll()
        raise AssertionError("polling never ends")

    def add(self, source: Followed) -> None:
        self.sources.append(source)
        for path in {source.tail.path, os.path.realpath(source.tail.path)}:
            folder, name = os.path.split(path)
            self._names.setdefault((folder, name), []).append(source)
            self.want(folder)

    def drop(self, source: Followed) -> None:
        self.sources.remove(source)
        self._names = {
            key: left for key, having in self._names.items() if (left := [one for one in having if one is not source])
        }

    def want(self, folder: str) -> None:
        """Hear of what happens in a directory."""
        if folder not in self._wanted:
            self._wanted.add(folder)
            self._watch_folders()

    def _watch_folders(self) -> None:
        """Those that the kernel does not watch yet: they may not have been there."""
        if self._notify is None:
            return
        for folder in self._wanted - set(self._folders.values()):
            with suppress(OSError):  # it is looked at each second, and tried again
                self._folders[self._notify.add_watch(folder, _HEARD)] = folder  # type: ignore[no-untyped-call]

    async def _hear(self, notify: INotify) -> NoReturn:
        while True:
            await trio.lowlevel.wait_readable(notify.fileno())
            for event in notify.read(timeout=0):  # type: ignore[no-untyped-call]
                if event.mask & flags.Q_OVERFLOW:
                    for source in self.sources:
                        source.wake()
                    self._new.set()
                if event.mask & flags.IGNORED:
                    self._folders.pop(event.wd, None)
                    continue
                for source in self._names.get((self._folders.get(event.wd, ""), event.name), ()):
                    source.wake()
                if event.mask & _NEW:
                    self._new.set()

    async def _poll(self) -> NoReturn:
        while True:
            with trio.move_on_after(POLL_S):
                await self._new.wait()
            self._new = trio.Event()
            self._watch_folders()
            await self._rescan()
            for source in self.sources:
                source.check()
            if sum(source.tail.held for source in self.sources) > MAX_HELD:
                max(self.sources, key=lambda source: source.tail.held).give_up()


def _stat_of(found: os.stat_result) -> Stat:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return Stat(found.st_dev, found.st_ino, found.st_size, kinds.get(stat.S_IFMT(found.st_mode), "device"))


def _stat(path: str) -> Stat | int | None:
    try:
        return _stat_of(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        return err.errno or errno.EIO


def _siblings(path: str) -> list[Sibling]:
    """The newest files beside a path whose names begin as its own does."""
    own = Path(path)
    stem = own.name.split(".")[0] or own.name
    found: list[tuple[float, Sibling]] = []
    try:
        entries = [entry for entry in os.scandir(own.parent) if entry.name.startswith(stem)]
    except OSError:
        return []
    for entry in entries:
        if entry.name == own.name or entry.name.endswith(COMPRESSED):
            continue
        try:
            if entry.is_file(follow_symlinks=False):
                with open(entry.path, "rb", buffering=0) as file:
                    status = os.fstat(file.fileno())
                    found.append((status.st_mtime, Sibling(entry.path, _stat_of(status), file.read(HEAD))))
        except OSError as err:  # gone meanwhile, or not for us to read
            log.debug("cannot read a file beside path=%s error=%s", entry.path, err)
    found.sort(key=lambda one: one[0], reverse=True)
    return [sibling for _, sibling in found[:MAX_SIBLINGS]]
