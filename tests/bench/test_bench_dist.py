"""The frozen agent: how large it is, how fast it answers and starts, what it takes when it has nothing to do.

Starts are told by the supervisor's protocol, as an init hears them. The minimum of many is what the machine can do;
the median is what it did beside whatever else was running.
"""

import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]

STARTS, LIMIT_S = 15, 60
IDLE_S = 60.0  # of the ten minutes that the goal speaks of

ALL_ROLES = """
[seneschal]
url = "ws://127.0.0.1:9/seneschal"
[mimir]
url = "ws://127.0.0.1:9/mimir"
[polarize]
url = "http://127.0.0.1:9"
project = "LAB"
[cibus]
url = "stomp://127.0.0.1:9"
[entitlement]
enabled = true
[[files.watch]]
path = "/etc/hosts"
[[logs.watch]]
name = "kernel"
path = "/var/log/kern.log"
"""


def settings(folder: Path, more: str = "") -> Path:
    """agent.toml of a machine whose servers, if it names any, are absent."""
    file = folder / "agent.toml"
    own = f'ident = "idle-{os.getpid()}"\n[state]\ndir = "{folder}/state"\n[control]\nlisten = ["127.0.0.1:0"]\n'
    file.write_text(own + more)
    return file


@contextmanager
def ready(agent: Path, config: Path) -> Generator[tuple[int, float]]:
    """An agent that said READY: its process, and the seconds from exec to then."""
    path = config.with_name("notify")
    path.unlink(missing_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(config.parent), "NOTIFY_SOCKET": str(path)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(path))
        supervisor.settimeout(LIMIT_S)
        began = time.monotonic()
        with subprocess.Popen([agent, "run", "--config", config], env=env, stderr=subprocess.DEVNULL) as process:
            while not supervisor.recv(65_536).startswith(b"READY=1"):
                pass
            took = time.monotonic() - began
            yield process.pid, took
            process.kill()


def took_ms(argv: Sequence[str | Path]) -> float:
    began = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True)
    return (time.monotonic() - began) * 1000


def least_and_median(measured: Sequence[float]) -> str:
    return f"min {min(measured):.0f} ms, median {statistics.median(measured):.0f} ms"


def test_how_large_it_is(frozen: Path, figure: Figure) -> None:
    figure("single file", f"{(frozen / 'agent').stat().st_size / 1e6:.1f} MB", "< 25 MB")
    for kind in ("deb", "rpm"):
        (package,) = frozen.glob(f"*.{kind}")
        figure(kind, f"{package.stat().st_size / 1e6:.1f} MB", "< 12 MB")


def test_how_fast_it_answers(frozen: Path, figure: Figure) -> None:
    for form, goal in (("onedir/agent", "< 50 ms"), ("agent", "-")):
        measured = [took_ms([frozen / form, "--version"]) for _ in range(STARTS + 1)][1:]
        figure(f"dist/{form} --version, warm", least_and_median(measured), goal)


@pytest.mark.parametrize(("roles", "more"), [("default roles", ""), ("all roles, servers absent", ALL_ROLES)])
def test_how_fast_it_is_ready(frozen: Path, tmp_path: Path, figure: Figure, roles: str, more: str) -> None:
    config, measured = settings(tmp_path, more), []
    for _ in range(STARTS):
        with ready(frozen / "onedir/agent", config) as (_, took):
            measured.append(took * 1000)
    figure(f"exec -> READY, {roles}", least_and_median(measured), "min < 200 ms")


def test_what_it_takes_when_idle(frozen: Path, tmp_path: Path, figure: Figure) -> None:
    config = settings(tmp_path)
    with ready(frozen / "onedir/agent", config):
        pass  # the first start makes a token, which takes OpenSSL; later ones do not
    with ready(frozen / "onedir/agent", config) as (pid, _):
        time.sleep(5)  # noqa: TID251 - the roles come up, and what they read goes back
        before, began = cpu_s(pid), time.monotonic()
        time.sleep(IDLE_S)  # noqa: TID251
        used = (cpu_s(pid) - before) / (time.monotonic() - began)
        (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    figure("idle memory (RSS), default roles", f"{int(resident) / 1024:.1f} MiB", "< 30 MiB")
    figure(f"idle CPU over {IDLE_S:.0f} s, default roles", f"{used:.3%}", "< 0.1 % over ten minutes")


def cpu_s(pid: int) -> float:
    """What a process has run, to the microsecond."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def test_two_builds_are_the_same(frozen: Path, tmp_path: Path, figure: Figure) -> None:
    """The last commit, from nothing, in two folders whose names have not even the same length."""
    if not (ROOT / ".git").exists():
        pytest.skip("two clones of a checkout: this is none")
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    sums = []
    for name in ("one", "the-other"):
        subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / name], check=True)
        made = subprocess.run(["make", "dist"], cwd=tmp_path / name, env=env, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
        sums.append((tmp_path / name / "dist/SHA256SUMS").read_text())
        shutil.rmtree(tmp_path / name)
    assert sums[0] == sums[1]
    figure("two builds in two folders: agent, deb, rpm, list of parts", "the same bytes", "the same bytes")
