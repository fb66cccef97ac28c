"""The settings, the profile, the control port, and who may read what.

Source: protocols/packaging.md 7.
"""

import math
import os
import re
import socket
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import msgspec

from agent.checks.subject import Finding, Subject, text_of
from agent.core import locks
from agent.core.config import is_there
from agent.core.listen import split_address
from agent.core.tls import TlsUnusable, server_context
from agent.core.token import TokenUnusable, read_token
from agent.settings import DEFAULT_TOKEN, DEVICES, Settings, find

MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address as IPv6 writes it


def config(subject: Subject) -> Finding:
    """Can the settings be used, as they are on the disk?"""
    if subject.errors:
        return Finding("fail", "\n".join(subject.errors), "Correct them.")
    of_profile = subject.report.warnings if subject.report else ()
    warnings = [text for text in (subject.effective.warnings if subject.effective else ()) if text not in of_profile]
    if warnings:
        return Finding("warn", "\n".join(warnings), "Unset the variable, or correct its name.")
    return Finding("ok", "good")


def profile(subject: Subject) -> Finding:
    """Does a hardware profile fit, and only one so well?"""
    if subject.report is None:
        return Finding("fail", "not looked for: the settings cannot be used", "Correct the settings.")
    report = subject.report
    data = {"profile": report.profile, "forced": report.forced}
    if wrong := [error for refused in report.refused for error in refused.errors]:
        return Finding("fail", "\n".join(wrong), "Correct the profile, or take it away.", data)
    if report.warnings:
        return Finding("warn", "\n".join(report.warnings), 'Set profile = "NAME", or `agent profile`.', data)
    return Finding("ok", report.profile or "none fits", data=data)


def control_port(subject: Subject) -> Finding:
    """Is it free, or ours, and of this machine; is there a certificate? Nothing is made to listen."""
    control, tls = subject.settings.control, subject.settings.control.tls
    if tls.cert:
        key, client_ca = (find(name, subject.folder) if name else None for name in (tls.key, tls.client_ca))
        try:
            server_context(find(tls.cert, subject.folder), key, client_ca)
        except TlsUnusable as err:
            return Finding("fail", err.what, err.remedy)
    held = []
    for address in control.listen:
        host, number = split_address(address)
        try:
            ours = _own_addresses(host)
        except OSError as err:
            what = f"{address} is no address of this machine: {err.strerror}"
            return Finding("fail", what, "Set control.listen to one of its own, or bring that one up.")
        held += [
            (address, inode)
            for theirs, port, inode in _listening(subject.root)
            if port == number and any(_clashes(own, theirs) for own in ours)
        ]
    if not held:
        return Finding("ok", f"free: {', '.join(control.listen)}")
    owner = locks.owner(subject.folder / "lock", subject.root)
    for address, inode in held:
        pid = _pid_of(subject.root, inode)
        if owner is None or pid not in (owner, None):
            comm = text_of(subject.root / f"proc/{pid}/comm") if pid else None
            who = f"pid {pid} ({comm})" if pid else "a process of another user"
            return Finding("fail", f"{address} is held by {who}", "End it, or set control.listen.", {"pid": pid})
    return Finding("warn", f"held by our own service, pid {owner}", "Nothing, as long as it is to run.", {"pid": owner})


def _own_addresses(host: str) -> list[bytes]:
    """What a host stands for, where one may listen on this machine. Raises OSError for one that is another's, or none.

    A socket is bound to each, but to no port that is asked for, and does not listen.
    """
    found = []
    for family, kind, _, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        try:
            probe = socket.socket(family, kind)
        except OSError:  # of a family that this kernel does not have: it is left out there, too
            continue
        with probe:
            probe.bind(place)
        found.append(socket.inet_pton(family, str(place[0]).partition("%")[0]))
    return found


