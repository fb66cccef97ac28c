"""A release on its way onto the disk: where it comes from, its copy, and whether the copy works here.

    RELEASES/.VERSION.new/    the copy, until it has passed: then RELEASES/VERSION

Source: protocols/packaging.md 8 (STAGED), 3 (what a release folder is).
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.core.bundle import checksums, damaged
from agent.core.errors import AgentError

NAMESPACE = "emissary"  # of signatures: ssh-keygen -Y sign -n emissary
SPARE = 16 * 2**20  # bytes that stay free beside the copy
LIMIT_S = 60.0  # for each program that is asked
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~-]{0,63}")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # where sudo's or cron's own is shorter


class InstallFailed(AgentError):
    """The work stopped; what stands is said by the text. Exit code 1."""


def check_place(prefix: Path) -> None:
    """Refuse a prefix that others could write: what stands there is started by root. Raises InstallFailed."""
    for folder in (prefix, prefix / "releases"):
        if os.geteuid() == 0 and folder.exists():
            state = folder.stat()
            if state.st_uid != 0 or state.st_mode & 0o022:
                raise InstallFailed(
                    f"{folder} belongs to user {state.st_uid}, mode {state.st_mode & 0o7777:04o}: others than root may"
                    " change what root would start",
                    remedy=f"chown root {folder} && chmod 755 {folder}, or choose another --prefix.",
                )


def is_same(source: Path, placed: Path) -> bool:
    """Is what stands there already, whole, what would be copied?"""
    try:
        return checksums(source) == checksums(placed) and not damaged(placed)
    except OSError:
        return False


def copy(source: Path, staged: Path) -> None:
    """Copy a release folder, file by file as its checksums name them; on disk when it returns.

    Raises InstallFailed: no room, read-only, or a file is not what was built. The copy is gone then.
    """
    shutil.rmtree(staged, ignore_errors=True)
    try:
        sums = checksums(source)
        names = [*sums, "lib/SHA256SUMS"]
        need = sum((source / name).stat().st_size for name in names)
        make_folder(staged.parent)
        free = shutil.disk_usage(staged.parent).free
        if free < need + SPARE:
            raise InstallFailed(
                f"{staged.parent}: {free >> 20} MiB are free, {(need + SPARE) >> 20} MiB are needed",
                remedy="Make room, or choose another --prefix.",
            )
        staged.mkdir()
        for name in names:
            _copy_file(source / name, staged / name, sums.get(name))
        for folder in [staged, *(path for path in staged.rglob("*") if path.is_dir() and not path.is_symlink())]:
            folder.chmod(0o755)
        sync_all(staged)
    except OSError as err:
        shutil.rmtree(staged, ignore_errors=True)
        raise InstallFailed(f"{err.filename or staged}: {err.strerror}", remedy=remedy(err)) from err
    except InstallFailed:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def probe(staged: Path, version: str, *, only: str, config: Sequence[Path]) -> None:
    """Let the copy start and look at itself. Raises InstallFailed with the checks that failed and their remedies."""
    try:
        told = call([staged / "agent", "--version", "--json"])
    except OSError as err:
        is_noexec = os.statvfs(staged).f_flag & os.ST_NOEXEC
        raise InstallFailed(
            f"{staged / 'agent'} cannot be run: {err.strerror}",
            remedy="The file system is mounted noexec: choose another --prefix."
            if is_noexec
            else "Is it built for this machine?",
        ) from err
    try:
        says = json.loads(told.stdout)["version"] if told.returncode == 0 else None
    except (ValueError, KeyError, TypeError):
        says = None
    if says != version:
        raise InstallFailed(
            f"{staged / 'agent'} --version says {says!r}, not {version!r}: {_last(told)}",
            remedy="Is it built for this machine? Its C library may be too old.",
        )
    options = [word for path in config for word in ("--config", str(path))]
    tested = call([staged / "agent", "--selftest", "--json", "--only", only, *options])
    if tested.returncode != 0:
        raise InstallFailed(f"the selftest of {version} fails: {_failed_checks(tested)}", remedy="Nothing was changed.")


def take(file: Path, folder: Path, *, sha256: str | None, keys: Path) -> Path:
    """Copy the single file that --from names into `folder`, checked as it is copied; the copy, executable.

    Raises InstallFailed: neither checksum nor signature, or one that does not fit.
    """
    signature = file.with_name(f"{file.name}.sig")
    if sha256 is None and not signature.exists():
        raise InstallFailed(
            f"{file} comes without --sha256 and without {signature.name}",
            remedy="Give the checksum that its maker published, or put the signature beside it.",
        )
    if not file.is_file():
        what = "is no regular file" if file.exists() else "there is no such file"
        raise InstallFailed(f"{file}: {what}", remedy="Name the single file of a release.")
    taken, digest = folder / "agent", hashlib.sha256()
    try:
        with file.open("rb") as given, taken.open("wb") as copied:
            while block := given.read(2**20):
                digest.update(block)
                copied.write(block)
    except OSError as err:
        raise InstallFailed(f"{err.filename or taken}: {err.strerror}", remedy=remedy(err)) from err
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise InstallFailed(
            f"{file} has the checksum {digest.hexdigest()}, not {sha256}", remedy="Fetch it again; nothing was changed."
        )
    if sha256 is None:
        _verify(taken, signature, keys)
    taken.chmod(0o755)
    return taken


def call(argv: Sequence[str | Path], *, limit_s: float = LIMIT_S, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, without our own traces and settings in its environment.

    Raises OSError: it cannot be run. One that takes too long is killed, with exit code 124.
    """
    environ = environ_for(os.environ)
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=limit_s, env=environ, errors="replace", **more
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"it took more than {limit_s:g} s")


