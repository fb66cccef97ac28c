"""Child processes for suites, monitors and gator: each in its own session, within limits, and dead with all its tree.

    async with open_child(Spec(argv=("node", "cli.js"), cwd=folder, env=environ(os.environ), mark=run)) as child:
        async with trio.open_nursery() as nursery:
            for name, stream in child.streams.items():
                nursery.start_soon(drain, stream, partial(feed, name))
            await child.finish()  # or child.stop(ladder)

The end of a child is its *exit*, not the end of its pipes: what it leaves behind may keep them open. Its exit is looked
at and not taken until the tree is dead: so long its number, which is also its group's and its session's, stays its own.

Limits, nice, oom_score_adj, cgroup and user are set before the program's first instruction (spawn.py): set from outside
they would come after its first forks.

    AgentError
    ├── ChildFailedToStart                 no such program or folder, not executable, no memory ...
    └── TreeSurvived (processtree.py)      some processes could not be ended

Needs Linux 5.4 (waiting by pidfd). Source: protocols/suites.md, "A run"; protocols/monitors.md, "State machine of a
run"; protocols/packaging.md 3 (trap 1) and 4.
"""

import ctypes
import errno
import logging
import math
import os
import pwd
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Literal, assert_never

import msgspec
import trio

from agent.core.bundle import callers_environ
from agent.core.cgroup import Leaf, Leaves
from agent.core.errors import AgentError, ProtocolMisuse
from agent.core.processtree import (
    MARK,
    Proc,
    Stat,
    TreeSurvived,
    kill,
    nested,
    no_strangers,
    reap,
    send,
    stat_of,
    tree,
)
from agent.core.spawn import PARTS, program

log = logging.getLogger(__name__)

DRAIN_S = 2.0  # protocols/suites.md, "A run": after the exit the pipes get that long
PASSED = ("PATH", "HOME", "LANG", "LC_*", "TZ", "TMPDIR", "USER")  # protocols/suites.md, `env_pass`
READ_SIZE = 65_536  # a pipe's usual capacity
REAP_PAUSE_S, REAP_IDLE_S = 1.0, 60.0  # between looks for orphans that ended: with children, and without

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PIPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_STANDARD = ("stdin", "stdout", "stderr")
_TICKS = os.sysconf("SC_CLK_TCK")

Reach = Literal["child", "group", "tree"]


class ChildFailedToStart(AgentError):
    """The program did not begin; nothing of it is left. `path` is what was to be run, or the folder to run it in."""

    def __init__(self, path: str, why: str, *, remedy: str) -> None:
        super().__init__(f"{path}: {why}", remedy=remedy)
        self.path = path


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a child may use; None leaves what the agent itself has. Never more than the agent's own hard limits.

    `memory` (bytes) and `processes` hold for the whole tree where a cgroup is delegated. Else `memory` is each one's
    RLIMIT_DATA (RLIMIT_AS counts what Node and Java merely reserve: they end at once), `processes` is RLIMIT_NPROC,
    which counts all of the user's and never stops root. `file_size` (bytes) holds for each file. `cpu` is seconds of
    each process: SIGXCPU, one second later SIGKILL. `cpus` is held by a cgroup only; `affinity` are the numbers of CPUs
    it may run on. `nice` is added to the agent's own; it and `oom_score_adj` are wishes: where the service may not set
    them (EPERM), the child runs on without. UNLIMITED asks for nothing.
    """

    memory: int | None = None
    address_space: int | None = None
    processes: int | None = None
    nofile: int | None = None
    file_size: int | None = None
    cpu: int | None = None
    core: int | None = 0
    cpus: float | None = None
    affinity: tuple[int, ...] | None = None
    nice: int = 5
    oom_score_adj: int | None = 500


UNLIMITED = Limits(core=None, nice=0, oom_score_adj=None)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. `env` is the child's whole environment; `start` adds EMISSARY_RUN=`mark` and the pipes.

    A program without a slash is looked up in the PATH of `env`. `makes_cwd`: its folder is made for it, 0700 and its
    user's; whoever named it removes it. `pipes` are names of pipes the child writes to beside
    stdout and stderr: their numbers are in EMISSARY_PIPE_<NAME>, and stand for an argument "@pipe:<name>". Without
    `stdin` the child's is at its end. `user` is the name of whom it runs as, which only root can choose.
    """

    argv: tuple[str, ...]
    cwd: Path
    env: dict[str, str]
    mark: str
    pipes: tuple[str, ...] = ()
    stdin: bool = False
    user: str | None = None
    limits: Limits = Limits()
    makes_cwd: bool = False


