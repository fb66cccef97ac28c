"""Service files: which init there is, what it is given, and how it is asked to start us.

Templates stand in packaging/service, with @PREFIX@ and @USER@. Beside the systemd unit go two drop-ins: suites.conf,
and machine.conf, which holds what depends on this machine and its settings: user, groups, credentials, devices.

Source: protocols/packaging.md 4, 8.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

import agent
from agent.install.stage import InstallFailed, call
from agent.settings import credential

Init = Literal["systemd", "openrc", "sysv", "none"]

TEMPLATES = Path(agent.__file__).parent.parent / "packaging/service"
STATIC_USER = "agent"  # where a dynamic user cannot be had
GROUPS = ("adm", "systemd-journal", "dialout")  # logs and serial lines, of those that exist
CREDENTIALS_SINCE = 247  # of systemd: LoadCredential=
STATE, CONFIG, LOG = Path("/var/lib/agent"), Path("/etc/agent"), Path("/var/log/agent.log")
UNITS, SCRIPT = Path("/etc/systemd/system"), Path("/etc/init.d/agent")
MACHINE = UNITS / "agent.service.d/machine.conf"
RESTART_S = 200.0  # TimeoutStopSec and TimeoutStartSec of the unit, and some

# Suites that need root: no capability is taken away.
ROOT = """\
DynamicUser=no
User=root
CapabilityBoundingSet=~
SystemCallFilter=@privileged
"""


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings ask of a service: files with secrets as the settings name them, folders that it writes.

    `secrets` is a folder of such files, or ""; `devices` are kinds of DEVICES, `groups` whose they are.
    """

    credentials: tuple[str, ...] = ()
    secrets: str = ""
    writes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One service for one init. `user` is dynamic, root or a name; `root` is / or the image's folder."""

    init: Init
    user: str
    prefix: Path
    root: Path
    needs: Needs

    @property
    def is_live(self) -> bool:
        """Is it this machine's own init?"""
        return self.root == Path("/") and self.init != "none"

    def files(self) -> dict[Path, tuple[str, int]]:
        """Every file of the service: its path on the installed system, text and mode."""
        match self.init:
            case "systemd":
                return {
                    UNITS / "agent.service": (self._fill("systemd"), 0o644),
                    MACHINE: (self._machine(), 0o644),
                    UNITS / "agent.service.d/suites.conf": (self._fill("suites.conf"), 0o644),
                }
            case "openrc" | "sysv":
                return {SCRIPT: (self._fill(self.init), 0o755)}
            case "none":
                return {}

    def links(self) -> dict[Path, str]:
        """What makes it start at boot."""
        match self.init:
            case "systemd":
                return {UNITS / "multi-user.target.wants/agent.service": "../agent.service"}
            case "openrc":
                return {Path("/etc/runlevels/default/agent"): "/etc/init.d/agent"}
            case "sysv":
                starts = {Path(f"/etc/rc{level}.d/S20agent"): "../init.d/agent" for level in "2345"}
                return starts | {Path(f"/etc/rc{level}.d/K01agent"): "../init.d/agent" for level in "016"}
            case "none":
                return {}

    def command(self, verb: Literal["restart", "stop"]) -> list[list[str]]:
        """The programs that do it."""
        match self.init:
            case "systemd":
                return [["systemctl", "daemon-reload"], ["systemctl", verb, "agent.service"]]
            case "openrc":
                return [["rc-service", "agent", verb]]
            case "sysv":
                return [["/etc/init.d/agent", verb]]
            case "none":
                return []

    def reload(self) -> None:
        """Have systemd read what its files are now. Raises InstallFailed."""
        self._run(["systemctl", "daemon-reload"])

    def ask(self, verb: Literal["restart", "stop"]) -> None:
        """Have the init do it. systemd returns when the service is READY, others at once. Raises InstallFailed."""
        for argv in self.command(verb):
            self._run(argv)

    def _run(self, argv: Sequence[str]) -> None:
        try:
            done = call(argv, limit_s=RESTART_S)
        except OSError as err:
            raise InstallFailed(f"{argv[0]}: {err.strerror}", remedy="Is this the right --init?") from err
        if done.returncode != 0:
            text = (done.stderr or done.stdout).strip()[-500:]
            raise InstallFailed(f"{' '.join(argv)} ended with {done.returncode}: {text}", remedy=self.where_to_look())

    def where_to_look(self) -> str:
        """Where the service's own words are."""
        return "See journalctl -u agent." if self.init == "systemd" else f"See {LOG}."

    def _fill(self, template: str) -> str:
        text = (TEMPLATES / template).read_text()
        return text.replace("@PREFIX@", str(self.prefix)).replace("@USER@", self.user)

    def _machine(self) -> str:
        lines = ["[Service]"]
        match self.user:
            case "dynamic":
                lines += ["DynamicUser=yes"]
            case "root":
                lines += ROOT.splitlines()
            case name:
                lines += ["DynamicUser=no", f"User={name}"]
        if groups := groups_for(self.root, self.needs):
            lines.append(f"SupplementaryGroups={' '.join(groups)}")
        if self.user == "dynamic":
            lines += self._credentials()
        if self.needs.writes:
            quoted = (f'"-{path}"' if " " in path else f"-{path}" for path in self.needs.writes)
            lines.append(f"ReadWritePaths={' '.join(quoted)}".replace("%", "%%"))
        if allowed := [f"DeviceAllow={name} rw" for name in self.needs.devices]:
            lines += ["PrivateDevices=no", "DevicePolicy=closed", *allowed]
        return "\n".join(lines) + "\n"

    def _credentials(self) -> list[str]:
        """A dynamic user cannot read root's files: systemd hands them over, those that are there."""
        named = [(credential(name), CONFIG / name) for name in self.needs.credentials]
        if self.needs.secrets:  # each file of the folder is secrets_NAME
            named.append(("secrets", CONFIG / self.needs.secrets))
        there = [(name, path) for name, path in named if inside(self.root, path).exists()]
        return [f"LoadCredential={name}:{path}" for name, path in dict(there).items()]


