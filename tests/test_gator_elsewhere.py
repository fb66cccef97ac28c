"""Children that connect to a tier's port: the seed's frames, three dialects, and what goes wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.channel import Channel, Refused
from agent.core.envelope import MAX_MESSAGE
from agent.core.link import Dial, connect
from agent.gator.elsewhere import set_aside
from agent.gator.layer import Options
from agent.gator.messages import MAX_MESSAGE_IN
from agent.gator.pool import Pool
from agent.gator.settings import GatorSettings
from agent.gator.summary import Sums
from tests.gator_tree import dialled, shared_of, tier_of, until

ONE = '!JobGroup {ident: root_group, jobs: [!Job {ident: child_job_a, command: "true"}]}'
TWO = '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "true"}, !Job {ident: b, command: "true"}]}'
METRICS = {"msg_debug": 0, "msg_info": 1, "msg_warning": 0, "msg_error": 0, "msg_critical": 0}
D1_END = {"result": "SUCCESS", "code": 0, "metrics": METRICS, "sub_total": 1, "sub_passed": 1, "sub_failed": 0}


def d2(ident: str, *, active: int = 0, passed: int = 1) -> dict[str, Any]:
    metrics = {**METRICS, "sub_total": 1, "sub_active": active, "sub_passed": passed, "sub_failed": 1 - active - passed}
    failed = [] if active or passed else [[ident]]
    return {"ident": ident, "summary": {"metrics": metrics, "failed_ids": failed, "running_ids": []}, "result": 1}


async def test_the_seeds_frames_as_printed_get_the_seeds_answers(tmp_path: Path) -> None:
    async with tier_of(ONE, tmp_path) as (tier, hands, above):
        await hands.started("child_job_a")
        async with connect(Dial(url=f"ws://{above.address}/")) as ws:

            async def ask(action: str, payload: str, *, posted: str = "false") -> Any:
                frame = f'{{"action" : "{action}", "req_id" : 1, "posted" : {posted}, "payload": {payload}}}'
                await ws.send_message(frame)
                return json.loads(await ws.get_message())

            spec = await ask("spec", '{"ident": "child_job_a"}')
            assert (spec["action"], spec["rsp_id"], spec["result"]) == ("spec", 1, "success")
            assert spec["payload"]["spec"].startswith('!Job\nident: "child_job_a"\n')
            answer = await ask("register", '{"ident" : "child_job_a", "server": "192.168.0.65:54241"}')
            assert answer["payload"]["path"] == ["root_group"]
            assert (answer["payload"]["uidx"], answer["payload"]["root"]) == (1, 0)
            metrics = '{"sub_total": 1, "sub_active": 1, "msg_info": 5, "lint_warnings": 123}'
            update = f'{{"ident": "child_job_a", "metrics": {metrics}}}'
            assert await ask("update", update) == {"action": "update", "rsp_id": 1, "result": "success", "payload": {}}
            children = await ask("children", "{}")
            child = children["payload"]["child_job_a"]
            assert (child["state"], child["result"], child["server"]) == ("STARTED", "UNKNOWN", "192.168.0.65:54241")
            assert child["metrics"] == {"msg_info": 5, "lint_warnings": 123}
            tier._journal.say("INFO", "the only one")  # D1 wants it by its uid, D2 what comes behind that
            told = await ask("get_messages", '{"after": 1}')
            assert [row["message"] for row in told["payload"]["messages"]] == ["the only one"]
            assert await ask("get_tree", "{}") == {
                "action": "get_tree",
                "rsp_id": 1,
                "result": "success",
                "payload": {"root_group": {"child_job_a": "STARTED"}},
            }
            assert await ask("paint", "{}") == {"result": "error", "rsp_id": 1, "reason": "Unknown action 'paint'"}
            await ws.send_message('{"action": "log", "posted": true, "payload": {"message": "posted, so no answer"}}')
            await ws.send_message("not JSON")
            bad = json.loads(await ws.get_message())
            assert (bad["result"], bad["rsp_id"]) == ("error", None)
            complete = json.dumps({"ident": "child_job_a", **D1_END})
            assert (await ask("complete", complete))["result"] == "success"
        hands.ended["child_job_a"].set()
    assert above.end is not None
    assert (above.end[0].jobs, above.end[1]) == (Sums(1, 0, 1, 0), "SUCCESS")


async def test_a_connection_is_of_one_child(tmp_path: Path) -> None:
    async with tier_of(TWO, tmp_path) as (tier, hands, above):
        for ident in ("a", "b"):
            await hands.started(ident)
        async with dialled(above.address) as child:
            await child.ask("register", {"ident": "a", "server": "h:1"})
            with pytest.raises(Refused, match="Bad child ID b: this connection is that of 'a'"):
                await child.ask("register", {"ident": "b", "server": "h:1"})
        await until(lambda: tier.tree.kids["a"].gone_since is not None)  # it may come back, by another
        for ident in ("a", "b"):
            async with dialled(above.address) as child:
                if ident == "b":
                    await child.ask("register", {"ident": "b", "server": "h:1"})
                await child.ask("complete", {"ident": ident, **D1_END})
            hands.ended[ident].set()
    assert above.end is not None
    assert above.end[1] == "SUCCESS"


async def test_children_of_all_dialects_complete_under_one_tier(tmp_path: Path) -> None:
    text = """\
