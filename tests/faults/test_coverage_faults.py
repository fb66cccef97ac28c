"""Coverage through lines that are cut, agents and runners that are killed, and files that are damaged.

What the admin has in the end equals what it has when nothing goes wrong.

Source: protocols/drill.md, "Acceptance" 4 and 8, "Failure behaviour".
"""

import os
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.app import Service
from agent.core.bus import Subscription
from agent.core.covered import CoverageWarning
from agent.core.events import RoleChanged, RunRefused, SuiteFinished
from agent.coverage.catalog import Delta
from agent.coverage.sources.python import Python
from tests.drill_house import CALC, IDENT, User, admin, agent_of, run_suite
from tests.faults.station import Station, until

CUT_S = 10.0
# Two test files, each a process; the first waits for the file `go`, and the second comes after it.
RUNNER = """\
const {execFileSync} = require('node:child_process');
console.log('1..2');
for (const name of ['t1.test.js', 't2.test.js']) {
	execFileSync(process.execPath, [name], {stdio: 'inherit'});
	console.log(`ok - ${name}`);
}
"""
FIRST = """\
const {existsSync} = require('node:fs');
require('./calc.js').add(1, 2);
const timer = setInterval(() => existsSync('go') && clearInterval(timer), 20);
"""
# As it is when a disk is full, or a process is killed while it writes.
DAMAGE = """\
const {writeFileSync} = require('node:fs');
for (const [n, text] of ['', '{"result":[{', '\\0\\xff'].entries()) {
	writeFileSync(`${process.env.NODE_V8_COVERAGE}/coverage-9999999-${n}-0.json`, text);
}
require('./all.js');
"""
SECOND = "require('./calc.js').sub(3, 2);\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    if shutil.which("node") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("peer node: packaging/deps peers installs it")
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in (("calc", CALC), ("all", RUNNER), ("t1.test", FIRST), ("t2.test", SECOND), ("damage", DAMAGE)):
        (folder / f"{name}.js").write_text(text)
    return folder


def suite_of(project: Path) -> dict[str, Any]:
    return {"id": "calc", "runner": "tap", "command": ["node", "all.js"], "source": {"dir": str(project)}}


class Line:
    """A proxy that can be cut: both ends are reset, and nobody comes through until it is mended."""

    def __init__(self, target: str) -> None:
        self.port = 0
        self.cut_behind = b""  # the line is cut when this has passed to the agent
        self._target = int(target.rpartition(":")[2])
        self._is_cut = False
        self._open: set[trio.SocketStream] = set()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, self._relay, 0, host="127.0.0.1"))
            self.port = listener.socket.getsockname()[1]
            task_status.started()

    def cut(self) -> None:
        self._is_cut, self.cut_behind = True, b""
        for stream in self._open:
            _reset(stream)
        self._open.clear()

    def mend(self) -> None:
        self._is_cut = False

    async def _relay(self, near: trio.SocketStream) -> None:
        if self._is_cut:
            _reset(near)
            return
        async with await trio.open_tcp_stream("127.0.0.1", self._target) as far, trio.open_nursery() as nursery:
            self._open |= {near, far}
            nursery.start_soon(self._pass, near, far, nursery)
            nursery.start_soon(self._pass, far, near, nursery)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, nursery: trio.Nursery) -> None:
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
                if self.cut_behind and self.cut_behind in data:
                    self.cut()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it was cut, or its end was
        self._open -= {source, sink}
        nursery.cancel_scope.cancel()


def _reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@asynccontextmanager
async def line_to(user: User) -> AsyncIterator[Line]:
    line = Line(user.lab.address)
    async with trio.open_nursery() as nursery:
        await nursery.start(line.run)
        yield line
        nursery.cancel_scope.cancel()


async def undisturbed(user: User, service: Service, project: Path) -> list[dict[str, Any]]:
    """What the admin has of a session that nothing disturbs."""
    (project / "go").touch()
    await user.ask("START", sessionId="undisturbed")
    await run_suite(service, suite_of(project))
    await user.ask("STOP", sessionId="undisturbed")
    reached: list[dict[str, Any]] = (await user.finished("undisturbed"))["reached"]
    assert {row["testName"] for row in reached} >= {"t1.test.js", "t2.test.js"}
    (project / "go").unlink()
    return reached


async def seen(user: User, session: str) -> None:
    """Wait until the admin has heard something of a session."""

    async def is_seen() -> bool:
        return bool((await user.coverage(session))["reached"])

    await until(is_seen)


async def test_a_line_cut_for_10_s_in_a_session_and_again_right_after_its_stop(project: Path, tmp_path: Path) -> None:
    async with admin(tmp_path / "lab") as user, line_to(user) as line:
        through = f"ws://127.0.0.1:{line.port}"
        async with agent_of(user.lab, tmp_path / "agent", project, admin=through, hook_s=0.2, flush_s=0.2) as service:
            await user.online()
            expected = await undisturbed(user, service, project)
            await user.ask("START", sessionId="s1", isRealtime=True)

            async def cut_in_the_middle() -> None:
                await seen(user, "s1")
                line.cut()
                (project / "go").touch()
                await trio.sleep(CUT_S)
                line.mend()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut_in_the_middle)
                await run_suite(service, suite_of(project))  # it ends while the line is cut
            await user.online(again=True)
            line.cut_behind = b"STOP"
            assert await user.code("STOP", sessionId="s1") == 500
            line.mend()
            assert (await user.finished("s1"))["reached"] == expected


