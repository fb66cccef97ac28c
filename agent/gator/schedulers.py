"""Where children run that are not tasks of this process: a process here, a job of Slurm.

Another scheduler is another class here with `run`, and a line in `choose`.

Source: protocols/gator.md, "Schedulers", "Command line".
"""

import logging
import shlex
import signal
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
END_S = 10.0  # for a child that was told to stop, before its processes are killed


class CannotSchedule(AgentError):
    """The scheduler did not take a child; `what` is its own word."""


class Order(msgspec.Struct, frozen=True):
    """A child to start: `flags` are Gator's, without the parent's address. `jobs` is how many are in it."""

    ident: str
    folder: Path
    parent: str
    flags: tuple[str, ...]
    slots: int
    memory: int
    licenses: tuple[tuple[str, int], ...]
    timeout_s: float | None


class Scheduler(Protocol):
    """Runs one child from start to end."""

    name: str

    async def run(self, order: Order, waits: Callable[[], None]) -> None:
        """Returns when it has ended; cancelled, it is ended with all its tree. `waits` is called while it queues.

        Raises CannotSchedule.
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

    async def run(self, order: Order, waits: Callable[[], None]) -> None:
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


def choose(name: str, args: Mapping[str, str], env: Mapping[str, str]) -> Scheduler:
    """The scheduler of that name, with its `--sched-arg`s. Raises ValueError."""
    if name == "local":
        return Local(env, args.get("command"))
    raise ValueError(f"there is no scheduler {name!r}; use local")