!JobGroup
ident: g
jobs:
  - !Job { ident: oldest, command: "true", timeout: 9 }
  - !Job { ident: seeds, command: "true", timeout: 9 }
  - !Job { ident: main, command: "true", timeout: 9 }
  - !Job { ident: ours, command: "true", timeout: 9 }
"""
    async with tier_of(text, tmp_path) as (_, hands, above):
        for ident in ("oldest", "seeds", "main", "ours"):
            order = await hands.started(ident)
            assert order.flags()[:2] == ("--id", ident)
        async with dialled(above.address) as child:
            spec = await child.ask("spec", {"id": "oldest"})
            assert spec["spec"].startswith('!Job\nid: "oldest"\n')
            await child.ask("register", {"id": "oldest", "server": "h:1"})
            await child.ask("complete", {"id": "oldest", **D1_END})
        async with dialled(above.address) as child:
            assert "timeout" not in (await child.ask("spec", {"ident": "seeds"}))["spec"]
            await child.ask("register", {"ident": "seeds", "server": "h:1"})
            assert "seeds" in await child.ask("children", {})
            await child.ask("complete", {"ident": "seeds", **D1_END})
        async with dialled(above.address) as child:
            await child.ask("register", {"ident": "main", "server": "h:1"})
            await child.ask("update", d2("main", active=1, passed=0))
            assert (await child.ask("children", {}))["children"][2]["ident"] == "main"  # in its own form
            await child.ask("complete", {**d2("main"), "code": 0})
        async with dialled(above.address) as child:
            ours = {"ident": "ours", "emissary": {"version": "1"}}
            assert "timeout: 9" in (await child.ask("spec", ours))["spec"]
            await child.ask("register", {**ours, "server": "h:1"})
            await child.ask("complete", {**d2("ours", passed=0), "result": 2, "code": 1})
        for ended in hands.ended.values():
            ended.set()
    assert above.end is not None
    assert above.end[0].jobs == Sums(4, 0, 3, 1)
    assert above.end[0].failed == (("g", "ours"),)


async def started(channel: Channel, ident: str) -> None:
    await channel.ask("register", {"ident": ident, "server": "h:1"})


async def test_a_spec_of_more_than_a_mebibyte_goes_to_ours_only(tmp_path: Path) -> None:
    text = f'!JobGroup {{ident: g, jobs: [!Job {{ident: a, command: echo, args: ["{"x" * 2 * MAX_MESSAGE}"]}}]}}'
    async with tier_of(text, tmp_path) as (_, hands, above):
        await hands.started("a")
        async with dialled(above.address) as child:
            with pytest.raises(Refused, match="too_big: the answer has 2097"):
                await child.ask("spec", {"ident": "a"})  # who is foreign takes no more, and would hang up
        async with dialled(above.address, max_message=MAX_MESSAGE_IN) as child:
            spec = await child.ask("spec", {"ident": "a", "emissary": {}})
            assert len(spec["spec"]) > 2 * MAX_MESSAGE
            await child.ask("register", {"ident": "a", "server": "h:1", "emissary": {}})
            await child.ask("complete", {**d2("a"), "code": 0})
        hands.ended["a"].set()


async def test_the_newest_connection_of_a_child_wins(tmp_path: Path) -> None:
    async with tier_of(ONE, tmp_path) as (_, hands, above):
        await hands.started("child_job_a")
        async with dialled(above.address) as first, dialled(above.address) as second:
            await started(first, "child_job_a")
            await started(second, "child_job_a")
            for action in ("update", "complete"):
                with pytest.raises(Refused, match="superseded"):
                    await first.ask(action, {"ident": "child_job_a", **D1_END})
            await second.ask("complete", {"ident": "child_job_a", **D1_END})
        hands.ended["child_job_a"].set()
    assert any("registers again on another connection" in text for _, text in above.messages)


async def test_wrong_idents_are_refused(tmp_path: Path) -> None:
    async with tier_of(TWO, tmp_path, ends=False) as (tier, hands, above):
        await hands.started("b")
        async with dialled(above.address) as child:
            for action in ("spec", "register", "update", "complete"):
                with pytest.raises(Refused, match="Bad child ID x"):
                    await child.ask(action, {"ident": "x", "server": "h:1", **D1_END})
                with pytest.raises(Refused, match="missing required field `ident`"):
                    await child.ask(action, {"server": "h:1", **D1_END})
            await started(child, "a")
            with pytest.raises(Refused, match="this connection is that of 'a'"):
                await child.ask("complete", {"ident": "b", **D1_END})
        assert tier.tree.kids["b"].state == "LAUNCHED"
        assert [severity for severity, _ in above.messages].count("WARNING") == 9


async def test_who_completes_with_active_jobs_or_twice_is_told(tmp_path: Path) -> None:
    async with tier_of(ONE, tmp_path) as (_, hands, above):
        await hands.started("child_job_a")
        async with dialled(above.address) as child:
            await started(child, "child_job_a")
            with pytest.raises(Refused, match="2 jobs are still active"):
                await child.ask("complete", {"ident": "child_job_a", **D1_END, "sub_active": 2})
            await child.ask("complete", {"ident": "child_job_a", **D1_END})
            await child.ask("complete", {"ident": "child_job_a", **D1_END})  # the same: its answer was lost, perhaps
            with pytest.raises(Refused, match="Child sent a second completion message"):
                await child.ask("complete", {"ident": "child_job_a", **D1_END, "code": 5})
            with pytest.raises(Refused, match="Child sent update after completion"):
                await child.ask("update", {"ident": "child_job_a", **D1_END})
            await child.ask("log", {"message": "after the end"})
        assert above.messages[-1] == ("INFO", "after the end")
        hands.ended["child_job_a"].set()


async def test_a_process_that_vanishes_is_lost_and_what_comes_back_is_refused(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    async with tier_of(TWO, tmp_path, shared=shared_of(tell=events.append)) as (tier, hands, above):
        await hands.started("b")
        async with dialled(above.address) as child:
            await started(child, "a")
            hands.ended["a"].set()
            await until(lambda: tier.tree.kids["a"].state == "COMPLETE")
            with pytest.raises(Refused, match="superseded"):
                await child.ask("complete", {"ident": "a", **D1_END})
            async with dialled(above.address) as again:
                with pytest.raises(Refused, match="given up: superseded"):
                    await started(again, "a")
                await started(again, "b")
                await again.ask("complete", {"ident": "b", **D1_END})
        hands.ended["b"].set()
    assert above.end is not None
    assert (above.end[0].jobs, above.end[1]) == (Sums(2, 0, 1, 1), "FAILURE")
    ends = [(e["ident"], e["code"], e["why"]) for e in events if e["event"] == "end"]
    why = f"its process ended, and it did not say how: with code 7; what it printed is in {tmp_path}/a/layer.log"
    assert ends == [("a", 254, why), ("b", 0, None)]


async def test_a_silent_child_is_warned_of_then_lost_and_killed(tmp_path: Path) -> None:
    shared = shared_of(options=Options(interval_s=0.5))
    async with tier_of(ONE, tmp_path, shared=shared) as (_, hands, above):
        await hands.started("child_job_a")
        async with dialled(above.address) as child:
            await started(child, "child_job_a")
            await until(lambda: "child_job_a" in hands.killed)
    *warned, (severity, text) = above.messages
    assert (severity, "Child 'child_job_a' is lost: it told nothing for" in text) == ("CRITICAL", True)
    assert {severity for severity, _ in warned} <= {"WARNING"}  # none when the machine is slower than the limit


async def test_a_child_may_come_back_on_another_connection_without_registering(tmp_path: Path) -> None:
    settings = GatorSettings(resume_wait_s=60)
    async with tier_of(ONE, tmp_path, shared=shared_of(settings=settings)) as (tier, hands, above):
        await hands.started("child_job_a")
        async with dialled(above.address) as child:
            await started(child, "child_job_a")
        await until(lambda: tier.tree.kids["child_job_a"].gone_since is not None)
        async with dialled(above.address) as child:
            await child.ask("update", {"ident": "child_job_a", **D1_END})
            await child.ask("complete", {"ident": "child_job_a", **D1_END})
        hands.ended["child_job_a"].set()
    assert above.end is not None
    assert above.end[1] == "SUCCESS"


async def test_a_lost_child_is_started_again_and_its_folder_kept(tmp_path: Path) -> None:
    text = '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "true", retries: 1}]}'
    async with tier_of(text, tmp_path) as (tier, hands, above):
        first = await hands.started("a")
        first.folder.mkdir()
        (first.folder / "db.sqlite").write_text("of the first")
        del hands.orders["a"]
        hands.ended["a"].set()
        await hands.started("a")
        async with dialled(above.address) as child:
            await started(child, "a")
            await child.ask("complete", {"ident": "a", **D1_END})
        assert tier.tree.kids["a"].attempt == 2
        assert (tmp_path / "a/attempt_1/db.sqlite").read_text() == "of the first"
        hands.ended["a"].set()
    assert above.end is not None
    assert above.end[0].jobs == Sums(1, 0, 1, 0)


async def test_a_child_is_not_started_again_while_its_last_attempt_still_dies(tmp_path: Path) -> None:
    text = '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "true", retries: 1}]}'
    shared = shared_of(settings=GatorSettings(retry_on=("fail",)))
    async with tier_of(text, tmp_path, shared=shared) as (_, hands, above):
        await hands.started("a")
        hands.may_die = trio.Event()
        del hands.orders["a"]
        async with dialled(above.address) as child:
            await started(child, "a")
            failed = {**D1_END, "result": "FAILURE", "code": 1, "sub_passed": 0, "sub_failed": 1}
            await child.ask("complete", {"ident": "a", **failed})
            await until(lambda: hands.killed == ["a"])
            await child.ask("children", {})  # the tier has had its turns
            assert not hands.orders  # it would have moved the folder away from below the first attempt
        hands.may_die.set()
        await hands.started("a")
        async with dialled(above.address) as child:
            await started(child, "a")
            await child.ask("complete", {"ident": "a", **D1_END})
        hands.ended["a"].set()
    assert above.end is not None
    assert above.end[1] == "SUCCESS"


async def test_a_stop_is_passed_on_and_who_does_not_hear_it_is_ended(tmp_path: Path) -> None:
    stopped = trio.Event()

    async def stop(payload: dict[str, Any]) -> dict[str, Any]:
        stopped.set()
        return {}

    async with tier_of(TWO, tmp_path) as (tier, hands, above):
        await hands.started("b")
        async with dialled(above.address, {"stop": stop}) as child:
            await started(child, "a")
            await tier.stop()
            assert stopped.is_set()
            await child.ask("complete", {"ident": "a", **D1_END, "result": "FAILURE", "code": 255, "sub_passed": 0})
        await until(lambda: hands.killed == ["b"])  # it had no connection to be told on
        hands.ended["a"].set()
    assert [(kid.result, kid.code) for kid in tier.tree.kids.values()] == [("FAILURE", 255)] * 2  # and not lost
    assert above.end is not None
    assert above.end[1] == "FAILURE"


async def test_a_tier_below_gets_slots_and_more_when_others_end(tmp_path: Path) -> None:
    text = """\
