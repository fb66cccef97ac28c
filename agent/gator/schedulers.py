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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from agent.core.errors import AgentError
from agent.core.process import UNLIMITED, ChildFailedToStart, Pipe, Spec, Step, open_child

log = logging.getLogger(__name__)

MAX_PRINTED = 1024 * 1024  # bytes
POLL_S = 10.0  # between two looks at Slurm's queue
COMMAND_S = 60.0  # for one of its commands
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
ENDED = {
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    ),
    "REVOKED",
}
END_S = 10.0  # for a child that was told to stop, before its processes are killed


class CannotSchedule(AgentError):
    """The scheduler did not take a child; `what` is its own word."""


class Order(msgspec.Struct, frozen=True):
    """A child to start: `flags` are Gator's, without the parent's address. `cores`, `memory` (bytes) and `licenses` are
    what its own process and task need.
    """

    ident: str
    folder: Path
    parent: str
    flags: tuple[str, ...]
    cores: int
    memory: int
    licenses: tuple[tuple[str, int], ...]
    timeout_s: float | None


class Scheduler(Protocol):
    """Runs one child from start to end."""

    name: str

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> None:
        """Returns when it has ended; cancelled, it is ended with all its tree. `waits` is called while it queues.

        `over` is set when the child has told its end itself. Raises CannotSchedule.
        """


def own_command() -> tuple[str, ...]:
    """How this agent starts itself as a layer."""
    if getattr(sys, "frozen", False):
        return sys.executable, "gator"
    return sys.executable, "-P", "-m", "agent", "gator"  # -P: not a folder that is called agent here


class Local:
    """A process of this machine. `command` is what is started in place of the agent itself."""

    name = "local"

    def __init__(self, env: Mapping[str, str], command: str | None) -> None:
        self._env = env
        self._command = tuple(shlex.split(command)) if command else own_command()

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> None:
        argv = (*self._command, "--parent", order.parent, *order.flags)
        spec = Spec(
            argv=argv, cwd=Path.cwd(), env=dict(self._env), mark=order.parent + "." + order.ident, limits=UNLIMITED
        )
        order.folder.mkdir(parents=True, exist_ok=True)
        try:
            async with open_child(spec) as child, trio.open_nursery() as nursery:
                for pipe in child.streams.values():
                    nursery.start_soon(_drain, pipe, order.folder / "layer.log")
                try:
                    await child.wait()
                except trio.Cancelled:
                    with trio.CancelScope(shield=True):
                        await child.stop([Step(signal.SIGTERM, END_S, "child")])
                    raise
                await child.finish()
        except ChildFailedToStart as err:
            raise CannotSchedule(err.what, remedy=err.remedy) from err


async def _drain(pipe: Pipe, path: Path) -> None:
    """What the child prints, kept up to a mebibyte."""
    left = MAX_PRINTED
    try:
        while data := await pipe.receive_some():
            if left > 0:
                await trio.to_thread.run_sync(_append, path, data[:left])
                left -= len(data)
    except trio.ClosedResourceError:
        pass  # somebody outside its tree holds it


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


class Slurm:
    """Jobs of Slurm. One squeue tells of all of a tier's, every 10 s; what is missing there has ended.

    The parent's address goes by environment: arguments are seen by all users. A squeue that fails proves nothing.
    """

    name = "slurm"

    def __init__(self, env: Mapping[str, str], partition: str | None) -> None:
        self._env, self._partition = dict(env), partition
        self._asking = trio.Lock()
        self._asked_at = -math.inf  # when the last squeue that told something began
        self._states: dict[str, str] = {}

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> None:
        job = await self._submit(order)
        submitted_at = trio.current_time()
        try:
            while True:
                with trio.move_on_after(POLL_S):
                    await over.wait()
                    return  # its process ends by itself, and the queue would tell us late
                await self._poll()
                state = self._states.get(job)
                if state in WAITING:
                    waits()
                elif state in ENDED or (state is None and self._asked_at > submitted_at):
                    return
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._command("scancel", job)
            raise

    async def _submit(self, order: Order) -> str:
        order.folder.mkdir(parents=True, exist_ok=True)
        argv = ["sbatch", "--parsable", "--no-requeue", "--export=GATOR_PARENT,PATH", f"--job-name={order.ident}"]
        argv += [f"--output={order.folder / 'layer.log'}", f"--cpus-per-task={max(order.cores, 1)}"]
        if order.memory:
            argv.append(f"--mem={max(1, math.ceil(order.memory / 2**20))}M")
        if order.licenses:
            argv.append("--licenses=" + ",".join(f"{name}:{count}" for name, count in order.licenses))
        if order.timeout_s is not None:  # its wrapper ends it; Slurm only if that is gone too
            argv.append(f"--time={math.ceil(order.timeout_s / 60) + 1}")
        if self._partition:
            argv.append(f"--partition={self._partition}")
        argv.append("--wrap=exec " + shlex.join((*own_command(), *order.flags)))
        done = await self._command(*argv, GATOR_PARENT=order.parent)
        if done is None or done.returncode:
            said = "no answer" if done is None else done.stderr.decode("utf-8", "replace").strip()
            raise CannotSchedule(f"sbatch: {said or 'it failed'}", remedy="See what the job asks for, and sinfo.")
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


def choose(name: str, args: Mapping[str, str], env: Mapping[str, str]) -> Scheduler:
    """The scheduler of that name, with its `--sched-arg`s. Raises ValueError."""
    match name:
        case "local":
            return Local(env, args.get("command"))
        case "slurm":
            return Slurm(env, args.get("partition"))
        case _:
            raise ValueError(f"there is no scheduler {name!r}; use local or slurm")
