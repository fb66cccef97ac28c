"""The lab's one port: who may come in, the page, the switches, and what survives a restart."""

import json
import sqlite3
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from agent.core.errors import PeerRefused, PeerUnreachable
from agent.core.link import Dial, connect
from agent.eman.settings import HubSettings
from agent.lab.server import FolderUnusable, Lab, serve_lab
from tests import no_json
from tests.eman_hub import peer

SUITE = {"id": "login", "runner": "command", "command": ["true"]}


@asynccontextmanager
async def lab_in(folder: Path, suites: Sequence[Mapping[str, Any]] = ()) -> AsyncIterator[Lab]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(serve_lab, "127.0.0.1:0", folder, suites)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with lab_in(tmp_path / "lab") as lab:
        yield lab


BROWSER = {"Accept": "text/html,application/xhtml+xml"}


def client_of(lab: Lab, token: str | None = None) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {token or lab.token_file.read_text().strip()}"} if token != "" else {}
    return httpx.AsyncClient(base_url=lab.url, headers=headers, trust_env=False, timeout=60)


async def test_the_token_is_made_once_and_for_its_user_alone(tmp_path: Path) -> None:
    async with lab_in(tmp_path) as lab:
        token = lab.token_file.read_text()
        assert stat.S_IMODE(lab.token_file.stat().st_mode) == 0o600
        assert len(token.strip()) >= 40
    async with lab_in(tmp_path) as lab:
        assert lab.token_file.read_text() == token


@pytest.mark.parametrize("path", ["seneschal", "mimir"])
async def test_agents_come_in_by_the_token(lab: Lab, path: str) -> None:
    url = f"{lab.ws_url}/{path}"
    with pytest.raises(PeerRefused, match="answered 401"):
        async with connect(Dial(url)):
            pass
    async with connect(Dial(url, token_file=lab.token_file)) as ws:
        await ws.send_message('{"action":"","req_id":7,"posted":false,"payload":{}}')
        answer = json.loads(await ws.get_message())
    assert (answer["rsp_id"], answer["payload"]["tool"]) == (7, "emissary")


async def test_the_page_shows_runs_and_imports_and_escapes_them(tmp_path: Path) -> None:
    async with lab_in(tmp_path, [{**SUITE, "id": "<script>"}]) as lab, client_of(lab, "") as client:
        page = await client.get("/", headers=BROWSER)
    assert page.status_code == 200
    assert "&lt;script&gt;" in page.text
    assert "<script>" not in page.text
    assert "<td>queued</td>" in page.text


async def test_the_page_is_for_this_machine_or_by_the_token(lab: Lab) -> None:
    async with client_of(lab, "") as client:
        assert (await client.get("/", headers={"host": "rebound.example"} | BROWSER)).status_code == 401
    async with client_of(lab) as client:
        assert (await client.get("/", headers={"host": "rebound.example"} | BROWSER)).status_code == 200


async def test_switches_are_turned_by_the_token(lab: Lab) -> None:
    async with client_of(lab, "") as client:
        assert (await client.post("/lab/faults", json={"polarize": {"html": 2}})).status_code == 401
    async with client_of(lab) as client:
        reply = await client.post("/lab/faults", json={"polarize": {"html": 2}, "mimir": {"late_s": 0.5}})
        assert reply.json()["polarize"]["html"] == 2
        assert (await client.get("/lab/faults")).json() == reply.json()
    assert lab.polarize.faults.html == 2
    assert lab.mimir.faults.late_s == 0.5


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"eman": {}}, "'eman' has no switches"),
        ({"polarize": {"smoke": 1}}, "unknown switches: smoke"),
        ({"polarize": {"html": "yes"}}, "Expected `int`"),
        ({"polarize": {"html": 1}, "mimir": {"late_s": "long"}}, "Expected `float`"),
        ({"seneschal": {"cut": -1}}, "Expected `int` >= 0"),
        ({"mimir": {"late_s": -0.5}}, "Expected `float` >= 0.0"),
        ({"polarize": {"half": -1}}, "Expected `int` >= 0"),
        ([], "Expected `object`"),
        (b'{"polarize":{"\xff":0}}', "can't decode byte 0xff"),
    ],
)
async def test_a_switch_that_is_none_is_refused_and_nothing_is_turned(lab: Lab, body: object, complaint: str) -> None:
    async with client_of(lab) as client:
        reply = await client.post("/lab/faults", content=body if isinstance(body, bytes) else json.dumps(body))
    assert reply.status_code == 400
    assert complaint in reply.text
    assert lab.polarize.faults.html == 0


