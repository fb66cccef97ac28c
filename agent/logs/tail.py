"""Following one path: stat results, bytes and the time come in; what to open, read, match and tell goes out.

A file is known by device and inode, by a hash of its first bytes, and by one of those before the offset: each read
takes these again. Where they differ, other content stands there: a new generation of the path begins at offset 0. Files
that left the path (renamed, removed, or copied before they were cut to nothing) are drained to their end, oldest first.
After a restart, a rotation or a cut the files beside the path are looked at: one of them may have the rest of what was
read last, and others may have come and gone at the path unseen.

    ABSENT -> READING <-> IDLE      the path's file; any -> ERROR: wait, then open again
    READING, IDLE -> draining -> closed

Source: protocols/logs.md 5.
"""

import errno
import os
from collections.abc import Sequence
from typing import Literal

import msgspec

from agent.logs import identity
from agent.logs.acts import Act, Close, FindSiblings, Gap, Open, Read, Report, Scan
from agent.logs.identity import LAST, Came, Checkpoint, File, Opening, Sibling, Stat, begins, is_it
from agent.logs.scanner import LINE_MAX, PARTIAL, WINDOW, End

BLOCK = 1 << 20  # bytes of one read; more leave the cache before they are matched, less cost more reads
PARTIAL_S = 2.0  # a line without its end is matched after so long without growth
QUIET_S = 5.0  # a drained file is closed after so long without growth
ZEROS_S = 1.0  # NFS shows zeros before it shows data
ZEROS = 64  # NULs in a row where a line begins are no text
PAST = 16  # files of the path that are done and known again
RETRY_S, RETRY_MAX_S = 1.0, 30.0
LAGGING = 64 << 20  # bytes behind that are told
COARSE_S = 0.02  # the clock of a file system is late by so much

State = Literal["ABSENT", "READING", "IDLE", "ERROR", "PAUSED"]


