"""`agent --selftest`: every check at once, each within its limit; a table for people, JSON for machines.

It opens no port and changes nothing, so it may run beside the service; the service runs it too, for the action
`selftest`.

Source: protocols/packaging.md 7.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from fnmatch import fnmatchcase

import trio

import agent
from agent.checks import machine, peers, service, state
from agent.checks.subject import Finding, Subject
from agent.control.messages import Checked, Selftest
from agent.core.config import ConfigErrors
from agent.core.errors import printable
from agent.settings import Given, Settings, survey

LIMIT_S, PEER_LIMIT_S = 3.0, 5.0

LOCAL: dict[str, Callable[[Subject], Finding]] = {
    "native.engine": machine.native_engine,
    "native.jit": machine.native_jit,
    "native.rules": machine.native_rules,
    "inotify.limits": machine.inotify_limits,
    "state.disk": state.disk,
    "state.fsync": state.fsync,
    "state.integrity": state.integrity,
    "os.entropy": machine.os_entropy,
    "clock": machine.clock,
    "cgroup": machine.cgroup,
    "dbus": machine.dbus,
    "runner.node": machine.runner_node,
    "runner.ava": machine.runner_ava,
    "runner.pytest": machine.runner_pytest,
    "tls.roots": peers.tls_roots,
    "config": service.config,
    "profile": service.profile,
    "control.port": service.control_port,
    "control.token": service.control_token,
    "files.permissions": service.files_permissions,
    "bundle": machine.installed,
}
PEERS: dict[str, Callable[[Subject], Awaitable[Finding]]] = {
    "peer.seneschal": peers.seneschal,
    "peer.mimir": peers.mimir,
    "peer.polarize": peers.polarize,
    "peer.cibus": peers.cibus,
    "peer.eman": peers.eman,
    "peer.coverage": peers.coverage,
}
NAMES = (*LOCAL, *PEERS)


def select(patterns: Sequence[str]) -> list[str]:
    """The checks that are meant by globs; without any, all. Raises ValueError for a glob that means none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in NAMES):
            raise ValueError(f"{pattern!r} is no check. There are: {', '.join(NAMES)}")
    return [name for name in NAMES if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def examine(given: Given) -> Subject:
    """What there is to check: the settings, or what is wrong with them."""
    try:
        effective, report = survey(given)
    except ConfigErrors as err:
        return Subject(settings=Settings(), errors=tuple(map(str, err.errors)))
    return Subject(settings=effective.settings, effective=effective, report=report)


async def run(subject: Subject, names: Sequence[str] = NAMES) -> Selftest:
    """Carry out the checks, all at once. One that takes too long or breaks is a `fail`, and holds up no other."""
    done: dict[str, Checked] = {}
    limiter = trio.CapacityLimiter(len(NAMES))  # a check that hangs keeps its thread

    async def ask(name: str) -> tuple[Finding, float]:
        if name not in PEERS:
            return await trio.to_thread.run_sync(_timed, LOCAL[name], subject, abandon_on_cancel=True, limiter=limiter)
        began = trio.current_time()
        return await PEERS[name](subject), trio.current_time() - began

    async def carry_out(name: str) -> None:
        limit_s = took_s = PEER_LIMIT_S if name in PEERS else LIMIT_S
        try:
            with trio.fail_after(limit_s):
                finding, took_s = await ask(name)
        except trio.TooSlowError:
            finding = Finding("fail", f"not done within {limit_s:g} s", "Look at what it waits for.")
        except Exception as err:  # noqa: BLE001 - the sheet: an exception is a fail of that check
            finding, took_s = Finding("fail", f"{type(err).__name__}: {err}", "It is a defect: report it."), 0.0
        done[name] = Checked(
            name=name,
            status=finding.status,
            ms=round(1000 * took_s, 1),
            detail=finding.detail,
            remedy=finding.remedy,
            data=finding.data,
        )

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(carry_out, name)
    is_ok = all(check.status != "fail" for check in done.values())
    return Selftest(ok=is_ok, version=agent.__version__, checks=tuple(done[name] for name in names))


def _timed(check: Callable[[Subject], Finding], subject: Subject) -> tuple[Finding, float]:
    """In its thread, so that the time is the check's own."""
    began = time.perf_counter()
    return check(subject), time.perf_counter() - began


def table(report: Selftest) -> list[str]:
    """A line a check, what to do about it indented below."""
    width = max((len(check.name) for check in report.checks), default=0)
    lines = []
    for check in report.checks:
        first, *more = printable(check.detail).splitlines() or [""]
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.ms:7.1f} ms  {first}")
        lines += [f"      {line}" for line in more]
        if check.status != "ok":
            lines.append(f"      {check.remedy}")
    count = {status: sum(check.status == status for check in report.checks) for status in ("ok", "warn", "fail")}
    return [*lines, ", ".join(f"{number} {status}" for status, number in count.items())]
