"""The lab's Drill admin on its port: the attach order, its answers by HTTP, what it shows, and who may come in."""

import json
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.link import Dial, connect
from agent.lab import coverage, drill, test2code
from agent.lab.drillwire import read_config
from agent.lab.server import Lab, serve_lab
from tests import no_json
from tests.test_lab_drillwire import CONFIG, framed
from tests.test_lab_server import BROWSER, client_of, lab_in

WELCOME = ["/agent/logging/update-config", "/agent/change-header-name"]
LOADING = [
    *("/agent/set-packages-prefixes", "/agent/load", "/agent/change-header-name", "/agent/load-classes-data"),
    "/plugin/togglePlugin",
]
METHODS = [
    {"name": "div", "params": ["a", "b"], "returnType": "", "probes": [0, 1], "count": 2, "checksum": ""},
    {"name": "GLOBAL", "params": [], "returnType": "", "probes": [2], "count": 1, "checksum": ""},
]
ACTION = "/api/agents/lab-07/plugins/test2code/dispatch-action"
COVERAGE = "/api/agents/lab-07/plugins/test2code/data/coverage"


class Agent:
    """An agent by script: acknowledges all but what is in `deaf`; `answers` gives what it says to an action.

    `sessions` are those it has.
    """

    def __init__(self, ws: WebSocketConnection) -> None:
        self.ws, self.heard, self.actions = ws, list[str](), list[dict[str, Any]]()
        self.deaf: set[str] = set()
        self.sessions: list[str] = []
        self.gone = trio.Event()
        self._news = trio.Event()
        self.answers: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda action: []

    async def say(self, **message: Any) -> None:
        await self.ws.send_message(framed(message))

    async def ack(self, topic: str) -> None:
        if topic not in self.deaf:
            await self.ws.send_message(json.dumps({"type": "MESSAGE_DELIVERED", "destination": topic}))

    async def run(self) -> None:
        try:
            while True:
                frame = json.loads(await self.ws.get_message())
                await self._take(frame["destination"], frame["text"])
                self._news.set()
                self._news = trio.Event()
        except ConnectionClosed:
            self.gone.set()
            self._news.set()

    async def _take(self, topic: str, text: str) -> None:
        self.heard.append(topic)
        match topic:
            case "/agent/load":
                await self.ack("/agent/plugin/test2code/loaded")
            case "/plugin/togglePlugin":
                await self.say(type="INIT", classesCount=1, message="", init=True)
                entity = {"path": "src", "name": "calc.js", "methods": METHODS}
                await self.say(type="INIT_DATA_PART", astEntities=[entity])
                await self.say(type="INITIALIZED", msg="Initialized")
                await self.ack("/agent/plugin/test2code/toggle")
            case "/plugin/action":
                given = json.loads(text)
                self.actions.append(json.loads(given["message"]))
                for message in self.answers(self.actions[-1]):
                    await self.say(**message)
                await self.ack(f"/plugin/action/{given['confirmationKey']}")
            case "/plugin/state":
                await self.say(type="SYNC_MESSAGE", activeSessions=self.sessions)
        await self.ack(topic)

    async def until(self, holds: Callable[[], object]) -> None:
        """Look each time something was heard. Fails when the connection is gone."""
        with trio.fail_after(60):
            while not holds():
                assert not self.gone.is_set(), self.heard
                await self._news.wait()


@asynccontextmanager
async def attached(lab: Lab, sync: str = "true", sessions: Sequence[str] = (), **config: str) -> AsyncIterator[Agent]:
    headers = (("AgentConfig", json.dumps(CONFIG | config)), ("needSync", sync))
    async with trio.open_nursery() as nursery, connect(Dial(f"{lab.ws_url}/agent/attach", headers=headers)) as ws:
        agent = Agent(ws)
        agent.sessions += sessions
        nursery.start_soon(agent.run)
        yield agent


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with lab_in(tmp_path / "lab") as lab:
        yield lab


