"""The lab's Seneschal over a real websocket: register, supersede, offers, orders, restart, faults."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.core.channel import Channel, Refused
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerUnreachable
from agent.core.events import Counts
from tests.lab_links import Lab, client, epoch, jump, until

SUITE = {"id": "login"}
HELLO = {"ident": "a", "server": "ws://a/", "version": "1", "instance": "i-1", "slots": 1}
OFFER = {"slots": 1, "lease": 60, "reservations": ["a/0/1"]}


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(tmp_path).up() as lab:
        yield lab


@asynccontextmanager
async def agent(lab: Lab, **hello: Any) -> AsyncIterator[tuple[Channel, list[Request]]]:
    async with client(lab, "seneschal") as (channel, asked):
        await channel.ask("register", {**HELLO, **hello})
        yield channel, asked


def complete(seq: int, run: str, **changes: Any) -> dict[str, Any]:
    return {
        "seq": seq, "ident": "a", "run": run, "result": "SUCCESS", "code": 0, "metrics": {}, "verdict": "passed",
        "counts": {"total": 1, "passed": 1}, **changes,
    }  # fmt: skip


async def refused(channel: Channel, action: str, payload: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refusal:
        await channel.ask(action, payload)
    return refusal.value.reason


async def sent(asked: list[Request], count: int = 1) -> list[Request]:
    with trio.fail_after(60):
        while len(asked) < count:
            await trio.lowlevel.checkpoint()
    return asked


async def test_register_answers_with_the_terms(lab: Lab) -> None:
    async with client(lab, "seneschal") as (channel, _):
        assert await refused(channel, "available", OFFER) == "forbidden: available before register"
        assert await refused(channel, "register", {"ident": "a"}) == "bad_payload: key server is missing"
        answer = await channel.ask("register", HELLO)
        assert (answer["heartbeat"], answer["deadline"], answer["last_seq"], answer["runs"]) == (5, 20, 0, [])
        assert abs(answer["time"] - epoch()) < 5
        assert await refused(channel, "register", HELLO) == "forbidden: registered already, as a"
        assert (await refused(channel, "spec", {})).startswith("unknown_action: 'spec' is none of register available")
        assert list(lab.seneschal.agents()) == ["a"]


async def test_a_run_goes_to_an_offer_and_its_end_is_kept(lab: Lab) -> None:
    async with agent(lab) as (channel, asked):
        await channel.ask("available", OFFER)
        run = lab.seneschal.enqueue(SUITE, deadline=epoch() + 1000)
        (order,) = await sent(asked)
        assert order.action == "run"
        assert (order.payload["run"], order.payload["reservation"], order.payload["suite"]) == (run, "a/0/1", SUITE)
        assert (order.payload["lease"], order.payload["deadline"] > epoch()) == (600.0, True)
        await channel.ask("accepted", {"seq": 1, "run": run, "reservation": "a/0/1"})
        reports = [{"run": run, "state": "running", "test": "x", "since": 1.0}]
        updated = await channel.ask("update", {"ident": "a", "metrics": {}, "runs": reports})
        assert updated["leases"] == {run: 600.0}
        assert await refused(channel, "update", {"ident": "b", "metrics": {}, "runs": []}) == (
            "bad_payload: key ident: b, but a registered"
        )
        await channel.post("log", {"message": "hello", "severity": "WARNING"})
        await channel.ask("complete", complete(2, run))
        row = await lab.seneschal.ended(run)
        assert row.complete is not None
        assert (row.state, row.complete.counts) == ("done", Counts(total=1, passed=1))
        (_, id_, label, *_), *_ = [(None, *row) for row in await lab.mimir.rows()]
        assert (id_, label) == ("a/0/1", "Reservation")


@pytest.mark.parametrize(
    ("action", "payload", "reason"),
    [
        ("refused", {"seq": 1, "run": "r", "reason": "tired"}, "bad_payload: key reason: "),
        ("accepted", {"seq": -1, "run": "r", "reservation": "x"}, "bad_payload: key seq: "),
        ("complete", complete(1, "../../etc"), "bad_payload: key run: "),
        ("complete", complete(1, "r", result="FINE"), "bad_payload: key result: "),
        ("accepted", {"seq": 1, "run": "r-1", "reservation": "x"}, "no_such_run: r-1 is not known here"),
        ("available", {"slots": 2, "lease": 60, "reservations": []}, "bad_payload: key slots: 2, but 0 offers"),
    ],
)
async def test_it_is_strict_about_what_it_is_sent(lab: Lab, action: str, payload: dict[str, Any], reason: str) -> None:
    async with agent(lab) as (channel, _):
        assert (await refused(channel, action, payload)).startswith(reason)


async def test_the_same_instance_supersedes_and_another_is_refused(lab: Lab) -> None:
    async with agent(lab) as (_, _):
        first = lab.websockets[0]
        async with client(lab, "seneschal") as (other, _):
            assert (await refused(other, "register", {**HELLO, "instance": "i-2"})).startswith("ident_taken: a is")
        async with agent(lab) as (second, _):
            assert first.closed is not None
            assert (first.closed.code, first.closed.reason) == (4001, "superseded by a newer connection")
            await second.ask("available", OFFER)
            assert list(lab.seneschal.agents()) == ["a"]


async def test_a_killed_server_remembers_runs_and_last_seq(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    async with lab.up(), agent(lab) as (channel, asked):
        await channel.ask("available", OFFER)
        run = lab.seneschal.enqueue(SUITE)
        waiting = lab.seneschal.enqueue(SUITE)
        await sent(asked)
        await channel.ask("accepted", {"seq": 7, "run": run, "reservation": "a/0/1"})
    async with lab.up():
        assert [(row.run, row.state) for row in lab.seneschal.runs()] == [(run, "running"), (waiting, "queued")]
        async with client(lab, "seneschal") as (channel, asked):
            answer = await channel.ask("register", HELLO)
            assert (answer["last_seq"], answer["runs"]) == (7, [run])
            await channel.ask("available", {**OFFER, "reservations": ["a/0/2"]})
            (order,) = await sent(asked)
            assert order.payload["run"] == waiting


async def test_cancel_goes_to_the_agent(lab: Lab) -> None:
    async with agent(lab) as (channel, asked):
        await channel.ask("available", OFFER)
        run = lab.seneschal.enqueue(SUITE)
        await sent(asked)
        await lab.seneschal.cancel(run, "enough")
        cancel = (await sent(asked, 2))[1]
        assert (cancel.action, cancel.payload) == ("cancel", {"run": run, "reason": "enough"})
        with pytest.raises(ActionError, match="r-9 is not known here"):
            await lab.seneschal.cancel("r-9", "why")


async def test_a_lost_run_marks_its_reservation_and_its_successor_is_awaited(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    async with Lab(tmp_path, lease_s=20).up() as lab:
        async with agent(lab) as (channel, asked):
            await channel.ask("available", OFFER)
            run = lab.seneschal.enqueue(SUITE)
            await sent(asked)
            await channel.ask("accepted", {"seq": 1, "run": run, "reservation": "a/0/1"})
        await lab.until(lambda: lab.seneschal.runs()[0].state == "lost")
        (reservation,) = [row for row in await lab.mimir.rows() if row[1] == "Reservation"]
        assert '"state":"lost"' in reservation[3]
        async with agent(lab) as (channel, asked):
            await channel.ask("available", {**OFFER, "reservations": ["a/0/2"]})
            (order,) = await sent(asked)
            await channel.ask("complete", complete(2, order.payload["run"]))
            row = await lab.seneschal.ended(run)
            assert (row.replaces, row.state) == (run, "done")


async def test_a_full_disk_is_told_of_and_what_was_not_kept_is_kept_later(
    tmp_path: Path, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    mock_clock.rate = 1.0  # time jumps only while nobody is connected
    async with Lab(tmp_path).up() as lab:
        disk = lab.seneschal._disk._db
        async with agent(lab) as (channel, asked):
            disk.execute("PRAGMA max_page_count = 1")  # what SQLite sees of a full disk: it takes no page more
            lab.seneschal.enqueue({"id": "login", "title": 100_000 * "x"})
            full = "internal: this cannot be kept: database or disk is full"
            assert await refused(channel, "available", OFFER) == full
            assert not asked
        mock_clock.autojump_threshold = 0.001
        took = await until(lambda: caplog.text.count("the queue is not on the disk") >= 3)
        assert took >= 30  # and no line each second
        disk.execute("PRAGMA max_page_count = 1000000")
        await until(lab.seneschal._changed.is_set)
    async with Lab(tmp_path).up() as lab:
        assert [row.suite["id"] for row in lab.seneschal.runs()] == ["login"]


async def test_the_faults_send_twice_and_cut_after_the_deed(lab: Lab) -> None:
    lab.seneschal.faults.duplicate = True
    async with agent(lab) as (channel, asked):
        await channel.ask("available", OFFER)
        run = lab.seneschal.enqueue(SUITE)
        assert [order.payload["run"] for order in await sent(asked, 2)] == [run, run]
        lab.seneschal.faults.cut = 1
        with pytest.raises(PeerUnreachable):
            await channel.ask("accepted", {"seq": 1, "run": run, "reservation": "a/0/1"})
    assert lab.seneschal.runs()[0].state == "running"
