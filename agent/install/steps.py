"""`agent install`: a release in steps, each of which may be the last one that is done.

    STAGED      copied to releases/.V.new; its own selftest passes         else: removed, nothing has changed
    PLACED      releases/V, with config, token, service files; the slot is free       else: stays placed
    STARTED     pending.json, `current` replaced, the service restarted    else: back to the previous release, restarted
    TRIAL       it became READY; the agent or the boot check ends the trial (core/release.py)

At every moment `current`, `previous` and pending.json name whole releases: nothing is ever changed in a folder that is
named. When the same version comes anew, a copy of the old one is named instead: `V.replaced`.

Source: protocols/packaging.md 8.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Literal

import msgspec

from agent.core import release
from agent.core.locks import owner
from agent.core.release import Pending, point, pointed, read_pending, sync, write, write_pending
from agent.install import stage
from agent.install.service import (
    CONFIG,
    LOG,
    MACHINE,
    STATE,
    Service,
    account,
    groups_for,
    has_systemd,
    inside,
    make_account,
)
from agent.install.stage import InstallFailed, call

State = Literal["", "STAGED", "PLACED", "STARTED", "TRIAL"]
Step = tuple[str, Callable[[], object]]

LINK = Path("/usr/local/bin/agent")
PRIVATE_STATE = Path("/var/lib/private/agent")  # of a dynamic user; STATE is a link to it
SHARE = Path("/usr/share/emissary/monitors")  # the library and the examples for who writes monitors
SLOT_S, SLOT_LOOK_S = 600.0, 5.0  # so long a running suite is waited for
READY_S, READY_LOOK_S = 60.0, 0.5
TRIED = "native.*,state.*,config"  # what the new release looks at before it is placed
TRIED_IN_AN_IMAGE = "native.*,config"  # whose state directory is elsewhere

DMI = Path("/sys/class/dmi/id")
SERIALS = ("product_serial", "board_serial", "chassis_serial")
# What firmware says where its maker wrote nothing.
NO_SERIAL = re.compile(
    r"(?i)[\s0.x-]*|none|not (specified|applicable|available)|to be filled.*|default string|.*o\.e\.m\..*"
)

FIRST_SETTINGS = """\
# Emissary's settings; what stands in conf.d/*.toml goes over it. `agent config show --origin` tells what holds.
# ident = "lab-07"

# [seneschal]
# url = "wss://lab.example/seneschal"
# token_file = "seneschal.token"
"""


class Job(msgspec.Struct, kw_only=True):
    """What is to be done. `prefix` and `state_dir` are paths of the installed system, `config` are options for it.

    `state` is how far it came, for the one who reads the result.
    """

    service: Service
    state_dir: Path
    config: tuple[Path, ...] = ()
    now: bool = False
    starts: bool = True
    is_root: bool = True
    state: State = ""
    version: str = ""

    @property
    def prefix(self) -> Path:
        """Where the releases are, from here."""
        return inside(self.service.root, self.service.prefix)

    @property
    def releases(self) -> Path:
        """Their folder."""
        return self.prefix / "releases"

    @property
    def has_service(self) -> bool:
        """Is there a running machine's init to be asked?"""
        return self.starts and self.service.is_live

    def at(self, path: Path) -> Path:
        """Where a path of the installed system is from here."""
        return inside(self.service.root, path)