@asynccontextmanager
async def user_of(lab: Lab) -> AsyncIterator[httpx.AsyncClient]:
    """A user who logged in as js-auto-test-agent does."""
    async with client_of(lab, "") as client:
        token = (await client.post("/api/login")).headers["authorization"]
        client.headers["authorization"] = f"Bearer {token}"
        yield client


def reached(session: str, probes: list[bool], test: str = "t1.test.js") -> dict[str, Any]:
    data = [{"className": "src/calc.js", "probes": probes, "testName": test}]
    return {"type": "COVERAGE_DATA_PART", "sessionId": session, "data": data}


async def post(user: httpx.AsyncClient, kind: str, **payload: Any) -> tuple[int, dict[str, Any]]:
    body = {"type": kind} | ({"payload": payload} if payload else {})
    reply = await user.post(ACTION, json=body)
    answer = reply.json()
    assert answer["code"] == reply.status_code
    return reply.status_code, answer


async def test_an_agent_is_told_all_in_order_once_it_is_registered(lab: Lab) -> None:
    async with user_of(lab) as user, attached(lab) as agent:
        await agent.until(lambda: len(agent.heard) >= 2)
        assert agent.heard == WELCOME
        (shown,) = (await user.get("/api/agents")).json()
        assert (shown["status"], shown["build"]["buildStatus"], shown["plugins"]) == ("NOT_REGISTERED", "BUSY", [])
        assert (await post(user, "START"))[0] == 400
        reply = await user.post("/api/agents/lab-07", json={"name": "Lab 7", "plugins": ["test2code"]})
        assert reply.status_code == 200
        assert agent.heard == [*WELCOME, "/plugin/state", *LOADING]
        assert (reply.json()["status"], reply.json()["name"], reply.json()["activePluginsCount"]) == (
            *("REGISTERED", "Lab 7"),
            1,
        )


async def test_one_that_comes_back_is_asked_for_its_state_and_one_that_began_anew_is_told_again(lab: Lab) -> None:
    lab.drill.switches.auto_register = True
    async with attached(lab) as agent:
        await agent.until(lambda: len(agent.heard) >= 8)
    async with attached(lab, sync="false") as agent:
        await agent.until(lambda: len(agent.heard) >= 3)
        assert agent.heard == [*WELCOME, "/plugin/state"]
        async with user_of(lab) as user:
            assert (await user.get("/api/agents/lab-07")).json()["instanceIds"] == ["lab-07-1"]
            assert (await post(user, "STOP_ALL"))[0] == 200
        # The line was cut and the admin does not know it yet: the newer connection counts.
        async with attached(lab) as newer:
            await agent.gone.wait()
            await newer.until(lambda: len(newer.heard) >= 8)
            assert newer.heard == [*WELCOME, "/plugin/state", *LOADING]


@pytest.mark.parametrize("sync", ["false", "true"])  # true: the agent was restarted too
async def test_a_lab_that_was_restarted_goes_on_with_an_agents_sessions(tmp_path: Path, sync: str) -> None:
    async with lab_in(tmp_path) as lab:
        lab.drill.switches.auto_register = True
        async with attached(lab, sync=sync, sessions=["s1"]) as agent:
            await agent.until(lambda: len(agent.heard) >= 8)
            assert agent.heard == [*WELCOME, "/plugin/state", *LOADING]  # it has sessions, and will tell what is theirs
            await agent.say(**reached("s1", [True, False, True]))
            async with user_of(lab) as user:
                assert (await post(user, "STOP", sessionId="s1"))[0] == 200
                (session,) = lab.drill.agents["lab-07"].plugin.sessions.values()
                assert session.reached == {("src/calc.js", "t1.test.js"): 0x010001}


