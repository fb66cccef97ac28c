"""A tier whose children are tasks of its own process, and what it answers on its port."""

import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.channel import Refused
from agent.core.process import adopt
from agent.gator import spec as specs
from agent.gator.layer import Options
from agent.gator.pool import Pool
from agent.gator.settings import GatorSettings
from agent.gator.spec import Group
from agent.gator.summary import Sums
from agent.gator.tier import Tier
from tests.gator_tree import WITHIN_S, Above, dialled, shared_of, until

pytestmark = pytest.mark.usefixtures("own_mark")

NESTED = """\
!JobGroup
ident: root
env: { MODE: fast }
jobs:
  - !Job { ident: a, command: "true" }
  - !JobGroup
    ident: inner
    jobs:
      - !JobArray { ident: many, repeats: 3, jobs: [!Job { ident: x, command: "true" }] }
      - !Job { ident: bad, command: "false" }
  - !Job { ident: after, command: "true", on_done: [inner] }
  - !Job { ident: never, command: "true", on_pass: [inner] }
"""


async def run(text: str, folder: Path, **more: Any) -> Above:
    root = specs.load(text).root
    assert isinstance(root, Group)
    above = Above(path=())
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        with trio.fail_after(WITHIN_S):
            await Tier(root, folder, above, shared_of(**more), None, forward=True).run()
        nursery.cancel_scope.cancel()
    return above


def rows(folder: Path, query: str) -> list[Any]:
    with sqlite3.connect(folder / "db.sqlite") as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