def environ_for(base: Mapping[str, str]) -> dict[str, str]:
    """What a program that we start is given of `base`: a service is to begin as at boot, and nothing is our own.

    So TMPDIR is none of it: the caller's may be closed to the service, and that of `--from` goes when we end.
    """
    given = {name: value for name, value in base.items() if name in ("PATH", "HOME", "LANG", "TZ", "TERM")}
    return {"PATH": _PATH} | given


def _copy_file(source: Path, target: Path, digest: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
        return
    data = source.read_bytes()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise InstallFailed(f"{source} is damaged: its checksum is wrong", remedy="Fetch the release again.")
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        is_program = (target.name == "agent" and target.parent.name != "lib") or data.startswith(b"#!")
        os.fchmod(fd, 0o755 if is_program else 0o644)  # as packaging/agent.spec does it
        file.write(data)


def make_folder(folder: Path) -> None:
    """With its parents, readable for all whatever the umask is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        path.chmod(0o755)


def sync_all(folder: Path) -> None:
    """Its file system, on disk: one call for some hundred files; a sync of each would take minutes on an SD card."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(fd)


def _verify(file: Path, signature: Path, keys: Path) -> None:
    """The signature is one of the release keys'."""
    if not keys.exists():
        raise InstallFailed(
            f"no {keys} to check {signature.name} with",
            remedy="Put the maker's public keys there (ssh-keygen(1), ALLOWED SIGNERS).",
        )
    try:
        found = call(["ssh-keygen", "-Y", "find-principals", "-f", keys, "-s", signature])
        who = found.stdout.split("\n")[0].split(",")[0]
        argv: list[str | Path] = ["ssh-keygen", "-Y", "verify", "-f", keys, "-I", who, "-n", NAMESPACE, "-s", signature]
        with file.open("rb") as content:
            good = found.returncode == 0 and call(argv, stdin=content).returncode == 0
    except FileNotFoundError:
        raise InstallFailed(
            "no ssh-keygen to check the signature with", remedy="Install it, or give --sha256."
        ) from None
    if not good:
        raise InstallFailed(
            f"{signature} is no signature of this file by a key of {keys}",
            remedy="Fetch both again; nothing was changed.",
        )


def _failed_checks(tested: "subprocess.CompletedProcess[str]") -> str:
    try:
        checks = json.loads(tested.stdout)["checks"]
        return " ".join(
            f"{check['name']}: {check['detail'].removesuffix('.')}. {check['remedy']}"
            for check in checks
            if check["status"] == "fail"
        )
    except (ValueError, KeyError, TypeError):
        return _last(tested)


def _last(told: "subprocess.CompletedProcess[str]") -> str:
    """The end of what it said, for the person at the machine."""
    lines = (told.stderr or told.stdout).strip().splitlines()
    return lines[-1][:500] if lines else f"exit code {told.returncode}"


def remedy(err: OSError) -> str:
    match err.errno:
        case errno.EROFS:
            return "The file system is read-only: remount it (mount -o remount,rw), or choose another --prefix."
        case errno.ENOSPC | errno.EDQUOT:
            return "The disk is full: make room, or choose another --prefix."
        case errno.EACCES | errno.EPERM:
            return "Run it as root."
        case _:
            return "Nothing was changed."