@contextmanager
def alone(job: Job) -> Iterator[None]:
    """One installer at a time. Raises InstallFailed: another one works, or the prefix cannot be written."""
    stage.check_place(job.prefix)
    try:
        stage.make_folder(job.releases)
        lock = os.open(job.prefix / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise InstallFailed(f"{err.filename}: {err.strerror}", remedy=stage.remedy(err)) from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        raise InstallFailed(f"{job.prefix}: another `agent install` works", remedy="Wait for its end.") from err
    else:
        yield
    finally:
        os.close(lock)


# ---- install ---------------------------------------------------------------------------------------------------------


def install(job: Job, source: Path, version: str) -> Generator[Step, None, None]:
    """The steps of a release that is copied from the folder `source`. Each may raise InstallFailed, and OSError."""
    if not stage.VERSION.fullmatch(version):
        raise InstallFailed(f"{version!r} is no version", remedy="Build it again.")
    job.version = version
    placed, staged = job.releases / version, job.releases / f".{version}.new"
    in_place, is_same = source == placed, stage.is_same(source, placed)
    copies, replaces = not in_place and not is_same, placed.exists() and not in_place and not is_same
    only = TRIED if job.service.root == Path("/") else TRIED_IN_AN_IMAGE
    if copies:
        yield f"copy {source} to {staged}", lambda: stage.copy(source, staged)
        job.state = "STAGED"
        yield f"selftest of {staged}", lambda: _probe_or_remove(job, staged, only)
    else:
        yield f"selftest of {placed}, which is there", lambda: _probe(job, placed, only)
    if copies and not replaces:
        yield f"rename it to {placed}", lambda: _place(staged, placed)
    job.state = "PLACED"
    yield from _around(job)
    current = pointed(job.prefix / "current")
    if job.has_service and not job.now and current:
        yield f"wait for a free slot, at most {SLOT_S:.0f} s", lambda: _wait_for_slot(job)
    if replaces:
        yield from _replace(job, placed, staged)
    if copies or current != version:
        is_proven = not replaces and _fallback(job) == version
        what = "which is proven" if is_proven else "on trial"
        yield f"{job.prefix / 'current'} -> {version}, {what}", lambda: _switch(job)
    yield "remove older releases", lambda: release.prune(job.prefix)
    yield from _start(job)


def _probe(job: Job, folder: Path, only: str) -> None:
    stage.probe(folder, job.version, only=only, config=job.config)


def _probe_or_remove(job: Job, staged: Path, only: str) -> None:
    try:
        _probe(job, staged, only)
    except InstallFailed:
        shutil.rmtree(staged)
        job.state = ""
        raise


def _place(staged: Path, placed: Path) -> None:
    staged.rename(placed)
    sync(placed.parent)


def _replace(job: Job, placed: Path, staged: Path) -> Generator[Step, None, None]:
    """The same version anew. Where something names it, that names a copy of it before the new files come."""
    names = release.named(job.prefix)
    if job.version in names:
        each = (f"{job.version}.replaced{number or ''}" for number in count())
        kept = job.releases / next(name for name in each if name not in names)
        yield f"keep what is there as {kept}", lambda: _keep(placed, kept)
        yield f"what was {placed.name} is {kept.name}", lambda: _rename(job, placed.name, kept.name)
    old = job.releases / f".{job.version}.old"
    yield f"rename {placed} to {old}", lambda: _move_away(placed, old)
    yield f"rename {staged} to {placed}", lambda: _place(staged, placed)
    yield f"remove {old}", lambda: shutil.rmtree(old)


def _keep(placed: Path, kept: Path) -> None:
    """A copy by links: the bytes are there once."""
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(placed, kept, symlinks=True, copy_function=os.link)
    stage.sync_all(kept)


def _rename(job: Job, name: str, to: str) -> None:
    """Whatever names one release names another from now on. They are the same: it may end between any two, and the
    trial of the one is that of the other then (release.trial).
    """
    pending = read_pending(job.prefix)
    if pending is not None and name in (pending.version, pending.previous):
        version, previous = (to if each == name else each for each in (pending.version, pending.previous))
        write_pending(job.prefix, msgspec.structs.replace(pending, version=version, previous=previous))
    for link in (job.prefix / "current", job.prefix / "previous"):
        if pointed(link) == name:
            point(link, to)


def _move_away(placed: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    placed.rename(old)


def _fallback(job: Job) -> str | None:
    """What is current; the one before it, where that is proven and what is current is not."""
    current, trial = pointed(job.prefix / "current"), release.trial(job.prefix)
    return current if trial is None or release.is_confirmed(trial) else trial.previous or current


def _switch(job: Job) -> None:
    """Let `current` be the release: on trial, unless it is the proven one that a trial would go back to."""
    fallback, trial = _fallback(job), release.trial(job.prefix)
    if fallback == job.version:
        _end_trial(job, job.version)
        return
    if trial is not None and release.is_confirmed(trial):
        release.settle(job.prefix, trial)
    confirm = job.state_dir / "confirmed"
    pending = Pending(id=secrets.token_hex(16), version=job.version, previous=fallback, confirm=str(confirm))
    write_pending(job.prefix, pending)  # first: whoever looks at the new `current` finds its trial
    point(job.prefix / "current", job.version)


def _end_trial(job: Job, version: str) -> None:
    """Another release than the one on trial is current from now on."""
    point(job.prefix / "current", version)
    (job.prefix / "pending.json").unlink(missing_ok=True)
    sync(job.prefix)


def _start(job: Job) -> Generator[Step, None, None]:
    if not job.has_service:
        if job.service.is_live and job.service.init == "systemd" and has_systemd(job.service.root):
            yield "tell systemd", job.service.reload
        if job.service.is_live:
            yield "the service is left as it is: what is new holds from its next start", lambda: None
        return
    job.state = "STARTED"
    yield f"restart the service, READY within {READY_S:.0f} s", lambda: _restart_or_go_back(job)
    job.state = "TRIAL"


def _restart_or_go_back(job: Job) -> None:
    try:
        restart(job, job.version)
    except InstallFailed as err:
        back_to = _go_back(job)
        if back_to is None:
            raise
        try:
            restart(job, back_to)
        except InstallFailed as again:
            neither = f"{job.version} does not come up, and {back_to} neither: {err.what}; {again.what}"
            raise InstallFailed(neither, remedy=again.remedy) from err
        raise InstallFailed(
            f"{job.version} does not come up, {back_to} runs again: {err.what}", remedy=err.remedy
        ) from err


def _go_back(job: Job) -> str | None:
    """To what ran before; None: there is no such release."""
    trial = release.trial(job.prefix)
    if trial is None or trial.previous is None:
        return None
    _end_trial(job, trial.previous)
    return trial.previous


def restart(job: Job, version: str) -> None:
    """Restart the service; returns when it answers as that version. Raises InstallFailed after READY_S."""
    began = time.monotonic()
    job.service.ask("restart")
    said = "nothing"
    while job.service.init != "systemd":  # which waits for READY itself
        told = _status(job)
        if told.returncode == 0:
            status = json.loads(told.stdout)
            if status["uptime"] <= time.monotonic() - began:
                if status["version"] == release.version_of(version):
                    return
                said = f"version {status['version']}"
        else:
            said = (told.stderr or "nothing").strip()
        if time.monotonic() - began > READY_S:
            raise InstallFailed(
                f"{version} is not READY after {READY_S:.0f} s, it says: {said}", remedy=job.service.where_to_look()
            )
        time.sleep(READY_LOOK_S)  # noqa: TID251 - no loop runs here


def _wait_for_slot(job: Job) -> None:
    """Until no suite runs."""
    until = time.monotonic() + SLOT_S
    while running := _running(job):
        if time.monotonic() > until:
            raise InstallFailed(
                f"{', '.join(running)} still runs after {SLOT_S:.0f} s; the release is placed, and not started",
                remedy="Try again later, or use --now.",
            )
        time.sleep(SLOT_LOOK_S)  # noqa: TID251 - no loop runs here


def _running(job: Job) -> list[str]:
    """The runs under way. An agent that cannot be asked, as the settings are newer than it, has them in its store."""
    told = _status(job)
    if told.returncode == 0:
        return [run["run"] for run in json.loads(told.stdout)["runs"]]
    pid = owner(job.state_dir / "lock")
    if pid is None:
        return []
    store = job.state_dir / "store.db"
    try:
        with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return [run for (run,) in db.execute("SELECT run FROM kept")]
    except sqlite3.Error as err:
        said = f"{told.stderr.strip()} ({store}: {err})"
        raise InstallFailed(
            f"the agent that runs (pid {pid}) does not say whether a suite runs: {said}", remedy="Use --now."
        ) from err


def _status(job: Job) -> subprocess.CompletedProcess[str]:
    options = [word for path in job.config for word in ("--config", str(path))]
    return call([job.prefix / "current/agent", "ctl", *options, "status"])


# ---- what stands around the releases ---------------------------------------------------------------------------------


def _around(job: Job) -> Generator[Step, None, None]:
    """Settings, token, state, service files and links: made once, or brought up to date."""
    service = job.service
    if not job.is_root:
        yield "not root: settings, token, service and link are left to root", lambda: None
        return
    static = service.user not in ("dynamic", "root") and service.init != "none"
    if static and account(service.root, service.user) is None:
        groups = groups_for(service.root, service.needs)
        yield f"make the user {service.user}", lambda: make_account(service.root, service.user, groups)
    yield f"settings in {job.at(CONFIG)}, unless they are there", lambda: _make_config(job)
    if service.root == Path("/"):
        machine = CONFIG / "conf.d/00-machine.toml"
        yield f"serial numbers in {machine}, where the firmware has any", lambda: record_serials(DMI, machine)
    for path in _unreadable(job) if static else ():
        yield f"{path} to the user {service.user}", lambda path=path: _give(job, path)  # type: ignore[misc]
    if service.user == "root":
        yield "the service runs as root: for suites that need it (exposure 4.8 of 10, else 1.6)", lambda: None
    if static or service.user == "root":
        yield f"state in {job.at(STATE)}", lambda: _make_state(job)
    yield f"{job.at(LINK)} -> {service.prefix}/current/agent", lambda: _link(job)
    yield f"library and examples in {job.at(SHARE)}", lambda: _share(job)
    for path, (text, mode) in service.files().items():
        data = text.encode()
        yield f"write {job.at(path)}", lambda path=path, data=data, mode=mode: _write(job.at(path), data, mode)  # type: ignore[misc]
    for link, target in service.links().items():
        yield f"{job.at(link)} -> {target}", lambda link=link, target=target: _point(job.at(link), target)  # type: ignore[misc]


def _make_config(job: Job) -> None:
    folder = job.at(CONFIG)
    stage.make_folder(folder / "conf.d")
    if not (folder / "agent.toml").exists():
        write(folder / "agent.toml", FIRST_SETTINGS.encode())
    token = folder / "token"
    if not token.exists():
        write(token, f"{secrets.token_urlsafe(32)}\n".encode(), 0o600)
    _give(job, token)


def _unreadable(job: Job) -> list[Path]:
    """What of /etc/agent the settings name as secret, and root alone may read. systemd hands it to a dynamic user."""
    needs = job.service.needs
    named = {Path(os.path.normpath(CONFIG / name)) for name in (*needs.credentials, needs.secrets) if name}
    files = [job.at(path) for path in sorted(named) if CONFIG in path.parents]
    files += [path for folder in files if folder.is_dir() for path in sorted(folder.iterdir())]
    return [path for path in files if path.exists() and not path.is_symlink() and not path.stat().st_mode & 0o004]


def record_serials(dmi: Path, file: Path) -> None:
    """As labels, once: only root can read them, and the service is not root."""
    labels = {}
    for name in SERIALS:
        with suppress(OSError):
            text = (dmi / name).read_text(errors="replace").strip()
            if text.isascii() and text.isprintable() and not NO_SERIAL.fullmatch(text):
                labels[name] = text
    if labels and not file.exists():
        lines = [f"{name} = {json.dumps(text)}\n" for name, text in labels.items()]
        write(file, f"# Written by `agent install`.\n[labels]\n{''.join(lines)}".encode())


def _make_state(job: Job) -> None:
    if job.at(STATE).is_symlink():  # of a dynamic user: systemd moves it back, and gives all of it away
        return
    stage.make_folder(job.at(STATE).parent)
    job.at(STATE).mkdir(mode=0o700, exist_ok=True)
    _give(job, job.at(STATE))


def _give(job: Job, path: Path) -> None:
    """To the service's user, if that is one of the system's."""
    user = account(job.service.root, job.service.user)
    if user is None or path.stat().st_uid == user[0]:
        return
    if path.is_dir():  # it was another user's
        for _, folders, files, at in os.fwalk(path):
            for name in (*folders, *files):
                os.chown(name, *user, dir_fd=at, follow_symlinks=False)
    os.chown(path, *user)


def _link(job: Job) -> None:
    link = job.at(LINK)
    if link.exists() and not link.is_symlink():
        raise InstallFailed(f"{link} is a file that is not ours", remedy="Move it away.")
    _point(link, _program(job))


def _program(job: Job) -> str:
    """What is to be started, as the installed system sees it."""
    return f"{job.service.prefix}/current/agent"


def _share(job: Job) -> None:
    monitors = job.releases / job.version / "lib/agent/monitors"
    for file in (monitors / "sdk.py", *sorted((monitors / "examples").glob("*"))):
        if file.is_file():
            # Whole at every moment: monitors of the agent that runs may read them.
            _write(job.at(SHARE) / file.relative_to(monitors), file.read_bytes(), file.stat().st_mode & 0o777)


def _write(path: Path, data: bytes, mode: int) -> None:
    stage.make_folder(path.parent)
    if not path.exists() or path.read_bytes() != data:
        write(path, data, mode)


def _point(link: Path, target: str) -> None:
    stage.make_folder(link.parent)
    if not link.is_symlink() or os.readlink(link) != target:
        release.replace_link(link, target)


# ---- the other ways --------------------------------------------------------------------------------------------------


def roll_back(job: Job) -> Generator[Step, None, None]:
    """Back to the previous release, which is known to run; the one that is left becomes `previous`."""
    current, trial = pointed(job.prefix / "current"), release.trial(job.prefix)
    target = trial.previous if trial else pointed(job.prefix / "previous")
    if current is None or target is None or target == current or not (job.releases / target / "agent").exists():
        raise InstallFailed(f"{job.prefix} has no release to go back to", remedy="Install one; --list shows them.")
    job.version, job.state = target, "PLACED"
    if job.has_service and not job.now:
        yield f"wait for a free slot, at most {SLOT_S:.0f} s", lambda: _wait_for_slot(job)

    def switch() -> None:
        _end_trial(job, target)
        point(job.prefix / "previous", current)

    yield f"{job.prefix / 'current'} -> {target}", switch
    if job.has_service:
        job.state = "STARTED"
        yield f"restart the service, READY within {READY_S:.0f} s", lambda: restart(job, target)


def uninstall(job: Job, *, purge: bool) -> Generator[Step, None, None]:
    """Stop the service and take everything away; settings and state too with `purge`."""
    service = job.service
    if job.has_service and any(job.at(path).exists() for path in service.files()):
        yield "stop the service", lambda: service.ask("stop")
    folders = [job.releases]
    if job.is_root:  # nobody else has made these
        paths = [path for path in (*service.links(), *service.files()) if os.path.lexists(job.at(path))]
        link = job.at(LINK)
        paths += [LINK] if link.is_symlink() and os.readlink(link) == _program(job) else []
        for path in paths:
            yield f"remove {job.at(path)}", job.at(path).unlink
        drop_ins = job.at(MACHINE.parent)  # among them may be what `systemctl edit` made
        if service.init == "systemd" and drop_ins.exists() and not purge and not any(drop_ins.iterdir()):
            yield f"remove {drop_ins}", drop_ins.rmdir
        folders.append(job.at(SHARE))
        folders += [job.at(path) for path in (CONFIG, STATE, PRIVATE_STATE, MACHINE.parent)] if purge else []
    for folder in folders:
        if folder.is_symlink():  # systemd's, to the private folder of a dynamic user
            yield f"remove {folder}", folder.unlink
        elif folder.exists():
            yield f"remove {folder}", lambda folder=folder: shutil.rmtree(folder)  # type: ignore[misc]
    names = ("current", "previous", "pending.json", ".lock")
    yield f"remove {job.prefix}", lambda: _remove_prefix(job.prefix, names)
    if purge and job.is_root:
        logs = [job.at(LOG).with_name(f"{LOG.name}{suffix}") for suffix in ("", ".1", ".2")]
        yield f"remove {job.at(LOG)}", lambda: _remove(logs)
    if purge and job.state_dir not in (STATE, job.at(STATE)) and job.state_dir.exists():
        yield f"the state in {job.state_dir} stays: what else is there, only its owner knows", lambda: None
    if job.has_service and service.init == "systemd":
        yield "tell systemd", service.reload


def _remove_prefix(prefix: Path, names: Sequence[str]) -> None:
    _remove([prefix / name for name in names])
    if prefix.exists() and not any(prefix.iterdir()):
        prefix.rmdir()


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


class Listed(msgspec.Struct, frozen=True):
    """A release on the disk. `role` is current, previous, on trial, or nothing."""

    version: str
    role: str
    starts: int | None


def listed(prefix: Path) -> list[Listed]:
    """The releases of a prefix, by name."""
    current, previous, trial = pointed(prefix / "current"), pointed(prefix / "previous"), release.trial(prefix)
    on_trial = trial is not None and not release.is_confirmed(trial)
    if trial is not None:
        previous = trial.previous
    folder = prefix / "releases"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
    roles = {previous: "previous", current: "current, on trial" if on_trial else "current"}
    return [
        Listed(name, roles.get(name, ""), trial.unproven if trial and on_trial and name == current else None)
        for name in names
    ]