@pytest.mark.parametrize("how", ["killed", "stopped while the line is cut"])
async def test_an_agent_that_ends_and_is_started_again_in_a_session(project: Path, tmp_path: Path, how: str) -> None:
    machine = Station(IDENT, tmp_path)  # the project is below its folder
    async with admin(tmp_path / "lab") as user, line_to(user) as line:
        async with agent_of(user.lab, tmp_path / "agent", project, hook_s=0.2, flush_s=0.2) as service:
            await user.online()
            expected = await undisturbed(user, service, project)
        coverage = {"enabled": "true", "admin": f'"ws://127.0.0.1:{line.port}"', "roots": f'["{project}"]'}
        more = "\n".join(f"{name} = {value}" for name, value in {**coverage, "flush_s": 0.2, "hook_s": 0.2}.items())
        machine.configure(user.lab.address, user.lab.token_file, more=f"[coverage]\n{more}\n")
        try:
            machine.start()
            await user.online(again=True)
            await user.ask("START", sessionId="s1")
            if how != "killed":
                line.cut()
            (project / "go").touch()
            run = user.lab.seneschal.enqueue(suite_of(project))

            async def is_over() -> bool:
                return (machine.state / "runs" / run / "result.json").exists()

            await until(is_over)
            assert machine.result(run)["verdict"] == "passed"
            if how == "killed":
                await all_seen(user, "s1", expected)
                await machine.end(signal.SIGKILL)
            else:
                await machine.end(signal.SIGTERM)
                assert (await user.coverage("s1"))["reached"] == []
                line.mend()
            machine.start()
            await user.online(again=True)
            await user.ask("STOP", sessionId="s1")
            assert (await user.finished("s1"))["reached"] == expected
        finally:
            machine.kill()


async def test_a_role_that_fails_in_a_session_is_started_again_and_the_admin_has_it_all(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Node has told is taken from its folder before Python's source fails; its runner goes on meanwhile."""
    async with (
        admin(tmp_path / "lab") as user,
        agent_of(user.lab, tmp_path / "agent", project, hook_s=0.2, flush_s=0.2) as service,
    ):
        await user.online()
        expected = await undisturbed(user, service, project)
        await user.ask("START", sessionId="s1")
        collect = Python.collect

        async def fail_once(source: Python, *, final: bool = False) -> list[Delta]:
            if reached or source.folder.parent.name == "product":
                return await collect(source, final=final)
            raise RuntimeError("injected")

        async def fail_in_the_middle() -> None:
            await seen(user, "s1")
            with service.bus.subscribe(RoleChanged) as changes:
                monkeypatch.setattr(Python, "collect", fail_once)
                async for change in changes:
                    assert change.name == "coverage"
                    reached.append(change.state)
                    if change.state == "backoff":
                        (project / "go").touch()  # the second test file runs while nobody collects
                    if change.state == "running":
                        return

        reached: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_in_the_middle)
            await run_suite(service, suite_of(project) | {"coverage": True})
        assert reached == ["backoff", "running"]
        await user.online(again=True)
        await user.ask("STOP", sessionId="s1")
        assert (await user.finished("s1"))["reached"] == expected


async def all_seen(user: User, session: str, expected: list[dict[str, Any]]) -> None:
    async def is_seen() -> bool:
        return bool((await user.coverage(session))["reached"] == expected)

    await until(is_seen)


async def test_a_runner_killed_loses_no_more_than_one_period(project: Path, tmp_path: Path) -> None:
    async with (
        admin(tmp_path / "lab") as user,
        agent_of(user.lab, tmp_path / "agent", project, hook_s=0.2, flush_s=0.2) as service,
    ):
        await user.online()
        await user.ask("START", sessionId="s1")
        with service.bus.subscribe(RunRefused, SuiteFinished) as events:
            await service.bus.ask("run_suite", {"suite": suite_of(project)})
            await seen(user, "s1")
            for pid in processes_in(project):
                os.kill(pid, signal.SIGKILL)
            with trio.fail_after(60):
                event = await events.__anext__()
            assert isinstance(event, SuiteFinished)
            assert event.verdict != "passed"
        await user.ask("STOP", sessionId="s1")
        shown = await user.finished("s1")
        assert shown["sessions"][0]["flushes"] == 0  # it is not realtime
        assert {row["testName"] for row in shown["reached"] if row["className"] == "./calc.js"} == {"t1.test.js"}


def processes_in(folder: Path) -> Iterator[int]:
    """Those with that working directory."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(proc / "cwd") == str(folder):
                yield int(proc.name)
        except OSError:
            continue


async def test_damaged_files_are_told_of_and_the_others_count(project: Path, tmp_path: Path) -> None:
    async with (
        admin(tmp_path / "lab") as user,
        agent_of(user.lab, tmp_path / "agent", project, hook_s=0.2, flush_s=0.2) as service,
    ):
        await user.online()
        expected = await undisturbed(user, service, project)
        await user.ask("START", sessionId="s1")
        told: list[str] = []

        async def let_go_when_told(warnings: Subscription[CoverageWarning]) -> None:
            async for warning in warnings:
                told.append(warning.text)
                if all(any(f"coverage-9999999-{n}-0.json" in text for text in told) for n in range(3)):
                    (project / "go").touch()

        with service.bus.subscribe(CoverageWarning) as warnings:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go_when_told, warnings)
                await run_suite(service, suite_of(project) | {"command": ["node", "damage.js"]})
                nursery.cancel_scope.cancel()
        await user.ask("STOP", sessionId="s1")
        reached = (await user.finished("s1"))["reached"]
        assert [row for row in reached if row["className"] != "./damage.js"] == expected
        assert " ".join(told).count("coverage-9999999-") == 3
