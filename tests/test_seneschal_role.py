"""The Seneschal link end to end: a real lab or a scripted peer on loopback, a real store, a stand-in for the suites."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from trio_websocket import WebSocketConnection

from agent.core import listen
from agent.core.channel import Channel, Refused, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.core.events import Alert, AlertCleared, Logged, Reloaded, RunRecalled
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial
from agent.core.listen import Route
from agent.core.metrics import Metrics
from agent.mimir.messages import Query
from agent.seneschal.messages import MAX_SUITE
from agent.seneschal.settings import SeneschalSettings
from tests.lab_links import PATIENCE_S, Agent, Lab, client, epoch, jump

SUITE = {"id": "login"}


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(tmp_path / "lab").up() as lab:
        yield lab


class Peer:
    """A Seneschal that does what a test says: records what it is asked, asks what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.registered: dict[str, Any] = {"last_seq": 0}
        self.refuse: set[str] = set()
        self._channels, self.connections = trio.open_memory_channel[Channel](10)
        self._came = trio.Event()
        self.address = "127.0.0.1:0"

    def dial(self, path: str) -> Dial:
        return Dial(url=f"ws://{self.address}/{path}")

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Peer"]:
        guard, routes = Guard([], {}, True, (), trio.current_time), [Route("/seneschal", websocket=self._serve)]
        async with trio.open_nursery() as nursery:
            (self.address,) = await nursery.start(
                partial(listen.serve, [self.address], routes, guard, metrics=Metrics())
            )
            yield self
            nursery.cancel_scope.cancel()

    async def _serve(self, head: Head, ws: WebSocketConnection) -> None:
        async def talk(channel: Channel) -> None:
            await self._channels.send(channel)
            await trio.sleep_forever()

        await converse(ws, self._answer, talk, metrics=Metrics())

    async def _answer(self, request: Request) -> dict[str, Any]:
        self.asked.append(request)
        came, self._came = self._came, trio.Event()
        came.set()
        if request.action == "register":
            return {"session": "s", "time": epoch() + 100, **self.registered}
        return {"time": epoch() + 100} if request.action == "update" else {}

    async def told(self, action: str, count: int = 1) -> list[dict[str, Any]]:
        """The payloads of an action, once so many came."""
        with trio.fail_after(PATIENCE_S):
            while len(got := [request.payload for request in self.asked if request.action == action]) < count:
                await self._came.wait()
        return got

    async def offer(self) -> str:
        """An offer that stands."""
        with trio.fail_after(PATIENCE_S):
            while not (offers := self._offers()):
                await self._came.wait()
        return offers[0]

    async def no_offer(self) -> None:
        """None stands any more."""
        with trio.fail_after(PATIENCE_S):
            while self._offers():
                await self._came.wait()

    def _offers(self) -> list[str]:
        told = [request.payload["reservations"] for request in self.asked if request.action == "available"]
        return told[-1] if told else []


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer().up() as peer:
        yield peer


def scripted(folder: Path, peer: Peer, **options: Any) -> Agent:
    return Agent(folder, peer, roles=("seneschal",), **options)


async def refused(channel: Channel, action: str, payload: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refusal:
        await channel.ask(action, payload)
    return refusal.value.reason


def ends(agent: Agent) -> list[str]:
    return [request["run"] for request in agent.suites.orders]


# ---- against the lab -----------------------------------------------------------------------------------------------


async def test_a_suite_comes_runs_and_its_end_is_told(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        run = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: run in agent.suites.active)
        await lab.until(lambda: lab.seneschal.runs()[0].state == "running")
        agent.suites.finish(run)
        row = await lab.seneschal.ended(run)
        assert row.complete is not None
        assert (row.complete.result, row.complete.verdict, row.complete.late) == ("SUCCESS", "passed", False)
        await agent.delivered()
        assert agent.link == {"seneschal": "ready", "mimir": "ready"}
        assert agent.alerts == {}
        again = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: again in agent.suites.active)
        await agent.delivered()
        states = [state for _, state in await reservations(lab)]
        assert states == ["returned", "running"]


async def reservations(lab: Lab) -> list[tuple[str, str]]:
    page = await lab.mimir.query(Query(label="Reservation"))
    return [(vertex["id"], vertex["props"].get("state")) for vertex in page["vertices"]]


POINTS = ["queued", "running", "finished"]


