"""How a program is started: where it is looked for, what it is given, and what is said when that fails."""

import errno
import os
import pwd
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.core.process import UNLIMITED, Limits
from agent.core.processtree import snapshot
from agent.core.spawn import program


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


pytestmark = pytest.mark.usefixtures("alone")


def said(*argv: str, **more: Any) -> str:
    """What it writes, of at most a pipe's size; with code 0 at the end."""
    with pipe() as (reading, writing):
        pid = starter(*argv, stdout=writing, **more)()
        _, status = os.waitpid(pid, 0)
        assert status == 0
        os.write(writing, b"\n")
        return os.read(reading, 65_536).decode().removesuffix("\n")


def children() -> set[int]:
    """Those of this process, of other tests too, and who has ended without being waited for."""
    return {pid for pid, stat in snapshot().items() if stat.parent == os.getpid()}


def starter(*argv: str, stdout: int = 2, **more: Any) -> Callable[[], int]:
    given: dict[str, Any] = {
        "cwd": Path("/"), "env": {"PATH": os.environ["PATH"]}, "stdin": None, "stdout": stdout, "stderr": stdout,
        "kept": (), "limits": UNLIMITED, "held": (), "procs": None, "account": None,
    }  # fmt: skip
    return program(argv, **(given | more))


WITNESS = """
import os, sys
fds = []
for fd in range(100):
    try:
        os.fstat(fd)
    except OSError:
        continue
    fds.append(fd)
os.write(int(os.environ["KEPT"]), b"kept")
print(sys.argv[1:], os.environ["X"], os.getcwd(), os.read(0, 1), fds)
"""


@pytest.mark.parametrize("shares", [True, False], ids=["in our memory", "in a copy of it"])
def test_it_gets_what_it_is_given_and_nothing_else(shares: bool) -> None:
    if not shares and os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    with pipe() as (leaking, _), pipe() as (reading, kept):
        os.set_inheritable(leaking, True)
        text = said(
            *("/usr/bin/env", "python3", "-c", WITNESS, "ö"), cwd=Path("/usr"), kept=[kept],
            env={"X": "a b", "KEPT": str(kept), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            account=None if shares else pwd.getpwnam("nobody"),
        )  # fmt: skip
        assert os.read(reading, 100) == b"kept"
        assert text == f"['ö'] a b /usr b'' {[0, 1, 2, kept]}\n"


def test_no_signal_is_ignored_or_blocked() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        text = said("grep", "Sig[BI]", "/proc/self/status")
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGUSR1, before[1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    assert {line.split()[0]: int(line.split()[1], 16) for line in text.splitlines()} == {"SigBlk:": 0, "SigIgn:": 0}
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


def test_our_own_mask_and_handlers_stay() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        said("true")
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_the_first_in_the_path_that_can_be_run_is_taken(tmp_path: Path) -> None:
    for folder, mode in (("one", 0o644), ("two", 0o755), ("three", 0o755)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool").write_text(f"#!/bin/sh\necho {folder}")
        (tmp_path / folder / "tool").chmod(mode)
    path = ":".join(str(tmp_path / folder) for folder in ("none", "one", "two", "three"))
    assert said("tool", env={"PATH": path}) == "two\n"
    assert said("two/tool", cwd=tmp_path) == "two\n"


def test_it_leads_a_session_and_has_the_nice_and_the_processors(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    script = "import os; print(os.getsid(0) == os.getpid(), os.nice(0), os.sched_getaffinity(0))"
    limits = Limits(nice=3, affinity=(cpu, 4000), oom_score_adj=700)
    assert said(sys.executable, "-c", script, limits=limits) == f"True {os.nice(0) + 3} {{{cpu}}}\n"
    assert said("cat", "/proc/self/oom_score_adj", limits=limits) == "700\n"


@pytest.mark.parametrize("shares", [True, False], ids=["its own", "another user's"])
def test_a_folder_is_made_for_it_and_for_nobody_else(tmp_path: Path, shares: bool) -> None:
    if not shares and os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    account = None if shares else pwd.getpwnam("nobody")
    cwd = tmp_path / "made"
    text = said("sh", "-c", "pwd; stat -c %U:%a .; touch x", cwd=cwd, makes_cwd=True, account=account)
    assert text == f"{cwd}\n{cwd.owner()}:700\n"
    assert cwd.owner() == (account or pwd.getpwuid(os.geteuid())).pw_name
    with pytest.raises(FileExistsError) as caught:
        starter("true", cwd=cwd, makes_cwd=True)()
    assert caught.value.filename == str(cwd)


@pytest.mark.parametrize(
    ("wrong", "number", "name"),
    [
        ({"cwd": Path("/nonexistent")}, errno.ENOENT, "/nonexistent"),
        ({"cwd": Path("/bin/sh")}, errno.ENOTDIR, "/bin/sh"),
        ({"procs": "/dev/full"}, errno.ENOSPC, "its cgroup"),
        ({"limits": Limits(affinity=(4000,))}, errno.EINVAL, "its CPUs"),
        ({"kept": [1_000_000]}, errno.EBADF, "its descriptors"),
        ({"stdin": 1_000_000}, errno.EBADF, "its descriptors"),
    ],
)
def test_what_fails_is_named_and_leaves_nothing(wrong: dict[str, Any], number: int, name: str) -> None:
    full, before = os.open("/dev/full", os.O_WRONLY), children()
    try:
        given = wrong | ({"procs": full} if "procs" in wrong else {})
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            starter("true", **given)()
    finally:
        os.close(full)
    assert (caught.value.errno, caught.value.filename) == (number, name)
    assert children() <= before


def test_one_that_is_there_but_cannot_be_run_tells_more_than_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("no program")
    with pytest.raises(OSError, match="Permission denied") as caught:
        starter("tool", env={"PATH": f"{tmp_path}:/nonexistent"})()
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, "tool")
    with pytest.raises(OSError, match="No such file") as caught:
        starter("tool", env={"PATH": "/nonexistent"})()
    assert caught.value.errno == errno.ENOENT


def test_it_can_take_the_place_of_standard_descriptors_of_ours() -> None:
    """A service whose stdin was closed has pipes with numbers below 3."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(0)
            os.close(1)
            reading, writing = os.pipe()
            assert (reading, writing) == (0, 1)
            child = starter("sh", "-c", "cat; echo from $0", "it", stdout=writing)()
            _, status = os.waitpid(child, 0)
            code = int((status, os.read(reading, 100)) != (0, b"from it\n"))
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
