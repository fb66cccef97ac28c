"""What every test shares: hypothesis profiles and how long a soak lasts."""

import faulthandler
import fcntl
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import settings

from agent.core import cgroup, processtree

T = TypeVar("T")

ROOT = Path(__file__).parents[1]

# A shell's command in the background ignores it, and so would all that the tests start, and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the machines are shared. In CI the same examples each time, so that a failure there can be repeated.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", type=float, default=0, metavar="SECONDS", help="how long each test of tests/faults lasts"
    )


@pytest.fixture
def soak_s(pytestconfig: pytest.Config) -> float:
    """How long a test of tests/faults goes on repeating its scenario; 0: once."""
    seconds: float = pytestconfig.getoption("--soak")
    return seconds


@pytest.fixture(autouse=True)
def virtual_time_waits_for_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autojump clock would run on while a thread works, by as much as the machine is busy: so there is none."""
    if "autojump_clock" not in request.fixturenames:
        return

    async def in_place(function: Callable[..., T], *args: Any, **options: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", in_place)


@pytest.fixture(autouse=True)
def databases_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test leaves its store as a killed agent does, and a lab that cannot start leaves what it has opened to the end
    of its process; from Python 3.13 on a database that nobody closed is an error.
    """
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def seen(path: str | Path, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(path, **options)
        if path != ":memory:":  # those of gator's layers serve the whole process
            opened.append(db)
        return db

    monkeypatch.setattr(sqlite3, "connect", seen)
    yield
    for db in opened:
        with suppress(sqlite3.ProgrammingError):  # it was opened by a thread, which closed it
            db.close()


@pytest.fixture
def cgroup_home() -> Iterator[Path]:
    """A cgroup of the kernel's own."""
    mount = next((line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line), "")
    if not mount:
        pytest.skip("no cgroup v2 is mounted")
    home = Path(mount) / f"emissary-test-{os.getpid()}"
    try:
        home.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup v2 that this user may write to: {error.strerror}")
    yield home
    cgroup.Leaf(home).remove()
    assert not home.exists()


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port of loopback that is given to nobody but who names it: for a server that goes and comes back."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def own_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started is below a mark of this process: who runs the same tests on this machine ends nothing of ours."""
    monkeypatch.setenv(processtree.MARK, processtree.nested(f"test-{os.getpid()}"))


@pytest.fixture
def alone() -> None:
    """What earlier tests left to this process, which adopts orphans, is gone."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextmanager
def unwatched(config: pytest.Config) -> Iterator[None]:
    """For what is fetched or built: pytest's watch, which ends the whole run, begins anew when that is there."""
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        faulthandler.dump_traceback_later(float(config.getini("faulthandler_timeout")), exit=True, file=2)


@pytest.fixture(scope="session")
def frozen(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` makes: a copy of dist/ with `agent`, `onedir/`, deb, rpm, SBOM. Made when something has changed.

    Freezing needs Python's shared library; an interpreter without one skips by name, and fails under CI=true.
    """
    soname, libdir, multiarch = (sysconfig.get_config_var(name) or "" for name in ("INSTSONAME", "LIBDIR", "MULTIARCH"))
    if ".so" not in soname or not any((Path(libdir) / sub / soname).exists() for sub in ("", multiarch)):
        outcome = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        outcome(f"the frozen form: Python in {libdir} has no shared library (make test PYTHON=/usr/bin/python3)")
    copy = tmp_path_factory.mktemp("frozen") / "dist"
    (ROOT / "build").mkdir(exist_ok=True)
    with unwatched(pytestconfig), (ROOT / "build/frozen.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        made = subprocess.run(["make", "dist"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
        shutil.copytree(ROOT / "dist", copy)
    return copy
