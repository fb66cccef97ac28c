"""`agent gator`: one layer of a tree from its command line, as root or below a parent.

    arguments -> spec (a file, or the parent's) -> wrapper or tier -> its end -> exit code

Source: protocols/gator.md, "Command line", "State machine" (Signals), "Schedulers" (local).
"""

import errno
import fcntl
import logging
import math
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from agent.core.cgroup import Leaves
from agent.core.channel import ungrouped
from agent.core.errors import AgentError, DocumentError, PeerRefused
from agent.core.metrics import Metrics
from agent.core.outflow import LAST_S, MIB, Outflow
from agent.core.process import adopt, environ
from agent.gator import hub, schedulers
from agent.gator import spec as specs
from agent.gator.elsewhere import set_aside
from agent.gator.layer import Above, Options, Place, Shared
from agent.gator.messages import Result, Severity
from agent.gator.pool import Demand, Grant, Held, Pool, demand
from agent.gator.schedulers import Scheduler
from agent.gator.settings import GatorSettings
from agent.gator.spec import Group, Job, Node, Spec
from agent.gator.summary import Summary
from agent.gator.tier import Tier
from agent.gator.told import Told
from agent.gator.tree import TIMEOUT_CODE
from agent.gator.uplink import LAST_TRY_S, Uplink
from agent.gator.wrapper import Wrapper

log = logging.getLogger(__name__)

PASSED, FAILED, UNREACHABLE = 0, 1, 3
# `babysit` is real Gator's, and of no use here; `licenses` and `cpus` are what a tier of ours gives to one below it.
KNOWN_ARGS: Final = {
    *("concurrency", "memory", "licenses", "cpus"),
    *("isolated", "command", "babysit", "partition", "batch"),
}
QUEUED: Final = 1000  # children that are given to a scheduler that has a queue of its own
MAX_NAMED: Final = 20  # failed jobs that a root prints
MAX_SHOWN: Final = 8 * MIB  # bytes of messages that wait to be read; those beyond are only in the layers' folders
MEMORY_SHARE: Final = 0.9  # of the machine's, for jobs
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s/:@?#\[\]]+):\d{1,5}(/[^\s?#]*)?")


