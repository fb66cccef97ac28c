"""The native engine, the system, the runners, and what was installed.

Source: protocols/packaging.md 7.
"""

import errno
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.checks.state import last_event
from agent.checks.subject import NOT_USED, Finding, Subject, date_of, text_of
from agent.core import bundle, toml
from agent.core.clock import is_synchronised
from agent.core.payload import UNREADABLE
from agent.settings import Settings
from agent.suites.requirements import satisfies

TESTED = {"node": ">=18.18", "ava": ">=6.4", "pytest": ">=8.4"}  # the oldest that tests/interop runs with
SLOW_NS = 5_000  # a line; a rule with a literal takes less than 100 on most
MEASURE_S = 0.5  # for all rules
COUNT_S = 1.0  # for the folders of all trees that are watched
PROGRAM_S = 2.5  # until a program has told its version


# ---- the native engine -----------------------------------------------------------------------------------------------


def native_engine(subject: Subject) -> Finding:
    """Does the native module load, and find what is known to be there?"""
    try:
        from agent.core import engine
        from agent.core.lines import Lines
        from agent.logs.literals import clauses
        from agent.logs.regex import Regex
        from agent.logs.scanner import Scanner, Worker
    except ImportError as err:
        return Finding("fail", f"cannot be loaded: {err}", "Install the agent again, for this kind of machine.")
    text = b"".join(b"line %d%s\n" % (i, b": error 42" if i % 7 == 0 else b"") for i in range(1000))
    lines = Lines(100).feed(text)
    pattern = r"error (?<code>\d+)"
    found = Worker(Scanner([Regex(pattern)], [clauses(pattern)])).scan(text)
    if len(lines) != 1000 or b"\n".join([*lines, b""]) != text or found.count != 143:
        what = f"{len(lines)} lines of 1000 and {found.count} matches of 143"
        return Finding("fail", f"{engine.native_engine()} is wrong: {what}", "Set AGENT_SIMD=scalar, and report it.")
    name = engine.native_engine()
    fast = os.uname().machine in ("x86_64", "aarch64")
    if name == "scalar" and fast:
        return Finding("warn", "scalar: scanning takes several times longer", "Unset AGENT_SIMD; else look at the CPU.")
    return Finding("ok", name, data={"engines": sorted(engine.available_engines())})


def native_jit(subject: Subject) -> Finding:
    """Are regexes run as machine code?"""
    from agent.logs.regex import Regex

    if Regex("a(b|c)d").jit:
        return Finding("ok", "regexes run as machine code")
    return Finding("warn", "refused: regexes are interpreted", "Set MemoryDenyWriteExecute=no for the service.")


def native_rules(subject: Subject) -> Finding:
    """Do the rules of all watches compile, and which of them cost too much?"""
    from agent.logs import lint
    from agent.logs.rules import RuleErrors

    try:
        rules = lint.check(subject.settings.logs, subject.origins)
    except RuleErrors as err:
        return Finding("fail", str(err), "Correct the rules.")
    took = lint.measure(rules, time.perf_counter, MEASURE_S)  # what is not measured in time is not slow
    ns = {rule.spec.id: round(took.get(rule.spec.id, 0)) for rule in rules}
    slow = {rule.spec.id: ns[rule.spec.id] for rule in rules if not rule.clauses or ns[rule.spec.id] > SLOW_NS}
    if slow:
        named = ", ".join(f"{id} ({ns} ns a line)" for id, ns in slow.items())
        return Finding("warn", f"without literal, or slow: {named}", "Give each a word that is in every match.", slow)
    return Finding("ok", f"{len(rules)} rules" if rules else "no rules", data={"rules": len(rules)})


# ---- the system ------------------------------------------------------------------------------------------------------


