"""The service under a systemd of its own, as the first process of namespaces in which the root directory is a copy.

It starts little: no devices, no network, no terminals. What it does to that root, its mounts and its cgroups is gone
with it. Where namespaces are not ours to make, or systemd does not come up in them, this is skipped by name.

Source: protocols/packaging.md 4 (systemd unit, supervisor protocol) and 8 (TRIAL, roll back).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.interop.test_inits import CRASHES, frozen

pytestmark = pytest.mark.interop

# In cgroups of its own: below these it makes its slices. "$0": an empty folder, "$cgroup": a name, "$@": what of ours
# is not on the root file system.
OUTSIDE = """\
set -e
for folder in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ -e "$folder/cgroup.procs" ] && mkdir "$folder/$cgroup" && echo $$ >"$folder/$cgroup/cgroup.procs" || continue
done
exec unshare --mount --pid --fork --kill-child --net --ipc --uts --cgroup sh -c "$inside" "$0" "$@"
"""
INSIDE = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$0"
mkdir "$0/upper" "$0/work" "$0/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$0/upper",workdir="$0/work" "$0/root"
cd "$0/root"
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
mkdir dev/shm dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t sysfs -o ro sysfs sys
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
fi
for folder in "$@"; do [ -e ".$folder" ] || { mkdir -p ".$folder"; mount --bind "$folder" ".$folder"; }; done
mkdir before
pivot_root . before
umount -l before
mount --make-rshared /  # as the first process finds it: so do credentials come into the service's own view
: >/etc/machine-id
rm -rf /etc/agent /var/lib/agent /var/lib/private/agent /opt/agent
rm -rf /etc/systemd/system
mkdir /etc/systemd/system /run/units
for unit in $units; do
    [ ! -e /lib/systemd/system/$unit ] || cp /lib/systemd/system/$unit /run/units
done
printf '[Unit]\\nRequires=sockets.target\\nWants=systemd-journald.service dbus.socket\\n' >/run/units/bare.target
path=/etc/systemd/system:/run/units  # and no other unit of this machine is known to it
exec env -i container=emissary PATH="$PATH" SYSTEMD_UNIT_PATH=$path \\
    /lib/systemd/systemd --system --unit=bare.target --show-status=no
"""
UNITS = """
systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket dbus.service dbus.socket
sysinit.target basic.target sockets.target paths.target timers.target slices.target local-fs.target multi-user.target
network.target network-online.target shutdown.target umount.target final.target
"""
# The checkout and its Python may lie where the unit forbids to look, and in /tmp, which is the service's own. Watchdog
# and restarts come sooner.
HERE = f"[Service]\\nProtectHome=no\\nBindReadOnlyPaths={ROOT}\\nWatchdogSec=10\\nRestartSec=200ms\\n"


LOOPBACK = """
import fcntl, socket, struct
up = struct.pack("16sH14x", b"lo", 1)
fcntl.ioctl(socket.socket(), 0x8914, up)  # SIOCSIFFLAGS, IFF_UP
"""


class Machine:
    """A copy of this machine that systemd runs, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self._cgroup = f"emissary-test-{os.getpid()}"
        ours = [str(ROOT), sys.base_prefix, sys.prefix, str(folder.parent)]
        environ = {**os.environ, "cgroup": self._cgroup, "inside": INSIDE, "units": UNITS.replace("\n", " ")}
        argv = ["sh", "-c", OUTSIDE, str(folder), *ours]
        self._outside = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ)
        self._inside: list[str] = []

    def boot(self) -> str:
        """Wait until it runs; why it does not."""
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children")
        state = "no process there"
        for _ in range(240):
            time.sleep(0.25)  # noqa: TID251 - another machine's init is waited for
            if self._outside.poll() is not None:
                assert self._outside.stdout is not None
                return self._outside.stdout.read().decode(errors="replace")
            if first := children.read_text().split():
                self._inside = [
                    "nsenter",
                    "--target",
                    first[0],
                    "--mount",
                    "--pid",
                    "--net",
                    "--ipc",
                    "--uts",
                    "--cgroup",
                ]
                state = self.run("systemctl", "is-system-running", code=None).strip()
                if state in ("running", "degraded"):
                    return ""
        return f"systemd does not come up: {state}"

    def run(self, *argv: str, code: int | None = 0) -> str:
        """What it says."""
        done = subprocess.run([*self._inside, *argv], capture_output=True, text=True, timeout=120, check=False)
        assert code is None or done.returncode == code, done.stdout + done.stderr + self.log()
        return done.stdout + done.stderr

    def log(self) -> str:
        argv = [*self._inside, "journalctl", "--no-pager", "--output=cat", "--unit=agent"]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    def shows(self) -> dict[str, str]:
        """The service's properties."""
        return dict(line.split("=", 1) for line in self.run("systemctl", "show", "agent").splitlines() if "=" in line)

    def status(self) -> dict[str, Any] | None:
        """What the agent says of itself; None while none answers."""
        said = self.run("/usr/local/bin/agent", "ctl", "status", code=None)
        answer: dict[str, Any] | None = json.loads(said) if said.startswith("{") else None
        return answer

    def until(self, condition: Callable[[], Any]) -> Any:
        """Look until it gives something."""
        for _ in range(480):
            if found := condition():
                return found
            time.sleep(0.25)  # noqa: TID251 - as above
        raise AssertionError(self.log())

    def close(self) -> None:
        self._outside.kill()  # and with it, the first process there, and so all
        self._outside.communicate()
        for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            for folder, _, _ in os.walk(top / self._cgroup, topdown=False):
                for _ in range(40):
                    with suppress(OSError):  # the last process has not left yet
                        os.rmdir(folder)
                        break
                    time.sleep(0.25)  # noqa: TID251 - the kernel is waited for


