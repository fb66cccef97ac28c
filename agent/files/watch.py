"""The file monitor: inotify's bytes and the results of looks in, looks to take and events out. Pure.

inotify only says where to look. What is told follows from what stat said last and what it says now, so that a lost
message costs time, never the end state. Every directory on the way to a watched path is watched too: what is deleted,
moved away or not there yet is found again when it comes.

    feed()  what inotify said          -> paths that settle, 200 ms without another change, 2 s at most
    acts()  what is to be done now     -> Survey a directory, Look at a path, Drop a watch; FileChanged, FileGap, Ready
    surveyed(), looked()               <- what was found

Sizes are bounded: MAX_KNOWN files, MAX_UNSETTLED changes; beyond, a FileGap says so and what is there is compared.

Source: protocols/emissary.md, "Entitlement and file monitor"; issue 4, item 5; inotify(7).
"""

import math
import os
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Set
from itertools import islice

import msgspec

from agent.core.errors import shown
from agent.core.events import FileGap
from agent.core.mounts import is_within
from agent.files.looks import (
    ATTRIB,
    CLOSE_WRITE,
    CREATE,
    DELETE,
    EXCL_UNLINK,
    IGNORED,
    MASK_ADD,
    MAX_KNOWN,
    MODIFY,
    MOVED_FROM,
    MOVED_TO,
    ONLYDIR,
    Q_OVERFLOW,
    Act,
    Drop,
    Look,
    Looked,
    Ready,
    Seen,
    Survey,
    Surveyed,
    Watch,
    What,
    change,
    described,
)
from agent.files.patterns import Pattern, Places

SETTLE_S = 0.2
LONGEST_SETTLE_S = 2.0  # a file that is written all the time is told of that often
POLL_S = 5.0  # from the end of a look at all to the next one, where inotify does not work
MAX_UNSETTLED = 65_536

# MASK_ADD: one inode may be reached by two paths, and the watch is the inode's.
_WAY = CREATE | DELETE | MOVED_FROM | MOVED_TO | ONLYDIR | MASK_ADD
_ENTRIES = _WAY | MODIFY | ATTRIB | CLOSE_WRITE | EXCL_UNLINK
_EVENT = struct.Struct("iIII")


class _Directory:
    """A directory that is watched: where the watches stand in it, and what was seen in it."""

    __slots__ = ("at", "every", "follow", "fresh", "is_polled", "is_short", "mask", "path", "reports_all", "seen", "wd")

    def __init__(self, path: str) -> None:
        self.path = path
        self.at: dict[str, Places] = {}
        self.seen: dict[str, Seen] = {}
        self.fresh: set[str] = set()
        self.wd: int | None = None
        self.is_polled = self.is_short = False
        self.aim({})

    def aim(self, patterns: dict[str, Pattern]) -> None:
        """Follow from `at` what is to be seen in it."""
        each = [(patterns[id], places) for id, places in self.at.items()]
        names = [pattern.names(places) for pattern, places in each]
        self.every = None in names
        self.follow = frozenset[str]().union(*(some for some in names if some is not None))
        self.reports_all = any(pattern.reports_all(places) for pattern, places in each)
        self.mask = _ENTRIES if any(pattern.may_report(places) for pattern, places in each) else _WAY


class _Unsettled:
    """A path where something happened: since when, and what inotify said."""

    __slots__ = ("came_from", "first", "hint", "last")

    def __init__(self, now: float) -> None:
        self.first = self.last = now
        self.hint = 0
        self.came_from: str | None = None