def has_systemd(root: Path) -> bool:
    """Does it run there? sd_booted(3)."""
    return (root / "run/systemd/system").is_dir()


def detect(root: Path) -> Init:
    """The init of this machine, or of an image. Raises InstallFailed where there is none that is known."""
    if root == Path("/") and has_systemd(root):
        return "systemd"
    if root != Path("/") and any((root / name).exists() for name in ("lib/systemd/systemd", "usr/lib/systemd/systemd")):
        return "systemd"
    if any((root / name).exists() for name in ("sbin/openrc-run", "usr/sbin/openrc-run")):
        return "openrc"
    if (root / "etc/init.d").is_dir():
        return "sysv"
    raise InstallFailed(
        f"no init is known in {root}: no systemd, no OpenRC, no /etc/init.d",
        remedy="Name it (--init systemd, openrc or sysv), or start the agent yourself (--init none).",
    )


def user_for(init: Init, user: str | None, root: Path) -> str:
    """Who the service runs as: `dynamic` is a user of its own where the init has none to give.

    None: as it is installed, for an upgrade by a package manager does not know; else dynamic.
    """
    if user is None:
        user = _installed_user(init, root) or "dynamic"
    if user == "dynamic" and (init in ("openrc", "sysv") or (systemd_version(root) or 999) < CREDENTIALS_SINCE):
        return STATIC_USER
    return user


def _installed_user(init: Init, root: Path) -> str | None:
    """As the service file says that is there; None where there is none, or it leaves the choice to us."""
    file = MACHINE if init == "systemd" else SCRIPT
    try:
        found = re.search(r"(?:^User=| --user )([A-Za-z0-9_-]+)", inside(root, file).read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return found[1] if found else None


def systemd_version(root: Path) -> int | None:
    """By the name of its library, which is there in an image too; None where there is none."""
    found = [
        int(match[1])
        for pattern in ("lib/systemd", "usr/lib/systemd", "usr/lib/*/systemd")
        for path in root.glob(f"{pattern}/libsystemd-shared-*.so")
        if (match := re.search(r"-(\d+)[^/]*\.so$", path.name))
    ]
    return max(found, default=None)


def account(root: Path, name: str) -> tuple[int, int] | None:
    """User and group number in that system's /etc/passwd; None: there is no such user."""
    for fields in _entries(root / "etc/passwd"):
        if fields[0] == name and len(fields) > 3:
            return int(fields[2]), int(fields[3])
    return None


def groups_for(root: Path, needs: Needs) -> list[str]:
    """The groups of the service's user, of those that exist there."""
    return [name for name in (*GROUPS, *needs.groups) if _id_of(root / "etc/group", name) is not None]


def make_account(root: Path, name: str, groups: Sequence[str]) -> None:
    """A system user without a password, in these groups. Raises InstallFailed."""
    image = [] if root == Path("/") else ["--prefix", str(root)]
    options = ["--system", "--user-group", "--no-create-home", "--home-dir", str(STATE), "--shell", "/usr/sbin/nologin"]
    ways: list[Sequence[str]] = [
        ["useradd", *image, *options, *(["--groups", ",".join(groups)] if groups else []), name]
    ]
    if not image:  # BusyBox
        ways.append(["adduser", "-S", "-D", "-H", "-h", str(STATE), "-s", "/sbin/nologin", name])
    said = ""
    for argv in ways:
        try:
            done = call(argv)
        except OSError as err:
            said = f"{argv[0]}: {err.strerror}"
            continue
        if done.returncode == 0:
            return
        said = (done.stderr or done.stdout).strip()
    raise InstallFailed(f"the user {name!r} cannot be made: {said}", remedy=f"Make it, or use --user root. In {root}.")


def inside(root: Path, path: Path) -> Path:
    """Where a path of the installed system is from here."""
    return root / path.relative_to("/")


def _id_of(file: Path, name: str) -> int | None:
    return next((int(fields[2]) for fields in _entries(file) if fields[0] == name and len(fields) > 2), None)


def _entries(file: Path) -> list[list[str]]:
    try:
        return [line.split(":") for line in file.read_text(errors="replace").splitlines()]
    except FileNotFoundError:
        return []
