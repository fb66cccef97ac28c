"""Our layer below parents of every make: the forms it tells them, and what it does when they fail."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.errors import ActionError, PeerBrokeProtocol, PeerRefused, PeerUnreachable, unwrap
from agent.gator import role
from agent.gator.layer import Options
from agent.gator.role import Command
from agent.gator.settings import GatorSettings
from agent.gator.summary import job_summary
from agent.gator.uplink import Uplink
from tests.gator_tree import WITHIN_S, Parent, shared_of, until

pytestmark = pytest.mark.usefixtures("own_mark")

D2_PARENT = {"path": ["root_group"], "root": 0, "uidx": 2}
OURS = {**D2_PARENT, "emissary": {"version": "1.0", "resume": True}}


def spec_of(command: str, *args: str, named: str = "ident") -> dict[str, Any]:
    return {"spec": f"!Job\n{named}: j\ncommand: {command}\nargs: [{', '.join(args)}]\nexpected_jobs: 1\n"}


class Running:
    """A child of a parent, and how it ended."""

    code: int | None = None


@asynccontextmanager
async def child_of(parent: Parent, folder: Path, *, interval_s: float = 5.0, **settings: Any) -> AsyncIterator[Running]:
    """Our layer "j" below that parent; it must have ended by the end of the block."""
    running = Running()
    command = Command(
        options=Options(quiet=False, interval_s=interval_s), idents=("j",), parent=parent.address, tracking=(folder,)
    )

    async def run() -> None:
        running.code = await role.run(command, GatorSettings(**settings))

    with trio.fail_after(2 * WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield running


@pytest.mark.parametrize(
    ("answer", "named", "forms"),
    [
        ({}, "id", "d0"),
        ({}, "ident", "d1"),
        (D2_PARENT, "ident", "d2"),
        (OURS, "ident", "d2"),
    ],
)
async def test_each_parent_is_told_in_its_dialect(tmp_path: Path, answer: Any, named: str, forms: str) -> None:
    parent = Parent({"spec": spec_of("sh", "-c", '"echo one; exit 3"', named=named), "register": answer})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path) as child:
            pass
        nursery.cancel_scope.cancel()
    assert child.code == 1
    asked = [name for name, _ in parent.requests]
    assert asked[:2] == ["spec", "register"]
    assert asked[-1] == "complete"
    assert asked.count("complete") == asked.count("register") == 1
    registered = (await parent.heard("register"))["server"]
    assert registered.startswith("127.0.0.1:")
    complete = await parent.heard("complete")
    assert complete["ident"] == complete["id"] == "j"
    assert complete["code"] == 3
    if forms == "d2":
        assert complete["result"] == 2
        assert sorted(complete["summary"]["failed_ids"]) == [["j"]]
        assert complete["summary"]["metrics"]["sub_failed"] == 1
    else:
        assert (complete["result"], complete["sub_failed"], complete["failed_ids"]) == ("FAILURE", 1, [["j"]])
        assert ("sub_failed" in complete["metrics"]) == (forms == "d1")
    last = [payload for name, payload in parent.requests if name == "update"][-1]
    assert (last["result"] == 2) if forms == "d2" else last["sub_active"] == 0
    assert (await parent.heard("log"))["message"] == "one"


async def test_who_waits_for_its_disk_is_not_silent(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("true"), "register": OURS})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        uplink = Uplink("j", parent.address, shared_of(options=Options(interval_s=0.05)))
        nursery.start_soon(uplink.run)
        await uplink.fetch_spec()
        await uplink.register("127.0.0.1:1")
        uplink.update(job_summary("j", {"n": 1}, passed=None), "UNKNOWN")
        assert await parent.heard("update", 3) == await parent.heard("update")
        nursery.cancel_scope.cancel()


async def test_a_forced_dialect_is_spoken_to_any_parent(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("true"), "register": {}})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path, dialect="d2"):
            pass
        nursery.cancel_scope.cancel()
    assert (await parent.heard("complete"))["result"] == 1


async def test_a_foreign_parent_whose_line_is_cut_is_not_registered_with_again(tmp_path: Path) -> None:
    (tmp_path / "wait").write_text("")
    script = f'"while [ -e {tmp_path}/wait ]; do sleep 0.02; done"'
    parent = Parent({"spec": spec_of("sh", "-c", script), "register": D2_PARENT})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path / "j") as child:
            await parent.heard("update")
            assert parent.channel is not None
            await parent.channel.close(1001)
            (tmp_path / "wait").unlink()
            await parent.heard("complete")
        nursery.cancel_scope.cancel()
    assert child.code == 0
    assert parent.connections == 2
    assert [name for name, _ in parent.requests].count("register") == 1
    assert [name for name, _ in parent.requests].count("complete") == 1


async def test_a_completion_whose_answer_was_lost_is_not_told_twice_to_a_foreign_parent(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("true"), "register": {}})
    done = {"state": "COMPLETE", "result": "SUCCESS", "server": "", "metrics": {}, "exitcode": 0, "started": 1,
            "updated": 1, "completed": 1}  # fmt: skip

    async def lose_the_answer(payload: dict[str, Any]) -> dict[str, Any]:
        assert parent.channel is not None
        await parent.channel.close(1001)
        return {}

    parent.answers |= {
        "complete": lose_the_answer,
        "children": {"launched": {}, "pending": {}, "completed": {"j": done}},
    }
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path) as child:
            pass
        nursery.cancel_scope.cancel()
    assert child.code == 0
    assert parent.actions()[-2:] == ["complete", "children"]  # an update behind the end would fail a real tier


async def test_a_parent_of_ours_is_resumed_and_told_the_end_again(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("true"), "register": OURS})
    lost = 0

    async def lose_one_answer(payload: dict[str, Any]) -> dict[str, Any]:
        nonlocal lost
        lost += 1
        if lost == 1:
            assert parent.channel is not None
            await parent.channel.close(1001)
        return {}

    parent.answers["complete"] = lose_one_answer
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path) as child:
            pass
        nursery.cancel_scope.cancel()
    assert child.code == 0
    first, second = await parent.heard("register", 1), await parent.heard("register", 2)
    assert "resume" not in first
    assert second["resume"] is True
    assert await parent.heard("complete", 1) == await parent.heard("complete", 2)


async def test_a_parent_that_is_gone_for_good_ends_in_3_with_the_job_done(tmp_path: Path) -> None:
    script = f'"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo done > {tmp_path}/done"'
    parent = Parent({"spec": spec_of("sh", "-c", script), "register": OURS})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path / "j", resume_wait_s=0.5) as child:
            await parent.heard("update")
            parent.server.cancel()
            (tmp_path / "go").touch()
        nursery.cancel_scope.cancel()
    assert child.code == 3
    assert (tmp_path / "done").exists()


async def test_who_is_stopped_waits_for_no_parent_that_is_gone(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("sleep", "600"), "register": OURS})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path / "j") as child:  # which would wait 600 s for it
            await parent.heard("update")
            parent.server.cancel()
            signal.raise_signal(signal.SIGTERM)
        nursery.cancel_scope.cancel()
    assert child.code == 3


async def test_a_parent_that_is_not_there_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.gator.uplink.FIRST_S", 0.5)
    parent = Parent({})
    parent.address = "127.0.0.1:9"  # discard: nobody listens
    with pytest.raises(BaseExceptionGroup) as failed:
        async with child_of(parent, tmp_path):
            pass
    assert isinstance(unwrap(failed.value), PeerUnreachable)
    assert "127.0.0.1:9 was not to be reached: 127.0.0.1:9 cannot be reached: Connection refused." in str(
        unwrap(failed.value)
    )


async def failure_below(parent: Parent, folder: Path) -> BaseException:
    """What ends a child of that parent."""
    with pytest.raises(BaseExceptionGroup) as failed:  # noqa: PT012 - the nursery's end raises
        async with trio.open_nursery() as nursery:
            await nursery.start(parent.run)
            async with child_of(parent, folder):
                pass
    return unwrap(failed.value)


async def test_a_parent_that_lets_us_not_in_is_not_waited_for(tmp_path: Path) -> None:
    parent = Parent({}, lets_in=False)
    failed = await failure_below(parent, tmp_path)
    assert isinstance(failed, PeerRefused)  # and not PeerUnreachable, half a minute later
    assert "answered 401 instead of opening a websocket" in str(failed)


async def test_a_parent_that_never_answers_the_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(payload: dict[str, Any]) -> dict[str, Any]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr("agent.gator.uplink.ASK_S", 0.2)
    parent = Parent({"spec": spec_of("true"), "register": OURS, "complete": deaf})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path / "j", resume_wait_s=0.5) as child:
            await parent.heard("complete")
        nursery.cancel_scope.cancel()
    assert child.code == 3


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"spec": {}}, "answered spec without one"),
        ({"spec": {"spec": 5}}, "answered spec without one"),
        ({"spec": {"spec": "!Job {ident: j}"}}, "the spec of j:1: j: column 1: command is missing"),
        ({"spec": ActionError("", "Bad child ID j")}, "refused spec: Bad child ID j"),
        ({"spec": spec_of("true"), "register": {"uidx": "one"}}, "answered register: path or uidx"),
        ({"spec": spec_of("true"), "register": ActionError("", "no")}, "refused register: no"),
    ],
)
async def test_a_parent_that_answers_rubbish_is_told_by_name(tmp_path: Path, answers: Any, said: str) -> None:
    parent = Parent(answers)

    failed = await failure_below(parent, tmp_path)
    assert said in str(failed)
    assert not isinstance(failed, PeerBrokeProtocol) or "version" in str(failed)


async def test_an_update_that_is_refused_does_not_end_the_job(tmp_path: Path) -> None:
    refuse = ActionError("", "Update received for child 'j' before start")
    parent = Parent({"spec": spec_of("true"), "register": D2_PARENT, "update": refuse, "complete": refuse})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path) as child:
            pass
        nursery.cancel_scope.cancel()
    assert child.code == 0


async def test_a_parent_may_take_longer_than_an_interval_to_hear_the_end(tmp_path: Path) -> None:
    async def complete(payload: dict[str, Any]) -> dict[str, Any]:
        await trio.sleep(0.5)  # some intervals
        return {}

    parent = Parent({"spec": spec_of("sleep", "0.7"), "register": OURS, "complete": complete})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path, interval_s=0.1) as child:
            pass
        nursery.cancel_scope.cancel()
    assert child.code == 0


async def test_a_parent_stops_us_and_looks_into_us_on_our_connection(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("sleep", "600"), "register": D2_PARENT})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path) as child:
            await parent.heard("update")
            channel = parent.channel
            assert channel is not None
            assert (await channel.ask("", {}))["tool"] == "gator"
            assert await channel.ask("get_tree", {}) == {"j": "STARTED"}
            assert (await channel.ask("resolve", {"root_path": [], "depth": 1}))["uidx"] == 2
            for action in ("update_scheduler_opts", "paint"):
                payload = {"options": {"concurrency": 1}}
                with pytest.raises(BaseException, match=f"Unknown action '{action}'"):
                    await channel.ask(action, payload)
            assert await channel.ask("stop", {}) == {}
        nursery.cancel_scope.cancel()
    assert child.code == 1
    assert (await parent.heard("complete"))["code"] == 255


async def test_who_was_given_up_stops_its_job(tmp_path: Path) -> None:
    parent = Parent({"spec": spec_of("sleep", "600"), "register": OURS})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        async with child_of(parent, tmp_path, interval_s=0.2) as child:
            await parent.heard("update", 2)
            parent.answers["update"] = ActionError("", "superseded: another connection has registered for this child")
        nursery.cancel_scope.cancel()
    assert child.code == 1


async def test_what_gathered_for_a_parent_goes_in_messages_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.uplink.MAX_OUTPUT", 20 * 2**20)
    parent = Parent({"spec": spec_of("true"), "register": OURS})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        uplink = Uplink("j", parent.address, shared_of(options=Options(interval_s=0.05)))
        nursery.start_soon(uplink.run)
        await uplink.register("h:1")
        for number in range(200):  # 40 MiB, and a message takes 16
            uplink.tell({"event": "output", "ident": f"x_{number}", "text": "x" * 200 * 1024})
        uplink.tell({"event": "end", "ident": "x_199"})
        uplink.update(job_summary("j", {}, passed=None), "UNKNOWN")

        def events() -> list[dict[str, Any]]:
            told = [payload["emissary"] for name, payload in parent.requests if name == "update"]
            return [event for each in told for event in each.get("events", [])]

        await until(lambda: bool(events()) and events()[-1]["event"] == "end")
        nursery.cancel_scope.cancel()
    assert parent.connections == 1
    outputs = [event["ident"] for event in events() if event["event"] == "output"]
    assert outputs == [f"x_{number}" for number in range(len(outputs))]
    assert 100 < len(outputs) < 200  # the rest is in the jobs' folders only


async def test_messages_that_are_too_many_for_a_parent_that_is_away_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.uplink.MAX_LOGS", 5)
    parent = Parent({"spec": spec_of("true"), "register": OURS})
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        uplink = Uplink("j", parent.address, shared_of())
        for number in range(12):
            uplink.log("INFO", f"message {number}", 1.0)
        nursery.start_soon(uplink.run)
        await uplink.register("h:1")
        await parent.heard("log", 6)
        nursery.cancel_scope.cancel()
    first, *rest = [payload["message"] for name, payload in parent.requests if name == "log"]
    assert first == "7 messages of 'j' were too many to be told here; its own files have them"
    assert rest == [f"message {number}" for number in range(7, 12)]


async def test_a_tier_below_takes_slots_and_tells_its_jobs(tmp_path: Path) -> None:
    text = '!JobArray {ident: j, repeats: 3, jobs: [!Job {ident: x, command: sh, args: [-c, "read x < wait"]}]}'
    text = text.replace("jobs:", f'cwd: "{tmp_path}", jobs:')
    parent = Parent({"spec": {"spec": text}, "register": OURS})
    os.mkfifo(tmp_path / "wait")
    options = Options(interval_s=0.2, sched_args=(("concurrency", "1"),))
    async with trio.open_nursery() as nursery:
        await nursery.start(parent.run)
        codes: list[int] = []

        async def run() -> None:
            told = Command(options=options, idents=("j",), parent=parent.address, tracking=(tmp_path / "j",))
            codes.append(await role.run(told, GatorSettings()))

        nursery.start_soon(run)
        await parent.heard("update", 2)
        assert parent.channel is not None
        assert await parent.channel.ask("update_scheduler_opts", {"options": {"concurrency": 9}}) == {"concurrency": 2}

        def running() -> int:
            updates = [payload for name, payload in parent.requests if name == "update"]
            return len(updates[-1]["summary"]["running_ids"])

        await until(lambda: running() == 3)
        await parent.channel.ask("stop", {})
        complete = await parent.heard("complete")
        assert sorted(complete["summary"]["failed_ids"]) == [["j", f"x_{n}"] for n in range(3)]
        await until(lambda: bool(codes))
        nursery.cancel_scope.cancel()
    events = [
        event
        for name, payload in parent.requests
        if name == "update"
        for event in payload.get("emissary", {}).get("events", [])
    ]
    assert sorted(event["ident"] for event in events if event["event"] == "end") == ["x_0", "x_1", "x_2"]
    assert codes == [1]
