"""A lab with Drill's admin, an agent that attaches to it and a user who asks it, all in one process."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from agent.app import Service
from agent.core import config
from agent.core.events import RunRefused, SuiteFinished
from agent.lab.drill import Attached
from agent.lab.drillwire import CoverageDataPart, CoverMessage, SessionChanged
from agent.lab.server import Lab, serve_lab
from agent.lab.test2code import Plugin
from agent.settings import Given, Settings
from tests.faults.station import until
from tests.test_lab_server import client_of

IDENT = "lab-07"
# A product, in the file calc.js.
CALC = """\
exports.add = (a, b) => {
	return a + b;
};

exports.sub = (a, b) => {
	return a - b;
};

exports.unused = () => {
	return 0;
};
"""
PLUGIN = f"/api/agents/{IDENT}/plugins/test2code"


class User:
    """Who logs in to the admin and starts sessions."""

    def __init__(self, lab: Lab, client: httpx.AsyncClient) -> None:
        self.lab, self.client = lab, client
        self._link: Attached | None = None  # by which the agent was online

    async def ask(self, kind: str, **payload: Any) -> dict[str, Any]:
        """An action of the plugin, which must be done; the answer's `data`."""
        reply = await self.client.post(f"{PLUGIN}/dispatch-action", json=action(kind, payload), timeout=150)
        assert reply.status_code == 200, reply.text
        data: dict[str, Any] = reply.json()["data"]
        return data

    async def code(self, kind: str, **payload: Any) -> int:
        """The status of the answer."""
        return (await self.client.post(f"{PLUGIN}/dispatch-action", json=action(kind, payload))).status_code

    async def online(self, *, again: bool = False) -> None:
        """Wait until the agent has attached and was told all; `again`: after it was online already.

        That an agent is gone the admin may notice late.
        """

        async def is_online() -> bool:
            agent = self.lab.drill.agents.get(IDENT)
            if agent is None or agent.state() != "ONLINE" or (again and agent.link is self._link):
                return False
            self._link = agent.link
            return True

        await until(is_online)

    async def coverage(self, session: str) -> dict[str, Any]:
        """What the admin shows of a session."""
        reply = await self.client.get(f"{PLUGIN}/data/coverage", params={"session": session})
        assert reply.status_code == 200, reply.text
        shown: dict[str, Any] = reply.json()
        return shown

    async def finished(self, session: str) -> dict[str, Any]:
        """Wait until the admin has taken all of a session that was stopped; what it shows."""

        async def is_finished() -> dict[str, Any] | None:
            shown = await self.coverage(session)
            return shown if shown["sessions"][0]["state"] == "finished" else None

        shown: dict[str, Any] = await until(is_finished)
        assert (shown["badFrames"], shown["sessions"][0]["strange"], shown["sessions"][0]["late"]) == (0, 0, 0)
        return shown


def action(kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind} | ({"payload": payload} if payload else {})


def methods_reached(lab: Lab, shown: dict[str, Any]) -> dict[str, dict[str, set[str]]]:
    """The methods with a probe that was reached, by class and test."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in shown["reached"]:
        entity = lab.drill.agents[IDENT].plugin.classes[row["className"]]
        names = {method.name for method in entity.methods if any(row["probes"][probe] for probe in method.probes)}
        found.setdefault(row["className"], {}).setdefault(row["testName"], set()).update(names)
    return found


@asynccontextmanager
async def admin(folder: Path, *, register: bool = True, address: str = "127.0.0.1:0") -> AsyncIterator[User]:
    """A lab that registers agents at once, unless told otherwise, and a user who is logged in."""
    async with trio.open_nursery() as nursery:
        lab: Lab = await nursery.start(serve_lab, address, folder)
        lab.drill.switches.auto_register = register
        async with client_of(lab, "") as client:
            token = (await client.post("/api/login")).headers["authorization"]
            client.headers["authorization"] = f"Bearer {token}"
            yield User(lab, client)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def agent_of(lab: Lab, folder: Path, project: Path, **coverage: Any) -> AsyncIterator[Service]:
    """An agent whose product is in `project`, attached to the lab's admin."""
    flags = {
        "ident": IDENT,
        "state.dir": str(folder),
        "control.listen": ["127.0.0.1:0"],
        "suites.roots": [str(project)],
        "suites.slots": 2,  # that of a run is free a moment after its end is told
        "coverage.enabled": True,
        "coverage.admin": lab.ws_url,
        "coverage.roots": [str(project)],
        **{f"coverage.{name}": value for name, value in coverage.items()},
    }
    settings = config.load(Settings, [], env={}, flags=flags)
    async with trio.open_nursery() as nursery:
        service = Service(settings, lambda: settings, Given())
        await nursery.start(service.run)
        yield service
        await service.end_orderly()
        nursery.cancel_scope.cancel()


async def run_suite(service: Service, suite: dict[str, Any], started: Callable[[str], None] = lambda run: None) -> str:
    """Run a suite to its end, which must be a good one; the run."""
    with service.bus.subscribe(RunRefused, SuiteFinished) as events, trio.fail_after(120):
        run: str = (await service.bus.ask("run_suite", {"suite": suite}))["run"]
        started(run)
        async for event in events:
            if isinstance(event, RunRefused | SuiteFinished) and event.run == run:
                assert isinstance(event, SuiteFinished), event
                assert event.verdict == "passed", event
                break
    return run


def record(patch: pytest.MonkeyPatch) -> list[str]:
    """What the admin hears from now on, in order: messages with their session and count, and acknowledgements."""
    heard: list[str] = []
    hear, acked = Plugin.hear, Attached.acked

    def hearing(self: Plugin, message: CoverMessage, now: float) -> None:
        heard.append(_line(message))
        hear(self, message, now)

    def acknowledged(self: Attached, destination: str) -> bool:
        heard.append(f"ack {destination}")
        return acked(self, destination)

    patch.setattr(Plugin, "hear", hearing)
    patch.setattr(Attached, "acked", acknowledged)
    return heard


def _line(message: CoverMessage) -> str:
    words: list[Any] = [message.__struct_config__.tag]
    words += [ident] if (ident := getattr(message, "session_id", None)) else getattr(message, "ids", ())
    match message:
        case CoverageDataPart(data=data):
            words.append(len(data))
        case SessionChanged(probe_count=count):
            words.append(count)
    return " ".join(map(str, words))