class Exit(msgspec.Struct, frozen=True):
    """How the child ended: `code`, or `signal` by name ("SIGKILL").

    `ended_by` is "self", or the last signal we had sent before. `oom`: did the kernel kill one of the tree for want of
    memory? None where no cgroup tells.
    """

    code: int | None
    signal: str | None
    ended_by: str
    oom: bool | None


class Step(msgspec.Struct, frozen=True):
    """One rung of a ladder: a signal, and how long the child then has to exit. SIGKILL to the tree always follows."""

    signal: int
    wait_s: float
    reach: Reach = "group"


class Pipe:
    """The reading end of a child's pipe. One task reads it; `ended` is set when that met the end, or it is closed."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.ended = trio.Event()
        self._fd: int | None = fd

    async def receive_some(self, max_bytes: int = READ_SIZE) -> bytes:
        """What is there, at most `max_bytes`; b"" at the end. Raises trio.ClosedResourceError after `close`."""
        while self._fd is not None:
            await trio.lowlevel.wait_readable(self._fd)  # first: it is what mostly comes, and a turn of the loop too
            if (data := self.read(max_bytes)) is not None:
                return data
        raise trio.ClosedResourceError

    def read(self, max_bytes: int = READ_SIZE) -> bytes | None:
        """The same without waiting, for who waits for many pipes at a time (`fileno`): None, when nothing is there."""
        try:
            data = os.read(self.fileno(), max_bytes)
        except BlockingIOError:
            return None
        if not data:
            self.ended.set()
        return data

    def fileno(self) -> int:
        """Its descriptor. Raises trio.ClosedResourceError after `close`."""
        if self._fd is None:
            raise trio.ClosedResourceError
        return self._fd

    def close(self) -> None:
        """Read no more; a reader is woken with trio.ClosedResourceError, a writer will get SIGPIPE."""
        if self._fd is not None:
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)
            self._fd = None
        self.ended.set()


async def drain(pipe: Pipe, feed: Callable[[bytes], object]) -> None:
    """Read to the end, feeding each chunk (at most READ_SIZE). A pipe that is closed meanwhile has ended too."""
    with suppress(trio.ClosedResourceError):
        while chunk := await pipe.receive_some():
            feed(chunk)


class Child:
    """A running child.

    `streams` are its outputs by name: "stdout", "stderr" and the spec's pipes. Somebody must read each of them, or the
    child stands still when a pipe is full. `stdin` is there if the spec asked for it.
    """

    def __init__(self, spec: Spec, pid: int, handle: int, leaf: Leaf | None) -> None:
        self.spec, self.pid = spec, pid
        self.streams: dict[str, Pipe] = {}
        self.stdin: trio.lowlevel.FdStream | None = None
        self._handle, self._leaf = handle, leaf
        _children[pid] = self
        self._exit: Exit | None = None
        self._ended_by = "self"
        self._waiting = trio.Lock()
        self._dead = False  # the whole tree, verified

    @cached_property
    def started(self) -> int:
        """Its start in clock ticks since boot: with `pid` it names the process until reboot.

        Read at first use, which must be before the block ends: few ask, and it takes as long as a step of a monitor.
        """
        seen = stat_of(self.pid)
        return seen.proc.start if seen else 0  # another user's, in a /proc that hides those: 0 is before all

    def fileno(self) -> int:
        """A descriptor that can be read from when it has ended."""
        return self._handle

    async def wait(self) -> Exit:
        """Its exit; its pipes may still be open and its children alive. Any number of tasks may wait."""
        async with self._waiting:
            while (exit_ := self.look()) is None:
                await trio.lowlevel.wait_readable(self._handle)
        return exit_

    def send(self, what: int, reach: Reach = "group") -> None:
        """Send a signal to the child, its process group, or all its tree; after its exit only the last does anything.

        All but SIGKILL are followed by SIGCONT: a process that stands stopped would not notice.
        """
        if self.look() is None:
            self._ended_by = _signal_name(what)
        elif reach != "tree":
            return
        for each in (what,) if what == signal.SIGKILL else (what, signal.SIGCONT):
            match reach:
                case "child":
                    with suppress(PermissionError):  # it became another user's; `kill` will name it
                        signal.pidfd_send_signal(self._handle, each)
                case "group":
                    # The group's number is the child's, which is not reaped: it cannot be another group's.
                    with suppress(PermissionError):
                        os.killpg(self.pid, each)
                case "tree":
                    for stat in self.tree():
                        send(stat.proc, each)
                case _:
                    assert_never(reach)

    def tree(self) -> list[Stat]:
        """Every process of its tree, itself among them; of those that have ended, the ones not yet reaped."""
        # An orphan without a mark is ours if no other child was there when it began; else the last of those takes it.
        others = [child.started for child in _children.values() if child is not self]
        before = min((*others, *_starting.values()), default=math.inf) if _adopting else 0
        found = tree(self.spec.mark, Proc(self.pid, self.started), strays_before=before)
        if self._leaf:
            known = {stat.proc.pid for stat in found}
            more = (stat_of(pid) for pid in self._leaf.pids() if pid not in known)
            found += filter(None, more)
        return found

    async def stop(self, steps: Sequence[Step], *, drain_s: float = DRAIN_S) -> Exit:
        """Go down the ladder until the child exits, then `finish`. Raises TreeSurvived."""
        for step in steps:
            if self.look() is not None:
                break
            self.send(step.signal, step.reach)
            with trio.move_on_after(step.wait_s):
                await self.wait()
        if self.look() is None:
            await self.kill()
        return await self.finish(drain_s=drain_s)

    async def finish(self, *, drain_s: float = DRAIN_S) -> Exit:
        """Wait for its exit, then up to `drain_s` for the ends of its pipes; then end what is left of its tree.

        The pipes are read by others meanwhile. What the tree wrote before its end they can still read; a pipe that
        somebody outside the tree holds is closed after another `drain_s`. Raises TreeSurvived.
        """
        exit_ = await self.wait()
        await self._pipes_ended(drain_s)
        await self.kill()
        await self._pipes_ended(drain_s)
        for pipe in self.streams.values():
            pipe.close()
        return exit_

    async def kill(self) -> None:
        """SIGKILL to the whole tree, verified within 2 s. Raises TreeSurvived with what outlived it."""
        if self._dead:
            return
        if self.look() is None:
            self._ended_by = "SIGKILL"
        elif not self._leaf and _adopting and no_strangers(_children):
            self._dead = True  # what it left would be our child now, or below such a one
            return
        if self._leaf:
            self._leaf.kill()
        if survivors := await kill(self.tree):
            raise TreeSurvived(self.spec.mark, tuple(stat.proc.pid for stat in survivors))
        self._dead = True
        self.look()

    async def _pipes_ended(self, within_s: float) -> None:
        with trio.move_on_after(within_s):
            for pipe in self.streams.values():
                await pipe.ended.wait()

    def look(self) -> Exit | None:
        """Its exit if it has ended; it stays a zombie, so that its number stays its own."""
        if self._exit is None:
            seen = os.waitid(os.P_PIDFD, self._handle, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if seen is not None:
                by_signal = seen.si_code != os.CLD_EXITED
                self._exit = Exit(
                    code=None if by_signal else seen.si_status,
                    signal=_signal_name(seen.si_status) if by_signal else None,
                    ended_by=self._ended_by,
                    oom=self._leaf.oom() if self._leaf else None,
                )
        return self._exit

    async def _close(self) -> None:
        """End the tree, take the exit, close everything."""
        try:
            await self.kill()
        finally:
            for pipe in self.streams.values():
                pipe.close()
            if self.stdin:
                self.stdin.close()
            if self.look() is not None:
                _take(self.pid)  # at once: it is a zombie. What survived is taken by `reap` when it ends.
            os.close(self._handle)
            del _children[self.pid]
            if self._leaf:
                self._leaf.remove()


# One process has one set of children, and the kernel keeps it for the process, not for an object: so does this module.
_children: dict[int, Child] = {}  # our direct children in sessions of their own, not yet reaped, by pid
_starting: dict[object, int] = {}  # starts under way, perhaps forked already; to when they began, in the same ticks
_adopting = False  # are orphans given to us?
_came: trio.Event | None = None  # there are children, whose orphans may end


@asynccontextmanager
async def open_child(spec: Spec, *, leaves: Leaves | None = None) -> AsyncIterator[Child]:
    """Start a child; when the block ends, however it ends, its whole tree is dead, reaped, and its pipes are closed.

    `leaves` is the delegated cgroup, if there is one. Raises ChildFailedToStart, and at the end TreeSurvived.
    """
    child = await _start(spec, leaves)
    try:
        yield child
    finally:
        with trio.CancelScope(shield=True):  # bounded: kill() gives up after 2 s
            await child._close()


async def adopt(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Be the subreaper of every tree: orphans become our children, and are reaped as they end. Runs until cancelled.

    Run it once, for as long as children are started. Whoever starts a process by other means (trio.run_process) must
    leave it in our session: that is how its exit is told from an orphan's.
    """
    global _adopting, _came
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if our parent ignored it, the kernel would take every exit itself
    _set_subreaper(True)
    _adopting, _came = True, trio.Event()
    try:
        task_status.started()
        while True:
            # Not at each SIGCHLD: that would wake us for the ends of our own children, and orphans can wait.
            with trio.move_on_after(REAP_IDLE_S):
                await _came.wait()
            await trio.sleep(REAP_PAUSE_S)
            if not _children and not _starting:
                _came = trio.Event()
            # A child that fails to exec is a zombie its start waits for: what began since is left for next time.
            reap(_children, before=min(_starting.values(), default=math.inf))
    finally:
        _adopting, _came = False, None
        _set_subreaper(False)


