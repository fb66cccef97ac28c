"""Each job is told once, whoever tells of it."""

import json
import os
from typing import Any

import pytest
import trio

from agent.gator import spec as specs
from agent.gator.told import Told
from tests.gator_tree import WITHIN_S

TREE = specs.load(
    '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "x"}, !JobArray {ident: t, repeats: 2, jobs: [!Job {ident: x,'
    ' command: "x"}]}]}'
).root


def event(kind: str, ident: str, *path: str, **more: Any) -> dict[str, Any]:
    end = {"result": "SUCCESS", "code": 0, "pruned": False, "why": None, "started": 1.0, "ended": 2.0, "folder": ""}
    return {"event": kind, "path": list(path), "ident": ident, **(end if kind != "start" else {}), **more}


async def lines_of(*events: dict[str, Any]) -> list[dict[str, Any]]:
    """What is written of them, and at the end."""
    with os.fdopen(os.memfd_create("told"), "w+b") as file:
        told = Told(TREE, file.fileno())
        for each in events:
            told.tell(each)
        told.close(3.0)
        with trio.fail_after(WITHIN_S):
            await told.keep_writing()
        file.seek(0)
        plan, *lines = [json.loads(line) for line in file]
    assert plan == {"event": "plan", "jobs": [["g", "a"], ["g", "t", "x_0"], ["g", "t", "x_1"]]}
    return lines


async def told(*events: dict[str, Any], close: bool = True) -> list[tuple[str, ...]]:
    lines = [line for line in await lines_of(*events) if close or line.get("why") != "nothing was told of it"]
    return [(line["event"], line["ident"], *(str(line[k]) for k in ("result", "code") if k in line)) for line in lines]


async def test_starts_and_ends_are_told_as_they_come_and_an_end_once() -> None:
    end = event("end", "a", "g")
    assert await told(event("start", "a", "g"), end, end, close=False) == [("start", "a"), ("end", "a", "SUCCESS", "0")]


async def test_of_a_foreign_tier_all_that_it_did_not_name_as_failed_has_passed() -> None:
    end = event("tier_end", "t", "g", result="FAILURE", failed=[["g", "t", "x_1"]], failed_jobs=1)
    assert await told(end, close=False) == [("end", "x_0", "SUCCESS", "0"), ("end", "x_1", "FAILURE", "0")]


@pytest.mark.parametrize("failed", [[], [["g", "t"]], [["g", "t", "x_1"]]])
async def test_a_foreign_tier_that_names_too_few_has_none_that_passed(failed: list[list[str]]) -> None:
    end = event("tier_end", "t", "g", result="FAILURE", code=1, failed=failed, failed_jobs=2)
    assert await told(end, close=False) == [("end", "x_0", "FAILURE", "1"), ("end", "x_1", "FAILURE", "1")]


async def test_of_a_lost_tier_what_was_told_before_stands() -> None:
    lost = event(
        "tier_end", "t", "g", result="FAILURE", code=254, why="it is gone", failed=[["g", "t", "x_1"]], failed_jobs=1
    )
    assert await told(event("end", "x_0", "g", "t"), lost, close=False) == [
        ("end", "x_0", "SUCCESS", "0"),
        ("end", "x_1", "FAILURE", "254"),
    ]


async def test_what_nobody_told_of_is_told_at_the_end() -> None:
    assert (await told(event("end", "a", "g")))[1:] == [
        ("end", "x_0", "FAILURE", "254"),
        ("end", "x_1", "FAILURE", "254"),
    ]


async def test_a_reader_that_went_away_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = Told(TREE, writing)
    with trio.fail_after(WITHIN_S):
        await told.keep_writing()
    told.tell(event("end", "a", "g"))
    told.close(1.0)
    os.close(writing)


async def test_what_waits_for_its_reader_has_a_bound_and_what_is_beyond_it_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agent.gator.told.ROOM", {"output": 1000, "start": 1500, "end": 5000})
    outputs = [{"event": "output", "path": ["g"], "ident": "a", "text": "x" * 300} for _ in range(9)]
    lines = await lines_of(*outputs, event("start", "a", "g"), event("end", "a", "g"))
    assert [(line["event"], line.get("count")) for line in lines] == [
        *[("output", None)] * 2,
        ("dropped", 7),
        ("start", None),
        *[("end", None)] * 3,
    ]
    assert caplog.text.count("read too slowly: lines are dropped") == 1


async def test_a_reader_that_stands_still_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agent.gator.told.LAST_S", 0.1)
    reading, writing = os.pipe()
    told = Told(TREE, writing)
    told.tell({"event": "output", "path": ["g"], "ident": "a", "text": "x" * 100_000})  # more than a pipe takes
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told.keep_writing)
            await trio.lowlevel.wait_readable(reading)
            told.close(1.0)
    assert "--events-fd is not read: 4 lines dropped" in caplog.text
    os.close(reading)
    os.close(writing)
