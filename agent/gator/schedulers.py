"""Where children run that are not tasks of this process: a process here, a job of Slurm.

Another scheduler is another class here with `run`, and a line in `choose`.

Source: protocols/gator.md, "Schedulers", "Command line".
"""

import logging
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from agent.core.cgroup import Leaves
from agent.core.errors import AgentError
from agent.core.process import UNLIMITED, Child, ChildFailedToStart, Pipe, Spec, Step, open_child

log = logging.getLogger(__name__)

MAX_PRINTED = 1024 * 1024  # bytes
SETTINGS = "AGENT_GATOR__"  # variables that children are to have as the parent has them
POLL_S = 10.0  # between two looks at Slurm's queue
GATHER_S = 0.2  # that a batch waits for more like it
COMMAND_S = 60.0  # for one of its commands
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
STAY_S = 30.0  # that a process may live on when its layer has told its end
END_S = 10.0  # for a child that was told to stop, before its processes are killed


class CannotSchedule(AgentError):
    """The scheduler did not take a child; `what` is its own word."""


class Need(msgspec.Struct, frozen=True):
    """What like children have in common: the address of their parent, Gator's other flags, and what the child's own
    process and task need: `cores`, `memory` (bytes), `licenses`, seconds.
    """

    parent: str
    flags: tuple[str, ...]
    cores: int = 1
    memory: int = 0
    licenses: tuple[tuple[str, int], ...] = ()
    timeout_s: float | None = None
    is_job: bool = True


class Order(msgspec.Struct, frozen=True):
    """A child to start. `cpus` are those that it may run on, by number; none: all."""

    ident: str
    folder: Path
    need: Need
    cpus: tuple[int, ...] = ()

    def flags(self) -> tuple[str, ...]:
        """Those that are its own."""
        return "--id", self.ident, "--tracking", str(self.folder)


class Scheduler(Protocol):
    """Runs one child from start to end."""

    name: str

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> str:
        """Returns when it has ended, with how; cancelled, it is ended with all its tree. `waits` is called while it
        queues, `over` is set when the child has told its end itself. Raises CannotSchedule.
        """


def own_command() -> tuple[str, ...]:
    """How this agent starts itself as a layer."""
    if getattr(sys, "frozen", False):
        return sys.executable, "gator"
    return sys.executable, "-P", "-m", "agent", "gator"  # -P: not a folder that is called agent here


class Local:
    """A process of this machine, in a leaf of `leaves`. `command` is what is started in place of the agent itself.

    A parent's address that ends in a secret goes by environment: arguments are seen by all users. Other Gators take it
    by `--parent` only.
    """

    name = "local"

    def __init__(self, env: Mapping[str, str], command: str | None, leaves: Leaves | None = None) -> None:
        self._env, self._leaves = env, leaves
        self._is_ours = not command
        self._command = tuple(shlex.split(command)) if command else own_command()

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> str:
        parent = order.need.parent
        place, _, secret = parent.partition("/")
        named = () if secret and self._is_ours else ("--parent", parent)
        argv = (*self._command, *named, *order.flags(), *order.need.flags)
        env = {**self._env, "GATOR_PARENT": parent}
        limits = msgspec.structs.replace(UNLIMITED, affinity=order.cpus or None)
        spec = Spec(argv=argv, cwd=Path.cwd(), env=env, mark=f"{place}.{order.ident}", limits=limits)
        order.folder.mkdir(parents=True, exist_ok=True)
        try:
            async with open_child(spec, leaves=self._leaves) as child, trio.open_nursery() as nursery:
                with _drained(child, order.folder / "layer.log", nursery):
                    with trio.CancelScope() as staying:
                        async with trio.open_nursery() as watching:
                            watching.start_soon(_cancel_behind, over, staying)
                            try:
                                exit_ = await child.wait()
                            except trio.Cancelled:
                                with trio.CancelScope(shield=True):
                                    await child.stop([Step(signal.SIGTERM, END_S, "child")])
                                raise
                            watching.cancel_scope.cancel()
                    if staying.cancelled_caught:
                        log.warning("ended: it has told its end, and stayed for %g s ident=%s", STAY_S, order.ident)
                        return f"by us, {STAY_S:g} s behind its own word"
                    await child.finish()
        except ChildFailedToStart as err:
            raise CannotSchedule(err.what, remedy=err.remedy) from err
        return f"by {exit_.signal}" if exit_.signal else f"with code {exit_.code}"