async def test_a_restart_keeps_the_queue_and_hands_nothing_out_twice(tmp_path: Path) -> None:
    async with lab_in(tmp_path, [SUITE]) as lab:
        before = [run.run for run in lab.seneschal.runs()]
    assert len(before) == 1
    async with lab_in(tmp_path, [SUITE]) as lab:
        assert [run.run for run in lab.seneschal.runs()] == before


async def test_suites_are_queued_and_runs_ended_by_the_token(lab: Lab) -> None:
    async with client_of(lab, "") as client:
        assert (await client.post("/lab/runs", json=SUITE)).status_code == 401
        assert (await client.get("/lab/runs")).status_code == 401
    async with client_of(lab) as client:
        for body in (b"", b"[]", b"{", b'{"x":%b}' % no_json.SPOILED[0], b'{"\xff":0}'):
            reply = await client.post("/lab/runs", content=body)
            assert (reply.status_code, reply.text.startswith("a suite document, as JSON, is expected: ")) == (400, True)
        assert (await client.post("/lab/runs", content=b" " * 262_145)).status_code == 413
        run = (await client.post("/lab/runs", json=SUITE)).json()["run"]
        queued = {"run": run, "suite": "login", "state": "queued", "agent": "", "verdict": "", "reason": None}
        assert (await client.get("/lab/runs")).json() == [queued]
        assert (await client.delete(f"/lab/runs/{run}")).json() == {"run": run}
        dropped = queued | {"state": "dropped", "reason": "ended by a user of the lab"}
        assert (await client.get("/lab/runs")).json() == [dropped]
        reply = await client.delete("/lab/runs/r-9")
        assert (reply.status_code, reply.text) == (404, "r-9 is not known here\n")


async def test_two_labs_do_not_share_a_folder(lab: Lab, tmp_path: Path) -> None:
    with pytest.RaisesGroup(FolderUnusable, flatten_subgroups=True):
        async with lab_in(tmp_path / "lab"):
            pass


@pytest.mark.parametrize("name", ["seneschal.db", "mimir.db", "polarize.db"])
async def test_state_that_cannot_be_read_is_told_of(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(1000 * "no database ")
    unusable = pytest.RaisesExc(FolderUnusable, match="the lab's state there cannot be used: file is not a database")
    with pytest.RaisesGroup(unusable, flatten_subgroups=True):
        async with lab_in(tmp_path):
            pass


async def test_runs_of_another_version_are_told_of(tmp_path: Path) -> None:
    async with lab_in(tmp_path, [SUITE]):
        pass
    with closing(sqlite3.connect(tmp_path / "seneschal.db")) as db, db:
        db.execute("UPDATE kept SET value = '{}'")
    unusable = pytest.RaisesExc(FolderUnusable, match="Object missing required field `run`")
    with pytest.RaisesGroup(unusable, flatten_subgroups=True):
        async with lab_in(tmp_path):
            pass


async def test_polarize_listens_on_the_same_port(lab: Lab) -> None:
    async with client_of(lab, "") as client:
        assert (await client.post("/xunit/import", content=b"")).status_code == 400
        assert b"j_password" in (await client.get("/polarion/import/xunit-queue")).content


async def test_the_eman_hub_is_as_it_is_set(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        settings = HubSettings(services_page="off", max_connections=1)
        start = partial(serve_lab, "127.0.0.1:0", tmp_path, hub=settings)
        lab: Lab = await nursery.start(start)
        async with peer(lab.address, "service"):
            with pytest.raises(PeerUnreachable, match="too many connections"):
                async with connect(Dial(f"ws://{lab.address}/socket.io/?EIO=3&transport=websocket")):
                    pass
        async with client_of(lab) as client:
            assert (await client.get("/services")).status_code == 403
        nursery.cancel_scope.cancel()


async def test_the_eman_hub_is_on_the_same_port(lab: Lab) -> None:
    async with client_of(lab) as client:
        assert (await client.get("/")).json() == {"result": {"id": "eman"}}
        async with peer(lab.address) as service:
            await service.shake("any-key-will-do", key="on-loopback")
            assert list((await client.get("/services")).json()["result"]) == [service.id]