async def test_a_tree_runs_and_sums_up(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    above = await run(NESTED, tmp_path, tell=events.append)
    assert above.end is not None
    summary, result, code = above.end
    assert (result, code, summary.jobs) == ("FAILURE", 0, Sums(6, 0, 5, 1))
    assert summary.tiers == Sums(3, 0, 1, 2)
    assert summary.failed == (("root", "inner", "bad"),)
    ends = sorted(("/".join(event["path"]), event["ident"], event["result"]) for event in events if "ended" in event)
    assert ends == [
        ("root", "a", "SUCCESS"),
        ("root", "after", "SUCCESS"),
        ("root", "never", "ABORTED"),
        ("root/inner", "bad", "FAILURE"),
        *(("root/inner/many", f"x_{n}", "SUCCESS") for n in range(3)),
    ]
    assert len([event for event in events if event["event"] == "start"]) == 6


async def test_each_layer_leaves_a_database_as_real_gator_reads_it(tmp_path: Path) -> None:
    await run(NESTED, tmp_path)
    columns = ["ident", "server_url", "db_file", "started", "updated", "stopped", "result", "expected_children"]
    for folder in (".", "inner", "inner/many"):
        found = rows(tmp_path / folder, "SELECT name FROM pragma_table_info('ChildEntry') ORDER BY cid")
        assert found == [("db_uid",), *((name,) for name in columns)]
    found = rows(tmp_path, "SELECT db_uid, ident, result, expected_children FROM ChildEntry")
    assert found == [(1, "a", "1", 1), (2, "inner", "2", 4), (3, "after", "1", 1), (4, "never", "3", 1)]
    job = tmp_path / "inner/many/x/2"
    assert rows(job, "SELECT value FROM Attribute WHERE name='path'") == [("root.inner.many",)]
    assert "GATOR_ARRAY_INDEX" in (job / "spec.yaml").read_text()
    assert rows(tmp_path / "never", "SELECT value FROM Attribute WHERE name='result'") == [("3",)]
    assert rows(job, "PRAGMA journal_mode") == [("delete",)]
    assert rows(tmp_path, "PRAGMA journal_mode") == [("delete",)]


async def test_a_tree_where_only_the_pruned_did_not_run_has_passed(tmp_path: Path) -> None:
    text = '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "true"}, !Job {ident: b, command: x, on_fail: [a]}]}'
    above = await run(text, tmp_path)
    assert above.end is not None
    assert above.end[1] == "SUCCESS"


async def test_a_licence_of_one_is_never_held_by_two(tmp_path: Path) -> None:
    job = '!Job {ident: x, command: sh, args: [-c, "mkdir h && sleep 0.05 && rmdir h"], resources: [!License [l, 1]]}'
    text = f'!JobArray {{ident: g, cwd: "{tmp_path}", repeats: 6, jobs: [{job}]}}'
    above = await run(text, tmp_path / "g", pool=Pool(6, 0, {"l": 1}))
    assert above.end is not None
    assert above.end[0].jobs == Sums(6, 0, 6, 0)


async def test_slots_bound_how_many_run_at_once(tmp_path: Path) -> None:
    script = "echo on >> ran; sleep 0.1; wc -l < ran; sed -i 1d ran"
    job = f'!Job {{ident: x, command: sh, args: [-c, "{script}"], resources: [!Cores [2]]}}'
    above = await run(
        f'!JobArray {{ident: g, cwd: "{tmp_path}", repeats: 4, jobs: [{job}]}}',
        tmp_path / "g",
        pool=Pool(2, 0, {}),
        options=Options(all_messages=True),
    )
    assert {text for _, text in above.messages} == {"1"}


async def test_a_tier_that_was_given_too_little_for_a_job_does_not_wait_for_ever(tmp_path: Path) -> None:
    jobs = "!Job {ident: wide, command: 'true', resources: [!Cores [4]]}", "!Job {ident: b, command: 'true'}"
    greedy = "!Job {ident: greedy, command: 'true', retries: 1, resources: [!Memory [1, KB]]}"
    above = await run(f"!JobGroup {{ident: g, jobs: [{', '.join((*jobs, greedy))}]}}", tmp_path, pool=Pool(2, 0, {}))
    assert above.end is not None
    assert (above.end[0].jobs, above.end[0].failed) == (Sums(3, 0, 2, 1), (("g", "greedy"),))
    assert ("WARNING", "Child 'wide' wants 4 slots, and has all 2 of here") in above.messages
    why = "it cannot be started: it wants 1000 bytes of memory; there are 0"
    assert ("CRITICAL", f"Child 'greedy' is lost: {why}") in above.messages


async def test_cores_that_were_asked_for_are_cpus_of_the_tasks_own(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU: there is nothing to choose")
    script = "import os; print(*sorted(os.sched_getaffinity(0)))"
    job = f'!Job {{ident: x, command: {sys.executable}, args: [-c, "{script}"]'
    text = f"!JobGroup {{ident: g, jobs: [{job}, resources: [!Cores [1]]}}, {job.replace('x,', 'y,')}}}]}}"
    above = await run(text, tmp_path, pool=Pool(2, 0, {}, cpus), options=Options(all_messages=True))
    assert sorted(text for _, text in above.messages) == sorted([str(cpus[0]), " ".join(map(str, cpus))])


async def test_a_stop_ends_what_runs_and_begins_nothing(tmp_path: Path) -> None:
    text = """\
!JobGroup
ident: root
jobs:
  - !JobGroup { ident: inner, jobs: [!Job { ident: long, command: sleep, args: [600] }] }
  - !Job { ident: after, command: "true", on_done: [inner] }
"""
    root = specs.load(text).root
    assert isinstance(root, Group)
    above, events = Above(path=()), list[dict[str, Any]]()
    tier = Tier(root, tmp_path, above, shared_of(tell=events.append), None, forward=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        async with trio.open_nursery() as running:
            running.start_soon(tier.run)
            await until(lambda: any(event["event"] == "start" for event in events))
            async with dialled(above.address) as user:
                assert await user.ask("get_tree", {}) == {
                    "root": {"inner": {"long": "STARTED"}, "after": "PENDING"},
                }
                assert await user.ask("stop", {}) == {}
        nursery.cancel_scope.cancel()
    assert above.end is not None
    assert (above.end[1], above.end[0].jobs) == ("FAILURE", Sums(1, 0, 0, 1))
    ends = {event["ident"]: (event["result"], event["code"]) for event in events if event["event"] == "end"}
    assert ends == {"long": ("FAILURE", 255), "after": ("ABORTED", 0)}


async def test_a_job_that_was_started_again_is_stopped_like_any(tmp_path: Path) -> None:
    task = f"test -e {tmp_path}/again || {{ touch {tmp_path}/again; exit 1; }}; sleep 600"
    root = specs.load(
        f"!JobGroup {{ident: g, jobs: [!Job {{ident: a, command: sh, args: [-c, '{task}'], retries: 1}}]}}"
    ).root
    assert isinstance(root, Group)
    above, events = Above(path=()), list[dict[str, Any]]()
    shared = shared_of(settings=GatorSettings(retry_on=("fail",)), tell=events.append)
    tier = Tier(root, tmp_path / "t", above, shared, None, forward=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        nursery.start_soon(tier.run)
        await until(lambda: len([event for event in events if event["event"] == "start"]) == 2)
        await tier.stop()
        await until(lambda: above.end is not None)
        nursery.cancel_scope.cancel()
    kid = tier.tree.kids["a"]
    assert (kid.attempt, kid.result, kid.code) == (2, "FAILURE", 255)


async def test_the_tree_below_is_told_in_every_form(tmp_path: Path) -> None:
    text = """\
!JobGroup
ident: root
jobs:
  - !JobGroup { ident: done, jobs: [!Job { ident: d, command: "true" }] }
  - !Job { ident: long, command: sleep, args: [600], on_pass: [done] }
"""
    root = specs.load(text).root
    assert isinstance(root, Group)
    above = Above(path=())
    tier = Tier(root, tmp_path, above, shared_of(), None, forward=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        nursery.start_soon(tier.run)
        await until(lambda: tier.tree.kids["long"].state == "STARTED")
        async with dialled(above.address) as user:
            seeds = await user.ask("children", {})
            assert seeds.keys() == {"done", "long"}
            assert (seeds["done"]["state"], seeds["done"]["result"], seeds["done"]["exitcode"]) == (
                "COMPLETE",
                "SUCCESS",
                0,
            )
            assert seeds["long"]["completed"] == 0 < seeds["long"]["started"]
            d2 = await user.ask("children", {"format": "d2"})
            assert [(job["ident"], job["uidx"], job["status"], job["result"]) for job in d2["children"]] == [
                ("done", 1, 3, 1),
                ("long", 2, 2, 0),
            ]
            assert [*await user.ask("children", {"limit": 1})] == ["done"]
            assert [*await user.ask("children", {"after": "done"})] == ["long"]
            last = await user.ask("children", {"after": "long", "limit": 5, "format": "d2"})
            assert last["children"] == []
            for wrong_page in ({"after": "none"}, {"limit": -1}, {"limit": 2**64}):
                with pytest.raises(Refused, match="children: "):
                    await user.ask("children", wrong_page)
            whole = await user.ask("resolve", {"depth": 2})
            assert [[child["ident"] for child in job["children"]] for job in whole["children"]] == [["d"], []]
            deep = await user.ask("resolve", {"root_path": ["done", "d"]})
            assert (deep["ident"], deep["path"], deep["result"]) == ("d", ["root", "done"], 1)
            chain = await user.ask("resolve", {"nest_path": ["done", "d"]})
            assert chain["children"][0]["children"][0]["ident"] == "d"
            assert (await user.ask("resolve", {"path": ["done"]}))["children"] == ["d"]
            for wrong in ({"root_path": ["x"]}, {"root_path": ["done", "x"]}, {"root_path": ["long", "x"]}):
                with pytest.raises(Refused, match="no child"):
                    await user.ask("resolve", wrong)
            await user.ask("log", {"message": "from outside"})
            assert above.messages[-1] == ("INFO", "from outside")
            assert (await user.ask("get_messages", {}))["total"] == 0  # a tier keeps none of others
            told = await user.ask("spec", {"ident": "long"})
            assert told["spec"].startswith('!Job\nident: "long"\n')
            with pytest.raises(Refused, match="the children of this tier run within it"):
                await user.ask("register", {"ident": "long", "server": "h:1"})
            with pytest.raises(Refused) as refused:
                await user.ask("metric", {"name": "x", "value": 1})
            assert refused.value.reason == "Unknown action 'metric'"
            await user.ask("stop", {})
        await until(lambda: above.end is not None)
        nursery.cancel_scope.cancel()


async def test_a_child_that_cannot_have_its_folder_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    text = '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "true"}, !Job {ident: b, command: "true"}]}'
    above = await run(text, tmp_path)
    assert above.end is not None
    assert (above.end[1], above.end[0].failed) == ("FAILURE", (("g", "a"),))
    assert any("Child 'a' cannot run" in text for _, text in above.messages)
