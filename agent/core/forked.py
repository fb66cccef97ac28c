"""What a child process does to itself between fork and exec. process.py tells why it is done there, and in Python."""

import os
import pwd
import resource
import signal
import sys
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.core.process import Limits

# Without what subprocess sets back itself. glibc keeps 32 and 33 for itself: they may be ignored, and nobody can tell.
_SETTABLE = signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}


def before_exec(
    limits: "Limits", held: Container[str], procs: int | None, account: pwd.struct_passwd | None, ignored: Sequence[int]
) -> Callable[[], None]:
    """What the child does. `held` are its cgroup's controllers, `procs` a descriptor to enter it, `ignored` signals."""
    groups = os.getgrouplist(account.pw_name, account.pw_gid) if account else []
    wanted = {
        resource.RLIMIT_NOFILE: limits.nofile,
        resource.RLIMIT_CORE: limits.core,
        resource.RLIMIT_CPU: limits.cpu,
        resource.RLIMIT_NPROC: None if "pids" in held else limits.processes,
        resource.RLIMIT_DATA: None if "memory" in held else limits.memory,
        resource.RLIMIT_AS: limits.address_space,
    }
    ceilings = [
        (which, (min(value, top), min(value + (which == resource.RLIMIT_CPU), top)))
        for which, value in wanted.items()
        if value is not None
        for top in [_top(resource.getrlimit(which)[1])]
    ]
    oom_score_adj = None if limits.oom_score_adj is None else str(limits.oom_score_adj).encode()

    def before_exec() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_DFL)
        if procs is not None:
            os.write(procs, b"0")
        if oom_score_adj is not None:
            with suppress(OSError):
                fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
                os.write(fd, oom_score_adj)
        with suppress(OSError):
            os.nice(limits.nice)
        if limits.affinity is not None:
            os.sched_setaffinity(0, limits.affinity)
        if account:
            os.setgroups(groups)
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        for which, pair in ceilings:  # last: the next allocation may fail
            resource.setrlimit(which, pair)

    return before_exec


def ignored_signals() -> list[int]:
    """Those of _SETTABLE that we ignore: a shell's background jobs have SIGINT ignored, and that is inherited.

    From the kernel, as asking Python for each costs more than to start a child.
    """
    with open("/proc/self/status", "rb") as status:
        line = next(line for line in status if line.startswith(b"SigIgn:"))
    bits = int(line.split()[1], 16)
    return [number for number in _SETTABLE if bits >> (number - 1) & 1] if bits else []


def _top(hard: int) -> int:
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