def _listening(root: Path) -> Iterator[tuple[bytes, int, str]]:
    """Address, port and inode of each TCP socket that listens."""
    for name in ("tcp", "tcp6"):
        for line in (text_of(root / "proc/net" / name) or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "0A":
                host, _, port = fields[1].partition(":")
                words = (int(host[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(host), 8))
                yield b"".join(words).removeprefix(MAPPED), int(port, 16), fields[9]


def _clashes(ours: bytes, theirs: bytes) -> bool:
    """Would listening at one address fail because of a socket at the other? Ours leaves IPv4 alone where it is IPv6."""
    if len(ours) == len(theirs):
        return ours == theirs or not any(ours) or not any(theirs)
    return len(theirs) == 16 and not any(theirs)


def _pid_of(root: Path, inode: str) -> int | None:
    """Who has the socket open, as far as we may see."""
    for folder in root.glob("proc/[0-9]*/fd"):
        try:
            if any(os.readlink(fd) == f"socket:[{inode}]" for fd in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:  # another user's, or gone
            continue
    return None


def control_token(subject: Subject) -> Finding:
    """Are there tokens, kept from others, and too long to be guessed?"""
    control = subject.settings.control
    weak, missing = [], []
    for token in control.tokens:
        path = find(token.file, subject.folder)
        if not is_there(path) and token.file == DEFAULT_TOKEN:
            missing.append(path)
            continue
        try:
            bits = _bits(read_token(path))
        except TokenUnusable as err:
            return Finding("fail", err.what, err.remedy)
        if bits < 128:
            weak.append(f"{path} has {bits:.0f} bits at most")
    if not control.tokens and not control.tls.client_ca and not control.insecure_loopback:
        return Finding("fail", "there is none: nobody may come in", "Set control.tokens.")
    if weak:
        return Finding("warn", ", ".join(weak), "Write 256 random bits: openssl rand -hex 32.")
    if control.insecure_loopback:
        return Finding("warn", "insecure_loopback: whoever is on this machine may all", "Set it to false.")
    return Finding("ok", f"{missing[0]} is made at the first start" if missing else f"tokens: {len(control.tokens)}")


def _bits(token: str) -> float:
    """At most so many, by its length and the kinds of its characters."""
    kinds = {r"[0-9]+": 10, r"[0-9a-f]+|[0-9A-F]+": 16, r"[a-z]+|[A-Z]+": 26, r"[0-9a-z]+|[0-9A-Z]+": 36}
    alphabet = next((size for kind, size in kinds.items() if re.fullmatch(kind, token)), 64)
    return min(len(token), 8 * len(set(token))) * math.log2(alphabet)


def files_permissions(subject: Subject) -> Finding:
    """May others read tokens and keys; may we read the logs, and use the devices that labels name?"""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    open_to_others, unseen = [], []
    for path in _secrets(subject):
        # systemd lets its user read a credential by an ACL, whose mask shows as group bits.
        others = 0o007 if credentials and path.is_relative_to(credentials) else 0o077
        try:
            if is_there(path) and path.stat().st_mode & others:
                open_to_others.append(str(path))
        except OSError as err:
            unseen.append(f"{path}: {err.strerror}")
    if unseen:
        return Finding("fail", ", ".join(unseen), "Run it as the service's user, or let that user enter the folder.")
    if open_to_others:
        return Finding("fail", f"others may read {', '.join(open_to_others)}", f"chmod 600 {' '.join(open_to_others)}")
    warned, remedies = [], []
    logs = [path for path in _logs(subject.settings) if os.path.exists(path) and not os.access(path, os.R_OK)]
    if logs:
        warned.append(f"not readable: {', '.join(logs)}")
        remedies.append("Put the service's user into their group, as adm.")
    if devices := list(_closed_devices(subject)):
        warned += devices
        remedies.append(
            "Load their driver, give them to a group of the service's user by a udev rule, then `agent install`."
        )
    return Finding("warn", "\n".join(warned), " ".join(remedies)) if warned else Finding("ok", "good")


def _closed_devices(subject: Subject) -> Iterator[str]:
    """A line a label of DEVICES whose devices are not there, or may not be used: by the agent that runs, else by us."""
    pid, proc = locks.owner(subject.folder / "lock", subject.root), subject.root / "proc"
    other = None if pid in (None, os.getpid()) else proc / str(pid)
    # systemd hides them from a service that they were not opened to; only root sees what it sees.
    dev = other / "root/dev" if other and os.geteuid() == 0 else subject.root / "dev"
    consoles = {line.split()[0] for line in (text_of(proc / "consoles") or "").splitlines()}
    for label, devices in DEVICES.items():
        if not subject.settings.labels.get(label):
            continue
        nodes = [node for pattern in devices.nodes for node in sorted(dev.glob(pattern))]
        closed = [node for node in nodes if node.name not in consoles and not _may_use(node, other)]
        if closed:
            named = ", ".join(f"/dev/{node.relative_to(dev)} ({_whose(node)})" for node in closed)
            yield f"label {label}: the service's user may not use {named}"
        elif not nodes:
            yield f"label {label}: the service sees none of {', '.join(f'/dev/{name}' for name in devices.nodes)}"


def _may_use(node: Path, other: Path | None) -> bool:
    """May we, or that process, read and write it?"""
    status = text_of(other / "status") if other else None
    if status is None:  # or it has ended meanwhile
        return os.access(node, os.R_OK | os.W_OK)
    fields = dict(line.split(":", 1) for line in status.splitlines())
    uid, groups = int(fields["Uid"].split()[1]), [fields["Gid"].split()[1], *fields["Groups"].split()]
    state = node.stat()
    bits = 0o600 if state.st_uid == uid else 0o060 if str(state.st_gid) in groups else 0o006
    return uid == 0 or state.st_mode & bits == bits


def _whose(node: Path) -> str:
    state = node.stat()
    return f"of user {state.st_uid}, group {state.st_gid}, mode {state.st_mode & 0o777:04o}"


def _secrets(subject: Subject) -> Iterator[Path]:
    """Every file of a token, password or key that the settings name."""

    def walk(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, key)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner, name)
        elif value and name in ("token_file", "password_file", "key_file", "salt_file"):
            yield value

    control = subject.settings.control
    names = [*walk(msgspec.to_builtins(subject.settings), ""), *(token.file for token in control.tokens)]
    yield from (find(name, subject.folder) for name in dict.fromkeys([*names, control.tls.key]) if name)


def _logs(settings: Settings) -> Iterator[str]:
    for watch in settings.logs.watch:
        yield from glob(watch.glob) if watch.glob else ["/dev/kmsg"] if watch.kmsg else [watch.path or os.devnull]
