"""One cgroup v2 leaf for each run, where the service manager has delegated a cgroup to us.

A leaf knows every process of a run, whatever that does with sessions, parents and environments; it ends them all at
once, and it holds limits for all together. Where nothing is delegated, processtree.py and rlimits stand in.

    agent.service/            home: delegated (Delegate= in suites.conf), and must hold no process itself
        emissary-agent/       we, moved there by `claim`
        run-1-r42/            a leaf

Source: protocols/packaging.md 4 (`Delegate`); protocols/suites.md, "A run"; protocols/gator.md, "Schedulers".
"""

import errno
import fcntl
import itertools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

log = logging.getLogger(__name__)

OWN_LEAF = "emissary-agent"
CONTROLLERS = ("memory", "pids", "cpu")
_CPU_PERIOD_US = 100_000  # the kernel's own default for cpu.max


class Leaf:
    """The cgroup of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def limit(self, file: str, value: str) -> bool:
        """Write a limit ("memory.max"); False where its controller was not delegated."""
        with suppress(FileNotFoundError):
            _write(self.folder / file, value)
            return True
        return False

    def open_procs(self) -> int:
        """A descriptor for a process to write "0" to, which moves it in. The caller closes it."""
        return os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def pids(self) -> list[int]:
        """Who is in it, or in a cgroup that was made below it; zombies too."""
        return [pid for folder in self._folders() for pid in _pids_in(folder)]

    def kill(self) -> None:
        """SIGKILL to all in it, and to what they fork meanwhile."""
        _write(self.folder / "cgroup.kill", "1")

    def oom(self) -> bool | None:
        """Whether the kernel killed one of them for want of memory; None where the controller was not delegated."""
        try:
            events = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        except FileNotFoundError:
            return None
        return int(events["oom_kill"]) > 0

    def remove(self) -> None:
        """Remove it, once all in it have ended."""
        for folder in self._folders():
            try:
                folder.rmdir()
            except OSError as error:
                log.warning("cgroup stays folder=%s error=%s", folder, error.strerror)

    def _folders(self) -> Iterator[Path]:
        """It and all below it, the lowest first."""
        for folder, _, _ in os.walk(self.folder, topdown=False):
            yield Path(folder)


class Leaves:
    """A cgroup that is ours. `controllers` are those of CONTROLLERS whose limits its leaves can hold."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.controllers = frozenset((home / "cgroup.subtree_control").read_text().split()) & {*CONTROLLERS}
        self._numbers = itertools.count(1)

    def leaf(self, name: str, *, memory: int | None, processes: int | None, cpus: float | None) -> Leaf:
        """Make a leaf. `memory` (bytes, no swap), `processes`, `cpus` hold for all in it together. Raises OSError."""
        leaf = Leaf(self.home / f"run-{next(self._numbers)}-{re.sub(r'[^A-Za-z0-9._-]', '-', name)[:64]}")
        leaf.folder.mkdir()
        try:
            self._limit(leaf, memory, processes, cpus)
        except OSError:
            leaf.remove()
            raise
        return leaf

    def _limit(self, leaf: Leaf, memory: int | None, processes: int | None, cpus: float | None) -> None:
        if memory is not None and leaf.limit("memory.max", str(memory)):
            leaf.limit("memory.swap.max", "0")
        if processes is not None:
            leaf.limit("pids.max", str(processes))
        if cpus is not None:
            leaf.limit("cpu.max", f"{round(cpus * _CPU_PERIOD_US)} {_CPU_PERIOD_US}")


def claim(proc: Path = Path("/proc/self")) -> Leaves | None:
    """Take the cgroup that was delegated to us, or None: none was, it cannot be written, or this is no cgroup v2.

    We move into a leaf of our own, as a cgroup that gives controllers to others may hold no process. It is ours until
    this process ends; another that starts in it meanwhile gets None. Leaves of a former agent are ended and removed.
    Call it once, before the first child.
    """
    where = _own_folder((proc / "cgroup").read_text(), (proc / "mountinfo").read_text())
    if where is None:
        return None
    home = where.parent if where.name == OWN_LEAF else where
    if not _is_delegated(home):
        return None
    try:
        (home / OWN_LEAF).mkdir(exist_ok=True)
        if not _hold(home / OWN_LEAF):
            log.warning("cgroup not claimed folder=%s: another agent has it", home)
            return None
        _write(home / OWN_LEAF / "cgroup.procs", "0")
    except OSError as error:
        log.warning("cgroup not claimed folder=%s error=%s", home, error.strerror)
        return None
    for name in (home / "cgroup.controllers").read_text().split():
        if name in CONTROLLERS:
            try:
                _write(home / "cgroup.subtree_control", f"+{name}")
            except OSError as error:  # another process is in it: leaves can still be killed
                log.warning("cgroup without limits controller=%s error=%s", name, error.strerror)
    for folder in home.glob("run-*"):
        Leaf(folder).kill()
        Leaf(folder).remove()
    return Leaves(home)


def _own_folder(cgroup: str, mountinfo: str) -> Path | None:
    """Where our cgroup v2 lies, from the texts of /proc/self/cgroup and /proc/self/mountinfo.

    Hybrid systems have it beside v1, some containers mount only a part of it.
    """
    path = next((PurePosixPath(line[3:]) for line in cgroup.splitlines() if line.startswith("0::")), None)
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f) for f in mount.split()[3:5])
        if filesystem.startswith("cgroup2 ") and path and path.is_relative_to(root) and ".." not in path.parts:
            return Path(point) / path.relative_to(root)
    return None


def _is_delegated(home: Path) -> bool:
    """Is it ours to order? Another user's is by ownership; root owns all, so systemd tells by an extended attribute.

    The leaf that an agent made for us is ours, too.
    """
    if not (os.access(home, os.W_OK) and os.access(home / "cgroup.procs", os.W_OK) and (home / "cgroup.kill").exists()):
        return False
    is_leaf = home.name.startswith("run-") and (home.parent / OWN_LEAF).is_dir()
    if os.geteuid() != 0 or is_leaf:
        return True
    for name in ("trusted.delegate", "user.delegate"):
        with suppress(OSError):
            if os.getxattr(home, name) == b"1":
                return True
    return False


def _pids_in(folder: Path) -> list[int]:
    """None where somebody has removed it since it was listed, as what manages containers does when they end."""
    try:
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # the latter: since it was opened
            raise
        return []


def _hold(folder: Path) -> bool:
    """Lock it until this process ends; False: another has. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    return True


def _write(file: Path, text: str) -> None:
    # Never create: a missing file means a missing controller, and in a cgroup nothing can be created anyway.
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
