"""Every action and every kind of event over a real socket, plain and TLS; each message fits `agent schema`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
import trio

from agent.control.messages import ACTIONS
from agent.core.channel import Refused
from agent.core.events import KINDS
from agent.core.link import Dial
from agent.core.tls import TlsSettings
from tests.certificates import authority, issue
from tests.control_house import Client, client, house
from tests.test_schema import values

SETTINGS = """\
ident = "lab-07"
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
tls = {tls}
[suites]
roots = ["{folder}"]
[logs]
roots = ["{folder}"]
[entitlement]
bus = "unix:path={folder}/nobody"
"""
RUN = f"r-{os.getpid()}-control"
SUITE = {"id": "s", "runner": "tap", "command": ["/bin/sh", "-c", "echo 1..2; echo ok 1; sleep 600"]}
# Answered only where a role of the settings, or of an issue that is open, runs.
MAY_BE_UNKNOWN = {
    "label_log": {"id": "lm-1", "class": "noise"},
    "search_log": {"path": "/var/log/x"},
    "run_monitor": {"id": "web"},
    "monitors": {},
    "children": {},
    "get_tree": {},
}


@asynccontextmanager
async def agent(folder: Path, *, has_tls: bool) -> AsyncIterator[Dial]:
    """`agent run` in a process of its own, and how to reach it."""
    tls = '{ cert = "", key = "" }'
    if has_tls:
        shown = issue(authority(folder), folder, "lab-07")
        tls = f'{{ cert = "{shown.cert}", key = "{shown.key}" }}'
    (folder / "agent.toml").write_text(SETTINGS.format(folder=folder, tls=tls))
    argv = [sys.executable, "-m", "agent", "run", "--config", str(folder / "agent.toml")]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, argv, stderr=subprocess.PIPE, check=False))
        said = b""
        with trio.fail_after(60):
            while not (found := re.search(rb"control listens addresses=(\S+)", said)):
                more = await process.stderr.receive_some()
                assert more, said.decode()
                said += more
        nursery.start_soon(_drain, process.stderr)
        scheme = "wss" if has_tls else "ws"
        yield Dial(
            f"{scheme}://{found[1].decode()}/",
            folder / "state/token",
            TlsSettings(folder / "ca.pem") if has_tls else TlsSettings(),
        )
        process.terminate()


async def _drain(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass


class Asker:
    """Asks, and remembers which actions were answered."""

    def __init__(self, them: Client) -> None:
        self.answered: set[str] = set()
        self._them = them

    async def __call__(self, action: str, **payload: Any) -> dict[str, Any]:
        self.answered.add(action)
        return await self._them.ask(action, payload)


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
async def test_every_action_is_answered_by_a_whole_agent(tmp_path: Path, has_tls: bool) -> None:
    (tmp_path / "watched.log").write_text("a line\n")
    (tmp_path / "project").mkdir()
    suite = SUITE | {"source": {"dir": str(tmp_path / "project")}}
    async with agent(tmp_path, has_tls=has_tls) as dial, client(dial) as them:
        ask = Asker(them)
        assert dial.token_file is not None
        await ask("auth", token=dial.token_file.read_text().strip())
        assert (await ask("subscribe", kinds=["Run*", "Test*", "SuiteFinished", "Logged", "FileChanged"]))["sub"] == 1
        assert await ask("run_suite", suite=suite, run=RUN) == {"run": RUN}
        await _kind(them, "TestFinished")
        status = await ask("status")
        (run,) = status["runs"]
        assert (run["run"], run["state"], run["counts"]) == (RUN, "running", {"passed": 1})
        assert {"control", "files", "logs", "suites"} <= {
            name for name, role in status["roles"].items() if role["state"] == "running"
        }
        await ask("log", message="by a client", severity="WARNING")
        assert (await _kind(them, "Logged"))["run"] == RUN
        await ask("cancel", run=RUN, reason="by a test")
        assert (await _kind(them, "SuiteFinished"))["data"]["result"] == "ABORTED"
        await ask("drain")
        assert (await ask("status"))["draining"] is True
        await ask("undrain")
        await ask("stop")

        watch = (await ask("watch_file", path=str(tmp_path / "file")))["watch"]
        (tmp_path / "file").write_text("x")
        assert (await _kind(them, "FileChanged"))["data"]["what"] == "created"
        await ask("unwatch_file", watch=watch)
        rules = [{"id": "r", "regex": "ERROR"}]
        log = await ask("watch_log", path=str(tmp_path / "watched.log"), rules=rules)
        assert str(tmp_path / "watched.log") in [source["path"] for source in (await ask("list_logs"))["sources"]]
        await ask("unwatch_log", watch=log["watch"])
        assert (await ask("entitlement", history=True))["status"] in range(-1, 6)
        assert (await ask("coverage"))["sessions"] == []

        assert (await ask("config"))["ident"] == {"value": "lab-07", "origin": f"{tmp_path}/agent.toml:1"}
        assert (await ask("metrics"))["control_clients"] == 1
        assert await ask("profile")
        (check,) = (await ask("selftest", only=["os.entropy"]))["checks"]
        assert check["status"] == "ok"
        assert (await ask("reload"))["changed"] == []
        await ask("unsubscribe", sub=1)
        for action, payload in MAY_BE_UNKNOWN.items():
            try:
                await ask(action, **payload)
            except Refused as err:
                assert err.code in ("unknown_action", "not_found", "bad_payload"), err  # noqa: PT017 - or it is answered
        assert ask.answered == ACTIONS.keys()


async def _kind(them: Client, kind: str) -> dict[str, Any]:
    """The first event of that kind, once it came."""
    with trio.fail_after(60):
        while not (found := [event for event in them.events if event["kind"] == kind]):
            await them.came.wait()
    return found[0]


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_every_kind_of_event_is_shown_as_it_is(tmp_path: Path, tls: bool) -> None:
    events = [_sample(kind) for kind in KINDS.values()]
    async with house(tmp_path, tls=tls) as server, client(server.dial("peek")) as them:
        await them.ask("subscribe", {})
        server.publish(*events)
        told = await them.told(len(events))
        server.store._db.execute("DELETE FROM journal WHERE seq = 1")  # as pruning does
        await them.ask("subscribe", {"since": 0, "kinds": ["Alert"]})
        gap = (await them.told(len(events) + 2))[len(events)]
    assert [event["kind"] for event in told[: len(events)]] == list(KINDS)
    published = [json.loads(msgspec.json.encode(event)) for event in events]
    assert [event["data"] for event in told[: len(events)]] == published
    assert gap == {"kind": "Gap", "data": {"from": 1, "to": 1}}


def _sample(kind: type[Any]) -> Any:
    """The first event of a kind that hypothesis thinks of: a simple one."""
    first = hypothesis.settings(database=None, max_examples=1, phases=(hypothesis.Phase.generate,))
    return hypothesis.find(values(msgspec.inspect.type_info(kind)), lambda event: True, settings=first)