def environ(base: Mapping[str, str], *, keep: Iterable[str] = ()) -> dict[str, str]:
    """The environment a child is given: of `base` only PASSED and what matches the patterns `keep`.

    A frozen agent's own LD_LIBRARY_PATH and _PYI_* never pass; a kept LD_LIBRARY_PATH is the one our caller had.
    """
    patterns = (*PASSED, *keep)
    return {name: value for name, value in callers_environ(base).items() if any(fnmatchcase(name, p) for p in patterns)}


def _set_subreaper(on: bool) -> None:
    # ctypes: it is one call in the agent's life.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _check(spec: Spec) -> None:
    """Raise what can be told before anything is opened."""
    names = [*_STANDARD, *spec.pipes]
    if not spec.mark or len({*names}) < len(names) or not all(map(_PIPE_NAME.fullmatch, names)):
        raise ProtocolMisuse(
            f"mark {spec.mark!r}, pipes {spec.pipes!r}", remedy="Give a mark, and pipes names of their own."
        )
    if not spec.argv or not spec.argv[0]:
        raise ChildFailedToStart("argv", "it is empty", remedy="Name a program.")
    if _passable("".join((*spec.argv, *spec.env, *spec.env.values(), spec.mark))) and not any(
        "=" in name or not name for name in spec.env
    ):
        return
    wrong = [
        *(f"argument {number}" for number, text in enumerate(spec.argv) if not _passable(text)),
        *(
            f"the name {name!r} in the environment"
            for name in spec.env
            if not _passable(name) or "=" in name or not name
        ),
        *(f"the value of {name!r} in the environment" for name, value in spec.env.items() if not _passable(value)),
        *(["the mark"] if not _passable(spec.mark) else []),
    ]
    raise ChildFailedToStart(
        spec.argv[0],
        f"{wrong[0]} cannot be passed to a program",
        remedy="Take NUL characters and unpaired surrogates out of it; a name is not empty and has no '='.",
    )


