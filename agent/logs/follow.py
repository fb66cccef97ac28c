"""Following a log on trio: carries out what a Tail asks for. What wakes it is in wake.py.

A log has its own task. What inotify tells of is looked at in the very turn that hears of it, as long as nothing has to
be waited for: with the first wait the log's own task takes over (own_turn). That saves a turn of the loop.

Threads: what is not in memory is read in a worker, and so is what a search walks back beyond 64 KiB; of a file that
inotify never told of (NFS) everything, since its disk may hang.

Source: protocols/logs.md 3 ("Blocks") and 5.
"""

import errno
import math
import os
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, Protocol, TypeVar

import trio

from agent._native import ffi, lib
from agent.core.engine import room
from agent.core.supervise import Health
from agent.logs import disk
from agent.logs.acts import Act, Close, FindSiblings, Gap, Open, Read, Report, Scan
from agent.logs.context import Ask, Place, Search, Size, T
from agent.logs.identity import HEAD, LAST, Stat
from agent.logs.tail import BLOCK, Tail

DIRECT = 1 << 16  # bytes that are read and matched without a thread
BLOCKS = 4  # large blocks in memory at a time, of all files
DISK = trio.CapacityLimiter(40)  # threads that wait for what no mount of its own has
BLOCK_S = 30.0  # s for a hang of one block
ROOM_S, ROOM_MAX_S = 0.05, 1.0  # s until the next look for room, as a commit takes; if there is none, twice as long
TURN_S = 0.002  # s for which blocks are matched one after the other, before others have their turn

_TOLD = (Report, Gap)

R = TypeVar("R")


class Matching(Protocol):
    """Who takes the blocks of one source."""

    async def scan(self, act: Scan) -> tuple[int, int]:
        """How much was matched in all, and `before` at the end of it. What takes long is done in Followed.in_thread."""

    def tell(self, act: Report | Gap) -> None: ...

    def keep(self) -> None:
        """Called after each act that may move its checkpoints."""

    def due(self) -> float:
        """When tick() is to be called, in trio time."""

    def tick(self, now: float) -> None: ...


class Blocks:
    """Memory that large blocks are read into, again and again. Who finds all of it in use waits."""

    def __init__(self) -> None:
        self._left = trio.Semaphore(BLOCKS)
        self._free: list[bytearray] = []
        data, head = room("uint8_t[]", DIRECT), room("uint8_t[]", HEAD)
        self._data, self._head = ffi.buffer(data), ffi.buffer(head)
        self._news = ffi.new("struct news *", {"data": data, "room": DIRECT, "head": head, "head_room": HEAD})

    async def take(self) -> bytearray:
        """Room for what one Read asks for; to be given back."""
        try:
            self._left.acquire_nowait()
        except trio.WouldBlock:
            await self._left.acquire()
        return self._free.pop() if self._free else bytearray(BLOCK + LAST)

    def give_back(self, block: bytearray) -> None:
        self._free.append(block)
        self._left.release()

    def news(self, fd: int, at: int) -> tuple[int, float, bytes, bytes] | None:
        """What an open file has from an offset on: its size, when it was written, that, and its first HEAD bytes.

        None: it is not in memory, or too much for now.
        """
        news = self._news
        if not lib.read_news(fd, at, news):
            return None
        return news.size, news.written, self._data[: news.got], self._head[: news.head_size]