@pytest.fixture
def machine(peer_command: Callable[[str], Path], tmp_path: Path) -> Iterator[Machine]:
    for name in ("systemctl", "unshare", "nsenter"):
        peer_command(name)
    if os.geteuid() != 0:
        pytest.skip("only root can have an init of its own")
    (tmp_path / "copy").mkdir()
    made = Machine(tmp_path / "copy")
    try:
        if why := made.boot():
            pytest.skip(f"no systemd of our own here: {why}")
        for path in {*ROOT.parents, *Path(sys.executable).resolve().parents, *tmp_path.parents, ROOT}:
            made.run("chmod", "o+rx", str(path))
        made.run(sys.executable, "-c", LOOPBACK)
        made.run("mkdir", "-p", "/etc/systemd/system/agent.service.d")
        made.run("sh", "-c", f"printf '{HERE}' >/etc/systemd/system/agent.service.d/here.conf")
        yield made
    finally:
        made.close()


def installed(machine: Machine, release: Path) -> None:
    """It runs, and its trial is over, as after a minute."""
    said = machine.run(str(release), "install", "--init", "systemd", "--json")
    assert json.loads(said)["state"] == "TRIAL", said
    pending = json.loads(machine.run("cat", "/opt/agent/pending.json"))
    machine.run("sh", "-c", f"echo {pending['id']} >/var/lib/agent/confirmed")
    assert machine.until(machine.status)["version"] == "1.0"


def test_systemd_starts_it_reloads_it_watches_it_and_ends_it(machine: Machine, tmp_path: Path) -> None:
    installed(machine, frozen(tmp_path, "1.0"))
    shown = machine.shows()
    assert (shown["ActiveState"], shown["UnitFileState"], shown["DynamicUser"]) == ("active", "enabled", "yes")
    assert ": control running" in shown["StatusText"]
    assert machine.run("ps", "-o", "user=", "-p", shown["MainPID"]).strip() == "agent"

    machine.run("systemctl", "reload", "agent")
    machine.until(lambda: "reloaded changed=nothing" in machine.log())
    assert machine.shows()["MainPID"] == shown["MainPID"]

    seq = machine.until(machine.status)["seq"]
    machine.run("kill", "-STOP", shown["MainPID"])
    hung = machine.until(lambda: (now := machine.shows())["MainPID"] not in ("0", shown["MainPID"]) and now)
    assert int(hung["NRestarts"]) >= 1
    assert "Watchdog timeout" in machine.log()
    assert machine.until(machine.status)["seq"] > seq  # no event of before is lost

    machine.run("systemctl", "stop", "agent")
    assert "stopping signal=SIGTERM" in machine.log()
    ended = machine.shows()
    assert (ended["ActiveState"], ended["Result"]) == ("inactive", "success")
    machine.run("/usr/local/bin/agent", "install", "--uninstall", "--purge", "--init", "systemd")
    machine.run("ls", "/opt/agent", "/etc/agent", "/var/lib/agent", "/etc/systemd/system/agent.service", code=2)


def test_systemd_starts_the_release_before_in_place_of_one_that_crashes(machine: Machine, tmp_path: Path) -> None:
    installed(machine, frozen(tmp_path, "1.0"))
    machine.run(str(frozen(tmp_path, "2.0", CRASHES)), "install", "--init", "systemd")
    machine.run("touch", "/crash")
    machine.until(lambda: (status := machine.status()) and status["version"] == "1.0")
    assert machine.run("readlink", "/opt/agent/current") == "releases/1.0\n"
    assert "unconfirmed after 3 starts version=2.0 back_to=1.0" in machine.log()
