"""The end of a root's tasks when the root itself was killed: a process of its own waits for that.

    root -- fork, fork --> guard: reads a pipe; a byte: the root has ended; its end: the root is dead, its tasks follow,
                                 and its messages.log says so

Children that are processes of their own are left alone: they go on, and wait for a parent as long as they may.

Source: protocols/gator.md, "Reconnect"; protocols/suites.md, "A run".
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final, NoReturn

import trio

from agent.core.processtree import MARK, TreeSurvived, nested, sweep

PIPE: Final = 3
TASKS: Final = "task"  # what the marks of a layer's tasks begin with, below that of its process


def task_mark(path: tuple[str, ...], ident: str) -> str:
    """The mark of a job's processes."""
    return f"{TASKS}/{'.'.join((*path, ident))}"


@contextmanager
def guarded(root: Path | None) -> Iterator[None]:
    """Gives this process a mark of its own, as the same spec may run twice at a time; a root is watched within.

    `root` is its folder, whose messages.log is told of its death; None: this is no root.

    To be entered before a trio loop or a thread is begun: this forks. Raises OSError.
    """
    before, mark = os.environ.get(MARK), nested(f"gator.{os.getpid()}.{time.time_ns()}")
    os.environ[MARK] = mark
    try:
        with nullcontext() if root is None else _watched(root.absolute()):
            yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before


@contextmanager
def _watched(root: Path) -> Iterator[None]:
    reading, writing = os.pipe()
    # Twice: as a child of this process it would be taken for what a task left.
    if not (pid := os.fork()):
        if os.fork():
            os._exit(0)
        _guard(reading, root)
    os.waitpid(pid, 0)
    os.close(reading)
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # somebody has killed the guard
            os.write(writing, b".")
        os.close(writing)


def _guard(reading: int, root: Path) -> NoReturn:
    try:
        os.setsid()
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        # Whoever reads the root's output waits for its end, and not for ours. Nor is the pipe held open from here.
        fd = os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for number in (1, 2):
            os.dup2(fd, number)
        os.dup2(reading, PIPE)
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the one that listed them
                if int(name) > PIPE:
                    os.close(int(name))
        if not os.read(PIPE, 1):
            ended = "its tasks were ended"
            try:
                trio.run(sweep, TASKS)
            except TreeSurvived as err:
                ended = str(err)
            with suppress(OSError), open(root / "messages.log", "a") as file:  # nobody is left who could be told else
                file.write(f"[{time.strftime('%H:%M:%S')}] [CRITICAL] this root was killed: {ended}\n")
    finally:
        os._exit(0)
