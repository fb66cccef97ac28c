"""The Mimir link end to end: a real lab on loopback, a real store; nothing lost, nothing doubled."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from agent.core.events import (
    AlertCleared,
    ImportFinished,
    Recorded,
    Reloaded,
    RunChanged,
    RunStarted,
    TestStarted,
    decode,
)
from agent.core.store import Outbox
from agent.mimir.graph import Batch, is_told, tell
from agent.mimir.messages import MAX_UPSERT, MAX_VERTICES, Query, Vertex
from tests import lab_links
from tests.lab_links import PATIENCE_S, Agent, Lab, client, epoch, jump

SUITE = {"id": "login"}


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(tmp_path / "lab").up() as lab:
        yield lab


async def started(agent: Agent, run: str = "r-1", **suite: Any) -> str:
    """A run of this machine's own, and its id."""
    await agent.suites.run_suite({"run": run, "suite": {**SUITE, **suite}})
    return run


async def found(lab: Lab, label: Any, **where: Any) -> dict[str, dict[str, Any]]:
    page = await lab.mimir.query(Query(label=label, where=where, limit=1000))
    return {vertex["id"]: vertex["props"] for vertex in page["vertices"]}


async def test_a_run_of_1000_tests_has_1000_final_outcomes(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        run = await started(agent)
        for n in range(1000):
            agent.suites.test(run, f"test {n}")
            if n % 50 == 0:
                await trio.lowlevel.checkpoint()
        agent.suites.finish(run)
        await agent.delivered()
        assert await lab.mimir.outcomes(run) == {"PASSED": 1000}
        assert (await found(lab, "Run"))[run]["verdict"] == "passed"
        assert len(await found(lab, "TestCase")) == 1000
        (platform,) = (await found(lab, "TestPlatform")).values()
        assert platform["hostname"] == "host"
        requests = dict((name, value) for name, _, value in agent.metrics)["mimir_upserts_total"]
        assert requests < 300  # what gathers while a request is under way goes as one


async def test_a_test_that_hangs_is_pending_at_once(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up(), client(lab, "mimir") as (channel, asked):
        await agent.until(lambda: agent.link.get("mimir") == "ready")
        await channel.ask("register", {"ident": "reader"})
        await channel.ask("live", {"label": "TestOutcome", "where": {"result": "PENDING"}})
        run = await started(agent)
        agent.bus.publish(TestStarted(run=run, suite="login", case="hangs", name="hangs", file="f", started=epoch()))
        began = trio.current_time()
        with trio.fail_after(PATIENCE_S):
            while not asked:
                await trio.lowlevel.checkpoint()
        assert trio.current_time() - began < 10  # no timer of ours is shorter
        assert asked[0].payload["id"] == "r-1:hangs"


async def test_nothing_is_lost_while_mimir_is_down_and_nothing_doubled_by_lost_answers(
    tmp_path: Path, held_port: int, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    lab = Lab(tmp_path / "lab", port=held_port)
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        run = await started(agent)
        agent.suites.test(run, "while it was down")
        async with lab.up():
            lab.mimir.faults.cut = 3
            await agent.delivered()
            agent.suites.test(run, "while it was up")
        agent.suites.finish(run)
        async with lab.up():
            await agent.delivered()
            assert set(await found(lab, "TestOutcome", result="PASSED")) == {
                "r-1:while it was down",
                "r-1:while it was up",
            }
            assert (await found(lab, "Run"))[run]["state"] == "done"


async def test_what_was_owed_when_the_agent_was_killed_arrives(tmp_path: Path, lab: Lab) -> None:
    lab.mimir.faults.silent = True
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        run = await started(agent)
        agent.suites.test(run, "a")
        await agent.store.commit()
    lab.mimir.faults.silent = False
    async with agent.up():
        await agent.delivered()
        assert await lab.mimir.outcomes(run) == {"PASSED": 1}
        assert (await found(lab, "Run"))[run]["verdict"] == "aborted"


async def test_replaying_all_messages_changes_no_row_and_none_is_refused(tmp_path: Path, lab: Lab) -> None:
    sent: list[dict[str, Any]] = []
    agent = Agent(tmp_path / "agent", lab)
    async with agent.up():
        run = lab.seneschal.enqueue(SUITE)
        await agent.until(lambda: run in agent.suites.active)
        for n in range(3):
            agent.suites.test(run, f"t{n}", tells_start=n != 1)
        agent.suites.finish(run)
        await lab.seneschal.ended(run)
        await agent.delivered()
        journal = await agent.store.read(limit=1000)
    async with client(lab, "mimir") as (channel, _):
        # As another instance: nothing is skipped because its number was heard already.
        await channel.ask("register", {"ident": "lab-07", "instance": "replay", "version": "1"})
        before = await lab.mimir.rows()
        sent = upserts(journal)
        assert len(sent) > 10
        for payload in sent:
            assert await channel.ask("upsert", payload) == {"changed": 0}
        assert await lab.mimir.rows() == before


def upserts(journal: list[Recorded]) -> list[dict[str, Any]]:
    """Every upsert that the journal's events mean, one an event."""
    payloads, started = [], None
    for row in journal:
        event = decode(row.kind, row.data)
        started = event if isinstance(event, RunStarted) else started
        batch = Batch()
        platform = {"hostname": "host", "os": "os"}
        if is_told(event) and batch.take(row.seq, tell(event, "lab-07", platform, started)) and batch:
            payloads.append(batch.payload())
    return payloads


async def test_a_poisoned_message_is_held_alone_and_the_next_ones_arrive(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        await agent.until(lambda: agent.link.get("mimir") == "ready")
        lab.mimir.faults.refuse = "poison"
        run = await started(agent)
        for n in range(9):
            agent.suites.test(run, "poison" if n == 4 else f"good {n}")
        await agent.until(lambda: "held.mimir" in agent.alerts)
        await agent.delivered()
        assert await lab.mimir.outcomes(run) == {"PASSED": 8}
        held = await Outbox(agent.store, "mimir").held()
        assert [reason for _, _, reason in held] == ["bad_payload: told to refuse what holds 'poison'"] * 2
        lab.mimir.faults.refuse = ""
        agent.bus.publish(Reloaded())
        await agent.until(lambda: any(isinstance(event, AlertCleared) for event in agent.events))
        assert await lab.mimir.outcomes(run) == {"PASSED": 9}


async def test_a_run_whose_suite_says_so_is_not_told_even_after_a_restart(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        run = await started(agent, to_mimir=False)
        agent.suites.test(run, "secret")
        await agent.delivered()
    async with agent.up():
        agent.bus.publish(ImportFinished(run=run, mode="polarion", outcome="passed"))
        await agent.delivered()
    assert await found(lab, "Run") == {}
    assert await found(lab, "TestOutcome") == {}


async def test_what_is_told_of_a_resumed_run_is_newer_than_what_was_told_before(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        run = await started(agent)
        agent.bus.publish(RunChanged(run=run, state="stopping"))
        agent.suites.decide(agent.suites.active.pop(run), attempt=2)
        agent.bus.publish(RunChanged(run=run, state="running"))
        await agent.delivered()
        assert (await found(lab, "Run"))[run]["state"] == "running"
    async with agent.up():
        await agent.delivered()
        assert (await found(lab, "Run"))[run]["verdict"] == "aborted"


async def test_each_upsert_keeps_the_bounds(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert, sizes = lab.mimir._upsert, []

    async def measured(payload: Any, writer: Any) -> int:
        size = sum(len(msgspec.json.encode(part)) for part in (*payload.vertices, *payload.edges))
        sizes.append((len(payload.vertices), size))
        return await upsert(payload, writer)

    monkeypatch.setattr(lab.mimir, "_upsert", measured)
    lab.mimir.faults.late_s = 0.05
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        run = await started(agent)
        for n in range(150):
            agent.suites.test(run, f"{n}" + "x" * 900)
        await agent.delivered()
    assert max(count for count, _ in sizes) <= MAX_VERTICES
    assert MAX_UPSERT / 2 < max(size for _, size in sizes) <= MAX_UPSERT


async def test_platform_and_reservations_are_renewed_and_lapse_without(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    jump(autojump_clock)
    async with Lab(tmp_path / "lab").up() as lab:
        agent = Agent(tmp_path / "agent", lab)
        async with agent.up():
            await agent.until(lambda: set(agent.link.values()) == {"ready"})
            began = epoch()
            await trio.sleep(100)
            ((offer, props),) = (await found(lab, "Reservation")).items()
            assert props["state"] == "available"
            assert props["lease_until"] > began + 140
            assert (await found(lab, "TestPlatform"))["lab-07"]["seen"] > began + 80
        await trio.sleep(70)
        assert (await found(lab, "Reservation"))[offer]["state"] == "lost"
        async with agent.up():
            await agent.until(lambda: set(agent.link.values()) == {"ready"})
            await agent.delivered()
            returned = (await found(lab, "Reservation"))[offer]
            assert returned["state"] == "returned"
            assert returned["recovered_at"] >= returned["lost_at"]


@pytest.mark.parametrize(("whose", "step_s"), [("agent", -86_400), ("lab", 86_400)])
async def test_no_reservation_lapses_because_a_date_is_set(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, whose: str, step_s: float
) -> None:
    jump(autojump_clock)
    dates = {"agent": 0.0, "lab": 0.0}
    monkeypatch.setattr(lab_links, "epoch", lambda: epoch() + dates["lab"])
    async with Lab(tmp_path / "lab").up() as lab:
        monkeypatch.setattr(lab_links, "epoch", lambda: epoch() + dates["agent"])
        agent = Agent(tmp_path / "agent", lab)
        async with agent.up():
            await agent.until(lambda: set(agent.link.values()) == {"ready"})
            await agent.delivered()
            dates[whose] += step_s
            await trio.sleep(100)
            assert [props["state"] for props in (await found(lab, "Reservation")).values()] == ["available"]
            assert set(agent.link.values()) == {"ready"}


async def test_a_machine_comes_back_after_mimir_was_away_for_long(tmp_path: Path, autojump_clock: MockClock) -> None:
    jump(autojump_clock)
    async with Lab(tmp_path / "lab").up() as lab:
        agent = Agent(tmp_path / "agent", lab, slots=2)
        async with agent.up():
            run = lab.seneschal.enqueue(SUITE)
            await agent.until(lambda: run in agent.suites.active)
            await agent.delivered()
            lab.mimir.faults.silent = True
            await trio.sleep(120)
            assert set(map(str, [p["state"] for p in (await found(lab, "Reservation")).values()])) == {"lost"}
            lab.mimir.faults.silent = False
            await agent.until(lambda: agent.link["mimir"] == "ready")
            await trio.sleep(2)
            await agent.delivered()
            states = sorted(props["state"] for props in (await found(lab, "Reservation")).values())
            assert states == ["available", "returned", "running"]
            assert agent.alerts == {}


async def test_a_mimir_that_lost_its_data_is_told_of_the_machine_again(
    tmp_path: Path, held_port: int, autojump_clock: MockClock
) -> None:
    async def entitlement(payload: dict[str, Any]) -> dict[str, Any]:
        return {"name": "valid", "source": "certificates"}

    jump(autojump_clock)
    lab = Lab(tmp_path / "lab", port=held_port)
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        with agent.bus.answer("entitlement", entitlement):
            async with lab.up():
                await agent.until(lambda: agent.link.get("mimir") == "ready")
                await agent.delivered()
            await agent.until(lambda: agent.link["mimir"] != "ready")
            shutil.rmtree(tmp_path / "lab")
            async with lab.up():
                with trio.fail_after(PATIENCE_S):
                    while not (known := await found(lab, "TestPlatform")):  # noqa: ASYNC110  # it tells nobody
                        await trio.sleep(1)
    told = {"hostname": "host", "os": "os", "entitlement": "valid"}
    assert known["lab-07"] == {**told, "seen": known["lab-07"]["seen"]}


async def test_the_peer_may_not_ask_anything(tmp_path: Path, lab: Lab) -> None:
    agent = Agent(tmp_path / "agent", lab, roles=("mimir",))
    async with agent.up():
        await agent.until(lambda: agent.link.get("mimir") == "ready")
        await lab.mimir.write(Vertex(id="r-9", label="Run"))
        await agent.delivered()
        assert agent.alerts == {}