@asynccontextmanager
async def ready(lab: Lab, **config: str) -> AsyncIterator[tuple[httpx.AsyncClient, Agent]]:
    async with user_of(lab) as user, attached(lab, **config) as agent:
        await agent.until(lambda: len(agent.heard) >= 2)
        assert (await user.post(f"/api/agents/{config.get('id', 'lab-07')}")).status_code == 200
        yield user, agent


async def test_a_session_from_start_to_the_files(lab: Lab) -> None:
    def answers(action: dict[str, Any]) -> list[dict[str, Any]]:
        if action["type"] != "STOP":
            started = {"sessionId": "s1", "testType": "AUTO", "isRealtime": False, "ts": 1}
            return [{"type": "SESSION_STARTED"} | started, reached("s1", [True, False, True])]
        finished = {"type": "SESSION_FINISHED", "sessionId": "s1", "ts": 2}
        return [reached("s1", [True, False, False], "t2.test.js"), finished]

    async with ready(lab) as (user, agent):
        agent.answers = answers
        code, answer = await post(user, "START", sessionId="s1", testType="AUTO")
        payload = {"sessionId": "s1", "testType": "AUTO", "testName": None, "isRealtime": False, "isGlobal": False}
        assert (code, answer["data"]) == (200, {"type": "START_AGENT_SESSION", "payload": payload})
        assert agent.actions == [answer["data"]]
        assert (await post(user, "START", sessionId="s1"))[0] == 409
        assert (await post(user, "STOP", sessionId="s2"))[0] == 404
        assert (await post(user, "STOP", sessionId="s1"))[0] == 200
        assert [action["type"] for action in agent.actions] == ["START_AGENT_SESSION", "STOP"]

        coverage = (await user.get(COVERAGE, params={"session": "s1"})).json()
        with trio.fail_after(60):
            while coverage["sessions"][0]["state"] != "finished":
                await trio.sleep(0.05)
                coverage = (await user.get(COVERAGE, params={"session": "s1"})).json()
        assert (coverage["classes"], coverage["probes"], coverage["covered"]) == (1, 3, 2)
        assert coverage["reached"][1] == {
            **{"className": "src/calc.js", "testName": "t2.test.js"},
            "probes": [True, False, False],
        }
        (session,) = coverage["sessions"]
        assert session["tests"] == {
            "t1.test.js": {"classes": 1, "covered": 2},
            "t2.test.js": {"classes": 1, "covered": 1},
        }
        assert (await user.get(COVERAGE, params={"session": "s9"})).status_code == 404

        async with client_of(lab, "") as browser:  # the links of the page are for whoever sees the page
            page = (await browser.get("/", headers=BROWSER)).text
            assert f'<a href="{COVERAGE}/lcov.info?session=s1">lcov.info</a>' in page
            lcov = (await browser.get(f"{COVERAGE}/lcov.info", params={"session": "s1"})).text
            xml = (await browser.get(f"{COVERAGE}/cobertura.xml")).content
            assert (await browser.get(f"{COVERAGE}/clover.xml")).status_code == 404
        assert "TN:t2_test_js\nSF:src/calc.js\nFN:1,div\nFN:3,GLOBAL\nFNDA:1,div\nFNDA:0,GLOBAL\n" in lcov
        assert ET.fromstring(xml).attrib["lines-covered"] == "2"


async def test_the_oldest_sessions_that_are_over_go_when_there_is_no_room_for_more(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drill, "MAX_KEPT", 3)
    monkeypatch.setattr(test2code, "GRACE_S", 0.0)

    def answers(action: dict[str, Any]) -> list[dict[str, Any]]:
        if action["type"] != "STOP":
            return []
        ident = action["payload"]["sessionId"]
        parts = [reached(ident, [True, False, True], test) for test in ("t1.test.js", "t2.test.js")]
        return [*parts, {"type": "SESSION_FINISHED", "sessionId": ident, "ts": 2}]

    async with ready(lab) as (user, agent):
        agent.answers = answers
        for number in range(4):
            assert (await post(user, "START", sessionId=f"s{number}"))[0] == 200
            assert (await post(user, "STOP", sessionId=f"s{number}"))[0] == 200
        assert list(lab.drill.agents["lab-07"].plugin.sessions) == ["s2", "s3"]  # each START makes room
        assert (await user.get(COVERAGE, params={"session": "s1"})).status_code == 404
        assert (await user.get(COVERAGE, params={"session": "s2"})).json()["covered"] == 2


