"""The service under its inits: systemd's own tools on the unit, and SysV for real, in a copy of this machine.

The copy is an overlay over its root directory, in namespaces of its own: what is installed there is gone with it.

Source: protocols/packaging.md 4 and 8, acceptance 4, 5 and 7.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agent
from tests.release_folder import make_release

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]

# The agent of this checkout as if it were frozen, in its release folder.
FROZEN = """\
#!{python}
import os, sys
sys.path[:0] = {path!r}
sys.frozen, sys.executable = True, os.path.realpath(__file__)
import agent
agent.__version__ = "{version}"
{twist}
from agent.__main__ import main
sys.exit(main())
"""
# Once there is a file `/crash`, it crashes soon after each READY.
CRASHES = """
import threading, time
from agent.core import notify
was_ready = notify.ready
def crash():
    while not os.path.exists("/crash"):
        time.sleep(0.1)
    os._exit(9)
notify.ready = lambda status: (was_ready(status), threading.Thread(target=crash, daemon=True).start())
"""

MOUNTS = """\
set -e
mount -t tmpfs tmpfs "$0"
mkdir "$0/upper" "$0/work" "$0/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$0/upper",workdir="$0/work" "$0/root"
cd "$0/root"
mount -t proc proc proc
mount -t tmpfs tmpfs run
mount --bind /dev dev
for folder in "$@"; do [ -e ".$folder" ] || { mkdir -p ".$folder"; mount --bind "$folder" ".$folder"; }; done
echo mounted
exec "$python" -c "$init"
"""

# Who leaves no zombies.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.pause()"


# ---- systemd ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Callable[..., Path]:
    """The unit as it is printed; it names a program that is there."""

    def printed(*words: str) -> Path:
        argv = [sys.executable, "-m", "agent", "install", "--print-service", "systemd", *words]
        text = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (tmp_path / "agent.service").write_text(text.replace("/opt/agent/current/agent", "/bin/true"))
        return tmp_path / "agent.service"

    return printed


def test_systemd_takes_the_unit_without_a_word(peer_command: Callable[[str], Path], units: Callable[..., Path]) -> None:
    analyze = peer_command("systemd-analyze")
    for user in ("dynamic", "root", "nobody"):
        done = subprocess.run([analyze, "verify", units("--user", user)], capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "agent.service" in line and "nobody" not in line]
        assert (done.returncode, said) == (0, [])


def exposure(analyze: Path, unit: Path) -> float:
    done = subprocess.run(
        [analyze, "security", "--offline=true", unit], capture_output=True, text=True, check=True, cwd=unit.parent
    )
    return float(re.findall(r"exposure level for agent.service: ([\d.]+)", done.stdout)[0])


def test_the_units_exposure_is_what_it_was_designed_for(
    peer_command: Callable[[str], Path], units: Callable[..., Path], tmp_path: Path
) -> None:
    analyze = peer_command("systemd-analyze")
    unit = units()
    assert exposure(analyze, unit) <= 1.6
    text, _, _ = unit.read_text().partition("# /etc/systemd/system/agent.service.d/suites.conf")
    unit.write_text(text)
    assert exposure(analyze, unit) <= 1.3
    assert exposure(analyze, units("--user", "root")) <= 5


# ---- OpenRC, SysV ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["openrc", "sysv"])
def test_a_shell_reads_the_scripts(init: str) -> None:
    argv = [sys.executable, "-m", "agent", "install", "--print-service", init]
    text = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["sh", "-n"], input=text, check=True)


@pytest.mark.parametrize(
    ("option", "started", "stopped"),
    [
        ("--stdout", ["to /var/log/agent.log", ""], ["by OpenRC"]),
        ("--output", ["to", "--output /var/log/agent.log"], ["--stop", "--remove-pidfile", "--name agent"]),
    ],
    ids=["its own", "dpkg's"],
)
def test_openrc_does_with_either_start_stop_daemon(
    tmp_path: Path, option: str, started: list[str], stopped: list[str]
) -> None:
    argv = [sys.executable, "-m", "agent", "install", "--print-service", "openrc"]
    script = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tool = tmp_path / "start-stop-daemon"
    tool.write_text(f'#!/bin/sh\necho "{option} FILE" "$@"\n')
    tool.chmod(0o755)
    ours = 'ebegin() { :; }; eend() { :; }; default_stop() { echo "by OpenRC"; }\n'
    asked = '\nstart_pre; echo "to ${output_log-}" | sed "s/ $//"; echo "${start_stop_daemon_args-}"; stop\n'
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", script + ours + asked], capture_output=True, text=True, check=True, env=environ)
    *first, last = done.stdout.splitlines()
    assert first == started
    assert all(word in last for word in stopped)


class Copy:
    """A copy of this machine, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        # What of ours is not on the root file system is bound into the copy.
        ours = [str(ROOT), sys.base_prefix, sys.prefix, str(folder.parent)]
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", MOUNTS, str(folder), *ours]
        environ = {**os.environ, "python": sys.executable, "init": INIT}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environ)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if said != "mounted\n":
            self.close()
            pytest.skip(f"no overlay over the root directory here: {said}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._inside = ["nsenter", "--target", children[0], "--mount", "--pid", "chroot", str(self.root)]
        # Where a user of the service may not look, it cannot start a program.
        for path in {*ROOT.parents, *Path(sys.executable).resolve().parents, *folder.parents, ROOT}:
            self.run("chmod", "o+rx", str(path))
        self.run("rm", "-rf", "/etc/agent", "/var/lib/agent", "/opt/agent")

    def run(self, *argv: str, code: int | None = 0) -> str:
        """What it says."""
        done = subprocess.run([*self._inside, *argv], capture_output=True, text=True, timeout=60, check=False)
        assert code is None or done.returncode == code, done.stdout + done.stderr + self.log()
        return done.stdout + done.stderr

    def log(self) -> str:
        done = subprocess.run([*self._inside, "cat", "/var/log/agent.log"], capture_output=True, text=True, check=False)
        return done.stdout

    def status(self) -> dict[str, Any] | None:
        """What the agent says of itself; None while none answers."""
        said = self.run("/usr/local/bin/agent", "ctl", "status", code=None)
        answer: dict[str, Any] | None = json.loads(said) if said.startswith("{") else None
        return answer

    def until(self, condition: Callable[[], Any]) -> Any:
        """Look until it gives something."""
        for _ in range(240):
            if found := condition():
                return found
            time.sleep(0.25)  # noqa: TID251 - another machine's init is waited for
        raise AssertionError(self.log())

    def agents(self) -> dict[int, str]:
        """The agent's processes there, with their users: the parent first."""
        said = self.run("ps", "-ww", "-eo", "pid=,user=,args=")
        found = [line.split(None, 2) for line in said.splitlines() if "current/agent run" in line]
        return {int(pid): user for pid, user, _ in found}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def copy(peer_command: Callable[[str], Path], tmp_path: Path) -> Iterator[Copy]:
    for name in ("start-stop-daemon", "unshare", "nsenter"):
        peer_command(name)
    if os.geteuid() != 0:
        pytest.skip("only root can have users and inits of its own")
    (tmp_path / "copy").mkdir()
    made = Copy(tmp_path / "copy")
    yield made
    made.close()


def frozen(folder: Path, version: str, twist: str = "") -> Path:
    """A release folder of this checkout's agent, and the command that installs it."""
    made = make_release(folder / f"release-{version}", version)
    path = [str(ROOT), *(entry for entry in sys.path if "site-packages" in entry)]
    text = FROZEN.format(python=Path(sys.executable).resolve(), path=path, version=version, twist=twist)
    (made / "agent").write_text(text)
    (made / "lib/build.json").write_text('{"commit": null, "built": 1, "glibc": "2.17"}')
    shutil.rmtree(made / "lib/agent")
    (made / "lib/SHA256SUMS").unlink()
    names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    sums = subprocess.run(["sha256sum", *map(str, names)], cwd=made, capture_output=True, text=True, check=True).stdout
    (made / "lib/SHA256SUMS").write_text(sums)
    return made / "agent"


def test_sysv_starts_it_keeps_it_and_goes_back_from_what_crashes(copy: Copy, tmp_path: Path) -> None:
    installed = copy.run(str(frozen(tmp_path, "1.0")), "install", "--init", "sysv", "--json")
    assert json.loads(installed)["state"] == "TRIAL", installed
    assert "agent runs\n" in copy.run("/etc/init.d/agent", "status")
    (parent, user), (child, service_user) = copy.agents().items()
    assert (user, service_user) == ("root", "agent")
    assert copy.run("cat", "/run/agent.pid").strip() == str(parent)
    assert copy.run("stat", "-c", "%U %a", "/etc/agent/token", "/var/lib/agent") == "agent 600\nagent 700\n"

    copy.run("kill", "-9", str(child))
    copy.until(lambda: child not in copy.agents() and copy.status())
    assert parent in copy.agents()
    copy.run("/etc/init.d/agent", "reload")
    copy.until(lambda: "reloaded changed=nothing" in copy.log())
    assert "agent ended signal=SIGKILL" in copy.log()

    copy.run("env", "TMPDIR=/nowhere", "/etc/init.d/agent", "restart")
    copy.until(copy.status)
    assert "TMPDIR" not in copy.run("cat", *(f"/proc/{pid}/environ" for pid in copy.agents()))
    # One start was killed, one was ended as it was asked, one is under way.
    assert "1.0  current, on trial, 2 of 3 starts\n" in copy.run("/usr/local/bin/agent", "install", "--list")

    seq = copy.until(copy.status)["seq"]
    # Proven, as after a minute: the trial of what crashes has something to go back to.
    pending = json.loads(copy.run("cat", "/opt/agent/pending.json"))
    copy.run("sh", "-c", f"echo {pending['id']} >/var/lib/agent/confirmed")
    copy.run(str(frozen(tmp_path, "2.0", CRASHES)), "install", "--init", "sysv")
    copy.run("touch", "/crash")
    copy.until(lambda: (status := copy.status()) and status["version"] == "1.0")
    assert copy.until(copy.status)["seq"] > seq  # no event of before is lost
    assert copy.run("readlink", "/opt/agent/current") == "releases/1.0\n"
    assert copy.log().count("agent ended code=9") == 3
    assert "unconfirmed after 3 starts version=2.0 back_to=1.0" in copy.log()
    assert copy.run("cat", "/run/agent.pid").strip() == str(min(copy.agents()))

    copy.run("/etc/init.d/agent", "stop")
    assert copy.agents() == {}
    assert "agent does not run" in copy.run("/etc/init.d/agent", "status", code=3)
    copy.run("/usr/local/bin/agent", "install", "--uninstall", "--purge", "--init", "sysv")
    copy.run("ls", "/opt/agent", "/etc/agent", "/var/lib/agent", "/etc/init.d/agent", code=2)


@pytest.mark.parametrize(
    ("install", "remove", "ending"),
    [
        (("dpkg", "-i"), ("dpkg", "-P", "emissary"), "deb"),
        (("rpm", "-i", "--nodeps"), ("rpm", "-e", "emissary"), "rpm"),
    ],
    ids=["deb", "rpm"],
)
def test_a_package_manager_starts_it_and_removes_it(
    copy: Copy,
    frozen: Path,
    tmp_path: Path,
    peer_command: Callable[[str], Path],
    install: tuple[str, ...],
    remove: tuple[str, ...],
    ending: str,
) -> None:
    peer_command(install[0])
    (package,) = frozen.glob(f"*.{ending}")
    there = str(shutil.copy(package, tmp_path))
    policy = "/usr/sbin/policy-rc.d"
    copy.run("sh", "-c", f"printf '#!/bin/sh\\nexit 101\\n' >{policy}; chmod +x {policy}")  # as image builders do
    copy.run(*install, there)
    assert copy.agents() == {}
    assert "agent does not run" in copy.run("/etc/init.d/agent", "status", code=3)
    copy.run("/etc/init.d/agent", "start")
    assert copy.until(copy.status)["version"] == agent.__version__
    copy.run(*remove)
    assert copy.agents() == {}
    copy.run("ls", "/opt/agent", "/etc/init.d/agent", "/usr/lib/emissary", "/usr/local/bin/agent", code=2)
    if ending == "deb":  # a purge; rpm knows none
        copy.run("rm", policy)
        assert "READY within 60 s" in copy.run(*install, there)
        assert copy.until(copy.status)["version"] == agent.__version__
        copy.run(*remove)
        copy.run("ls", "/etc/agent", "/var/lib/agent", "/var/log/agent.log", code=2)