!JobGroup
ident: g
jobs:
  - !JobArray { ident: big, repeats: 8, jobs: [!Job { ident: x, command: "true" }] }
  - !Job { ident: late, command: "true" }
"""
    given: list[int] = []

    async def options(payload: dict[str, Any]) -> dict[str, Any]:
        given.append(payload["options"]["concurrency"])
        return {"concurrency": 2}

    async def get_tree(payload: dict[str, Any]) -> dict[str, Any]:
        return {"x_0": "STARTED"}

    shared = shared_of(pool=Pool(3, 0, {}))
    answers = {"update_scheduler_opts": options, "get_tree": get_tree}
    async with tier_of(text, tmp_path, shared=shared, ends=False) as (tier, hands, above):
        order = await hands.started("big")
        assert "concurrency=3" in order.need.flags
        async with dialled(above.address, answers) as child:
            await started(child, "big")
            busy = {
                **d2("big"),
                "summary": {"metrics": {"sub_total": 9, "sub_active": 4}, "running_ids": []},
                "result": 0,
            }
            await child.ask("update", busy)
            assert await tier.states() == {"big": {"x_0": "STARTED"}, "late": "PENDING"}
            shared.pool.add(3)  # as a parent gives more
            await hands.started("late")
            await until(lambda: given == [2])
        assert shared.pool.free_slots == 0


async def test_tiers_that_count_for_themselves_share_what_there_is(tmp_path: Path) -> None:
    job = '!Job {ident: x, command: "true", resources: [!License [l], !Memory [1, KB]]}'
    text = (
        f"!JobGroup {{ident: g, jobs: [!JobGroup {{ident: a, jobs: [{job}]}}, !JobGroup {{ident: b, jobs: [{job}]}}]}}"
    )
    async with tier_of(text, tmp_path, shared=shared_of(pool=Pool(4, 9000, {"l": 1}))) as (tier, hands, above):
        for ident, other in (("a", "b"), ("b", None)):
            order = await hands.started(ident)
            given = dict(each.split("=", 1) for each in order.need.flags if "=" in each)
            assert given == {"concurrency": "1", "memory": "1000", "licenses": "l=1", "cpus": ""}
            async with dialled(above.address) as child:
                await started(child, ident)
                assert other is None or tier.tree.kids[other].state == "PENDING"
                await child.ask("complete", {**d2(ident), "code": 0})
            hands.ended[ident].set()


async def test_cores_of_a_child_are_cpus_that_no_other_child_has(tmp_path: Path) -> None:
    text = TWO.replace('"true"', '"true", resources: [!Cores [1]]')
    async with tier_of(text, tmp_path, shared=shared_of(pool=Pool(4, 0, {}, [4, 5, 6, 7])), ends=False) as (
        _,
        hands,
        _,
    ):
        assert [(await hands.started(ident)).cpus for ident in ("a", "b")] == [(4,), (5,)]


async def test_tiers_hand_out_cpus_that_no_other_child_has(tmp_path: Path) -> None:
    tiers = ", ".join(
        f'!JobArray {{ident: {ident}, repeats: 2, jobs: [!Job {{ident: x, command: "true", resources: [!Cores [1]]}}]}}'
        for ident in "ab"
    )
    shared = shared_of(pool=Pool(4, 0, {}, [4, 5, 6, 7]))
    text = f"!JobGroup {{ident: g, jobs: [{tiers}]}}"
    async with tier_of(text, tmp_path, shared=shared, ends=False) as (_, hands, _):
        for ident, given in (("a", "cpus=4,5"), ("b", "cpus=6,7")):
            order = await hands.started(ident)
            assert order.need.flags[-2:] == ("--sched-arg", given)
            assert order.cpus == ()  # jobs that ask for none may run on all


async def test_what_a_tier_of_ours_tells_of_its_jobs_counts_once(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    text = '!JobGroup {ident: g, jobs: [!JobArray {ident: t, repeats: 2, jobs: [!Job {ident: x, command: "true"}]}]}'
    async with tier_of(text, tmp_path, shared=shared_of(tell=events.append), ends=False) as (_, hands, above):
        await hands.started("t")
        async with dialled(above.address) as child:
            await child.ask("register", {"ident": "t", "server": "h:1", "emissary": {}})
            told = [{"event": "start", "path": ["g", "t"], "ident": f"x_{n}", "started": 1.5} for n in range(2)]
            await child.ask("update", {**d2("t"), "emissary": {"first": 0, "events": told[:1]}})
            await child.ask("update", {**d2("t"), "emissary": {"first": 0, "events": told}})  # sent again, with more
            with pytest.raises(Refused, match="emissary: Expected `int`"):
                await child.ask("update", {**d2("t"), "emissary": {"first": "no"}})
            for event, said in (
                (
                    {"event": "start", "path": ["g", "u"], "ident": "x", "started": 1},
                    "emissary: g/u/x is not below g/t",
                ),
                (
                    {"event": "end", "path": ["g", "t"], "ident": "x_1"},
                    "emissary: Object missing required field `result`",
                ),
                ({"event": "paint"}, "emissary: Invalid value 'paint'"),
            ):
                with pytest.raises(Refused, match=said):
                    await child.ask("update", {**d2("t"), "emissary": {"first": 2, "events": [event]}})
        assert [event["ident"] for event in events] == ["x_0", "x_1"]


def test_attempts_are_set_aside_one_beside_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    for attempt in (1, 2, 3):
        folder.mkdir(exist_ok=True)
        (folder / "db.sqlite").write_text(str(attempt))
        set_aside(folder, attempt)
    assert sorted(path.name for path in folder.iterdir()) == ["attempt_1", "attempt_2", "attempt_3"]
    assert (folder / "attempt_2/db.sqlite").read_text() == "2"
    set_aside(tmp_path / "none", 1)


async def test_ten_frames_that_are_none_close_the_connection(tmp_path: Path) -> None:
    async with (
        tier_of(ONE, tmp_path, ends=False) as (_, _, above),
        connect(Dial(url=f"ws://{above.address}/")) as ws,
    ):
        for _ in range(10):
            await ws.send_message("[]")
            assert json.loads(await ws.get_message())["rsp_id"] is None
        await until(lambda: ws.closed is not None)
        assert ws.closed is not None
        assert ws.closed.code == 1007