class BadOption(AgentError):
    """An option of the command line cannot be used. Exit code 2."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """The command line. `spec` for a root, `parent` and `idents` for children that run one after another, each with its
    folder in `tracking`; a root's is the last of these. `events` takes JSON lines of jobs.
    """

    options: Options
    tracking: tuple[Path, ...]
    spec: Path | None = None
    idents: tuple[str, ...] = ()
    parent: str | None = None
    progress: bool = False
    events: int | None = None


class Root:
    """Nobody is above: messages and progress are printed, and of a `job` that is the root itself its start is told.

    `out` is the descriptor to print into, by `keep_printing`; None: it is closed.
    """

    def __init__(self, out: int | None, shared: Shared, job: str | None, *, progress: bool) -> None:
        self._shared, self._job, self._progress = shared, job, progress
        self._out = None if out is None else Outflow(out, "standard output", self._not_shown)
        self._shown = ""
        self.address = ""  # of its port
        self.started: float | None = None
        self.registered = trio.Event()

    async def register(self, server: str) -> Place:
        self.address = server
        if self.started is None:
            self.started = self._shared.clock()
            if self._job is not None:
                self._shared.tell({"event": "start", "path": [], "ident": self._job, "started": self.started})
        self.registered.set()
        return Place()

    def update(self, summary: Summary, result: Result) -> None:
        if self._progress:
            jobs = summary.jobs
            text = f"{jobs.passed + jobs.failed}/{jobs.total} done, {jobs.failed} failed, {jobs.active} active"
            if text != self._shown:
                self._shown = text
                self._print(text)

    async def complete(self, summary: Summary, result: Result, code: int) -> None:
        jobs = summary.jobs
        if not self._shared.options.quiet:
            self._print(f"{result}: {jobs.passed} of {jobs.total} jobs passed, {jobs.failed} failed", math.inf)
            for path in summary.failed[:MAX_NAMED]:
                self._print(f"failed: {'/'.join(path)}", math.inf)
            if jobs.failed > MAX_NAMED:
                self._print(f"and {jobs.failed - MAX_NAMED} more failed", math.inf)

    def log(self, severity: Severity, message: str, at: float) -> None:
        self._print(_message(severity, message, at))

    def _print(self, text: str, room: float = MAX_SHOWN) -> None:
        if self._out is not None:
            self._out.put(f"{text}\n".encode(errors="backslashreplace"), room)

    def _not_shown(self, count: int) -> bytes:
        text = f"{count} messages are not shown: these were read too slowly. The folders of the layers have them"
        return f"{_message('WARNING', text, self._shared.clock())}\n".encode()

    async def keep_printing(self) -> None:
        """Until it is closed and all is read."""
        if self._out is not None:
            with suppress(OSError):  # whoever read it has gone; the work goes on
                await self._out.keep_writing()

    def close(self, *, is_stopped: bool) -> None:
        """No more will come. Who stopped it waits no longer than LAST_S for a reader that stands still."""
        if self._out is not None:
            self._out.close(LAST_S if is_stopped else math.inf)


def _message(severity: Severity, message: str, at: float) -> str:
    return f"[{time.strftime('%H:%M:%S', time.localtime(at))}] [{severity:<7s}] {message}"


async def run(command: Command, settings: GatorSettings, leaves: Leaves | None = None, out: int | None = None) -> int:
    """One layer from start to end; the exit code. `leaves` is the cgroup that was delegated to this process. A root
    prints into the descriptor `out`.

    Raises DocumentError for a spec that cannot be used, BadOption, PeerUnreachable and PeerRefused for a parent, and
    OSError when it cannot listen, or its files cannot be made.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        if command.parent:
            code = await _run_children(command, settings, leaves)
        else:
            code = await _run_root(command, settings, leaves, out)
        nursery.cancel_scope.cancel()
    return code


async def _run_root(command: Command, settings: GatorSettings, leaves: Leaves | None, out: int | None) -> int:
    path = command.spec
    if path is None:
        raise BadOption("neither a spec nor a parent is named", remedy="Name a spec, or --parent and --id.")
    spec = specs.load(await trio.to_thread.run_sync(_read, path), str(path))
    options = command.options
    pool = _pool(options, settings)
    check(spec, pool)
    if command.events is not None:
        _check_writable(command.events)
    tracking = await trio.to_thread.run_sync(_make, command.tracking[-1])
    told = Told(spec.root, command.events) if command.events is not None else None
    shared = _shared(options, settings, pool, leaves, told.tell if told else lambda event: None)
    job = spec.root.ident if isinstance(spec.root, Job) else None
    root = Root(out, shared, job, progress=command.progress)
    for name in unlisted(spec.root, pool):
        log.warning("license %r is not in [gator.licenses]: any number is given", name)
    running = _Running()
    async with trio.open_nursery() as nursery:
        ended = trio.Event()
        nursery.start_soon(root.keep_printing)
        if told:
            nursery.start_soon(told.keep_writing)
        if options.hub:
            nursery.start_soon(_tell_hub, options, root, running, tracking, ended)
        async with _stopped_by_signals(running, is_root=True):
            await _run_attempts(spec.root, tracking, root, shared, running)
        root.registered.set()  # who was killed before has no address to tell the hub
        ended.set()
        layer = running.layer
        if told:
            if job is not None:
                told.tell(_end_of(layer, root.started, shared))
            told.close(shared.clock())
        root.close(is_stopped=running.is_stopped)
    return PASSED if layer.result == "SUCCESS" else FAILED