class Tail:
    """Follows one path. Every method returns what to do next, in order; there is at most one Read or Scan under way.

    `checkpoints`, `generation` and `past` are those that were committed last; the generation outlives all files.
    Without them a file that is there at the first look is followed from `start`: "end", "start", or an offset where a
    line begins. What comes later is read from its beginning. `begun` is when the path was followed first, in the time
    of writes, and `again` that it was before: what came to the path since then is to be matched.
    """

    def __init__(
        self,
        path: str,
        checkpoints: Sequence[Checkpoint] = (),
        start: Literal["end", "start"] | int = "end",
        *,
        generation: int = 0,
        past: Sequence[Checkpoint] = (),
        begun: float | None = None,
        again: bool = False,
    ) -> None:
        self.path, self.start = path, start
        self.generation = max([generation, *(checkpoint.generation for checkpoint in checkpoints)])
        self.gaps = 0
        self.past = list(past)  # how the last files were left that are done
        self._lost = sorted(checkpoints, key=lambda checkpoint: checkpoint.generation)  # their files are not found yet
        # Rotations written later, and not known, came and went unseen. None: there can be none.
        self._begun = None if begun is None else begun - COARSE_S
        self._unseen_since = max((done.written for done in [*past, *checkpoints]), default=self._begun)
        self._current: File | None = None
        self._last: File | Checkpoint | None = max(  # what was at the path before
            [*past, *checkpoints], key=lambda done: done.generation, default=None
        )
        self._draining: list[File] = []
        self._opening: dict[int, Opening] = {}
        self._numbers = 0
        self._busy: File | None = None
        self._data = memoryview(b"")
        self._scanning = End.OPEN
        self._asked: tuple[Checkpoint, ...] | None = None  # of the FindSiblings under way
        self._wants_search = self._wants_old = bool(checkpoints or past) or again
        self._is_paused = self._is_lagging = False
        self._has_looked = self._is_there = False
        self._retry_s, self._retry_at = 0.0, 0.0
        self._own_seen: Stat | None = None  # the path's file, among the siblings
        self._rewind: int | None = None  # of the path's file, when it is not being matched
        self._came = Came()
        self._sought = False  # those were looked for beside it

    @property
    def state(self) -> State:
        """The path's own; files that left it are drained beside."""
        if self._retry_s:
            return "ERROR"
        if self._current is None:
            return "ABSENT"
        if self._is_paused:
            return "PAUSED"
        return "IDLE" if self._current.is_at_end else "READING"

    @property
    def lag(self) -> int:
        """Bytes not matched yet, those of drained files too."""
        behind = self._current.unread if self._current else 0
        return behind + sum(file.unread for file in self._draining) if self._draining else behind

    @property
    def is_waiting(self) -> bool:
        """For what nothing tells of: the time to try again, or a drained file's last line."""
        return self._retry_s > 0 or bool(self._draining)

    @property
    def held(self) -> int:
        """Of these, the bytes in files that were deleted: they take space on disk until they are drained."""
        return sum(file.unread for file in self._draining if file.stat.is_deleted)

    def open_files(self) -> dict[int, int]:
        """The number of each file that is open, by generation."""
        return {file.generation: file.number for file in self._files()}

    def draining(self) -> list[int]:
        """The numbers of files to fstat each second, for look_at()."""
        return [file.number for file in self._draining]

    def checkpoints(self) -> list[Checkpoint]:
        """Where to go on after a restart: one for each file that is not done, at the start of a line.

        To be committed with the events of what was matched, and at once with each Report and Gap: who only knows of the
        generation before cannot tell a cut that came with a crash.
        """
        opening = [opening.done for opening in self._opening.values() if opening.done] if self._opening else []
        return [*self._lost, *opening, *[file.checkpoint() for file in self._files()]]

    def is_new(self, scan: Scan, line: int, rule: str, flags: int) -> bool:
        """Was the rule of that id not told yet of the line that begins at offset `line`? `flags` are the match's.

        A line is matched again when its end has come, and a long one by windows that overlap.
        """
        file = self._busy
        assert file
        assert file.number == scan.file
        told = file.reported.get(line, set())
        if rule in told:
            return False
        if flags & (WINDOW | PARTIAL):
            file.reported[line] = told | {rule}
        return True

    def due(self) -> float | None:
        """When tick() has something to do; None: nothing is waited for."""
        own = self._current
        if own and own.offset == own.stat.size and not (self._draining or self._retry_s):
            return None
        times = [self._retry_at] if self._retry_s else []
        for file in self._files():
            if not file.is_at_end or self._is_paused:
                continue
            if file in self._draining:
                times.append(file.changed_at + QUIET_S)
            if file.zeros_at == file.offset:
                times.append(file.changed_at + ZEROS_S)
            elif file.has_partial:
                times.append(file.changed_at + PARTIAL_S)
        return min(times, default=None)

    def look(self, found: Stat | int | None, now: float, came: int = 0) -> list[Act]:
        """What stat says of the path: on each event of inotify and each second. None: nothing is there; int: errno.

        `came`: so many files have come to the path since the last look, by creation or by name.
        """
        acts: list[Act] = []
        is_first, self._has_looked = not self._has_looked, True
        self._is_there = isinstance(found, Stat) and found.kind == "file"
        self._came.look(found, came, is_first=is_first)
        if found is None:
            self._retry_s = 0.0
            if self._current:
                acts.append(Report("removed", self._current.generation))
                self._leave(now)
            if is_first:
                self.start = "start"  # what comes later is read from its beginning
            if self._lost or is_first:
                acts += self._search()
            return acts + self._tell_missed() + self._next(now)
        if isinstance(found, int) or found.kind != "file":
            if is_first and isinstance(found, Stat):
                self.start = "start"
            why = os.strerror(found) if isinstance(found, int) else f"is a {found.kind}"
            return self._fail(why, now, wait=False)  # what stat says next is enough to go on
        file = self._current
        if file and (found.dev, found.ino) != file.origin:
            acts.append(Report("rotated", file.generation))
            self._leave(now)
        elif file and found.size < max(file.offset, file.stat.size):
            if file is not self._busy:  # else at the next look
                acts += self._restart(file, "truncated", found, now)
        elif file:
            file.grow(found, now)
            acts += self._tell_lag()
        return acts + self._find_path(now) + self._tell_missed() + self._next(now)

    def next_read(self) -> tuple[int, int] | None:
        """Number and offset to read the path's own file from, should it be written to. None: look() is needed then."""
        file = self._current
        is_other = self._wants_search or self._asked is not None or bool(self._opening or self._draining)
        is_other = is_other or self._is_paused or self._is_lagging or self._rewind is not None or self._retry_s > 0
        if file is None or self._busy or is_other or self._came.missed > 0 or not file.is_at_end:
            return None
        return file.number, file.offset - file.overlap

    def grown(self, size: int, written: float, data: bytes, head: bytes, now: float) -> Scan | None:
        """The path's own file has this from next_read() to its end. None: look() and read() are to tell what it is."""
        file = self._current
        assert file
        known, overlap = file.stat, file.overlap
        if size <= known.size or not file.is_as_known(head, data[:overlap]) or (not data[overlap] and not file.before):
            return None
        file.stat = Stat(known.dev, known.ino, size, known.kind, written, known.is_deleted)
        file.changed_at, file.written = now, written
        view = memoryview(data)
        self._busy, self._data, self._scanning = file, view, End.OPEN
        return Scan(file.number, file.origin, file.generation, file.offset, view[overlap:], file.before, End.OPEN)

    def look_at(self, number: int, found: Stat, now: float) -> list[Act]:
        """What fstat says of a file that is drained."""
        acts: list[Act] = []
        for file in self._draining:
            if file.number != number or file is self._busy:
                continue
            if found.size < max(file.offset, file.stat.size):
                acts += self._restart(file, "truncated", found, now)
            else:
                file.grow(found, now)
            break
        return acts + self._next(now)

    def siblings(self, found: Sequence[Sibling], now: float) -> list[Act]:
        """The path's own file and those beside it, as asked for."""
        asked, self._asked = self._asked, None
        assert asked is not None
        is_old, self._wants_old = self._wants_old, False
        acts: list[Act] = []
        own = next((sibling for sibling in found if sibling.path == self.path), None)
        self._own_seen = own and own.stat
        beside = [sibling for sibling in found if sibling is not own]
        newest = max(self._lost, key=lambda done: done.generation, default=None)
        for done in [done for done in self._lost if done in asked]:
            if not self._current and own and is_it(own, done, asked):
                if done is newest and done.head_size:
                    self._unseen_since = None
                continue  # it is where it was
            its = [sibling for sibling in beside if is_it(sibling, done, asked)]
            copies = [sibling for sibling in beside if sibling.is_rotation and asked.index(done) in sibling.fits]
            if its or copies:
                there = (its or copies)[0]
                self._lost.remove(done)
                if not its and not done.is_copied:
                    acts.append(self._gap(done.generation, there.stat.size, "written after the copy"))
                    done = msgspec.structs.replace(done, is_copied=True)
                acts.append(self._open(there.path, Opening((there.stat.dev, there.stat.ino), done)))
            elif self._current:
                self._lost.remove(done)
                acts += self._give_up(done, "cut off, and no copy is found")
            elif not self._is_there and not done.is_gone:  # it is kept, should it come again
                self._lost[self._lost.index(done)] = msgspec.structs.replace(done, is_gone=True)
                acts += [
                    Report("removed", done.generation),
                    self._gap(done.generation, done.offset, "gone while no agent ran"),
                ]
        if (since := self._unseen_since) is not None:
            held = {(file.stat.dev, file.stat.ino) for file in self._files()}  # these tell by themselves what they are
            held |= {opening.origin for opening in self._opening.values() if opening.origin}
            for sibling in identity.unseen(beside, since, held):
                acts.append(self._open(sibling.path, Opening(sibling.stat[:2], is_old=is_old)))
        return acts + self._find_path(now) + self._tell_missed() + self._next(now)

    def opened(self, number: int, stat: Stat, head: bytes, now: float) -> list[Act]:
        """A file was opened; `head` are its first HEAD bytes."""
        acts: list[Act] = []
        opening = self._opening.pop(number)
        origin, done = opening.origin, opening.done
        if origin:
            if (stat.dev, stat.ino) != origin:  # it was renamed meanwhile
                return [Close(number), *self._search_again(opening, now)]
            if not done:
                if not opening.is_old or origin == self._came.first:
                    self._came.take_up()
                self.generation += 1
                acts.append(Report("found", self.generation, "rotated before it was seen"))
                # If it is a copy, lines came behind it before the cut; and others may have come and gone, too.
                acts.append(self._gap(self.generation, stat.size, "rotated before it was seen"))
            file = File(number, stat, done.generation if done else self.generation, now)
            file.head = head
            if done:
                file.origin = (done.dev, done.ino)
                file.resume(done)
            self._draining.append(file)
            self._draining.sort(key=lambda file: file.generation)
            return acts + self._find_path(now) + self._tell_missed() + self._next(now)
        if stat.kind != "file":
            return [Close(number), *self._fail(f"is a {stat.kind}", now)]
        seen, self._own_seen = self._own_seen, None
        if seen and (seen[:2] != stat[:2] or stat.size < seen.size):  # rotated or cut since the siblings were looked at
            self._wants_search = True
            return [Close(number), *self._find_path(now)]
        file = File(number, stat, self.generation, now)
        if self._retry_s:
            self._retry_s = 0.0
            acts.append(Report("recovered", self.generation))
        is_back = file.origin in [(done.dev, done.ino) for done in self._lost]
        acts += self._take_up(file, head)
        self._current = file
        if self._came.missed > 0 or not is_back:
            self._came.take_up()
        return acts + self._tell_missed() + self._next(now)

    def failed(self, number: int, error: int, now: float) -> list[Act]:
        """A file could not be opened, or not be read any more (EACCES, EIO). It is tried again."""
        acts: list[Act] = []
        why, is_path = os.strerror(error), True
        is_gone = error == errno.ENOENT  # the next look says so
        if number in self._opening:
            opening = self._opening.pop(number)
            done = opening.done
            if opening.origin:
                is_path = False
                if is_gone:
                    return self._search_again(opening, now)
                if done:
                    acts += self._give_up(done, f"its rest cannot be read: {why}")
                else:
                    acts.append(self._gap(self.generation, 0, f"a file that was rotated cannot be read: {why}"))
                acts += self._find_path(now)
        elif file := next((file for file in self._files() if file.number == number), None):
            acts.append(Close(number))
            self._busy = None
            if file is self._current:
                self._lost.append(file.checkpoint())
                self._current, self._wants_search = None, True
            else:
                is_path = False
                self._draining.remove(file)
                acts += self._give_up(file.checkpoint(), f"its rest cannot be read: {why}")
        return acts + (self._fail(f"cannot be read: {why}", now) if is_path and not is_gone else self._next(now))

    def read(self, number: int, data: bytes | bytearray | memoryview, head: bytes, now: float) -> list[Act]:
        """What was read where it was asked for; less than that only at the file's end. `head`: its first HEAD bytes."""
        file, self._busy = self._busy, None
        assert file
        assert file.number == number
        view = memoryview(data)
        if file.seeks_line:
            file.seek(view)
            return self._next(now)
        overlap = file.overlap
        is_same = len(view) >= overlap
        if overlap == file.offset:  # the same beginning was read twice: was it cut in between?
            is_same = is_same and head[: len(view)] == view[: len(head)]
        if not is_same or not file.knows(head, view[:overlap]):
            return self._restart(file, "replaced", file.stat._replace(size=0), now) + self._next(now)
        file.written, file.read_at = file.stat.written, now
        new = view[overlap:]
        file.is_at_end = len(view) < overlap + BLOCK
        if file.is_at_end and file.stat.size != file.offset + len(new):
            file.grow(file.stat._replace(size=file.offset + len(new)), now, seen=True)
        wants_partial, file.wants_partial = file.wants_partial, False
        zeros = 0 if file.before else identity.leading_zeros(new)
        if zeros >= ZEROS or (zeros and zeros == len(new)):
            return self._pass_zeros(file, view, overlap, zeros, now)
        if not new:
            return self._next(now)
        self._busy, self._data = file, view
        self._scanning = End.PARTIAL if wants_partial and file.is_at_end else End.OPEN
        return [Scan(number, file.origin, file.generation, file.offset, new, file.before, self._scanning)]

    def scanned(self, number: int, consumed: int, before: int, now: float) -> list[Act]:
        """How much of a Scan was matched in all, and `before` at the end of it."""
        file, self._busy = self._busy, None
        assert file
        assert file.number == number
        view, self._data = self._data, memoryview(b"")
        if self._scanning == End.PARTIAL:
            file.partial_size = file.stat.size
        elif consumed:
            end = file.overlap + consumed
            file.go_on(file.offset + consumed, before, view[max(0, end - LAST) : end])
            file.is_at_end &= not self._is_paused or end == len(view)  # what is left may be lines there was no room for
        if file.is_at_end and not self._draining and self._rewind is None and not self._is_lagging:
            return []  # until it grows, or a timer is due
        return self._tell_lag() + self._next(now)

    def pause(self) -> None:
        """Nobody takes the matches: read no more, but go on noticing."""
        self._is_paused = True

    def resume(self, now: float) -> list[Act]:
        """The subscriber has caught up."""
        self._is_paused = False
        return self._next(now)

    def give_up(self, now: float) -> list[Act]:
        """Deleted files hold more of the disk than is allowed: let go of the oldest, in which its writer may go on."""
        file = next((file for file in self._draining if file.stat.is_deleted and file is not self._busy), None)
        if not file:
            return []
        self._draining.remove(file)
        why = f"deleted, and too much is waiting: {file.unread} bytes were there"
        return [*self._give_up(file.checkpoint(), why), Close(file.number), *self._next(now)]

    def join(self, start: Literal["end", "start"] | int, now: float) -> tuple[tuple[int, int] | None, list[Act]]:
        """Generation and offset where one begins who comes later; None: with what is read next, nothing is open."""
        file = self._current
        if not file:
            return None, []
        if start == "end":
            return (file.generation, file.offset - file.before if file.is_at_end else file.stat.size), []
        to = 0 if start == "start" else min(start, file.stat.size)
        if to < file.offset - file.before:
            self._rewind = to if self._rewind is None else min(to, self._rewind)
        return (file.generation, to), self._next(now)

    def tick(self, now: float) -> list[Act]:
        """The time that due() gave has come."""
        return self._next(now)

    def hurry(self, now: float) -> list[Act]:
        """Nobody waits for the ends of lines any more: match those that have none."""
        for file in self._files():
            if file.has_partial:
                file.changed_at = min(file.changed_at, now - PARTIAL_S)
        return self._next(now)

    def _files(self) -> list[File]:
        return [*self._draining, self._current] if self._current else self._draining.copy()

    def _next(self, now: float) -> list[Act]:
        """Close what is drained; then read the oldest file that has more."""
        acts: list[Act] = []
        if self._busy or self._is_paused or self._asked is not None or self._opening:
            return acts
        if self._rewind is not None and self._current:
            self._current.rewind(self._rewind)
        self._rewind = None
        for file in self._files():
            is_drained = file in self._draining and file.is_at_end and now >= file.changed_at + QUIET_S
            if file.is_at_end and file.has_partial and (is_drained or now >= file.changed_at + PARTIAL_S):
                file.wants_partial, file.is_at_end = True, False
            elif file.is_at_end and file.zeros_at == file.offset and now >= file.changed_at + ZEROS_S:
                file.is_at_end = False
            elif is_drained and file.read_at < file.changed_at + QUIET_S:
                file.is_at_end = False  # nobody has looked since: its writer may have gone on
            elif is_drained:
                self._draining.remove(file)
                self.past = [*self.past, file.checkpoint()][-PAST:]
                acts.append(Close(file.number))
                continue
            if not file.is_at_end:
                return [*acts, self._go_on(file)]
        return acts

    def _go_on(self, file: File) -> Read:
        self._busy = file
        if file.seeks_line:
            at = max(0, file.offset - LINE_MAX - LAST)
            return Read(file.number, at, file.offset - at)
        overlap = file.overlap
        return Read(file.number, file.offset - overlap, BLOCK + overlap)

    def _open(self, path: str, opening: Opening) -> Open:
        self._numbers += 1
        self._opening[self._numbers] = opening
        return Open(self._numbers, path)

    def _search(self) -> list[Act]:
        """Look at the siblings once; most often the path's own file is all there is."""
        if not self._wants_search or self._asked is not None:
            return []
        self._wants_search = False
        self._asked = tuple([*self._lost, *self.past, *(file.checkpoint() for file in self._files())])
        return [FindSiblings(self._asked)]

    def _search_again(self, opening: Opening, now: float) -> list[Act]:
        """Names changed since the siblings were looked at."""
        if opening.done:
            self._lost.append(opening.done)
        self._wants_search, self._wants_old = True, opening.is_old
        return self._find_path(now) + self._next(now)

    def _find_path(self, now: float) -> list[Act]:
        """Open the path's file if it is not open; before that, look for what was there before it."""
        if self._asked is not None or self._opening:
            return []
        if self._current:
            return self._search()
        if not self._is_there or now < self._retry_at:
            return []
        return self._search() or [self._open(self.path, Opening())]

    def _take_up(self, file: File, head: bytes) -> list[Act]:
        """The path's own file: go on where its checkpoint says, else begin a generation."""
        acts: list[Act] = []
        file.head = head
        lost, self._lost = self._lost, []
        is_known = False
        for done in reversed(lost):
            is_it = (done.dev, done.ino) == file.origin
            if is_it and not is_known and begins(head, done) and done.offset <= file.stat.size:
                is_known, file.generation = True, done.generation
                file.resume(done)
                if done.is_gone:
                    acts.append(Report("recovered", done.generation))
                continue
            if is_it and not is_known:
                acts.append(Report("truncated" if done.offset > file.stat.size else "replaced", done.generation))
            acts += self._give_up(done, "its file was not found again")
        if is_known:
            return acts
        is_first = self.generation == 0
        self.generation += 1
        file.generation = self.generation
        acts.append(Report("found", self.generation))
        if is_first and self.start != "start":
            file.begin(file.stat.size if self.start == "end" else min(int(self.start), file.stat.size))
            file.seeks_line = self.start == "end" and file.offset > 0
        return acts

    def _tell_missed(self) -> list[Act]:
        """Files came to the path, and were gone again before they were looked at: seek them beside it, else tell."""
        if self._came.missed < 1 or self._asked is not None or self._opening or (self._is_there and not self._current):
            return []
        before = [done for done in [*self.past, *self._lost] if done.generation < self.generation or not self._current]
        before += [file.checkpoint() for file in self._draining]
        since = max((done.written for done in before), default=self._begun)
        if since is not None and not self._sought:
            self._sought, self._wants_search, self._unseen_since = True, True, since
            return self._search()
        self._came.missed, self._sought = 0, False
        # Behind the one that was at the path before: those found beside it may have come later.
        last = self._last.checkpoint() if isinstance(self._last, File) else self._last
        generation, start = (last.generation, last.offset) if last else (self.generation, 0)
        return [self._gap(generation, start, "a file came and went before it was looked at")]

    def _leave(self, now: float) -> None:
        """The path's file is there no more: drain it."""
        if self._current:
            self._current.changed_at, self._current.is_at_end = now, False
            self._unseen_since, self._wants_search = self._current.written, True
            self._draining.append(self._current)
            self._last, self._current = self._current, None

    def _restart(self, file: File, what: Literal["truncated", "replaced"], found: Stat, now: float) -> list[Act]:
        """Other content stands in the file: a new generation. A copy may have the rest of the old one."""
        if self._came.missed > 0:  # a new file with the old one's inode
            self._came.take_up()
        self._lost.append(file.checkpoint())
        if file is self._current:
            self._last = file
        self._unseen_since, self._wants_search = file.written, True
        self.generation += 1
        new = File(file.number, found, self.generation, now)
        if file is self._current:
            self._current = new
        else:
            self._draining[self._draining.index(file)] = new
        return [Report(what, self.generation), *self._find_path(now)]

    def _fail(self, why: str, now: float, *, wait: bool = True) -> list[Act]:
        is_new = not self._retry_s
        if is_new or wait:
            self._retry_s = min(RETRY_MAX_S, 2 * self._retry_s) if self._retry_s else RETRY_S
        self._retry_at = now + self._retry_s if wait else now
        return [*([Report("unreadable", self.generation, why)] if is_new else []), *self._next(now)]

    def _give_up(self, done: Checkpoint, why: str) -> list[Gap]:
        """What came behind a checkpoint is not found, or cannot be read."""
        self.past = [*self.past, done][-PAST:]
        return [] if done.is_gone else [self._gap(done.generation, done.offset, why)]

    def _gap(self, generation: int, start: int, why: str) -> Gap:
        """Possibly lost: nobody knows how much there was."""
        self.gaps += 1
        return Gap(generation, start, None, why)

    def _tell_lag(self) -> list[Act]:
        if self._is_lagging == (self.lag > (LAGGING // 4 if self._is_lagging else LAGGING)):
            return []
        self._is_lagging = not self._is_lagging
        return [Report("lagging" if self._is_lagging else "recovered", self.generation, f"{self.lag} bytes behind")]

    def _pass_zeros(self, file: File, view: memoryview, overlap: int, zeros: int, now: float) -> list[Act]:
        """A hole where a line begins: a writer kept its offset over a cut, or NFS does not have the data yet."""
        if file.zeros_at != file.offset:
            file.zeros_at, file.changed_at, file.is_at_end = file.offset, now, True
            return self._next(now)
        end = overlap + zeros
        file.go_on(file.offset + zeros, 0, view[max(0, end - LAST) : end])
        file.is_at_end = False
        return [Report("truncated", file.generation, f"{zeros} NUL bytes skipped"), *self._next(now)]