async def test_while_coverage_is_written_the_lab_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = trio.Event(), threading.Event()

    def lcov(taken: coverage.Taken) -> bytes:
        trio.from_thread.run_sync(began.set)
        assert may_end.wait(60)
        return b"written"

    monkeypatch.setattr(coverage, "lcov", lcov)
    async with ready(lab) as (user, _):
        texts: list[str] = []

        async def download() -> None:
            texts.append((await user.get(f"{COVERAGE}/lcov.info")).text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(download)
            with trio.fail_after(60):
                await began.wait()
            assert (await post(user, "START", sessionId="s1"))[0] == 200
            may_end.set()
        assert texts == ["written"]


async def test_a_start_that_the_agent_refuses_is_409(lab: Lab) -> None:
    async with ready(lab) as (user, agent):
        agent.answers = lambda action: [{"type": "SESSION_CANCELLED", "sessionId": "s1", "ts": 1}]
        code, answer = await post(user, "START", sessionId="s1")
        assert (code, answer["message"]) == (409, "agent 'lab-07' did not start session 's1'")
        agent.answers = lambda action: []
        assert (await post(user, "START", sessionId="s1"))[0] == 200


async def test_each_wrong_request_has_its_code(lab: Lab) -> None:
    async with ready(lab) as (user, agent):
        assert (await post(user, "PAUSE"))[0] == 400
        assert (await post(user, "START", isRealtime="true"))[0] == 400
        other = "/api/agents/lab-07/plugins/other/dispatch-action"
        assert (await user.post(other, json={"type": "STOP_ALL"})).status_code == 404
        assert (await user.post(ACTION.replace("07", "08"), json={"type": "STOP_ALL"})).status_code == 404
        assert (await user.post("/api/agents/lab-08")).status_code == 404
        assert (await user.post("/api/agents/lab-07", json={"plugins": ["other"]})).status_code == 404
        for body in (b'{"colour": "red"}', *no_json.SPOILED, b'{"name":"\xff"}'):
            assert (await user.post("/api/agents/lab-07", content=body)).status_code == 400
        assert (await user.put("/api/agents/lab-07", json={})).status_code == 405
        assert (await user.get("/api/agents/lab-07/plugins")).status_code == 404
        assert not agent.actions
        assert (await post(user, "START", sessionId="s1", isGlobal=True))[0] == 200
        assert (await post(user, "START", sessionId="s2", isGlobal=True))[0] == 409
        assert (await post(user, "CANCEL", sessionId="s1"))[0] == 200
        assert (await post(user, "CANCEL", sessionId="s1"))[0] == 404
        assert (await post(user, "ADD_SESSION_DATA", sessionId="s1", data="{}"))[0] == 404
        assert (await post(user, "CANCEL_ALL"))[0] == 200
    async with user_of(lab) as user:
        assert (await post(user, "START"))[0] == 400


async def test_no_acknowledgement_is_500_in_time_and_at_once_when_the_agent_goes(lab: Lab) -> None:
    async with ready(lab) as (user, agent):
        agent.deaf = {"/plugin/action"}
        lab.drill.switches.ack_s = 0.05
        code, answer = await post(user, "START", sessionId="s1")
        assert code == 500
        # Of the two that are awaited, on a slow machine, maybe neither has come.
        assert re.fullmatch("no acknowledgement of /plugin/action.*: nothing came within 0.05 s", answer["message"])
        lab.drill.switches.ack_s = 1000
        agent.answers = lambda action: []

        async def leave() -> None:
            await agent.until(lambda: len(agent.actions) >= 2)
            await agent.ws.aclose()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave)
                code, answer = await post(user, "STOP", sessionId="s1")
        assert (code, answer["message"]) == (500, "no acknowledgement of /plugin/action: the agent is gone")


