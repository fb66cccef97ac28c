"""Releases on the disk: which one this process is, which one starts next, and the trial of a new one.

    PREFIX/releases/VERSION/    a release: the executable `agent`, and `lib/`
    PREFIX/current              -> releases/VERSION, the one that starts; replaced by rename(2)
    PREFIX/previous             -> releases/VERSION, the one before it that ran well
    PREFIX/pending.json         the trial of `current`: gone when it is over

A trial begins with the installer. The agent ends it well after 60 s with all roles healthy: as it cannot write below
PREFIX, it writes the trial's id into `confirm`, a file in its state directory. Before each start `boot_check` looks
there; a fourth start without it gets the previous release instead. A start that was READY and then ended by a signal to
end is none of the three, and the agent writes its number behind the id: else who restarts the service a few times while
he sets it up would find himself on the previous release.

Imports no trio: the parent of `agent run --respawn` and the boot check are small.

Source: protocols/packaging.md 8.
"""

import fcntl
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import msgspec

from agent.core import bundle

log = logging.getLogger(__name__)

STARTS = 3  # so many unconfirmed ones, then the previous release
MAX_CONFIRM = 64  # bytes; an id is 32, and there may be the number of a start


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """The trial of a release. `previous` is the version to go back to, `starts` how often it was started, `ended` how
    often of these it was ended by a signal to end.

    `confirm` is the path of the file into which the agent writes `id`.
    """

    id: str
    version: str
    previous: str | None
    confirm: str
    starts: int = 0
    ended: int = 0

    @property
    def unproven(self) -> int:
        """How many starts speak against it."""
        return self.starts - self.ended


def own_folder() -> Path | None:
    """The release folder that this process is bound to, whatever `current` names meanwhile; None in a checkout."""
    folder = bundle.release()
    return folder.resolve() if folder else None


def own_prefix() -> Path | None:
    """PREFIX, when this process is a release below it."""
    folder = own_folder()
    return folder.parent.parent if folder and folder.parent.name == "releases" else None


def own_trial() -> Pending | None:
    """The trial of the release that this process is."""
    prefix = own_prefix()
    pending = read_pending(prefix) if prefix else None
    folder = own_folder()
    return pending if pending and folder and _is_of(pending, folder.name) else None


def end_own_trial() -> None:
    """This start was ended by a signal to end. What cannot be written is logged: the start counts then."""
    pending = own_trial()
    if pending is None or is_confirmed(pending):
        return
    try:
        write(Path(pending.confirm), _ended(pending).encode(), 0o600)
    except OSError as err:
        log.error("the end of a start on trial is not kept error=%s", err)  # noqa: TRY400 - the path says it


def pointed(link: Path) -> str | None:
    """The version that `current` or `previous` points to; None when there is none."""
    try:
        return os.readlink(link).removeprefix("releases/")
    except FileNotFoundError:
        return None


def version_of(name: str) -> str:
    """The version of a release, of its folder's name; one that was kept when its version came anew has more behind."""
    return name.partition(".replaced")[0]


def trial(prefix: Path) -> Pending | None:
    """The trial of what is current; None when it has none."""
    pending, current = read_pending(prefix), pointed(prefix / "current")
    return pending if pending and current and _is_of(pending, current) else None


def _is_of(pending: Pending, name: str) -> bool:
    """Is it the trial of the release whose folder has this name?

    When its version comes anew, a release is called otherwise first in pending.json, then where `current` points to:
    where the installer is killed between the two, the names differ, and the release is the same.
    """
    return version_of(pending.version) == version_of(name) and pending.previous != name


def named(prefix: Path) -> set[str]:
    """The releases that are pointed to or on trial, or were before a trial that is under way."""
    pending = read_pending(prefix)
    names = {pointed(prefix / "current"), pointed(prefix / "previous")}
    names |= {pending.version, pending.previous} if pending else set()
    return {name for name in names if name is not None}


def point(link: Path, version: str) -> None:
    """Let `current` or `previous` point to a version."""
    replace_link(link, f"releases/{version}")


def replace_link(link: Path, target: str) -> None:
    """At every moment it points to the old target or the new one; on disk when it returns."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
    sync(link.parent)


def read_pending(prefix: Path) -> Pending | None:
    """The trial under way; None when there is none, or its file cannot be read, which is logged."""
    try:
        return msgspec.json.decode((prefix / "pending.json").read_bytes(), type=Pending)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as err:
        log.error("pending.json is left alone file=%s error=%s", prefix / "pending.json", err)  # noqa: TRY400 - as said
        return None


def write_pending(prefix: Path, pending: Pending) -> None:
    """On disk when it returns, whole or not at all."""
    write(prefix / "pending.json", msgspec.json.encode(pending) + b"\n")


def is_confirmed(pending: Pending) -> bool:
    """Has the agent said that this trial went well?"""
    return _said(pending) == pending.id


def _ended(pending: Pending) -> str:
    """What the agent says of the start under way when it is ended by a signal to end."""
    return f"{pending.id} {pending.starts}"


def _said(pending: Pending) -> str:
    """What the agent has said of this trial; nothing where it cannot be read."""
    try:
        # The file is the agent's own, and this may be root: it may be a FIFO, or huge.
        fd = os.open(pending.confirm, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(fd, MAX_CONFIRM).decode("ascii", "replace").strip()
    except OSError:
        return ""
    finally:
        os.close(fd)


def boot_check(prefix: Path) -> str | None:
    """What is to be done before each start; the version gone back to, None when `current` stays.

    Raises OSError when PREFIX cannot be written while there is a trial.
    """
    pending = trial(prefix)
    if pending is None:
        return None
    if is_confirmed(pending):
        settle(prefix, pending)
        _prune_unless_installing(prefix)
        return None
    if _said(pending) == _ended(pending):
        pending = msgspec.structs.replace(pending, ended=pending.ended + 1)
    if pending.unproven < STARTS:
        write_pending(prefix, msgspec.structs.replace(pending, starts=pending.starts + 1))
        return None
    if pending.previous is None or not (prefix / "releases" / pending.previous / "agent").exists():
        log.warning("unconfirmed after %d starts, and no release to go back to version=%s", STARTS, pending.version)
        return None
    log.error("unconfirmed after %d starts version=%s back_to=%s", STARTS, pending.version, pending.previous)
    point(prefix / "current", pending.previous)
    (prefix / "pending.json").unlink()
    sync(prefix)
    return pending.previous


def settle(prefix: Path, pending: Pending) -> None:
    """The trial went well: what it replaced is `previous` from now on."""
    if pending.previous is not None:
        point(prefix / "previous", pending.previous)
    (prefix / "pending.json").unlink(missing_ok=True)
    sync(prefix)
    log.info("confirmed version=%s", pending.version)


def prune(prefix: Path) -> list[str]:
    """Remove all but the `named` releases; the versions that went, and what a kill has left."""
    keep = named(prefix)
    gone = [path for path in (prefix / "releases").iterdir() if path.is_dir() and path.name not in keep]
    for path in gone:
        shutil.rmtree(path)
    return [path.name for path in gone]


def _prune_unless_installing(prefix: Path) -> None:
    """An installer has a release on the disk that nothing names yet."""
    lock = os.open(prefix / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        prune(prefix)
    except BlockingIOError:
        log.info("an installer works, nothing is removed")
    finally:
        os.close(lock)


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """A file, whole or not at all, on disk when it returns. Raises OSError, and leaves nothing else then."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask is
            file.write(data)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except OSError:
        with suppress(OSError):  # what went wrong is told
            new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """The names in a folder are on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
