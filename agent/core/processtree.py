"""The processes of a tree, found in /proc, and their end.

A process belongs to a tree if any of these holds; no single one is enough:

    its session is the root's, or has a member         children that kept the session
    its parent belongs                                 children that made a session of their own
    EMISSARY_RUN in its environment has the mark       daemons: forked twice, a session of their own
    the agent inherited it as subreaper, unmarked      daemons that emptied their environment too

The kernel's own record, a cgroup, is better where one is delegated (cgroup.py); this works everywhere.

    AgentError
    └── TreeSurvived    some processes could not be ended

Source: protocols/suites.md, "A run"; protocols/monitors.md, "State machine of a run" (the ladder).
"""

import logging
import math
import os
import signal
from collections.abc import Callable, Container, Mapping
from contextlib import suppress

import msgspec
import trio

from agent.core.errors import AgentError

log = logging.getLogger(__name__)

MARK = "EMISSARY_RUN"
VERIFIED_WITHIN_S = 2.0  # protocols/monitors.md: "Dead" is verified within 2 s
MOST_LOOKS = 8  # before the first kill of a round; a tree that forks through all of them is ended round by round

_MARK_BYTES = MARK.encode() + b"="
_ENDED = (b"Z", b"X")  # states of /proc/PID/stat: a zombie is dead, only not yet reaped


class Proc(msgspec.Struct, frozen=True, order=True):
    """One process for as long as the machine is up: `start` is field 22 of /proc/PID/stat, clock ticks since boot."""

    pid: int
    start: int


class Stat(msgspec.Struct, frozen=True):
    """What /proc/PID/stat says of a process."""

    proc: Proc
    parent: int
    group: int
    session: int
    ended: bool


class TreeSurvived(AgentError):
    """Some processes outlived SIGKILL: another user's, or stuck in the kernel. `pids` names them."""

    def __init__(self, mark: str, pids: tuple[int, ...]) -> None:
        which = ",".join(map(str, pids))
        super().__init__(
            f"{mark}: still alive after SIGKILL: pid {which}",
            remedy=f"See `ps -o pid,user,stat,args -p {which}`: another user's, or in state D, waiting for a device.",
        )
        self.mark, self.pids = mark, pids


def stat_of(pid: int) -> Stat | None:
    """A process's line, or None when there is no such process (any more)."""
    try:
        line = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command's name in parentheses, and may hold spaces and parentheses itself.
    state, parent, group, session, *rest = line.rpartition(b")")[2].split()
    # A process whose first thread has left reads as a zombie too, while its other threads (field 20) run on.
    ended = state in _ENDED and int(rest[13]) < 2
    return Stat(Proc(pid, int(rest[15])), int(parent), int(group), int(session), ended)


def snapshot() -> dict[int, Stat]:
    """Every process we may see, by pid, zombies too. Not one instant: who forks meanwhile may be missed."""
    return {pid: stat for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if (stat := stat_of(pid))}