async def test_a_group_is_told_as_one_and_answers_each(lab: Lab) -> None:
    async with (
        ready(lab, serviceGroupId="g") as (user, first),
        attached(lab, id="lab-08", serviceGroupId="g") as second,
    ):
        await second.until(lambda: len(second.heard) >= 2)
        for path in ("/api/groups/g", "/api/service-groups/g"):
            reply = await user.post(f"{path}/plugins/test2code/dispatch-action", json={"type": "START"})
            assert [answer["code"] for answer in reply.json()] == [200, 400]
        await user.post("/api/agents/lab-08")
        reply = await user.post("/api/groups/g/plugins/test2code/dispatch-action", json={"type": "START"})
        assert [answer["code"] for answer in reply.json()] == [200, 200]
        assert first.actions[-1]["payload"]["sessionId"] == second.actions[-1]["payload"]["sessionId"] != ""
        nobody = await user.post("/api/groups/h/plugins/test2code/dispatch-action", json={"type": "START"})
        assert nobody.status_code == 404


async def test_settings_are_changed_and_an_agent_is_forgotten(lab: Lab) -> None:
    async with ready(lab) as (user, agent):
        settings = {"packages": ["org/acme"], "sessionIdHeaderName": "x-session", "targetHost": ""}
        reply = await user.patch("/api/agents/lab-07", json={"description": "d", "systemSettings": settings})
        assert (reply.json()["description"], reply.json()["name"]) == ("d", "lab-07")
        assert agent.heard[-2:] == ["/agent/set-packages-prefixes", "/agent/change-header-name"]
        assert (await user.delete("/api/agents/lab-07")).status_code == 200
        assert agent.heard[-1] == "/plugin/unload"
        await agent.gone.wait()
        assert (await user.get("/api/agents")).json() == []


async def test_two_who_forget_an_agent_at_a_time_are_answered_alike(lab: Lab) -> None:
    async with ready(lab) as (user, agent):
        agent.deaf = {"/plugin/unload"}
        lab.drill.switches.ack_s = 1000
        answers: list[object] = []

        async def forget() -> None:
            answers.append((await user.delete("/api/agents/lab-07")).json())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(forget)
            nursery.start_soon(forget)
            await agent.until(lambda: agent.heard.count("/plugin/unload") == 2)
            await agent.ws.aclose()
        assert answers == 2 * [{"code": 500, "message": "no acknowledgement of /plugin/unload: the agent is gone"}]
        assert (await user.get("/api/agents")).json() == []


async def test_a_bad_frame_is_dropped_and_counted_and_the_agent_stays(lab: Lab) -> None:
    async with ready(lab) as (user, agent):
        await post(user, "START", sessionId="s1", isRealtime=True)
        await agent.say(**reached("s1", [True, False, False]), more=1)
        await agent.say(type="SESSION_STARTED", sessionId="s1", testType="AUTO", isRealtime="true", ts=1)
        await agent.ws.send_message(b"\x08\x01")
        await agent.ws.send_message("{}")
        assert (await post(user, "STOP_ALL"))[0] == 200
        coverage = (await user.get(COVERAGE)).json()
        assert (coverage["badFrames"], coverage["covered"]) == (4, 0)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("AgentConfig", json.dumps(CONFIG | {"agentVersion": "1"})),
        ("AgentConfig", json.dumps(CONFIG | {"agentType": "JAVA"})),
        ("AgentConfig", None),
        ("needSync", "yes"),
        ("needSync", None),
        ("Content-Encoding", "zstd"),
    ],
)
async def test_an_agent_with_a_wrong_header_is_not_let_in(lab: Lab, header: str, value: str | None) -> None:
    headers = {"AgentConfig": json.dumps(CONFIG), "needSync": "true"} | {header: value}
    given = tuple((name, text) for name, text in headers.items() if text is not None)
    async with connect(Dial(f"{lab.ws_url}/agent/attach", headers=given)) as ws:
        with pytest.raises(ConnectionClosed) as closed, trio.fail_after(60):
            await ws.get_message()
        assert closed.value.reason is not None
        assert closed.value.reason.code == 1002
    assert not lab.drill.agents