async def _run_attempts(node: Node, tracking: Path, root: Root, shared: Shared, running: "_Running") -> None:
    """No tier starts a job again that is the root: so it is done here, by the same rule (tree.py)."""
    attempts = 1 + ((node.retries or 0) if isinstance(node, Job) else 0)
    for attempt in range(1, attempts + 1):
        await running.take(_layer(node, tracking, root, shared, forward=not shared.options.quiet))
        layer = running.layer
        await layer.run()
        why = "timeout" if layer.code == TIMEOUT_CODE else "fail"
        is_over = layer.result == "SUCCESS" or running.is_stopped or why not in shared.settings.retry_on
        if is_over or attempt == attempts:
            return
        root.log("WARNING", f"'{layer.ident}' is started again: it ended with code {layer.code}", shared.clock())
        await trio.to_thread.run_sync(set_aside, tracking, attempt)


async def _tell_hub(options: Options, root: Root, running: "_Running", tracking: Path, ended: trio.Event) -> None:
    await root.registered.wait()
    kind = "wrapper" if isinstance(running.layer, Wrapper) else "tier"
    db_file = str(tracking / "db.sqlite")
    await hub.tell(options.hub, lambda: running.layer, root.address, kind, db_file, options.interval_s, ended)


async def _run_children(command: Command, settings: GatorSettings, leaves: Leaves | None) -> int:
    """Below a parent: one child after another, each with its own connection. The worst exit code."""
    assert command.parent is not None
    if not command.idents or any(not ident or specs.bad_ident(ident) for ident in command.idents):
        raise BadOption("a child needs an ident", remedy="Name it with --id.")
    if not _ADDRESS.fullmatch(command.parent):
        raise BadOption(
            f"--parent {command.parent}: no address", remedy="Write it as HOST:PORT, as the parent gave it."
        )
    if len(command.idents) > 1 and len(command.tracking) != len(command.idents):
        raise BadOption("each of several children needs a folder", remedy="Give a --tracking with each --id.")
    codes: list[int] = []
    folders = [await trio.to_thread.run_sync(_make, folder) for folder in command.tracking]
    running = _Running()
    async with _stopped_by_signals(running, is_root=False):
        for ident, tracking in zip(command.idents, folders, strict=True):
            try:
                with ungrouped():
                    codes.append(await _run_child(ident, tracking, command, settings, leaves, running))
            except PeerRefused as err:
                if len(command.idents) == 1:
                    raise
                log.warning("not run ident=%s: %s", ident, err)
                codes.append(FAILED)
            if codes[-1] == UNREACHABLE:
                return UNREACHABLE
    return max(codes) if len(codes) == len(command.idents) else FAILED  # the rest was killed


async def _run_child(
    ident: str,
    tracking: Path,
    command: Command,
    settings: GatorSettings,
    leaves: Leaves | None,
    running: "_Running",
) -> int:
    assert command.parent is not None
    options = command.options
    pool = _pool(options, settings)
    events: list[Callable[[dict[str, Any]], None]] = []
    shared = _shared(options, settings, pool, leaves, lambda event: events[0](event))
    try:
        uplink = Uplink(ident, command.parent, shared)
    except ValueError as err:
        raise BadOption(f"--parent: {err}", remedy="Write it as HOST:PORT, as the parent gave it.") from err
    events.append(uplink.tell)
    text: str | None = None
    async with trio.open_nursery() as nursery:
        over = trio.Event()

        async def hold_connection() -> None:
            await uplink.run()
            over.set()

        nursery.start_soon(hold_connection)
        with running.reaching(uplink):
            text = await uplink.fetch_spec()
        if text is None:
            log.warning("stopped before the parent was reached ident=%s", ident)
            nursery.cancel_scope.cancel()
            return FAILED
        spec = specs.load(text, f"the spec of {ident}", from_parent=True)
        node = msgspec.structs.replace(spec.root, ident=ident)
        layer = _layer(node, tracking, uplink, shared, forward=not options.quiet)
        uplink.below = layer

        async def stop_when_superseded() -> None:
            await uplink.until_superseded()
            await layer.stop()

        nursery.start_soon(stop_when_superseded)
        await running.take(layer)
        await layer.run()
        await over.wait()
        nursery.cancel_scope.cancel()
    if uplink.gave_up:
        return UNREACHABLE
    return PASSED if layer.result == "SUCCESS" else FAILED


