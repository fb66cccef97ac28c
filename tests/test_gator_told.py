"""Each job is told once, whoever tells of it."""

import json
import os
from typing import Any

import pytest

from agent.gator import spec as specs
from agent.gator.told import Told

TREE = specs.load(
    '!JobGroup {ident: g, jobs: [!Job {ident: a, command: "x"}, !JobArray {ident: t, repeats: 2, jobs: [!Job {ident: x,'
    ' command: "x"}]}]}'
).root


def event(kind: str, ident: str, *path: str, **more: Any) -> dict[str, Any]:
    end = {"result": "SUCCESS", "code": 0, "pruned": False, "why": None, "started": 1.0, "ended": 2.0, "folder": ""}
    return {"event": kind, "path": list(path), "ident": ident, **(end if kind != "start" else {}), **more}


def told(*events: dict[str, Any], close: bool = True) -> list[tuple[str, ...]]:
    reading, writing = os.pipe()
    told = Told(TREE, writing)
    for each in events:
        told.tell(each)
    if close:
        told.close(3.0)
    os.close(writing)
    with open(reading) as pipe:
        plan, *lines = [json.loads(line) for line in pipe]
    assert plan == {"event": "plan", "jobs": [["g", "a"], ["g", "t", "x_0"], ["g", "t", "x_1"]]}
    return [(line["event"], line["ident"], *(str(line[k]) for k in ("result", "code") if k in line)) for line in lines]


def test_starts_and_ends_are_told_as_they_come_and_an_end_once() -> None:
    end = event("end", "a", "g")
    assert told(event("start", "a", "g"), end, end, close=False) == [("start", "a"), ("end", "a", "SUCCESS", "0")]


def test_of_a_foreign_tier_all_that_it_did_not_name_as_failed_has_passed() -> None:
    end = event("tier_end", "t", "g", result="FAILURE", failed=[["g", "t", "x_1"]], failed_jobs=1)
    assert told(end, close=False) == [("end", "x_0", "SUCCESS", "0"), ("end", "x_1", "FAILURE", "0")]


@pytest.mark.parametrize("failed", [[], [["g", "t"]], [["g", "t", "x_1"]]])
def test_a_foreign_tier_that_names_too_few_has_none_that_passed(failed: list[list[str]]) -> None:
    end = event("tier_end", "t", "g", result="FAILURE", code=1, failed=failed, failed_jobs=2)
    assert told(end, close=False) == [("end", "x_0", "FAILURE", "1"), ("end", "x_1", "FAILURE", "1")]


def test_of_a_lost_tier_what_was_told_before_stands() -> None:
    lost = event(
        "tier_end", "t", "g", result="FAILURE", code=254, why="it is gone", failed=[["g", "t", "x_1"]], failed_jobs=1
    )
    assert told(event("end", "x_0", "g", "t"), lost, close=False) == [
        ("end", "x_0", "SUCCESS", "0"),
        ("end", "x_1", "FAILURE", "254"),
    ]


def test_what_nobody_told_of_is_told_at_the_end() -> None:
    assert told(event("end", "a", "g"))[1:] == [("end", "x_0", "FAILURE", "254"), ("end", "x_1", "FAILURE", "254")]


def test_a_reader_that_went_away_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = Told(TREE, writing)
    told.tell(event("end", "a", "g"))
    told.close(1.0)
    os.close(writing)