async def _cancel_behind(over: trio.Event, staying: trio.CancelScope) -> None:
    await over.wait()
    await trio.sleep(STAY_S)
    staying.cancel()


@contextmanager
def _drained(child: Child, path: Path, nursery: trio.Nursery) -> Iterator[None]:
    """What the child prints is read in the block, also when that is cancelled: its end would wait for its pipes."""
    scopes = [trio.CancelScope(shield=True) for _ in child.streams]
    for scope, pipe in zip(scopes, child.streams.values(), strict=True):
        nursery.start_soon(_drain, scope, pipe, path)
    try:
        yield
    finally:
        for scope in scopes:
            scope.cancel()


async def _drain(scope: trio.CancelScope, pipe: Pipe, path: Path) -> None:
    """What the child prints, kept up to a mebibyte."""
    left = MAX_PRINTED
    # Closed before its end: somebody outside its tree holds it.
    with scope, suppress(trio.ClosedResourceError):
        while data := await pipe.receive_some():
            if left > 0:
                kept = data[:left]
                left -= len(kept)
                try:
                    await trio.to_thread.run_sync(_append, path, kept)
                except OSError as err:
                    left = 0
                    log.warning("what a child prints is not kept path=%s error=%s", path, err.strerror)


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


class Allocation:
    """A job of Slurm that runs like children one after another, and the ends that they have told."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.overs: list[trio.Event] = []
        self.full = trio.Event()  # nobody may join any more
        self.submitting = trio.Lock()
        self.job: str | None = None
        self.refusal: CannotSchedule | None = None
        self.submitted_at = 0.0
        self.left = 0  # children that are waited for

    def join(self, order: Order, over: trio.Event, most: int) -> None:
        self.orders.append(order)
        self.overs.append(over)
        self.left += 1
        if len(self.orders) >= most:
            self.full.set()

    def leave(self, order: Order, over: trio.Event) -> None:
        """It is waited for no more."""
        self.left -= 1
        if self.job is None:
            self.orders.remove(order)
            self.overs.remove(over)

    def is_turn_of(self, over: trio.Event) -> bool:
        """Have all before it ended?"""
        return all(each.is_set() for each in self.overs[: self.overs.index(over)])


class Slurm:
    """Jobs of Slurm. One squeue tells of all of a tier's, every 10 s; what is missing there has ended.

    Up to `batch` like jobs share an allocation, which has room for one and runs them one after another: a job of its
    own costs a second. The parent's address goes by environment: arguments are seen by all users. A squeue that fails
    proves nothing.
    """

    name = "slurm"

    def __init__(self, env: Mapping[str, str], partition: str | None, batch: int = 1) -> None:
        self._env, self._partition, self._batch = dict(env), partition, batch
        self._open: dict[Need, Allocation] = {}  # that like children may join
        self._asking = trio.Lock()
        self._asked_at = -math.inf  # when the last squeue that told something began
        self._states: dict[str, str] = {}

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> str:
        place = self._join(order, over)
        has_ended = False
        try:
            async with place.submitting:
                if place.refusal is not None:
                    raise place.refusal
                if place.job is None:
                    with trio.move_on_after(GATHER_S):
                        await place.full.wait()
                    self._close(order.need, place)
                    with trio.CancelScope(shield=True):  # what was submitted is known, to be cancelled
                        place.job = await self._submit(place)
                    place.submitted_at = trio.current_time()
            how = await self._watch(place, waits, over)
            has_ended = True
        finally:  # not `except trio.Cancelled`: out of a command that runs it comes as a group
            if not has_ended:
                over.set()  # those behind it do not wait for it
                if place.job is not None and place.left == 1:
                    with trio.CancelScope(shield=True):
                        await self._command("scancel", place.job)
            place.leave(order, over)
        return how

    async def _watch(self, place: Allocation, waits: Callable[[], None], over: trio.Event) -> str:
        assert place.job is not None
        while True:
            with trio.move_on_after(POLL_S):
                await over.wait()
                return "told"  # its process ends by itself, and the queue would tell us late
            await self._poll()
            state = self._states.get(place.job)
            if state in ENDED or (state is None and self._asked_at > place.submitted_at):
                return f"job {place.job} of Slurm is {state or 'gone'}"
            if state in WAITING or not place.is_turn_of(over):
                waits()

    def _join(self, order: Order, over: trio.Event) -> Allocation:
        place = self._open.setdefault(order.need, Allocation())
        most = self._batch if order.need.is_job else 1
        place.join(order, over, most)
        if place.full.is_set():
            self._close(order.need, place)
        return place

    def _close(self, need: Need, place: Allocation) -> None:
        if self._open.get(need) is place:
            del self._open[need]

    async def _submit(self, place: Allocation) -> str:
        orders, need = place.orders, place.orders[0].need
        for order in orders:
            order.folder.mkdir(parents=True, exist_ok=True)
        passed = ("GATOR_PARENT", "PATH", *sorted(name for name in self._env if name.startswith(SETTINGS)))
        argv = ["sbatch", "--parsable", "--no-requeue", f"--export={','.join(passed)}"]
        argv += [f"--job-name={orders[0].ident}", f"--output={orders[0].folder / 'layer.log'}"]
        argv.append(f"--cpus-per-task={max(need.cores, 1)}")
        if need.memory:
            argv.append(f"--mem={max(1, math.ceil(need.memory / 2**20))}M")
        if need.licenses:
            argv.append("--licenses=" + ",".join(f"{name}:{count}" for name, count in need.licenses))
        if need.timeout_s is not None:  # its wrapper ends it; Slurm only if that is gone too
            argv.append(f"--time={math.ceil(len(orders) * need.timeout_s / 60) + 1}")
        if self._partition:
            argv.append(f"--partition={self._partition}")
        flags = [flag for order in orders for flag in order.flags()]
        argv.append("--wrap=exec " + shlex.join((*own_command(), *flags, *need.flags)))
        done = await self._command(*argv, GATOR_PARENT=need.parent)
        if done is None or done.returncode:
            said = "no answer" if done is None else done.stderr.decode("utf-8", "replace").strip()
            place.refusal = CannotSchedule(
                f"sbatch: {said or 'it failed'}", remedy="See what the job asks for, and sinfo."
            )
            raise place.refusal
        return done.stdout.decode("ascii", "replace").strip().partition(";")[0]  # "ID" or "ID;cluster"

    async def _poll(self) -> None:
        async with self._asking:
            now = trio.current_time()
            if now - self._asked_at < POLL_S / 2:
                return  # another child's has just told
            done = await self._command("squeue", "-h", "-t", "all", "--me", "-o", "%i|%T|%r")
            if done is None or done.returncode:
                log.warning("squeue failed error=%s", done and done.stderr.decode("utf-8", "replace").strip())
                return
            lines = (line.split("|") for line in done.stdout.decode("utf-8", "replace").splitlines())
            self._states = {fields[0]: fields[1] for fields in lines if len(fields) > 1}
            self._asked_at = now

    async def _command(self, *argv: str, **env: str) -> "subprocess.CompletedProcess[bytes] | None":
        """One of Slurm's own; None when it does not end in time, or is not there."""
        with trio.move_on_after(COMMAND_S):
            try:
                return await trio.run_process(
                    argv, env={**self._env, **env}, capture_stdout=True, capture_stderr=True, check=False
                )
            except OSError as err:
                log.warning("cannot run program=%s error=%s", argv[0], err.strerror)
        return None


def choose(name: str, args: Mapping[str, str], env: Mapping[str, str], leaves: Leaves | None = None) -> Scheduler:
    """The scheduler of that name, with its `--sched-arg`s. Raises ValueError."""
    match name:
        case "local":
            return Local(env, args.get("command"), leaves)
        case "slurm":
            return Slurm(env, args.get("partition"), int(args.get("batch", 1)))
        case _:
            raise ValueError(f"there is no scheduler {name!r}; use local or slurm")
