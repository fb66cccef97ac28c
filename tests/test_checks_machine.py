"""Each check of the machine is good here, and warns or fails where the sheet says so."""

import builtins
import errno
import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import inotify_simple
import pytest

from agent.checks import machine
from agent.checks.subject import Subject
from agent.core import bundle, engine
from agent.files.settings import EntitlementSettings, FilesSettings, FileWatch
from agent.logs import scanner
from agent.logs.settings import LogsSettings, LogWatch
from agent.seneschal.settings import SeneschalSettings
from agent.settings import Settings, StateSettings
from agent.suites.settings import SuitesSettings

RULE = 'version = 1\n[[rule]]\nid = "a"\nregex = "{}"\n'


def subject(root: Path = Path("/"), **tables: Any) -> Subject:
    return Subject(settings=Settings(**tables), root=root)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


# ---- the native engine -----------------------------------------------------------------------------------------------


def test_the_engine_finds_what_is_known_to_be_there() -> None:
    found = machine.native_engine(subject())
    assert found.status in ("ok", "warn")
    assert "scalar" in found.data.get("engines", ["scalar"])


def test_an_engine_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner.Worker, "scan", lambda *_: scanner.Found.__new__(scanner.Found))
    monkeypatch.setattr(scanner.Found, "count", 142, raising=False)
    found = machine.native_engine(subject())
    assert (found.status, found.remedy) == ("fail", "Set AGENT_SIMD=scalar, and report it.")
    assert "1000 lines of 1000 and 142 matches of 143" in found.detail


def test_a_scalar_engine_is_a_warning_where_there_is_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "native_engine", lambda: "scalar")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", "6", "1", "x86_64")))
    assert machine.native_engine(subject()).status == "warn"
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", "6", "1", "riscv64")))
    assert machine.native_engine(subject()).status == "ok"


def test_a_module_that_cannot_be_loaded_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any) -> Any:
        if name == "agent.core.lines":
            raise ImportError("libc.so.6: version `GLIBC_2.36' not found")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", broken)
    found = machine.native_engine(subject())
    assert (found.status, found.detail) == ("fail", "cannot be loaded: libc.so.6: version `GLIBC_2.36' not found")


def test_interpreted_regexes_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.native_jit(subject()).status == "ok"

    class Interpreted:
        jit = False

        def __init__(self, pattern: str) -> None:
            self.pattern = pattern

    monkeypatch.setattr("agent.logs.regex.Regex", Interpreted)
    assert machine.native_jit(subject()).status == "warn"


def test_rules_that_do_not_compile_fail_with_their_line(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", RULE.format("a(b"))
    found = machine.native_rules(subject(logs=LogsSettings(rules=(f"{tmp_path}/*.toml",))))
    assert found.status == "fail"
    assert found.detail.startswith(f"{tmp_path}/a.toml:4: rule[a].regex: ")


def test_a_rule_set_that_is_not_there_fails(tmp_path: Path) -> None:
    watch = LogWatch(name="w", path="/x", rules=("kernel", "no-such"))
    found = machine.native_rules(subject(logs=LogsSettings(rules=(), watch=(watch,))))
    assert found.status == "fail"
    assert found.detail.startswith("settings: logs.watch[w].rules: no rule set is called 'no-such'.")
    watch = LogWatch(name="w", path="/x", rules=(f"{tmp_path}/gone.toml",))
    assert machine.native_rules(subject(logs=LogsSettings(rules=(), watch=(watch,)))).status == "fail"


def test_a_rule_without_literal_is_named_with_what_it_costs(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", RULE.format("[0-9]+"))
    found = machine.native_rules(subject(logs=LogsSettings(rules=(f"{tmp_path}/*.toml",))))
    assert found.status == "warn"
    assert found.data.keys() == {"a"}
    assert f"a ({found.data['a']} ns a line)" in found.detail


def test_a_slow_rule_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.toml", RULE.format("error"))
    rules = LogsSettings(rules=(f"{tmp_path}/*.toml",))
    assert machine.native_rules(subject(logs=rules)).detail == "1 rules"
    monkeypatch.setattr(machine, "SLOW_NS", -1)
    assert machine.native_rules(subject(logs=rules)).status == "warn"


# ---- the system ------------------------------------------------------------------------------------------------------


def test_inotify_gives_an_event() -> None:
    assert machine.inotify_limits(subject()).status in ("ok", "warn")


def test_too_few_watches_for_what_is_to_be_watched_are_a_warning(tmp_path: Path) -> None:
    write(tmp_path, "proc/sys/fs/inotify/max_user_watches", "10\n")
    (tmp_path / "a/b/c").mkdir(parents=True)
    files = FilesSettings(watch=(FileWatch(path=str(tmp_path / "a"), recursive=True),))
    logs = LogsSettings(watch=(LogWatch(name="w", path="/x"),))
    found = machine.inotify_limits(subject(tmp_path, files=files, logs=logs))
    assert (found.status, found.detail) == ("ok", "10 watches, 7 needed") or found.status == "warn"
    assert found.data == {"max_user_watches": 10, "needed": 7}
    assert found.remedy == "Raise fs.inotify.max_user_watches."


def test_a_tree_that_takes_long_to_count_holds_up_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "walk", itertools.repeat)  # folders without an end
    monkeypatch.setattr(machine, "COUNT_S", 0.0)
    files = FilesSettings(watch=(FileWatch(path="/a", recursive=True),))
    assert machine.inotify_limits(subject(files=files)).status in ("ok", "warn")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EMFILE, "fs.inotify.max_user_instances"), (errno.ENOSPC, "fs.inotify.max_user_watches")],
)
def test_a_limit_that_is_reached_fails(monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inotify_simple.INotify, "__init__", refuse)
    found = machine.inotify_limits(subject())
    assert found.status == "fail"
    assert said in found.remedy


