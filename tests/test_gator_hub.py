"""What a root tells a hub, and that it does not care for the answer."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.listen import Body, Response, Route, serve
from agent.core.metrics import Metrics
from agent.gator import hub
from agent.gator.messages import Result
from agent.gator.summary import Summary, job_summary
from tests import no_json
from tests.gator_tree import WITHIN_S, until

Told = list[tuple[str, dict[str, Any]]]


class Root:
    ident = "nightly"
    result: Result = "FAILURE"

    def summary(self) -> Summary:
        return job_summary("nightly", {"msg_error": 1}, passed=False)


@asynccontextmanager
async def a_hub(told: Told, answer: Response) -> AsyncIterator[str]:
    async def take(head: Head, body: Body) -> Response:
        told.append((head.path, json.loads(await body.read())))
        return answer

    routes = [Route("/*", http=take, scope="open", methods=("POST",), max_body=100_000)]
    guard = Guard((), {}, False, (), trio.current_time)
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
            await serve(["127.0.0.1:0"], routes, guard, metrics=Metrics(), task_status=task_status)

        (address,) = await nursery.start(run)
        yield address
        nursery.cancel_scope.cancel()


async def test_a_root_registers_tells_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", WITHIN_S)
    told: Told = []
    async with a_hub(told, Response(200, body=b'{"uid": 7}')) as address, trio.open_nursery() as nursery:
        ended = trio.Event()
        nursery.start_soon(hub.tell, address, Root, "127.0.0.1:1", "tier", "/t/db.sqlite", 0.05, ended)
        await until(lambda: len(told) > 2)
        ended.set()
    first, beat, last = told[0], told[1], told[-1]
    assert first[0] == "/api/register"
    assert (first[1]["ident"], first[1]["url"], first[1]["layer"]) == ("nightly", "127.0.0.1:1", "tier")
    metrics = {"msg_error": 1, "sub_total": 1, "sub_active": 0, "sub_passed": 0, "sub_failed": 1}
    assert beat == (
        "/api/job/7/heartbeat",
        {"metrics": metrics, "failed_ids": [["nightly"]], "running_ids": []},
    )
    assert last == ("/api/job/7/complete", {"db_file": "/t/db.sqlite", "result": 2})


async def test_a_hub_that_refuses_answers_rubbish_or_is_not_there_changes_nothing() -> None:
    ended = trio.Event()
    rubbish = (b"<html>", b"[]", *no_json.SPOILED)
    for answer in (Response(500, body=b"no"), *(Response(200, body=body) for body in rubbish)):
        told: Told = []
        async with a_hub(told, answer) as address:
            await hub.tell(address, Root, "", "tier", "", 0.05, ended)
        assert [path for path, _ in told] == ["/api/register"]
    await hub.tell("127.0.0.1:9", Root, "", "tier", "", 0.05, ended)
    await hub.tell("no such host", Root, "", "tier", "", 0.05, ended)