class Followed:
    """One path. `links`: its last step may be a symbolic link; `linked` are the numbers of files where it is one.
    `room` tells whether matches can be taken; `blocks` are those of all paths.
    """

    def __init__(
        self,
        tail: Tail,
        matching: Matching,
        health: Health,
        *,
        links: bool,
        room: Callable[[], bool],
        blocks: Blocks,
    ) -> None:
        self.tail, self._matching, self._health, self.room = tail, matching, health, room
        self._blocks, self._block = blocks, bytearray()  # of it the one that is being matched
        self.links, self.linked = links, set[int]()
        self.disk = DISK  # or the threads that wait for its mount
        self.begun = trio.Event()  # it was looked at: what is written now is new
        self.is_waiting = True  # for what nothing tells of
        self._wake, self._idle = trio.Event(), trio.Event()
        self._wants_look, self._was_written = True, False
        self._rests = False  # its task does, and waits for what comes
        self._timer = trio.CancelScope()  # of that wait
        self._due = math.inf
        self._is_elsewhere = False  # its work is done in the turn of another task
        self._handed: Coroutine[Any, Any, None] | None = None  # work that began so, and goes on in its task
        self._acts: deque[Act] = deque()
        self._fds: dict[int, int] = {}
        self._seen: Stat | int | None = None
        self._is_heard = False  # by inotify: then its disk is here
        self._came = 0  # files that did since the last look, says inotify
        self._is_lost = False  # it said less than there was
        self._is_paused, self._room_s = False, ROOM_S
        self._ticked: float | None = None
        self._grown = 0  # bytes read since the last look
        self.now = self._turn_at = 0.0  # trio time, as of the last wait; others have their turn then

    async def run(self) -> NoReturn:
        """Follow it, until cancelled."""
        try:
            while True:
                work, self._handed = self._handed or self._work(), None
                await _go_on_with(work)
                await self._wait()
        finally:
            if self._handed:
                self._handed.close()
            self._leave_block()
            for fd in self._fds.values():
                os.close(fd)
            self._idle.set()  # who waits in settle() for what is there now waits for nothing

    async def _work(self) -> None:
        """Look, if something happened, and do all there is to do."""
        self.now = trio.current_time()
        self._turn_at = self.now + TURN_S
        while self._wants_look or self._was_written or self._acts:
            if self._was_written and not self._wants_look:
                await self._read_on()
            if self._wants_look:
                await self._look()
            if self._acts:
                self._did(await self._carry_out(self._acts.popleft()))
                if self._acts:
                    await self._give_turn()
            if not self.begun.is_set() and not any(isinstance(act, Open | FindSiblings) for act in self._acts):
                self.begun.set()

    async def _give_turn(self) -> None:
        """Others have theirs, if it is time."""
        self.now = trio.current_time()
        if self.now >= self._turn_at:
            await self.own_turn()
            await trio.lowlevel.checkpoint()
            self.now = trio.current_time()
            self._turn_at = self.now + TURN_S

    async def own_turn(self) -> None:
        """What comes next may wait, so it is not for the turn of another task."""
        if self._is_elsewhere:
            await _hand_over()

    async def in_thread(self, function: Callable[[], R]) -> R:
        """Do there what takes long, while scan() is awaited; longer than BLOCK_S is a hang."""
        await self.own_turn()
        with self._health.busy(limit=BLOCK_S):
            found = await trio.to_thread.run_sync(function)
        self.now = trio.current_time()
        return found

    async def settle(self, *, is_last: bool = False) -> None:
        """Returns when what is there now was matched. `is_last`: the last line too, if it has no end."""
        if self._idle.is_set():  # else others wait for it, too
            self._idle = trio.Event()
        self.poll()
        await self._idle.wait()
        if is_last:
            self._take(self.tail.hurry(trio.current_time()))
            await self.settle()

    def join(self, start: Literal["end", "start"] | int) -> Place | None:
        """Where one begins who watches it from now on: from then all is read again. None: what is read next."""
        since, acts = self.tail.join(start, trio.current_time())
        self._take(acts)
        self.poll()
        return Place(*since) if since else None

    @property
    def grows_fast(self) -> bool:
        """Was there much to read at the last look?"""
        return self._grown > DIRECT

    def wake(self, *, wrote: bool = False, came: bool = False, lost: bool = False) -> None:
        """Something happened at the path, says inotify; `wrote`: the file there was written to, and no more.

        `came`: a file was created or moved there. `lost`: what happened is not known, there was too much. Who says so
        calls go_on() then.
        """
        self._is_heard = True
        if wrote:
            self._was_written = True
        else:
            self._wants_look = True
            self._came += came
            self._is_lost |= lost

    def go_on(self) -> None:
        """Look at once, in the turn of the task that calls this, if its own rests; that one goes on if it must wait."""
        if not self._rests:
            self._wake.set()
            return
        self._rests, self._is_elsewhere, work = False, True, self._work()
        try:
            work.send(None)
        except StopIteration:
            self._rests, due = True, self._next_due()
            if due != self._timer.deadline:
                self._timer.deadline = due
        else:
            self._handed = work
            self._wake.set()
        finally:
            self._is_elsewhere = False

    def poll(self) -> None:
        """Something changed at the path, or `is_waiting` and a second has passed."""
        self._wants_look = True
        self._wake.set()

    def give_up(self) -> None:
        """Let go of the oldest file that was deleted."""
        self._take(self.tail.give_up(trio.current_time()))
        self.poll()

    def _take(self, acts: Sequence[Act], *, first: bool = False) -> None:
        """What to do next, or after what is to be done.

        What is to be told is told at once: a checkpoint that was kept before it would hide it after a crash.
        """
        todo: list[Act] = []
        for act in acts:
            if isinstance(act, _TOLD):
                self._matching.tell(act)
            else:
                todo.append(act)
        if len(todo) < len(acts):
            self._matching.keep()
        if first:
            self._acts.extendleft(reversed(todo))
        else:
            self._acts.extend(todo)

    def _did(self, acts: Sequence[Act]) -> None:
        """An act is carried out, and wants these."""
        if acts:
            self._take(acts, first=True)
        self._matching.keep()  # in the transaction of what was told
        self._matching.tick(self.now)

    async def search(self, search: Search[T]) -> T:
        """Run a search back from a match, while scan() is awaited: here while it is short, then in a thread."""
        beside: dict[int, int | None] = {}
        numbers = self.tail.open_files()

        def answer(wish: Ask | Size) -> bytes | int | None:
            fd = self._fds[numbers[wish.generation]] if wish.generation in numbers else None
            if fd is None:
                if wish.generation not in beside:
                    beside[wish.generation] = self._open_past(wish.generation)
                fd = beside[wish.generation]
            if isinstance(wish, Size):
                return None if fd is None else os.fstat(fd).st_size
            return b"" if fd is None else os.pread(fd, wish.size, wish.start)

        try:
            wish, room = next(search), DIRECT
            while self._is_heard and wish.generation in numbers:
                room -= wish.size if isinstance(wish, Ask) else 0
                if room < 0:
                    break
                wish = search.send(answer(wish))
            return await self.in_thread(partial(_go_on, search, wish, answer))
        except StopIteration as end:
            found: T = end.value
            return found
        finally:
            for fd in beside.values():
                if fd is not None:
                    os.close(fd)

    def _open_past(self, generation: int) -> int | None:
        """Open the file of a generation that is done, if it is found beside."""
        done = [done for done in self.tail.past if done.generation == generation]
        for sibling in disk.siblings(self.tail.path, done):
            if sibling.fits and (sibling.is_rotation or (done[0].dev, done[0].ino) == sibling.stat[:2]):
                return os.open(sibling.path, disk.FLAGS)
        return None

    async def _wait(self) -> None:
        """Until something happens, or a timer is due."""
        if self._wake.is_set():
            self._wake = trio.Event()
        try:
            with trio.CancelScope(deadline=self._next_due()) as self._timer:
                self._rests = True
                self._idle.set()
                await self._wake.wait()
        finally:
            self._rests = False
        self.now = now = trio.current_time()
        if self._handed:
            return
        self._matching.tick(now)
        if self._is_paused:
            self._wants_look, self._room_s = True, min(2 * self._room_s, ROOM_MAX_S)
        if self._due <= now:
            self._ticked = self._due
            self._take(self.tail.tick(now))

    def _next_due(self) -> float:
        """When a timer is due; to be asked before each rest."""
        due = self.tail.due()
        # If it was due already, the next look does it.
        self._due = math.inf if due is None or due == self._ticked else due
        self.is_waiting = self._is_paused or self.tail.is_waiting
        room_at = self.now + self._room_s if self._is_paused else math.inf
        return min(self._due, self._matching.due(), room_at)

    async def _run(self, function: Callable[[], R], *, long: bool = False) -> R:
        """Here if that is short; in a thread if it is long, or the disk may hang."""
        if self._is_heard and not long:
            return function()
        await self.own_turn()
        with self._health.asking(self.tail.path):
            found = await trio.to_thread.run_sync(function, limiter=self.disk)
        self.now = trio.current_time()
        return found

    async def _read_on(self) -> None:
        """Match what it grew by, where the file was only written to; else its path must be looked at."""
        self._was_written = False
        place = self.tail.next_read()
        news = place and self._blocks.news(self._fds[place[0]], place[1])
        scan = news and self.tail.grown(*news, self.now)
        if not scan:
            self._wants_look = True
            return
        self._grown = 0
        self._did(await self._scan(scan))

    async def _look(self) -> None:
        def stats() -> tuple[Stat | int | None, list[tuple[int, Stat]]]:
            drained = [(number, disk.stat_of(os.fstat(self._fds[number]))) for number in draining]
            return disk.look(self.tail.path), drained

        self._wants_look = self._was_written = False
        draining = self.tail.draining()
        came, self._came = self._came, 0  # what comes while stat is asked may be what it sees: that is told later
        before, is_lost, self._is_lost = self._seen, self._is_lost, False
        self._seen, drained = await self._run(stats)
        if is_lost and _file_of(self._seen) != _file_of(before):  # it may not have been the only one that came
            came = max(came, 1 + isinstance(self._seen, Stat))
        self._grown, now = 0, self.now
        if self._is_paused and self.room():
            self._is_paused = False
            self._take(self.tail.resume(now))
        self._take(self.tail.look(self._seen, now, came))
        for number, found in drained:
            self._take(self.tail.look_at(number, found, now))

    async def _carry_out(self, act: Act) -> Sequence[Act]:
        match act:
            case Scan():
                return await self._scan(act)
            case Read():
                return await self._read(act)
            case Open():
                return await self._open(act)
            case Close(number):
                os.close(self._fds.pop(number))
                self.linked.discard(number)
            case FindSiblings(known):
                found = await self._run(partial(disk.siblings, self.tail.path, known), long=True)
                return self.tail.siblings(found, self.now)
        return []

    async def _open(self, act: Open) -> Sequence[Act]:
        def open_() -> tuple[int, bool, Stat, bytes]:
            try:
                fd, is_link = os.open(act.path, disk.FLAGS), False
            except OSError as err:
                if err.errno != errno.ELOOP or not self.links:
                    raise
                fd, is_link = os.open(act.path, disk.FLAGS & ~os.O_NOFOLLOW), True
            try:
                found = disk.stat_of(os.fstat(fd))
                return fd, is_link, found, os.pread(fd, HEAD, 0) if found.kind == "file" else b""
            except OSError:
                os.close(fd)
                raise

        try:
            fd, is_link, found, head = await self._run(open_)
        except OSError as err:
            return self.tail.failed(act.file, err.errno or errno.EIO, self.now)
        self._fds[act.file] = fd
        if is_link:
            self.linked.add(act.file)
        return self.tail.opened(act.file, found, head, self.now)

    async def _read(self, act: Read) -> Sequence[Act]:
        fd = self._fds[act.file]
        try:
            found = None
            if self._is_heard:
                size = min(act.size, max(0, os.fstat(fd).st_size - act.at))
                if size > DIRECT:
                    await self.own_turn()
                    self._block = await self._blocks.take()
                    self.now = trio.current_time()
                found = self._read_at_once(fd, act, size)
            if found is None:
                found = await self._run(partial(self._read_all, fd, act), long=True)
            data, head = found
        except OSError as err:
            self._leave_block()
            return self.tail.failed(act.file, err.errno or errno.EIO, self.now)
        self._grown += len(data)
        acts = self.tail.read(act.file, data, head, self.now)
        if len(acts) == 1 and isinstance(acts[0], Scan):
            return await self._scan(acts[0])
        if not any(isinstance(act, Scan) for act in acts):
            self._leave_block()
        return acts

    def _read_all(self, fd: int, act: Read) -> tuple[bytes | memoryview, bytes]:
        """However long the disk takes."""
        head = os.pread(fd, HEAD, 0)
        if not self._block:
            return os.pread(fd, act.size, act.at), head
        data = memoryview(self._block)[: act.size]
        return data[: os.preadv(fd, [data], act.at)], head

    def _read_at_once(self, fd: int, act: Read, size: int) -> tuple[bytes | memoryview, bytes] | None:
        """The `size` bytes that are there, when they are in memory, as what was just written is. None: they are not."""
        data = memoryview(self._block or bytearray(size))[:size]
        try:
            if size and os.preadv(fd, [data], act.at, os.RWF_NOWAIT) < size:
                return None
        except OSError as err:
            if err.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            if err.errno == errno.EAGAIN or not lib.file_in_memory(fd):
                return None
            if os.preadv(fd, [data], act.at) < size:
                return None
        return data, os.pread(fd, HEAD, 0)

    def _leave_block(self) -> None:
        """What was read is matched, or not wanted."""
        if self._block:
            block, self._block = self._block, bytearray()
            self._blocks.give_back(block)

    async def _scan(self, act: Scan) -> Sequence[Act]:
        consumed, before = await self._matching.scan(act)
        if not self._is_paused and not self.room():
            self._is_paused, self._room_s = True, ROOM_S
            self.tail.pause()
        acts = self.tail.scanned(act.file, consumed, before, self.now)
        if self._block:
            self._leave_block()
        return acts


@types.coroutine
def _hand_over() -> Generator[None, None, None]:
    """Ends the work in another's turn."""
    yield


@types.coroutine
def _go_on_with(work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Await a coroutine that began elsewhere."""
    yield from work


def _go_on(search: Search[T], wish: Ask | Size, answer: Callable[[Ask | Size], bytes | int | None]) -> T:
    try:
        while True:
            wish = search.send(answer(wish))
    except StopIteration as end:
        found: T = end.value
        return found


def _file_of(found: Stat | int | None) -> tuple[int, int] | None:
    """Device and inode, of what is there."""
    return found[:2] if isinstance(found, Stat) else None