def mark_of(pid: int) -> str | None:
    """EMISSARY_RUN of a process; "" when its environment has none, None when we may not read that."""
    try:
        entries = _read(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return None  # ended, or another user's
    return next((os.fsdecode(e.removeprefix(_MARK_BYTES)) for e in entries if e.startswith(_MARK_BYTES)), "")


def nested(mark: str) -> str:
    """What EMISSARY_RUN says below us: in an agent that is itself part of a run, `<the mark of that>/<mark>`."""
    outer = os.environ.get(MARK)
    return f"{outer}/{mark}" if outer else mark


def no_strangers(known: Container[int]) -> bool:
    """Have we no children but known ones? False too where the kernel does not list them.

    The tree of a child of ours that has ended is dead then, if we are the subreaper: each of its processes had a parent
    in the tree or has us. A look of 0.02 ms, where `snapshot` takes one for each process on the machine.
    """
    ours = _children()
    return ours is not None and all(pid in known for pid in ours)


def tree(mark: str, root: Proc | None = None, *, strays_before: float = 0) -> list[Stat]:
    """The processes of a tree, by pid, the zombies too; never ourselves or a process above us.

    `root` is the child the tree began with: it and its session belong, and nothing older can. Without it (after a
    restart) the marks alone tell, that of an agent within the tree included (`nested`).

    Of the children we adopted, those without a mark that began since the root and before `strays_before` (ticks as
    Proc.start) belong too. Direct children outside our session that began in that time would be taken for such.
    """
    full = nested(mark)
    table = snapshot()
    here = table[os.getpid()]
    above = _with_ancestors(here, table)
    since = root.start if root else 0
    young = {pid: stat for pid, stat in table.items() if pid not in above and stat.proc.start >= since}
    # The number of a session is not given away while the session has members. So if the root's number belongs to a
    # process that started later, the root's session has ended, and what has this number now is another one.
    session = root.pid if root and (root.pid not in table or table[root.pid].proc == root) else None
    found = {pid for pid, stat in young.items() if session in (pid, stat.session)}
    for pid in young.keys() - found:
        match "" if young[pid].ended else mark_of(pid):
            case None:
                continue
            case "":
                belongs = young[pid].proc.start < strays_before and _adopted(young[pid], here)
            case theirs:
                belongs = theirs == full or theirs.startswith(f"{full}/")
        if belongs:
            found.add(pid)
    joined = found
    while joined:
        # Nobody can enter a session that exists: one with a member of the tree was made in the tree. But without a root
        # the member may be a command in a person's session, who set the mark by hand: then its leader must belong.
        sessions = {young[pid].session for pid in found} - {here.session} if root else found
        joined = {pid for pid in young.keys() - found if young[pid].parent in found or young[pid].session in sessions}
        found |= joined
    return [young[pid] for pid in sorted(found)]


async def kill(find: Callable[[], list[Stat]], *, within_s: float = VERIFIED_WITHIN_S) -> list[Stat]:
    """End every process that `find` tells, until none lives at two looks. What lives `within_s` behind the first
    SIGKILL is returned.

    All are stopped before any is killed: a stopped process forks no more, and a child whose parent is only stopped can
    still be told by its parent. The stopping goes on until it meets nobody new. What forks and ends faster than one can
    look has left zombies: its group is killed, at one instant.
    """
    session, quiet = os.getsid(0), 0
    with trio.CancelScope() as limit:
        while quiet < 2:  # one look may miss who is forked by a process that ends just then
            met: set[Proc] = set()
            groups: set[int] = set()
            for _ in range(MOST_LOOKS):
                found = find()
                groups.update(stat.group for stat in found if stat.session != session)
                new = [stat.proc for stat in found if not stat.ended and stat.proc not in met]
                if not new:
                    break
                met.update(new)
                for proc in new:
                    send(proc, signal.SIGSTOP)
                await trio.lowlevel.cancel_shielded_checkpoint()  # who was stopped must not stay so
            for proc in met:
                send(proc, signal.SIGKILL)
            for group in groups:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            limit.deadline = min(limit.deadline, trio.current_time() + within_s)  # looks may take long, too
            await trio.lowlevel.checkpoint()
            for proc in met:
                await _wait_gone(proc)
            quiet = 0 if met else quiet + 1
        return []
    return [stat for stat in find() if not stat.ended]


async def sweep(mark: str) -> None:
    """End what a former agent left of a tree. Raises TreeSurvived when something outlives it."""
    if survivors := await kill(lambda: tree(mark)):
        raise TreeSurvived(mark, tuple(stat.proc.pid for stat in survivors))


def send(proc: Proc, what: int) -> bool:
    """Send a signal to exactly this process; False when it has ended or is not ours to signal."""
    handle = _open(proc)
    if handle is None:
        return False
    try:
        signal.pidfd_send_signal(handle, what)
    except ProcessLookupError:
        return False
    except PermissionError:
        log.warning("signal refused pid=%d signal=%d", proc.pid, what)
        return False
    finally:
        os.close(handle)
    return True


def reap(children: Container[int], *, before: float = math.inf) -> list[int]:
    """Take the exits of processes that ended after we adopted them; returns their pids.

    `children` are the pids of our direct children in sessions of their own; those, direct children in our session and
    what began at `before` or later are passed by: whoever started them waits for their exits.
    """
    ours = _children()
    if ours is None:
        table = snapshot()
    else:
        strangers = (stat_of(pid) for pid in (*ours, os.getpid()) if pid not in children)
        table = {stat.proc.pid: stat for stat in strangers if stat}
    here = table[os.getpid()]
    ended = [
        pid
        for pid, stat in table.items()
        if stat.ended and pid not in children and stat.proc.start < before and _adopted(stat, here)
    ]
    for pid in ended:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    return ended


def _children() -> set[int] | None:
    """Our first thread's children, zombies too; None where the kernel does not list them (CONFIG_PROC_CHILDREN).

    Orphans are given to that one. What another thread has started is its own while it lives, and no orphan.
    """
    pid = os.getpid()
    try:
        return set(map(int, _read(f"/proc/{pid}/task/{pid}/children").split()))
    except OSError:
        return None


def _read(path: str) -> bytes:
    # A look reads hundreds of these; without Python's file objects it takes a third of the time.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 65_536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _adopted(stat: Stat, here: Stat) -> bool:
    # Nobody can enter a session that exists: who is not in ours made one, or was born in one that a child of ours made.
    return stat.parent == here.proc.pid and stat.session != here.session


def _with_ancestors(stat: Stat, table: Mapping[int, Stat]) -> set[int]:
    line = {stat.proc.pid}
    while stat.parent in table and stat.parent not in line:
        stat = table[stat.parent]
        line.add(stat.proc.pid)
    return line


def _open(proc: Proc) -> int | None:
    """A pidfd of exactly this process, or None. If its start is still the same, the handle opened before is its own."""
    try:
        handle = os.pidfd_open(proc.pid)
    except ProcessLookupError:
        return None
    now = stat_of(proc.pid)
    if now and now.proc == proc:
        return handle
    os.close(handle)
    return None


async def _wait_gone(proc: Proc) -> None:
    handle = _open(proc)
    if handle is None:
        return
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)
