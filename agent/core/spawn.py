"""Start a program with its limits, user and descriptors: what native/spawn.c is told.

OSError     `filename` is the program, the folder to run it in, or one of PARTS that could not be set
"""

import os
import pwd
import resource
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent._native import ffi, lib

if TYPE_CHECKING:
    from agent.core.process import Limits

PARTS = {
    lib.SPAWN_DESCRIPTORS: "its descriptors",
    lib.SPAWN_CGROUP: "its cgroup",
    lib.SPAWN_AFFINITY: "its CPUs",
    lib.SPAWN_USER: "its user",
    lib.SPAWN_LIMITS: "its limits",
}


def program(
    argv: Sequence[str],
    *,
    cwd: Path,
    makes_cwd: bool = False,
    env: Mapping[str, str],
    stdin: int | None,
    stdout: int,
    stderr: int,
    kept: Sequence[int],
    limits: "Limits",
    held: Container[str],
    procs: int | None,
    account: pwd.struct_passwd | None,
) -> Callable[[], int]:
    """What starts it: gives its pid once it runs, raises OSError. It may be called in a thread; it waits for the disk.

    `makes_cwd`: the folder is made for it. `held` are the controllers of its cgroup, `procs` a descriptor to enter
    that. Without `stdin` it is at its end.
    """
    kept_alive: list[Any] = []

    def new(kind: str, *given: Any) -> Any:
        made = ffi.new(kind, *given)
        kept_alive.append(made)
        return made

    def texts(parts: Sequence[str | bytes]) -> Any:
        return new("char *[]", [*(new("char[]", os.fsencode(part)) for part in parts), ffi.NULL])

    where = [argv[0]] if "/" in argv[0] else [os.path.join(folder, argv[0]) for folder in os.get_exec_path(env)]
    groups = os.getgrouplist(account.pw_name, account.pw_gid) if account else []
    ceilings = _ceilings(limits, held)
    what = {
        "paths": texts(where),
        "argv": texts(argv),
        "env": texts([f"{name}={value}" for name, value in env.items()]),
        "cwd": new("char[]", os.fsencode(cwd)),
        "makes_cwd": makes_cwd,
        "in": -1 if stdin is None else stdin,
        "out": stdout,
        "err": stderr,
        "kept": new("int[]", list(kept)),
        "kept_count": len(kept),
        "procs": -1 if procs is None else procs,
        "oom_score_adj": ffi.NULL if limits.oom_score_adj is None else new("char[]", b"%d" % limits.oom_score_adj),
        "nice": limits.nice,
        "ceilings": new("struct ceiling[]", ceilings),
        "ceiling_count": len(ceilings),
    }
    if limits.affinity is not None:
        bits = sum(1 << cpu for cpu in {*limits.affinity})
        mask = bits.to_bytes(8 * (bits.bit_length() // 64 + 1), sys.byteorder)
        what |= {"cpus": new("uint8_t[]", mask), "cpus_size": len(mask)}
    if account:
        what |= {"is_other_user": 1, "uid": account.pw_uid, "gid": account.pw_gid}
        what |= {"groups": new("uint32_t[]", groups), "group_count": len(groups)}
    return partial(_start, new("struct spawn *", what), kept_alive, argv[0], cwd)


def _start(what: Any, kept_alive: list[Any], name: str, cwd: Path) -> int:
    fault = ffi.new("struct spawn_fault *")
    pid = int(lib.spawn_program(what, fault))
    if pid > 0:
        return pid
    stages = {lib.SPAWN_EXEC: name, lib.SPAWN_CWD: str(cwd)} | PARTS
    raise OSError(fault.number, os.strerror(fault.number), stages.get(fault.stage))


def _ceilings(limits: "Limits", held: Container[str]) -> list[tuple[int, int, int]]:
    """What is to be limited, soft and hard: never above our own hard limits."""
    wanted = {
        resource.RLIMIT_NOFILE: limits.nofile,
        resource.RLIMIT_FSIZE: limits.file_size,
        resource.RLIMIT_CORE: limits.core,
        resource.RLIMIT_CPU: limits.cpu,
        resource.RLIMIT_NPROC: None if "pids" in held else limits.processes,
        resource.RLIMIT_DATA: None if "memory" in held else limits.memory,
        resource.RLIMIT_AS: limits.address_space,
    }
    return [
        (which, min(value, top), min(value + (which == resource.RLIMIT_CPU), top))
        for which, value in wanted.items()
        if value is not None
        for top in [_top(resource.getrlimit(which)[1])]
    ]


def _top(hard: int) -> int:
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