def _passable(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


async def _start(spec: Spec, leaves: Leaves | None) -> Child:
    _check(spec)
    begun = object()
    _starting[begun] = int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS)
    if _came is not None:
        _came.set()
    try:
        return await _spawn(spec, leaves)
    except OSError as error:
        raise _explained(spec, error) from error
    finally:
        del _starting[begun]


async def _spawn(spec: Spec, leaves: Leaves | None) -> Child:
    """Start it. What it was given is closed here in any case, what is ours if it fails."""
    reading: dict[str, int] = {}
    writing: dict[str, int] = {}
    ours: list[int] = []
    theirs: list[int] = []
    limits, leaf, procs = spec.limits, None, None
    try:
        for name in (*_STANDARD, *spec.pipes):
            if name != "stdin" or spec.stdin:
                reading[name], writing[name] = os.pipe()
                theirs.append(reading[name] if name == "stdin" else writing[name])
                ours.append(writing[name] if name == "stdin" else reading[name])
        if leaves:
            leaf = leaves.leaf(spec.mark, memory=limits.memory, processes=limits.processes, cpus=limits.cpus)
            procs = leaf.open_procs()
            theirs.append(procs)
        numbers = {name: str(writing[name]) for name in spec.pipes}
        arguments = {f"@pipe:{name}": number for name, number in numbers.items()}
        start = program(
            [arguments.get(argument, argument) for argument in spec.argv],
            cwd=spec.cwd,
            makes_cwd=spec.makes_cwd,
            env={
                **spec.env,
                MARK: nested(spec.mark),
                **{f"EMISSARY_PIPE_{name.upper()}": number for name, number in numbers.items()},
            },
            stdin=reading["stdin"] if spec.stdin else None,
            stdout=writing["stdout"],
            stderr=writing["stderr"],
            kept=[writing[name] for name in spec.pipes],
            limits=limits,
            held=leaves.controllers if leaves else frozenset(),
            procs=procs,
            account=_account(spec),
        )
        # In a thread, as exec may wait for a slow disk; that cannot be cancelled, so no child gets lost in the middle.
        pid = await trio.to_thread.run_sync(start)
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            os.killpg(pid, signal.SIGKILL)
            _take(pid)
            raise
    except BaseException:
        for fd in ours:
            os.close(fd)
        if leaf:
            leaf.remove()
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    child = Child(spec, pid, handle, leaf)
    child.streams.update({name: Pipe(fd) for name, fd in reading.items() if name != "stdin"})
    if spec.stdin:
        child.stdin = trio.lowlevel.FdStream(writing["stdin"])
    return child