def test_an_event_that_does_not_come_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inotify_simple.INotify, "read", lambda *_, **__: [])
    assert machine.inotify_limits(subject()).detail == "no event came within 1 s"


def test_a_machine_without_entropy_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.os_entropy(subject()).status == "ok"

    def blocks(size: int, flags: int) -> bytes:
        raise BlockingIOError

    monkeypatch.setattr(os, "getrandom", blocks)
    assert machine.os_entropy(subject()).status == "warn"


def clock_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, synchronised: bool, last: float = 0.0) -> Subject:
    monkeypatch.setattr(machine, "is_synchronised", lambda: synchronised)
    monkeypatch.setattr(machine, "last_event", lambda folder: last)
    return subject(state=StateSettings(dir=str(tmp_path)))


def test_a_clock_that_is_not_synchronised_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.clock(clock_of(monkeypatch, tmp_path, synchronised=True)).status == "ok"
    assert machine.clock(clock_of(monkeypatch, tmp_path, synchronised=False)).status == "warn"


def test_a_clock_at_1970_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked = clock_of(monkeypatch, tmp_path, synchronised=True)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    found = machine.clock(checked)
    assert found.status == "fail"
    assert found.detail.startswith("it is 1970-01-01 00:16:40, before this was built: 20")


def test_a_clock_behind_the_journal_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = machine.clock(clock_of(monkeypatch, tmp_path, synchronised=True, last=time.time() + 3600))
    assert found.status == "fail"
    assert "before the last event of the journal" in found.detail


def test_a_clock_that_steps_back_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked = clock_of(monkeypatch, tmp_path, synchronised=True)
    real, readings = time.time, iter([0.0, 0.0])
    monkeypatch.setattr(time, "time", lambda: real() + next(readings, -5.0))
    found = machine.clock(checked)
    assert (found.status, found.detail[:16]) == ("fail", "stepped back 5.0")


@pytest.mark.parametrize(
    ("files", "status", "detail"),
    [
        ({"cgroup.controllers": "cpu memory pids\n"}, "ok", "version 2: cpu memory pids"),
        ({"cgroup.controllers": "cpu pids\n"}, "warn", "no memory controller"),
        ({"memory/tasks": ""}, "warn", "version 1"),
        ({}, "warn", "none is mounted"),
    ],
)
def test_cgroups(tmp_path: Path, files: Mapping[str, str], status: str, detail: str) -> None:
    for name, text in files.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text)
    found = machine.cgroup(subject(tmp_path))
    assert (found.status, found.detail) == (status, detail)


def test_a_bus_that_cannot_be_reached_fails_where_it_is_needed(tmp_path: Path) -> None:
    bus = f"unix:path={tmp_path}/none"
    found = machine.dbus(subject(entitlement=EntitlementSettings(enabled=True, bus=bus)))
    assert (found.status, found.detail) == ("fail", f"{bus}: [Errno 2] No such file or directory")
    assert machine.dbus(subject(entitlement=EntitlementSettings(enabled=False, bus=bus))).detail == "not used"
    automatic = EntitlementSettings(enabled="auto", bus=bus)
    assert machine.dbus(subject(tmp_path, entitlement=automatic)).detail == "not used"
    (tmp_path / "etc/pki/consumer").mkdir(parents=True)
    assert machine.dbus(subject(tmp_path, entitlement=automatic)).status == "fail"