class Monitor:
    """What is watched, how it was last seen, and what must be looked at. `now` is seconds of any steady clock."""

    def __init__(self) -> None:
        self.watches: dict[str, Watch] = {}
        self.known = 0  # entries in all directories
        self._patterns: dict[str, Pattern] = {}
        self._directories: dict[str, _Directory] = {}
        self._by_wd: dict[int, list[_Directory]] = {}
        self._baseline: dict[str, int] = {}  # surveys without which a watch is not ready
        self._surveys: dict[str, None] = {}
        self._unsettled: dict[str, _Unsettled] = {}  # in the order of `last`
        self._due: dict[str, _Unsettled] = {}
        self._cookies: dict[int, tuple[str, float, int]] = {}  # of what was moved away, and its hint
        self._polled: set[str] = set()  # directories, and links to what is elsewhere; some that are so no more
        self._out: list[Act] = []
        self._rescan: tuple[float, str] | None = None  # when, and why
        self._poll_at = 0.0  # inf while one is under way
        self._is_full = False

    @property
    def directories(self) -> int:
        """How many directories are watched, those on the way included."""
        return len(self._directories)

    @property
    def short(self) -> int:
        """How many of them the kernel gave no watch for; they are polled."""
        return sum(directory.is_short for directory in self._directories.values())

    # ---- what to watch ---------------------------------------------------------------------------------------------

    def watch(self, watch: Watch) -> None:
        """Watch from now on; Ready is told when all that is there already has been seen."""
        self.watches[watch.id] = watch
        self._patterns[watch.id] = pattern = Pattern(watch.path, recursive=watch.recursive)
        self._baseline[watch.id] = 0
        self._enter("/", {watch.id: pattern.start()}, {watch.id})

    def unwatch(self, id: str) -> None:
        """Watch no longer. An unknown one is not watched already."""
        if self.watches.pop(id, None) is None:
            return
        del self._patterns[id]
        self._baseline.pop(id, None)
        for directory in list(self._directories.values()):
            if directory.at.pop(id, None) is None:
                continue
            directory.fresh.discard(id)
            if not directory.at:
                self._leave(directory)
                continue
            directory.aim(self._patterns)
            for name in [name for name in directory.seen if not self._leads(directory, name)]:
                self._unsee(directory, name)

    # ---- what happened ---------------------------------------------------------------------------------------------

    def feed(self, data: bytes, now: float) -> None:
        """Take what was read from inotify."""
        at, size = 0, len(data)
        while at < size:
            if size - at < _EVENT.size:
                return self._lose("inotify's message was cut short", now)
            wd, mask, cookie, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if at > size:
                return self._lose("inotify's message was cut short", now)
            if mask & Q_OVERFLOW:
                self._lose("more happened at once than the kernel's queue holds (fs.inotify.max_queued_events)", now)
            elif mask & IGNORED:
                for directory in self._by_wd.pop(wd, ()):
                    directory.wd = None
                    if directory.path == "/":
                        self._queue(directory)
                    else:
                        self._touch(directory.path, now)
            elif length and (directories := self._by_wd.get(wd)):
                name = os.fsdecode(data[at - length : at].split(b"\0", 1)[0])
                for directory in directories:
                    if directory.reports_all or self._leads(directory, name):
                        self._happened(_join(directory.path, name), mask, cookie, now)
        return None

    def answered(self, path: str) -> None:
        """The disk answers again for this path and what is below it: compare that with what was seen."""
        for directory in self._directories.values():
            if is_within(directory.path, path) or is_within(path, directory.path):
                self._queue(directory)

    def mounted(self, names: Set[str], now: float) -> None:
        """File systems came or went at places of these names: inotify says nothing of what covers a directory."""
        for directory in self._directories.values():
            for name in names & directory.seen.keys():
                self._look_now(_join(directory.path, name), now)

    def hurry(self) -> None:
        """Let nothing settle any longer."""
        self._due = self._unsettled | self._due
        self._unsettled = {}

    def _happened(self, path: str, mask: int, cookie: int, now: float) -> None:
        touched = self._touch(path, now)
        if mask & MOVED_FROM:  # what was done to it goes with it
            self._cookies[cookie] = (path, now, touched.hint)
            touched.hint = 0
        elif mask & MOVED_TO:
            origin, _, touched.hint = self._cookies.pop(cookie, (None, 0.0, 0))
            if origin is None or origin == path:
                return
            left = self._unsettled.pop(origin, self._due.pop(origin, None))
            if left is not None and left.came_from is not None:  # moved twice
                if left.came_from == path:  # there and back
                    self._touch(origin, now)  # something else may have stood there
                    return
                if self._seen(origin) is None:
                    origin = left.came_from
                else:
                    self._touch(left.came_from, now)
            if touched.came_from is not None:
                self._touch(touched.came_from, now)
            touched.came_from = origin
        elif mask & (CREATE | DELETE):
            touched.hint = 0  # it was done to another file
        else:
            touched.hint |= mask & (MODIFY | ATTRIB)

    def _touch(self, path: str, now: float) -> _Unsettled:
        """Look at the path when it has settled."""
        found = self._due.get(path)
        if found is None:
            found = self._unsettled.get(path)
            if found is None:
                if len(self._unsettled) + len(self._due) >= MAX_UNSETTLED:
                    self._unsettled, self._due = {}, {}
                    self._lose(f"more than {MAX_UNSETTLED} changes at once", now)
                found = self._unsettled[path] = _Unsettled(now)
            elif now + SETTLE_S < found.first + LONGEST_SETTLE_S:
                found.last = now
                self._unsettled[path] = self._unsettled.pop(path)  # to the end: the oldest stand first
        return found

    def _look_now(self, path: str, now: float) -> None:
        """Look at the path as soon as may be: it differs already."""
        if path not in self._due:
            self._due[path] = self._unsettled.pop(path) if path in self._unsettled else _Unsettled(now)

    def _lose(self, why: str, now: float) -> None:
        """Something went unseen: compare everything, once it is quieter."""
        if self._rescan is None:
            self._rescan = (now + SETTLE_S, why)

    # ---- what to do ------------------------------------------------------------------------------------------------

    def next_at(self) -> float:
        """When `acts` will have something, as far as is known now."""
        if self._out or self._surveys or self._due:
            return 0.0
        times = [self._poll_at] if self._polled else []
        if self._rescan is not None:
            times.append(self._rescan[0])
        if self._unsettled:
            times.append(next(iter(self._unsettled.values())).last + SETTLE_S)
        return min(times, default=math.inf)

    def acts(self, now: float, limit: int = 256) -> list[Act]:
        """What to do and to tell now, in this order; at most `limit` surveys and looks. Give their results back
        before asking again.
        """
        if self._rescan is not None and self._rescan[0] <= now:
            self._compare_everything(self._rescan[1])
        if self._polled and self._poll_at <= now:
            self._poll(now)
        for cookie, (_, since, _) in list(islice(self._cookies.items(), limit)):
            if since + SETTLE_S <= now:
                del self._cookies[cookie]
        for path, unsettled in list(islice(self._unsettled.items(), limit)):
            if unsettled.last + SETTLE_S <= now:
                self._due[path] = self._unsettled.pop(path)
        acts, self._out = self._out, []
        for path in list(islice(self._surveys, limit)):
            del self._surveys[path]
            if directory := self._directories.get(path):
                fresh, directory.fresh = frozenset(directory.fresh), set()
                acts.append(Survey(path, directory.mask, directory.follow, directory.every, fresh))
                limit -= 1
        if not self._surveys:  # what is not surveyed yet would seem to be new
            acts += self._looks(limit)
        if not acts and self._poll_at == math.inf:  # from its end: where looks are slow nothing else would ever be done
            self._poll_at = now + POLL_S
        return acts

    def _looks(self, limit: int) -> Iterator[Look]:
        for path in list(islice(self._due, limit)):
            due = self._due.pop(path)
            directory, name = self._place(path)
            if directory is None:
                continue
            reporters = self._reporters(directory, name)
            yield Look(
                path,
                directory.seen.get(name),
                due.hint,
                due.came_from,
                follow=name in directory.follow,
                digest=bool(reporters),
                content=any(watch.content for watch in reporters),
            )

    def _compare_everything(self, why: str) -> None:
        self._rescan = None
        for watch in self.watches.values():
            self._out.append(FileGap(path=shown(watch.path), why=why, run=watch.run))
        for directory in self._directories.values():
            self._queue(directory)

    def _poll(self, now: float) -> None:
        self._poll_at = math.inf
        for path in list(self._polled):
            directory, seen = self._directories.get(path), self._seen(path)
            is_polled, is_link = directory is not None and directory.is_polled, seen is not None and seen.is_link
            if directory is not None and is_polled:
                self._queue(directory)
            if is_link:
                self._look_now(path, now)
            if not (is_polled or is_link):
                self._polled.discard(path)

    def _set_polled(self, path: str, now: float) -> None:
        if not self._polled:
            self._poll_at = now + POLL_S
        self._polled.add(path)

    # ---- what was found --------------------------------------------------------------------------------------------

    def surveyed(self, found: Surveyed, now: float) -> None:
        """Take the result of a survey: what is not as it was is looked at next."""
        survey = found.survey
        directory = self._directories.get(survey.path)
        if directory is None:
            if found.wd is not None and found.wd not in self._by_wd:
                self._out.append(Drop(found.wd))
        else:
            self._bind(directory, found.wd)
            if found.entries is None:
                self._not_surveyed(directory, found.why, now)
            else:
                directory.is_short = found.is_short
                directory.is_polled = found.is_short or found.is_deaf
                if directory.is_polled:
                    self._set_polled(directory.path, now)
                self._compare(directory, found.entries, survey.fresh, now)
                if found.is_cut:
                    self._tell_gap(directory.path, f"more than {MAX_KNOWN} entries", directory.at)
                else:
                    for name in directory.seen.keys() - found.entries.keys():
                        self._look_now(_join(directory.path, name), now)
        self._found_for(survey.fresh)

    def _compare(self, directory: _Directory, entries: dict[str, Seen], fresh: Collection[str], now: float) -> None:
        for name, seen in entries.items():
            leads = self._begun_leads(directory, name)
            if not leads:
                continue
            known, path = directory.seen.get(name), _join(directory.path, name)
            if known is None and leads.keys() <= set(fresh):
                if not self._see(directory, name, seen, now):
                    return
            elif change(known, seen, 0) is not None:
                self._look_now(path, now)
                continue
            if stat.S_ISDIR(seen.mode):
                self._enter(path, leads, fresh)

    def _not_surveyed(self, directory: _Directory, why: str, now: float) -> None:
        if not why:
            if directory.path != "/":
                self._look_now(directory.path, now)
            return
        if not directory.is_polled:
            self._tell_gap(directory.path, why, directory.at)
        directory.is_polled = True
        self._set_polled(directory.path, now)

    def looked(self, found: Looked, now: float) -> None:
        """Take the result of a look: what became of the path is told."""
        look, seen = found.look, found.seen
        directory, name = self._place(look.path)
        if directory is None or not self._leads(directory, name):
            return
        if look.came_from is not None:
            self._look_now(look.came_from, now)  # something else may stand there by now
        if seen is None:
            self._gone(directory, name)
            return
        known = directory.seen.get(name)
        reporters = self._reporters(directory, name)
        what, origin = change(known, seen, look.hint), None
        if look.came_from is not None and reporters and self._is(look.came_from, seen):
            what, origin = "moved", look.came_from
        if not self._see(directory, name, seen, now):
            return
        if what is not None:
            self._tell(reporters, look.path, what, found, origin)
        if origin is not None:
            self._moved(origin, look.path)
        if stat.S_ISDIR(seen.mode):
            below = self._directories.get(look.path)
            if below is not None and (below.wd is None or known is None or known.inode != seen.inode):
                self._queue(below)
            self._enter(look.path, self._begun_leads(directory, name), ())
        elif look.path in self._directories:
            self._forget(look.path)

    def _is(self, path: str, seen: Seen) -> bool:
        known = self._seen(path)
        return known is not None and known.inode == seen.inode

    def _gone(self, directory: _Directory, name: str) -> None:
        path, reporters = _join(directory.path, name), self._reporters(directory, name)
        known = directory.seen.get(name)
        self._forget(path)
        self._unsee(directory, name)
        if known is not None:
            self._tell(reporters, path, "deleted")

    def _forget(self, path: str) -> None:
        """A directory is gone, and what was in it: tell it, the deepest first."""
        for directory in reversed(list(self._below(path))):
            for name in directory.seen:
                self._tell(self._reporters(directory, name), _join(directory.path, name), "deleted")
            self._leave(directory)

    def _moved(self, origin: str, path: str) -> None:
        """What was at `origin` is at `path` now, with all that is in it."""
        place, name = self._place(origin)
        if place is not None:
            self._unsee(place, name)
        below = list(self._below(origin))
        if below:
            self._forget(path)
        for directory in reversed(below):
            new = path + directory.path[len(origin) :]
            at = self._at({id: pattern.walk(new) for id, pattern in self._patterns.items()})
            if not at:
                self._forget(directory.path)
                continue
            old = directory.path
            del self._directories[old]
            directory.path, directory.at = new, at
            directory.aim(self._patterns)
            self._directories[new] = directory
            for name, seen in directory.seen.items():
                if seen.is_link:
                    self._polled.add(_join(new, name))  # as the old path is
                self._tell(self._reporters(directory, name), _join(new, name), "moved", seen, _join(old, name))
            self._queue(directory)  # what is of interest may be other names than before

    # ---- the directories -------------------------------------------------------------------------------------------

    def _at(self, leads: dict[str, Places]) -> dict[str, Places]:
        """Of watches and where they stand, those to which something in the directory may matter."""
        return {
            id: places for id, places in leads.items() if places and self._patterns[id].names(places) != frozenset()
        }

    def _enter(self, path: str, leads: dict[str, Places], fresh: Collection[str]) -> None:
        """Have a directory watched for these watches, and surveyed where one of them is new to it."""
        at = self._at(leads)
        directory = self._directories.get(path)
        if not at or (directory is not None and at.keys() <= directory.at.keys()):
            return
        if directory is None:
            directory = self._directories[path] = _Directory(path)
        for id in (at.keys() & set(fresh)) - directory.at.keys():
            directory.fresh.add(id)
            self._baseline[id] += 1
        directory.at |= at
        directory.aim(self._patterns)
        self._queue(directory)

    def _leave(self, directory: _Directory) -> None:
        """Watch a directory no longer, and none that is below it."""
        self.known -= len(directory.seen)
        self._bind(directory, None)
        del self._directories[directory.path]
        self._found_for(directory.fresh)

    def _bind(self, directory: _Directory, wd: int | None) -> None:
        if directory.wd == wd:
            return
        if directory.wd is not None:
            sharing = self._by_wd[directory.wd]
            sharing.remove(directory)
            if not sharing:
                del self._by_wd[directory.wd]
                self._out.append(Drop(directory.wd))
        directory.wd = wd
        if wd is not None:
            self._by_wd.setdefault(wd, []).append(directory)

    def _queue(self, directory: _Directory) -> None:
        self._surveys[directory.path] = None

    def _found_for(self, fresh: Iterable[str]) -> None:
        """One survey less is missing until these watches are ready."""
        for id in fresh:
            if id not in self._baseline:  # not watched any more
                continue
            self._baseline[id] -= 1
            if not self._baseline[id]:
                del self._baseline[id]
                self._out.append(Ready(id))

    def _below(self, path: str) -> Iterator[_Directory]:
        """The directory and all below it, a directory before what is in it."""
        directory = self._directories.get(path)
        waiting = [directory] if directory is not None else []
        while waiting:
            directory = waiting.pop()
            yield directory
            for name, seen in directory.seen.items():
                if stat.S_ISDIR(seen.mode) and (below := self._directories.get(_join(directory.path, name))):
                    waiting.append(below)

    def _place(self, path: str) -> tuple[_Directory | None, str]:
        parent, _, name = path.rpartition("/")
        return self._directories.get(parent or "/"), name

    def _seen(self, path: str) -> Seen | None:
        directory, name = self._place(path)
        return None if directory is None else directory.seen.get(name)

    def _see(self, directory: _Directory, name: str, seen: Seen, now: float) -> bool:
        """Remember an entry. False: there are too many."""
        if name not in directory.seen:
            if self.known >= MAX_KNOWN:
                if not self._is_full:
                    self._is_full = True
                    self._tell_gap(directory.path, f"more than {MAX_KNOWN} files are watched; watch less", directory.at)
                return False
            self._is_full = False
            self.known += 1
        directory.seen[name] = seen
        if seen.is_link:
            self._set_polled(_join(directory.path, name), now)
        return True

    def _unsee(self, directory: _Directory, name: str) -> None:
        if directory.seen.pop(name, None) is not None:
            self.known -= 1

    def _leads(self, directory: _Directory, name: str) -> dict[str, Places]:
        """The watches to which an entry matters, and where they stand there."""
        steps = ((id, self._patterns[id].step(places, name)) for id, places in directory.at.items())
        return {id: places for id, places in steps if places}

    def _begun_leads(self, directory: _Directory, name: str) -> dict[str, Places]:
        """Without those to which the directory is new: a survey for them is still to come, and leads them on."""
        return {id: places for id, places in self._leads(directory, name).items() if id not in directory.fresh}

    def _reporters(self, directory: _Directory, name: str) -> list[Watch]:
        """The watches that mean an entry."""
        leads = self._leads(directory, name).items()
        return [self.watches[id] for id, places in leads if self._patterns[id].is_reported(places)]

    # ---- telling ---------------------------------------------------------------------------------------------------

    def _tell(
        self,
        reporters: Collection[Watch],
        path: str,
        what: What,
        found: Looked | Seen | None = None,
        origin: str | None = None,
    ) -> None:
        """One event for each run that watches it; one without where none does."""
        if not reporters:
            return
        event = described(path, what, found, origin)
        runs = sorted({watch.run for watch in reporters if watch.run is not None})
        self._out += [msgspec.structs.replace(event, run=run) for run in runs] or [event]

    def _tell_gap(self, path: str, why: str, ids: Iterable[str]) -> None:
        gap = FileGap(path=shown(path), why=why)
        runs = sorted({run for id in ids if (run := self.watches[id].run) is not None})
        self._out += [msgspec.structs.replace(gap, run=run) for run in runs] or [gap]


def _join(directory: str, name: str) -> str:
    return f"/{name}" if directory == "/" else f"{directory}/{name}"