@pytest.mark.parametrize("point", POINTS)
async def test_a_seneschal_killed_at_any_point_has_each_run_end_once(
    tmp_path: Path, point: str, held_port: int, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    lab = Lab(tmp_path / "lab", port=held_port)
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        async with lab.up():
            if point != "queued":
                await agent.until(lambda: agent.link.get("seneschal") == "ready")
            run = lab.seneschal.enqueue(SUITE)
            if point != "queued":
                await agent.until(lambda: run in agent.suites.active)
            else:
                await lab.seneschal.changed()
        if point == "finished":
            agent.suites.finish(run)
        async with lab.up():
            if point != "finished":
                await agent.until(lambda: run in agent.suites.active)
                agent.suites.finish(run)
            with trio.fail_after(PATIENCE_S):
                row = await lab.seneschal.ended(run)
            assert (row.run, row.state, len(lab.seneschal.runs())) == (run, "done", 1)
            await agent.delivered()
        assert set(ends(agent)) == {run}
        assert len([event for event in agent.events if type(event).__name__ == "SuiteFinished"]) == 1


@pytest.mark.parametrize("point", ["running", "finished"])
async def test_an_agent_killed_at_any_point_has_each_run_end_once(
    tmp_path: Path, lab: Lab, point: str, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        run = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: run in agent.suites.active)
        if point == "finished":
            agent.suites.finish(run)
    async with agent.up():
        with trio.fail_after(PATIENCE_S):
            row = await lab.seneschal.ended(run)
        assert row.complete is not None
        assert (row.run, row.complete.result, row.complete.reason) == (
            (run, "SUCCESS", None) if point == "finished" else (run, "ABORTED", "interrupted")
        )
        await agent.delivered()
        assert [r.run for r in lab.seneschal.runs()] == [run]
        assert [state for _, state in await reservations(lab)][:1] == ["returned"]


async def test_cut_connections_lose_and_double_nothing(tmp_path: Path, lab: Lab, autojump_clock: MockClock) -> None:
    jump(autojump_clock)
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        for _ in range(3):
            run = lab.seneschal.enqueue(SUITE)
            await agent.until(lambda run=run: run in agent.suites.active)  # type: ignore[misc]  # bound in the loop
            lab.seneschal.faults.cut = 2
            agent.suites.finish(run)
            with trio.fail_after(PATIENCE_S):
                await lab.seneschal.ended(run)
        await agent.delivered()
        assert [row.state for row in lab.seneschal.runs()] == ["done"] * 3
        assert len(set(ends(agent))) == 3


async def test_a_run_that_is_sent_many_times_starts_once(tmp_path: Path, lab: Lab) -> None:
    lab.seneschal.faults.duplicate = True
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        run = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: run in agent.suites.active)
        agent.suites.finish(run)
        await lab.seneschal.ended(run)
        await agent.delivered()
        assert len(agent.suites.orders) == 1


async def test_a_lapsed_lease_is_lost_and_the_late_end_replaces_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    jump(autojump_clock)
    lab = Lab(tmp_path / "lab", lease_s=20)
    agent = Agent(tmp_path / "agent", lab)
    async with lab.up(), agent.up():
        run = lab.seneschal.enqueue(SUITE)
        await lab.until(lambda: lab.seneschal.runs()[0].state == "running")
        lab.seneschal.faults.silent = True  # heartbeats are not answered any more
        await lab.until(lambda: lab.seneschal.runs()[0].state == "lost")
        lab.seneschal.faults.silent = False
        agent.suites.finish(run)
        await lab.until(lambda: lab.seneschal.runs()[0].state == "done")
        row, successor = lab.seneschal.runs()
        assert row.complete is not None
        assert (row.complete.late, row.again) == (True, successor.run)