def inotify_limits(subject: Subject) -> Finding:
    """Are there instances and watches enough, and do events come? The event is that of a file being opened."""
    from inotify_simple import INotify, flags

    most = int(text_of(subject.root / "proc/sys/fs/inotify/max_user_watches") or 0)
    needed = _watches_needed(subject.settings)
    data = {"max_user_watches": most, "needed": needed}
    try:
        with INotify() as inotify:  # type: ignore[no-untyped-call]  # annotated in part
            inotify.add_watch(sys.executable, flags.OPEN)  # type: ignore[no-untyped-call]
            with open(sys.executable, "rb"):
                events = inotify.read(timeout=1000)  # type: ignore[no-untyped-call]
    except OSError as err:
        if err.errno == errno.ENOSPC:
            return Finding("fail", "no watch is left", "Raise fs.inotify.max_user_watches.", data)
        remedy = "Raise fs.inotify.max_user_instances." if err.errno == errno.EMFILE else "Look at the system's limits."
        return Finding("fail", f"no instance: {err.strerror}", remedy, data)
    if not events:
        return Finding("fail", "no event came within 1 s", "Look at the file system and the container.", data)
    if most and most < 2 * needed:
        what = f"{most} watches are allowed, {needed} are needed now"
        return Finding("warn", what, "Raise fs.inotify.max_user_watches.", data)
    return Finding("ok", f"{most} watches, {needed} needed", data=data)


def _watches_needed(settings: Settings) -> int:
    """A watch a file and a folder; of a tree each folder, as far as they are counted within COUNT_S."""
    until = time.monotonic() + COUNT_S
    count = 2 * sum(bool(watch.path or watch.glob) for watch in settings.logs.watch)
    for watch in settings.files.watch:
        count += 2
        if watch.recursive:
            for _ in os.walk(watch.path):
                count += 1
                if time.monotonic() > until:
                    return count
    return count


def os_entropy(subject: Subject) -> Finding:
    """Would who asks for random bytes have to wait?"""
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        return Finding("warn", "getrandom would block", "Give the machine a source of randomness, as virtio-rng.")
    return Finding("ok", "getrandom does not block")


def clock(subject: Subject) -> Finding:
    """Is it synchronised, past the build, and does it go forward?"""
    now, before = time.time(), time.time() - time.monotonic()
    threading.Event().wait(0.05)
    jumped = time.time() - time.monotonic() - before
    built = bundle.built()
    data = {"now": now, "built": built}
    if now < built:
        return Finding("fail", f"it is {date_of(now)}, before this was built: {date_of(built)}", "Set the clock.", data)
    if jumped < -0.02:
        return Finding("fail", f"stepped back {-jumped:.2f} s while watched", "Look at what sets it.", data)
    last = last_event(subject.folder)
    if last > now + 60:
        what = f"it is {date_of(now)}, before the last event of the journal: {date_of(last)}"
        return Finding("fail", what, "Set the clock; it was stepped back.", data)
    if not is_synchronised():
        return Finding("warn", "not synchronised", "Run chronyd, systemd-timesyncd or ntpd.", data)
    return Finding("ok", "synchronised", data=data)


def cgroup(subject: Subject) -> Finding:
    """Can runs be held and ended as one?"""
    folder = subject.root / "sys/fs/cgroup"
    controllers = text_of(folder / "cgroup.controllers")
    if controllers is None:
        what = "version 1" if folder.is_dir() and any(folder.iterdir()) else "none is mounted"
        return Finding("warn", what, "Boot with systemd.unified_cgroup_hierarchy=1; limits are per process without it.")
    if "memory" not in controllers.split():
        return Finding("warn", "no memory controller", "Boot with cgroup_enable=memory.")
    return Finding("ok", f"version 2: {controllers}")


def dbus(subject: Subject) -> Finding:
    """Can the bus be reached that knows the entitlement?"""
    entitlement = subject.settings.entitlement
    is_on = entitlement.enabled is True or (
        entitlement.enabled == "auto" and (subject.root / "etc/pki/consumer").is_dir()
    )
    if not is_on:
        return NOT_USED
    from jeepney.io.blocking import open_dbus_connection

    try:
        open_dbus_connection(entitlement.bus or "SYSTEM").close()
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        remedy = "Start dbus, or set entitlement.enabled = false."
        return Finding("fail", f"{entitlement.bus or 'the system bus'}: {str(err) or type(err).__name__}", remedy)
    return Finding("ok", entitlement.bus or "the system bus")


# ---- runners ---------------------------------------------------------------------------------------------------------


def runner_node(subject: Subject) -> Finding:
    """Node, where a suite below suites.roots is AVA's."""
    return _program(subject, "node", ("node", "--version"), _suites(subject, "ava"), "Install Node.js.")