# ---- runners ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    """A suite below a root, and the only program of the machine, by what it does."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def made(runner: str, more: str = "", **programs: str) -> Subject:
        write(tmp_path, "suites/s/suite.toml", f'id = "s"\nrunner = "{runner}"\n{more}')
        for name, script in programs.items():
            write(tmp_path, f"bin/{name}", f"#!/bin/sh\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return subject(suites=SuitesSettings(roots=(str(tmp_path / "suites"),)))

    return made


def test_a_runner_that_no_suite_needs_is_not_asked_for(tmp_path: Path) -> None:
    for check in (machine.runner_node, machine.runner_ava, machine.runner_pytest):
        assert check(subject()).detail == "not used"
    write(tmp_path, "suite.toml", "broken =")
    assert machine.runner_node(subject(suites=SuitesSettings(roots=(str(tmp_path),)))).detail == "not used"


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("echo v20.19.1", "ok", "20.19.1"),
        ("echo v16.20.2", "warn", "16.20.2 is older than tested"),
        ("exit 1", "fail", "missing, and needed by"),
    ],
)
def test_node(suite: Callable[..., Subject], script: str, status: str, detail: str) -> None:
    found = machine.runner_node(suite("ava", node=script))
    assert found.status == status
    assert detail in found.detail


def test_a_missing_node_fails_where_a_suite_needs_it_alone(suite: Callable[..., Subject]) -> None:
    assert machine.runner_node(suite("ava")).status == "fail"
    assert machine.runner_node(suite("pytest")).status == "ok"
    lab = SeneschalSettings(url="ws://lab/seneschal")
    assert machine.runner_node(subject(seneschal=lab)).detail == "not there, and no suite here needs it"


def test_a_program_that_hangs_does_not_hold_the_check(
    suite: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "PROGRAM_S", 0.05)
    found = machine.runner_node(suite("ava", node="read line < /dev/full; while :; do :; done"))
    assert found.status == "fail"
    assert "timed out" in found.detail


def test_ava(suite: Callable[..., Subject], tmp_path: Path) -> None:
    assert machine.runner_ava(suite("ava")).detail == f"no AVA in {tmp_path}/suites/s"
    assert machine.runner_ava(suite("ava", 'setup = [["npm", "ci"]]')).detail == "comes with setup"
    package = "suites/s/node_modules/ava/package.json"
    write(tmp_path, package, '{"version": "5.3.1"}')
    assert machine.runner_ava(suite("ava")).status == "warn"
    write(tmp_path, package, '{"version": "8.0.1"}')
    assert machine.runner_ava(suite("ava")).detail == "8.0.1"
    for text in ("", '{"version"', "[]", '{"version": 8}', "[" * 100_000):  # an installation that was cut
        write(tmp_path, package, text)
        found = machine.runner_ava(suite("ava"))
        assert (found.status, found.detail) == ("fail", f"no AVA in {tmp_path}/suites/s")


@pytest.mark.parametrize(
    ("script", "status"), [("echo 9.2.0", "ok"), ("echo 7.2.1", "warn"), ("echo no pytest >&2; exit 1", "fail")]
)
def test_pytest(suite: Callable[..., Subject], script: str, status: str) -> None:
    assert machine.runner_pytest(suite("pytest", python3=script)).status == status


# ---- what was installed ----------------------------------------------------------------------------------------------


def test_a_release_is_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.installed(subject()).detail == "a checkout"
    write(tmp_path, "agent", "x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    write(tmp_path, "lib/SHA256SUMS", f"{digest}  agent\n")
    monkeypatch.setattr(bundle, "release", lambda: tmp_path)
    assert machine.installed(subject()).detail == f"release in {tmp_path}"
    write(tmp_path, "agent", "y")
    found = machine.installed(subject())
    assert (found.status, found.detail) == ("fail", "1 files are not what was built: agent")


def test_the_single_file_is_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "real/SHA256SUMS", "")
    (tmp_path / "lib").symlink_to("real")
    monkeypatch.setattr(bundle, "release", lambda: tmp_path)
    assert machine.installed(subject()).status == "ok"
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    assert machine.installed(subject()).detail == "the single file runs as a service"


def test_a_noexec_tmp_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def noexec(path: str) -> os.statvfs_result:
        return os.statvfs_result([*list(real(path))[:8], os.ST_NOEXEC, 255])

    monkeypatch.setattr(os, "statvfs", noexec)
    assert machine.installed(subject()).status == "warn"


def test_nowhere_to_unpack_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    found = machine.installed(subject())
    assert (found.status, found.remedy) == ("warn", "Set TMPDIR to one that can, or install it.")


def test_the_build_is_not_from_the_future() -> None:
    assert machine.clock(subject()).data["built"] < time.time()