def _check_writable(fd: int) -> None:
    """Raises BadOption."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    except (OSError, OverflowError) as err:
        raise BadOption(f"--events-fd {fd}: not open for writing", remedy="Name one that the caller opened.") from err


def new_tracking() -> Path:
    """The folder of a layer that is given none."""
    return Path("tracking") / datetime.now().isoformat(timespec="microseconds")  # two may begin in one second


def _make(folder: Path) -> Path:
    """The tracking folder, by its absolute path. Blocks. Raises BadOption."""
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as err:
        raise BadOption(
            f"--tracking {folder}: no folder to write in: {err.strerror}", remedy="Name one that can be made."
        ) from err
    return folder


def _end_of(layer: Wrapper | Tier, started: float | None, shared: Shared) -> dict[str, Any]:
    """Of a job that is the root itself: no tier tells of it."""
    return {
        "event": "end",
        "path": [],
        "ident": layer.ident,
        "result": layer.result,
        "code": layer.code,
        "pruned": False,
        "why": None,
        "started": started,
        "ended": shared.clock(),
        "folder": "",
        "metrics": dict(layer.summary().metrics),
    }


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(specs.MAX_SPEC + 1)
    except OSError as err:
        raise DocumentError(path, 0, "", f"cannot be read: {err.strerror}", remedy="Correct the path.") from err


def _layer(node: Node, folder: Path, above: Above, shared: Shared, *, forward: bool) -> Wrapper | Tier:
    if isinstance(node, Job):
        held = Held(shared.pool, shared.pool.take(demand(node)) or Grant(Demand(0)))
        grant, release = held.grant, held.give
        return Wrapper(node, folder, above, shared, grant, forward=forward, is_many=False, release=release)
    return Tier(node, folder, above, shared, _scheduler(shared), forward=forward)


def _scheduler(shared: Shared) -> Scheduler | None:
    """Who runs the children; None: this process."""
    options = shared.options
    args = dict(options.sched_args)
    is_here = (
        options.scheduler == "local" and not options.isolate and "command" not in args and args.get("isolated") != "1"
    )
    try:
        return None if is_here else schedulers.choose(options.scheduler, args, shared.env, shared.leaves)
    except ValueError as err:
        raise BadOption(f"--scheduler: {err}", remedy="Correct --scheduler or --sched-arg.") from err


class _Running:
    """The layer that runs. What a signal stops: it, any that would be started after it, the wait for its parent."""

    def __init__(self) -> None:
        self._layer: Wrapper | Tier | None = None
        self._uplink: Uplink | None = None
        self._reaching = trio.CancelScope()
        self.is_stopped = False

    @property
    def layer(self) -> Wrapper | Tier:
        assert self._layer is not None
        return self._layer

    def reaching(self, uplink: Uplink) -> trio.CancelScope:
        """To be entered: what it takes to reach the parent, who is to be told of the end even by who is stopped."""
        self._uplink = uplink
        if self.is_stopped:
            uplink.hurry()
        self._reaching = trio.CancelScope(deadline=trio.current_time() + LAST_TRY_S if self.is_stopped else math.inf)
        return self._reaching

    async def take(self, layer: Wrapper | Tier) -> None:
        self._layer = layer
        if self.is_stopped:
            await layer.stop()

    async def stop(self) -> None:
        self.is_stopped = True
        if self._uplink is not None:
            self._uplink.hurry()
        self._reaching.deadline = trio.current_time() + LAST_TRY_S
        if self._layer is not None:
            await self._layer.stop()


@asynccontextmanager
async def _stopped_by_signals(running: _Running, *, is_root: bool) -> AsyncIterator[None]:
    """A root is stopped by SIGINT and SIGTERM, and killed by the second; a child leaves SIGINT to its parent.

    Who is killed does not go on: its block ends.
    """
    async with trio.open_nursery() as nursery:

        async def listen(*, task_status: trio.TaskStatus[None]) -> None:
            stops = 0
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for received in signals:
                    if received == signal.SIGINT and not is_root:
                        continue
                    stops += 1
                    if stops > 1:
                        nursery.cancel_scope.cancel()
                        return
                    nursery.start_soon(running.stop)

        await nursery.start(listen)
        yield
        nursery.cancel_scope.cancel()


def _shared(
    options: Options,
    settings: GatorSettings,
    pool: Pool,
    leaves: Leaves | None,
    tell: Callable[[dict[str, Any]], None],
) -> Shared:
    return Shared(
        options=options,
        settings=settings,
        pool=pool,
        env=environ(os.environ, keep=("*",)),
        metrics=Metrics(),
        clock=time.time,
        tell=tell,
        host=socket.gethostname(),
        leaves=leaves,
    )


def _pool(options: Options, settings: GatorSettings) -> Pool:
    """What there is to give: by `--sched-arg`, else what the machine has. Raises BadOption."""
    args = dict(options.sched_args)
    if unknown := args.keys() - KNOWN_ARGS:
        raise BadOption(f"--sched-arg {min(unknown)}: not known", remedy=f"Use {', '.join(sorted(KNOWN_ARGS))}.")
    _number(args, "batch", 1)  # schedulers.choose takes it as it is
    if options.scheduler != "local":  # it knows what there is
        return Pool(_number(args, "concurrency", QUEUED), _number(args, "memory", 1 << 60), {})
    cpus = sorted(os.sched_getaffinity(0))
    slots = _number(args, "concurrency", len(cpus))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = _number(args, "memory", int(total * MEMORY_SHARE))
    return Pool(slots, memory, {**settings.licenses, **_licenses(args)}, _cpus(args, cpus))


def _cpus(args: Mapping[str, str], usable: list[int]) -> list[int]:
    """Those of `--sched-arg cpus=0,1` that there are. Raises BadOption."""
    text = args.get("cpus")
    if text is None:
        return usable
    if not re.fullmatch(r"([0-9]{1,6}(,[0-9]{1,6})*)?", text):
        raise BadOption(f"--sched-arg cpus={text}: no list of CPUs", remedy="Write it as cpus=0,1.")
    return [cpu for cpu in usable if str(cpu) in text.split(",")]


def _licenses(args: Mapping[str, str]) -> dict[str, int]:
    """Those of `--sched-arg licenses=a=1,b=2`. Raises BadOption."""
    pairs = [each.rpartition("=") for each in args.get("licenses", "").split(",") if each]
    return {name: _number({f"licenses={name}": count}, f"licenses={name}", 0) for name, _, count in pairs}


def _number(args: Mapping[str, str], name: str, default: int) -> int:
    text = args.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 20):
        raise BadOption(f"--sched-arg {name}={text}: no whole number", remedy=f"Write it as {name}=4.")
    return int(text)


def check(spec: Spec, pool: Pool) -> None:
    """Refuse what could never run for want of resources. Raises DocumentError with its place."""
    todo: list[tuple[Node, tuple[str, ...]]] = [(spec.root, (spec.root.ident,))]
    while todo:
        node, at = todo.pop()
        if isinstance(node, Group):
            todo += [(job, (*at, job.ident)) for job in node.jobs]
        elif why := pool.why_never(demand(node)):
            raise spec.error(at, f"resources: {why}", remedy="Ask for less, or give more by --sched-arg.")


def unlisted(node: Node, pool: Pool) -> list[str]:
    """The licences that a tree asks for and nobody counts."""
    if isinstance(node, Job):
        return pool.unlisted(demand(node))
    return sorted({name for job in node.jobs for name in unlisted(job, pool)})