def _account(spec: Spec) -> pwd.struct_passwd | None:
    """Whom to become, None: stay who we are."""
    if spec.user is None:
        return None
    try:
        account = pwd.getpwnam(spec.user)
    except KeyError:
        raise ChildFailedToStart(
            spec.argv[0], f"there is no user {spec.user!r}", remedy="Create it, or name another."
        ) from None
    if account.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise ChildFailedToStart(
            spec.argv[0], f"only root can run it as {spec.user!r}", remedy="Run the agent as root, or name no user."
        )
    return account


def _explained(spec: Spec, error: OSError) -> ChildFailedToStart:
    """The same with the path it is about and a remedy."""
    program = spec.argv[0]
    why = os.strerror(error.errno) if error.errno else str(error)
    if error.filename and str(error.filename) not in (program, str(spec.cwd)):
        why = f"{why} ({error.filename})"  # of its cgroup
    if str(error.filename) == str(spec.cwd):
        return ChildFailedToStart(str(spec.cwd), f"{why} (the folder to run {program} in)", remedy="Make the folder.")
    match error.errno:
        case _ if error.filename in PARTS.values():
            remedy = "This could not be set for it: see the user that the agent runs as, and what that may do."
        case errno.ENOENT if "/" not in program:
            remedy = f"Install it, or name its path; PATH was {spec.env.get('PATH', os.defpath)}."
        case errno.ENOENT if (spec.cwd / program).exists():
            remedy = "It is there, but the interpreter that its first line or its ELF header names is not."
        case errno.ENOENT:
            remedy = "Install it, or correct the path."
        case errno.EACCES:
            remedy = "Make it executable (chmod +x), and see that the file system is not mounted noexec."
        case errno.ENOEXEC:
            remedy = "Begin it with a line like #!/bin/sh, or name its interpreter first."
        case errno.ENOSYS:
            remedy = "Use Linux 5.4 or later: children are waited for by pidfd."
        case errno.E2BIG:
            remedy = "Pass fewer or shorter arguments and variables."
        case _:
            remedy = "This is about the machine, not the program: processes, memory or open files have run out."
    return ChildFailedToStart(program, why, remedy=remedy)


def _take(pid: int) -> None:
    """Take the exit of a child that has ended, or is about to."""
    os.waitpid(pid, 0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal: only the first and the last have names
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