async def test_an_agent_aborts_on_a_lost_lease_where_the_settings_say_so(
    tmp_path: Path, held_port: int, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    lab = Lab(tmp_path / "lab", lease_s=20, port=held_port)
    agent = Agent(tmp_path / "agent", lab, settings=SeneschalSettings(on_lease_lost="abort"))
    async with agent.up():
        async with lab.up():
            run = lab.seneschal.enqueue(SUITE)
            await agent.until(lambda: run in agent.suites.active)
        await agent.until(lambda: agent.suites.cancelled)
        assert agent.suites.cancelled == [(run, "lease lost: the Seneschal was not heard of in time")]


async def test_a_silent_seneschal_is_noticed_and_come_back_to(
    tmp_path: Path, lab: Lab, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        await agent.until(lambda: agent.link.get("seneschal") == "ready")
        lab.seneschal.faults.silent = True
        since = trio.current_time()
        await agent.until(lambda: agent.link["seneschal"] == "offline")
        assert trio.current_time() - since < 20
        lab.seneschal.faults.silent = False
        await agent.until(lambda: agent.link["seneschal"] == "ready")


async def test_the_link_outlives_a_suites_role_that_fails(
    tmp_path: Path, peer: Peer, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    agent = scripted(tmp_path, peer)
    async with agent.up():
        await peer.offer()
        agent.suites.slots = "two"  # type: ignore[assignment]  # a bug of that role: each look at its runs raises
        await peer.no_offer()
        await agent.until(lambda: "action.runs" in agent.alerts)
        agent.suites.slots = 1
        await peer.offer()
        await agent.until(lambda: "action.runs" not in agent.alerts)
        assert len(await peer.told("register")) == 1


async def test_a_poisoned_message_is_held_and_the_next_ones_arrive(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        first = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: first in agent.suites.active)
        await agent.delivered()
        lab.seneschal.faults.refuse = f'"run":"{first}","result"'
        agent.suites.finish(first)
        await agent.until(lambda: "held.seneschal" in agent.alerts)
        second = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: second in agent.suites.active)
        agent.suites.finish(second)
        assert (await lab.seneschal.ended(second)).state == "done"
        await agent.delivered()
        assert (await agent.store.depths())["seneschal"].held == 1
        lab.seneschal.faults.refuse = ""
        agent.bus.publish(Reloaded())
        assert (await lab.seneschal.ended(first)).state == "done"
        await agent.until(lambda: not agent.alerts)
        codes = [event.code for event in agent.events if isinstance(event, Alert | AlertCleared)]
        assert codes == ["held.seneschal", "held.seneschal"]


async def test_two_agents_with_one_ident_are_an_alert(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("seneschal",))
    hello = {"ident": "lab-07", "server": "", "version": "1", "instance": "another", "slots": 1}
    async with client(lab, "seneschal") as (channel, _):
        await channel.ask("register", hello)
        async with agent.up():
            await agent.until(lambda: "link.seneschal" in agent.alerts)
            assert "ident_taken" in agent.alerts["link.seneschal"].text


# ---- against a script ----------------------------------------------------------------------------------------------


async def test_register_and_the_heartbeat_say_what_the_sheet_asks(
    tmp_path: Path, peer: Peer, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    agent = scripted(tmp_path, peer)
    async with agent.up():
        (hello,) = await peer.told("register")
        assert hello == {
            "ident": "lab-07", "server": "ws://127.0.0.1:13172/", "version": hello["version"],
            "instance": agent.store.instance, "slots": 1, "profile": {}, "labels": ["rhel9"], "runners": {}, "runs": [],
        }  # fmt: skip
        channel = await peer.connections.receive()
        await channel.ask("run", {"run": "r-1", "reservation": await peer.offer(), "suite": SUITE})
        await agent.until(lambda: "r-1" in agent.suites.active)
        began, beats = trio.current_time(), len(await peer.told("update"))
        update = (await peer.told("update", beats + 4))[-1]
        assert 15 <= trio.current_time() - began <= 21
        assert update["runs"] == [{"run": "r-1", "state": "running", "since": 1.0, "test": None}]
        assert {"sub_total", "sub_active", "sub_passed", "sub_failed", "msg_error", "own"} <= update["metrics"].keys()
        assert update["metrics"]["own"]["clock_skew"] == pytest.approx(100, abs=1)


async def test_an_order_is_on_disk_before_it_is_answered_and_decided_by_its_event(tmp_path: Path, peer: Peer) -> None:
    agent = scripted(tmp_path, peer)
    async with agent.up():
        channel, offer = await peer.connections.receive(), await peer.offer()
        agent.suites.decides = False
        deadline = epoch() + 1100
        order = {"run": "r-1", "reservation": offer, "suite": SUITE, "deadline": deadline, "lease": 50}
        assert await channel.ask("run", order) == {}
        assert [row.kind for row in await agent.store.read(run="r-1")] == ["RunReceived"]
        (payload,) = agent.suites.orders
        assert (payload["origin"], payload["reservation"], payload["suite"]) == ("seneschal", offer, SUITE)
        assert payload["deadline"] == pytest.approx(deadline - 100, abs=30)  # the peer's clock is 100 s ahead
        assert [request.action for request in peer.asked if request.action == "accepted"] == []
        agent.suites.decide([event for event in agent.events if type(event).__name__ == "RunReceived"][0])  # type: ignore[arg-type]  # noqa: RUF015
        (accepted,) = await peer.told("accepted")
        assert (accepted["run"], accepted["reservation"]) == ("r-1", offer)


async def test_an_order_on_a_stale_offer_is_refused_busy(tmp_path: Path, peer: Peer) -> None:
    async with scripted(tmp_path, peer).up() as agent:
        channel = await peer.connections.receive()
        await channel.ask("run", {"run": "r-1", "reservation": "lab-07/0/1", "suite": SUITE})
        (said,) = await peer.told("refused")
        assert (said["run"], said["reason"]) == ("r-1", "busy: lab-07/0/1 is not on offer")
        await channel.ask("run", {"run": "r-1", "reservation": "lab-07/0/1", "suite": SUITE})
        assert [again["reason"] for again in await peer.told("refused", 2)] == [said["reason"]] * 2
        assert agent.suites.orders == []


async def test_a_finished_run_that_is_ordered_again_gets_its_end_again(tmp_path: Path, peer: Peer) -> None:
    agent = scripted(tmp_path, peer)
    async with agent.up():
        channel = await peer.connections.receive()
        order = {"run": "r-1", "reservation": await peer.offer(), "suite": SUITE}
        await channel.ask("run", order)
        agent.suites.finish("r-1")
        (first,) = await peer.told("complete")
        await agent.delivered()
        await channel.ask("run", order)
        again = (await peer.told("complete", 2))[1]
        assert again["seq"] > first["seq"]
        assert {**again, "seq": 0} == {**first, "seq": 0}
        assert len(agent.suites.orders) == 1


async def test_what_only_the_seneschal_has_was_aborted_by_a_restart(tmp_path: Path, peer: Peer) -> None:
    peer.registered["runs"] = ["r-gone"]
    async with scripted(tmp_path, peer).up() as agent:
        (told,) = await peer.told("complete")
        assert (told["run"], told["result"], told["reason"]) == ("r-gone", "ABORTED", "unknown after restart")
        await agent.until(lambda: any(isinstance(event, RunRecalled) for event in agent.events))


async def test_what_was_heard_before_the_cut_is_not_told_again(
    tmp_path: Path, peer: Peer, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    agent = scripted(tmp_path, peer)
    async with agent.up():
        channel = await peer.connections.receive()
        await channel.ask("run", {"run": "r-1", "reservation": await peer.offer(), "suite": SUITE})
        (accepted,) = await peer.told("accepted")
    agent_two = scripted(tmp_path, peer)
    peer.registered["last_seq"] = accepted["seq"]
    peer.asked.clear()
    async with agent_two.up():
        (told,) = await peer.told("complete")
        assert (told["run"], told["reason"]) == ("r-1", "interrupted")
        assert told["seq"] > accepted["seq"]
        assert [request.action for request in peer.asked].count("accepted") == 0


async def test_a_machine_put_back_to_a_snapshot_is_heard(tmp_path: Path, peer: Peer) -> None:
    peer.registered["last_seq"] = 5000
    agent = scripted(tmp_path, peer)
    async with agent.up():
        channel = await peer.connections.receive()
        await channel.ask("run", {"run": "r-1", "reservation": await peer.offer(), "suite": SUITE})
        (accepted,) = await peer.told("accepted")
        assert accepted["seq"] > 5000


@pytest.mark.parametrize("registered", [{"last_seq": 2**48 + 1}, {"last_seq": -1}, {"heartbeat": 0.001}])
async def test_an_answer_to_register_that_no_seneschal_gives_ends_the_connection(
    tmp_path: Path, peer: Peer, registered: dict[str, float]
) -> None:
    peer.registered |= registered
    agent = scripted(tmp_path, peer)
    async with agent.up():
        for _ in range(2):
            await peer.connections.receive()
        assert {request.action for request in peer.asked} == {"register"}


async def test_runs_of_others_are_none_of_its_business(tmp_path: Path, peer: Peer) -> None:
    agent = scripted(tmp_path, peer)
    async with agent.up():
        channel, offer = await peer.connections.receive(), await peer.offer()
        await agent.suites.run_suite({"run": "mine", "suite": SUITE, "origin": "control"})
        assert (await refused(channel, "run", {"run": "mine", "reservation": offer, "suite": SUITE})) == (
            "bad_payload: key run: mine is known here, ordered by control"
        )
        agent.suites.finish("mine")
        await agent.delivered()
        assert not {"accepted", "refused", "complete"} & {request.action for request in peer.asked}


async def test_requests_that_cannot_be_carried_out_are_answered_with_their_reason(tmp_path: Path, peer: Peer) -> None:
    agent = scripted(tmp_path, peer)

    async def status(payload: dict[str, Any]) -> dict[str, Any]:
        return {"ident": "lab-07"}

    async def no(payload: dict[str, Any]) -> dict[str, Any]:
        raise ActionError("bad_payload", "key suite.id is missing")

    async with agent.up():
        channel, offer = await peer.connections.receive(), await peer.offer()
        assert await refused(channel, "run", {"run": "r-1"}) == "bad_payload: key reservation is missing"
        for run in ("../x", "r-1\n", ".r", "", "r" * 129, "é"):
            reason = await refused(channel, "run", {"run": run, "reservation": offer, "suite": SUITE})
            assert reason.startswith("bad_payload: key run: ")
        big = {"run": "r-1", "reservation": offer, "suite": {"id": "x" * MAX_SUITE}}
        assert (await refused(channel, "run", big)).startswith("too_big: a suite of")
        assert (await refused(channel, "dance", {})).startswith("unknown_action: 'dance'")
        assert await refused(channel, "cancel", {"run": "r-9", "reason": ""}) == (
            "no_such_run: r-9 is not running here"
        )
        assert (await refused(channel, "status", {})).startswith("unknown_action")
        with agent.bus.answer("status", status):
            assert await channel.ask("status", {}) == {"ident": "lab-07"}
        agent.suites.run_suite = no  # type: ignore[method-assign]  # what a role that refuses would do
        await channel.ask("run", {"run": "r-2", "reservation": offer, "suite": SUITE})
        await agent.until(lambda: "r-2" in agent.suites.active)
        await channel.ask("cancel", {"run": "r-2", "reason": "enough"})
        (told,) = await peer.told("complete")
        assert (told["result"], told["reason"], told["code"]) == ("ABORTED", "cancel: enough", 137)
        await channel.ask("run", {"run": "r-3", "reservation": await peer.offer(), "suite": SUITE})
        assert await channel.ask("stop", {}) == {}
        assert (await peer.told("complete", 2))[1]["reason"] == "stop"


async def test_a_draining_machine_takes_its_offers_back(tmp_path: Path, peer: Peer) -> None:
    agent = scripted(tmp_path, peer)
    async with agent.up():
        await peer.connections.receive()
        await peer.offer()
        agent.suites.draining = True
        agent.suites.tell_slots()
        await agent.until(lambda: any(getattr(event, "state", "") == "returned" for event in agent.events))
        await peer.no_offer()


async def test_clients_messages_are_passed_on_and_counted(
    tmp_path: Path, peer: Peer, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    agent = scripted(tmp_path, peer)
    async with agent.up():
        await peer.offer()
        agent.bus.publish(Logged(severity="ERROR", message="x" * 20_000, timestamp=5.0, run="r-1", test="t"))
        (entry,) = await peer.told("log")
        assert entry == {"message": "x" * 16384, "timestamp": 5.0, "severity": "ERROR", "run": "r-1", "test": "t"}
        assert [request.posted for request in peer.asked if request.action == "log"] == [True]
        beats = len(await peer.told("update"))
        metrics = (await peer.told("update", beats + 1))[-1]["metrics"]
        assert (metrics["msg_error"], metrics["msg_info"]) == (1, 0)


async def test_the_current_reservations_are_an_action(tmp_path: Path, peer: Peer) -> None:
    agent = scripted(tmp_path, peer)
    async with agent.up():
        channel, offer = await peer.connections.receive(), await peer.offer()
        await channel.ask("run", {"run": "r-1", "reservation": offer, "suite": SUITE})
        await peer.told("accepted")
        (reservation,) = (await agent.bus.ask("reservations", {}))["reservations"]
        assert (reservation["id"], reservation["state"], reservation["run"]) == (offer, "running", "r-1")