def runner_ava(subject: Subject) -> Finding:
    """The AVA of each of its suites below suites.roots."""
    suites = _suites(subject, "ava")
    if not suites:
        return NOT_USED
    found: dict[str, str] = {}
    missing = []
    for folder, document in suites.items():
        packages = [above / "node_modules/ava/package.json" for above in (folder, *folder.parents)]
        package = next((path for path in packages if path.is_file()), None)
        if package and (version := _version_in(package)):
            found[str(folder)] = version
        elif not document.get("setup"):
            missing.append(str(folder))
    if missing:
        return Finding("fail", f"no AVA in {', '.join(missing)}", 'Set setup = [["npm", "ci"]] there.', found)
    old = [f"{version} in {folder}" for folder, version in found.items() if not satisfies(version, TESTED["ava"])]
    if old:
        return Finding("warn", f"older than tested: {', '.join(old)}", f"Use AVA {TESTED['ava']}.", found)
    return Finding("ok", ", ".join(sorted(set(found.values()))) or "comes with setup", data=found)


class _Package(msgspec.Struct):
    version: str


def _version_in(package: Path) -> str:
    """What a package.json says; "" when it says none, as after an installation that was cut."""
    try:
        return msgspec.json.decode(package.read_bytes(), type=_Package).version
    except (OSError, *UNREADABLE):
        return ""


def runner_pytest(subject: Subject) -> Finding:
    """pytest of the `python3` in PATH, where a suite below suites.roots is its."""
    # Asked of the installed package: pytest itself takes half a second to tell.
    ask = "import importlib.metadata as m; print(m.version('pytest'))"
    suites = {folder: document for folder, document in _suites(subject, "pytest").items() if not document.get("setup")}
    return _program(subject, "pytest", ("python3", "-c", ask), suites, "Install pytest for python3.")


def _suites(subject: Subject, runner: str) -> dict[Path, dict[str, Any]]:
    """Folder and document of each suite of a runner that stands directly below a root, or is one."""
    found: dict[Path, dict[str, Any]] = {}
    for root in map(Path, subject.settings.suites.roots):
        for path in [root / "suite.toml", *sorted(root.glob("*/suite.toml"))][:200]:
            try:
                document = toml.read(path).data
            except toml.TomlError:  # no suite, or one that is refused when it is to run
                continue
            if document.get("runner") == runner:
                found[path.parent] = document
    return found


def _program(
    subject: Subject, name: str, argv: Sequence[str], needed: dict[Path, dict[str, Any]], remedy: str
) -> Finding:
    """Its version; not asked where neither a suite of ours needs it nor a Seneschal may send one."""
    if not needed and not subject.settings.seneschal.url:
        return NOT_USED
    env, nothing = bundle.callers_environ(os.environ), subprocess.DEVNULL
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROGRAM_S, env=env, stdin=nothing)
        said = re.search(r"\d+(\.\d+)+", done.stdout) if done.returncode == 0 else None
    except FileNotFoundError:
        said = None
    except (OSError, subprocess.TimeoutExpired) as err:
        return Finding("fail" if needed else "warn", f"does not tell its version: {err}", remedy)
    if said is None:
        if not needed:
            return Finding("ok", "not there, and no suite here needs it")
        return Finding("fail", f"missing, and needed by {', '.join(map(str, needed))}", remedy)
    if not satisfies(said[0], TESTED[name]):
        return Finding("warn", f"{said[0]} is older than tested", f"Use {name} {TESTED[name]}.", {"version": said[0]})
    return Finding("ok", said[0], data={"version": said[0]})


# ---- what was installed ----------------------------------------------------------------------------------------------


def installed(subject: Subject) -> Finding:
    """Is what runs what was built, and in the form that a service has?"""
    folder = bundle.release()
    if folder is not None:
        if damaged := bundle.damaged(folder):
            what = f"{len(damaged)} files are not what was built: {', '.join(damaged[:3])}"
            return Finding("fail", what, "Install the release again.", {"damaged": damaged})
        if bundle.is_unpacked(folder) and {"INVOCATION_ID", "NOTIFY_SOCKET"} & os.environ.keys():
            return Finding("warn", "the single file runs as a service", "Run `agent install`.")
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        what = "no folder for temporary files can be written: the single file cannot start"
        return Finding("warn", what, "Set TMPDIR to one that can, or install it.")
    if os.statvfs(temporary).f_flag & os.ST_NOEXEC:
        what = f"{temporary} is noexec: the single file cannot start there"
        return Finding("warn", what, "Set TMPDIR to another folder for it.")
    return Finding("ok", f"release in {folder}" if folder else "a checkout")
