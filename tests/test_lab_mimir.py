"""The lab's Mimir over a real websocket: who may do what, live changes, gaps, lapsed reservations."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.core.channel import Channel, Refused
from agent.core.envelope import Request
from agent.core.errors import PeerUnreachable
from agent.lab import mimir
from agent.lab.graph import Graph
from agent.mimir.messages import Edge, Query, Vertex
from tests.lab_links import Lab, client, epoch, jump, until

Client = tuple[Channel, list[Request]]


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(tmp_path).up() as lab:
        yield lab


@asynccontextmanager
async def registered(lab: Lab, **hello: Any) -> AsyncIterator[Client]:
    async with client(lab, "mimir") as (channel, asked):
        await channel.ask("register", {"ident": "lab-07", "instance": "i-1", "version": "1", **hello})
        yield channel, asked


def run(**props: Any) -> dict[str, Any]:
    return {"id": "r-1", "label": "Run", "props": props}


def changes(asked: list[Request]) -> list[dict[str, Any]]:
    assert all(request.action == "change" and request.posted for request in asked)
    return [request.payload for request in asked]


async def came(asked: list[Request], count: int) -> list[dict[str, Any]]:
    with trio.fail_after(60):
        while len(asked) < count:
            await trio.lowlevel.checkpoint()
    return changes(asked)


async def refused(channel: Channel, action: str, payload: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refusal:
        await channel.ask(action, payload)
    return refusal.value.reason


async def test_nothing_goes_before_register(lab: Lab) -> None:
    async with client(lab, "mimir") as (channel, _):
        assert await refused(channel, "query", {"label": "Run"}) == "forbidden: query before register"
        assert await refused(channel, "register", {}) == "bad_payload: key ident is missing"
        answer = await channel.ask("register", {"ident": "reader"})
        assert (answer["last_seq"], abs(answer["time"] - epoch()) < 5) == (0, True)
        assert (await refused(channel, "upsert", {"seq": 1})).startswith("forbidden: a reader does not write")
        assert (await refused(channel, "dance", {})).startswith("unknown_action: 'dance' is none of register upsert")


async def test_what_is_written_is_found_and_last_seq_is_told(lab: Lab) -> None:
    async with registered(lab) as (channel, _):
        edges = [{"from": "r-1", "label": "ran on", "to": "lab-07"}]
        payload = {"seq": 4, "vertices": [run(state="running")], "edges": edges}
        assert await channel.ask("upsert", payload) == {"changed": 2}
        assert await channel.ask("upsert", payload) == {"changed": 0}
        found = await channel.ask("query", {"label": "Run", "where": {"state": "running"}, "edges": ["ran on"]})
        assert found == {
            "vertices": [{"id": "r-1", "label": "Run", "rev": None, "props": {"state": "running"}}],
            "edges": [{"from": "r-1", "label": "ran on", "to": "lab-07", "props": {}}],
            "next": None,
        }
        assert await refused(channel, "query", {"label": "Run", "where": {"a": {"x": 1}}}) == (
            "bad_payload: key where.a.x: no such operator; eq ne lt le gt ge in prefix are known"
        )
    async with client(lab, "mimir") as (channel, _):
        hello = {"ident": "lab-07", "instance": "i-1", "version": "1"}
        assert (await channel.ask("register", hello))["last_seq"] == 4
        assert (await channel.ask("register", {**hello, "instance": "i-2"}))["last_seq"] == 0


async def test_a_live_query_gets_a_snapshot_and_each_change(lab: Lab) -> None:
    await lab.mimir.write(Vertex(id="r-0", label="Run", props={"n": 0}))
    async with registered(lab) as (channel, asked):
        live = await channel.ask("live", {"label": "Run", "where": {"n": {"lt": 10}}})
        assert live["snapshot"] == [{"id": "r-0", "label": "Run", "rev": None, "props": {"n": 0}}]
        sub = live["sub"]
        for props in ({"n": 1}, {"n": 2}, {"n": 10}):
            await channel.ask("upsert", {"vertices": [run(**props)]})
        assert await came(asked, 3) == [
            {"sub": sub, "seq": 2, "op": "create", "label": "Run", "id": "r-1", "props": {"n": 1}},
            {"sub": sub, "seq": 3, "op": "update", "label": "Run", "id": "r-1", "props": {"n": 2}},
            {"sub": sub, "seq": 4, "op": "delete", "label": "Run", "id": "r-1", "props": {"n": 10}},
        ]
        assert await channel.ask("unlive", {"sub": sub}) == {}
        await channel.ask("upsert", {"vertices": [run(n=3)]})
        assert await refused(channel, "unlive", {"sub": sub}) == f"not_found: no live query {sub} on this connection"
        assert len(asked) == 3


async def test_since_replays_what_was_missed(lab: Lab) -> None:
    for n in range(5):
        await lab.mimir.write(Vertex(id="r-1", label="Run", props={"n": n}))
    async with registered(lab) as (channel, asked):
        live = await channel.ask("live", {"label": "Run", "since": 3})
        assert (live["seq"], live["snapshot"]) == (5, [])
        assert [(change["seq"], change["props"]) for change in await came(asked, 2)] == [(4, {"n": 3}), (5, {"n": 4})]
        assert await refused(channel, "live", {"label": "Run", "since": 99}) == (
            "bad_payload: key since: 99 is above the newest change, 5"
        )


async def test_where_it_cannot_replay_there_is_a_gap_with_exact_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mimir, "Graph", lambda path: Graph(path, keep_changes=3))
    async with Lab(tmp_path).up() as lab:
        for n in range(10):
            await lab.mimir.write(Vertex(id="r-1", label="Run", props={"n": n}))
        async with registered(lab) as (channel, asked):
            live = await channel.ask("live", {"label": "Run", "since": 2})
            gap, *rest = await came(asked, 4)
            assert gap == {"sub": live["sub"], "seq": 7, "op": "Gap", "from": 3, "to": 7}
            assert [change["seq"] for change in rest] == [8, 9, 10]


async def test_live_queries_are_bounded(lab: Lab) -> None:
    async with registered(lab) as (channel, _):
        for _ in range(32):
            await channel.ask("live", {"label": "Run"})
        assert (await refused(channel, "live", {"label": "Run"})).startswith("busy: 32 live queries are open")


async def test_a_reservation_that_is_not_renewed_is_lost(lab: Lab, autojump_clock: MockClock) -> None:
    jump(autojump_clock)
    props = {"state": "available", "lease_until": epoch() + 60}
    await lab.mimir.write(
        Vertex(id="l/0/1", label="Reservation", props=props), edges=(Edge(src="l/0/1", label="of", dst="l"),)
    )
    async with registered(lab) as (channel, asked):
        await channel.ask("live", {"label": "Reservation", "where": {"state": "lost"}})
        await trio.sleep(50)
        until = epoch() + 60
        renewal = {"id": "l/0/1", "label": "Reservation", "props": {"lease_until": until}}
        await channel.ask("upsert", {"vertices": [renewal]})
        await trio.sleep(62)
    (change,) = changes(asked)
    assert change["op"] == "create"
    assert change["props"]["state"] == "lost"
    page = await lab.mimir.query(Query(label="Reservation"))
    assert until <= page["vertices"][0]["props"]["lost_at"] <= until + 2


async def test_a_full_disk_is_told_of_and_tried_again(
    tmp_path: Path, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    mock_clock.rate = 1.0  # time jumps only while nobody is connected
    async with Lab(tmp_path).up() as lab:
        props = {"state": "available", "lease_until": epoch() + 100}
        await lab.mimir.write(Vertex(id="l/0/1", label="Reservation", props=props))
        disk = lab.mimir._graph._db
        disk.execute("PRAGMA max_page_count = 1")  # what SQLite sees of a full disk: it takes no page more
        async with registered(lab) as (channel, _):
            full = "internal: this cannot be kept: database or disk is full"
            assert await refused(channel, "upsert", {"seq": 1, "vertices": [run(text=60_000 * "x")]}) == full
            disk.execute("PRAGMA max_page_count = 1000000")
            assert await channel.ask("upsert", {"seq": 1, "vertices": [run(text=60_000 * "x")]}) == {"changed": 1}

        disk.execute("PRAGMA query_only = 1")
        mock_clock.autojump_threshold = 0.001
        took = await until(lambda: caplog.text.count("reservations that lapsed are not written") >= 3)
        assert took >= 60  # and no line each second
        disk.execute("PRAGMA query_only = 0")
        await until(lambda: "reservations lost ids=l/0/1" in caplog.text)
        assert (await lab.mimir.query(Query(label="Reservation")))["vertices"][0]["props"]["state"] == "lost"


async def test_the_faults_cut_after_the_deed_and_refuse_before_it(lab: Lab) -> None:
    lab.mimir.faults.cut = 1
    async with client(lab, "mimir") as (channel, _):
        with pytest.raises(PeerUnreachable):
            await channel.ask("register", {"ident": "lab-07", "instance": "i-1"})
    lab.mimir.faults.refuse = "poison"
    async with registered(lab) as (channel, _):
        assert (await refused(channel, "upsert", {"vertices": [run(text="poison")]})).startswith("bad_payload: told to")
        assert (await channel.ask("query", {"label": "Run"}))["vertices"] == []