async def test_a_new_build_begins_without_classes_and_the_old_ones_coverage_is_kept(lab: Lab) -> None:
    async with ready(lab) as (user, _):
        assert (await user.get(COVERAGE)).json()["classes"] == 1
        assert (await post(user, "START", sessionId="s1"))[0] == 200
        async with attached(lab, buildVersion="1.4.3") as newer:
            await newer.until(lambda: len(newer.heard) >= 8)
            shown = (await user.get(COVERAGE)).json()
            assert (shown["buildVersion"], shown["sessions"]) == ("1.4.3", [])
            shown = (await user.get(COVERAGE, params={"session": "s1"})).json()
            assert (shown["buildVersion"], shown["classes"]) == ("1.4.2", 1)
            for number in range(20):
                lab.drill.agents["lab-07"].attach(read_config(json.dumps(CONFIG | {"buildVersion": f"2.{number}"})))
            assert (await user.get(COVERAGE, params={"session": "s1"})).status_code == 404


async def test_users_log_in_on_this_machine_and_see_nothing_else_of_the_lab(lab: Lab) -> None:
    async with client_of(lab, "") as stranger:
        assert (await stranger.post(ACTION, json={"type": "STOP_ALL"})).status_code == 401
        assert (await stranger.post("/api/login", headers={"host": "rebound.example"})).status_code == 401
        assert (await stranger.get("/api/agents", headers={"host": "rebound.example"})).status_code == 401
        assert (await stranger.post("/api/login", json={"login": "guest"})).status_code == 200
    async with user_of(lab) as user:
        assert (await user.get("/lab/faults")).status_code == 403


async def test_a_lab_for_other_machines_asks_agents_and_users_for_the_token(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        lab: Lab = await nursery.start(serve_lab, "0.0.0.0:0", tmp_path, [])
        url = f"http://127.0.0.1:{lab.address.rpartition(':')[2]}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            assert (await client.post("/api/login")).status_code == 401
            assert (await client.get("/agent/attach")).status_code == 401
            token = lab.token_file.read_text().strip()
            reply = await client.post("/api/login", headers={"authorization": f"Bearer {token}"})
            assert reply.status_code == 200
            assert reply.headers["authorization"] != token
        nursery.cancel_scope.cancel()


async def test_agents_are_registered_at_once_where_that_is_switched_on(lab: Lab) -> None:
    async with client_of(lab) as client:
        assert (await client.post("/lab/faults", json={"drill": {"ack_s": 0}})).status_code == 400
        assert (await client.post("/lab/faults", json={"drill": {"auto_register": True}})).status_code == 200
        async with attached(lab) as agent:
            await agent.until(lambda: len(agent.heard) >= 8)
            assert (await client.get("/api/agents/lab-07")).json()["status"] in ("REGISTERING", "REGISTERED")


async def test_who_logged_in_is_known_after_the_lab_was_restarted(tmp_path: Path) -> None:
    async with lab_in(tmp_path / "lab") as lab, user_of(lab) as user:
        shown = {"authorization": user.headers["authorization"]}
        kept = tmp_path / "lab/login"
        assert await trio.to_thread.run_sync(lambda: kept.stat().st_mode & 0o777) == 0o600
    async with lab_in(tmp_path / "lab") as lab, client_of(lab, "") as client:
        assert (await client.get("/api/agents", headers=shown)).status_code == 200
        assert (await client.post("/api/login", headers=shown)).headers["authorization"] == shown["authorization"][7:]
