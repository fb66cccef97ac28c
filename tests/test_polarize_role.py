"""The role: what is owed is submitted until it has an outcome, through failures, refusals and restarts."""

import itertools
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from agent.core.bus import Bus, Subscription
from agent.core.event import Event
from agent.core.events import (
    Alert,
    AlertCleared,
    ImportFinished,
    Reloaded,
    decode,
)
from agent.core.metrics import Metrics
from agent.core.store import Outbox, Owed, Store, open_store
from agent.core.supervise import Health
from agent.polarize import progress, role
from agent.polarize.progress import Submission
from agent.polarize.settings import CibusSettings, PolarizeSettings
from agent.polarize.stomp import Frame
from tests.ended_run import finished, started
from tests.stomp_broker import Broker

XML = b'<testsuites>\n<testsuite name="login" tests="1"><testcase name="a"/></testsuite></testsuites>'
SUCCESS = httpx.Response(200, json={"status": "SUCCESS", "result": "", "errors": "", "new-xunit-path": "/x"})
LOGIN_PAGE = httpx.Response(200, html="<html><form><input name='j_password'></form></html>")

NOTHING: Mapping[str, object] = {}

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def patient_clock(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> MockClock:
    """Jumps when nothing can happen any more; it waits for the threads that are at work."""
    at_work = 0
    run_sync = trio.to_thread.run_sync

    async def run_counted(*args: Any, **more: Any) -> Any:
        nonlocal at_work
        at_work += 1
        mock_clock.autojump_threshold = math.inf
        try:
            return await run_sync(*args, **more)
        finally:
            at_work -= 1
            if not at_work:
                mock_clock.autojump_threshold = 0

    monkeypatch.setattr(trio.to_thread, "run_sync", run_counted)
    mock_clock.autojump_threshold = 0
    return mock_clock


class Rig:
    """An agent's store and bus with the role on it; `handler` is the other side, `requests` what it got."""

    def __init__(self, folder: Path, handler: Handler) -> None:
        self.folder, self._handler = folder, handler
        self.requests: list[tuple[float, httpx.Request]] = []
        self.settings = PolarizeSettings(url="http://polarize.lab", project="RHEL9")
        self.cibus = CibusSettings()
        self.transport: httpx.AsyncBaseTransport | None = httpx.MockTransport(self.answer)
        self.delay_s = 0.0
        self.scope = trio.CancelScope()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.requests.append((trio.current_time(), request))
        await trio.sleep(self.delay_s)
        return self._handler(request)

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[tuple[Bus, Store]]:
        store, started = open_store(self.folder / "state", reserve=4096), trio.current_time()
        bus = Bus(store)
        async with trio.open_nursery() as nursery:
            self.scope = nursery.cancel_scope
            await nursery.start(store.run)
            await nursery.start(
                lambda task_status: role.run(
                    bus,
                    store,
                    self.settings,
                    self.cibus,
                    "lab-07",
                    Health("polarize"),
                    random=Random(1),
                    metrics=Metrics(),
                    transport=self.transport,
                    # The store holds by the real clock; the virtual one is added to it.
                    clock=lambda: time.time() + trio.current_time() - started,
                    task_status=task_status,
                )
            )
            yield bus, store
            nursery.cancel_scope.cancel()
        store.close()

    def finish_a_run(
        self, bus: Bus, run: str = "r-9", more: Mapping[str, object] = NOTHING, xml: bytes | None = XML
    ) -> None:
        path = self.folder / f"{run}.xml"
        if xml is not None:
            path.write_bytes(xml)
        bus.publish(started(run, **more))
        bus.publish(finished(run, path))


async def alerts(store: Store) -> list[tuple[str, str]]:
    """Every alert told so far and its end, in order: the event's kind and the alert's code."""
    await store.commit()
    found = [decode(event.kind, event.data) for event in await store.read(kinds=("Alert", "AlertCleared"))]
    return [(type(event).__name__, event.code) for event in found if isinstance(event, Alert | AlertCleared)]


async def until(happened: Callable[[], bool]) -> None:
    """Let virtual seconds pass until it has happened."""
    with trio.fail_after(100_000):
        while not happened():  # noqa: ASYNC110  # no event tells what the other side got
            await trio.sleep(1)


async def owed(store: Store) -> tuple[int, int]:
    """How many reports wait, and how many of these are held."""
    await store.commit()
    depth = (await store.depths())["polarize"]
    return depth.waiting, depth.held


def response_of(request: httpx.Request) -> str:
    found = re.search(rb'polarion-response-emissary" value="(lab-07\.[a-z]{12})"', request.content)
    assert found, request.content
    return found[1].decode()


def down(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused", request=request)


async def test_a_finished_run_is_submitted_once_and_its_outcome_told(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    async with rig.agent() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            assert await anext(events) == ImportFinished(run="r-9", mode="polarize-http", outcome="passed")
        assert await owed(store) == (0, 0)
        assert await store.get("polarize.r-9", dict[str, object]) is None
    ((_, request),) = rig.requests
    assert request.url == "http://polarize.lab/xunit/import"
    assert b'name="xunit"' in request.content
    assert b'name="xargs"' in request.content
    assert response_of(request) in request.content.partition(b'name="xargs"')[2].decode()


async def test_an_answer_too_many_is_not_taken_for_that_to_the_next_report(tmp_path: Path) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        asked = b""
        while b'"xargs"' not in asked or not asked.endswith(b"--\r\n"):
            if not (data := await stream.receive_some()):
                return
            asked += data
        for status in (b"SUCCESS", b"FAILED"):
            body = b'{"status":"%b"}' % status
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        with suppress(trio.BrokenResourceError):  # with the second answer unread
            await stream.receive_some()  # whether the line stays is the client's to say

    rig = Rig(tmp_path, down)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        rig.transport = None
        rig.settings = PolarizeSettings(url=f"http://127.0.0.1:{listener.socket.getsockname()[1]}", project="RHEL9")
        async with rig.agent() as (bus, _):
            with bus.subscribe(ImportFinished) as events:
                for run in ("r-1", "r-2", "r-3"):
                    rig.finish_a_run(bus, run)
                    event = await anext(events)
                    assert (event.run, event.outcome) == (run, "passed")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("steps", range(0, 40, 8))
async def test_the_end_may_come_at_any_moment(tmp_path: Path, steps: int) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    async with rig.agent() as (bus, _):
        rig.finish_a_run(bus)
        for _ in range(steps):
            await trio.to_thread.run_sync(int)  # about as long as what the role waits for
    async with rig.agent() as (_, store):
        while await owed(store) != (0, 0):
            await trio.lowlevel.checkpoint()
        assert len(await store.read(kinds=("ImportFinished",))) == 1


async def test_large_documents_go_one_at_a_time_and_hold_up_no_small_one(
    tmp_path: Path, patient_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "LARGE", 10_000)
    large = XML.replace(b"<testsuites>", b"<testsuites>" + b" " * 10_000)
    rig = Rig(tmp_path, lambda request: SUCCESS)
    rig.delay_s = 100.0
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            for run in ("large-1", "large-2", "large-3"):
                rig.finish_a_run(bus, run, xml=large)
            rig.finish_a_run(bus, "small-1")
            rig.finish_a_run(bus, "small-2")
            kinds = [(await anext(events)).run.partition("-")[0] for _ in range(5)]
    assert sorted(kinds[:3]) == ["large", "small", "small"]
    sent = [(round(at), "large" if len(request.content) > 10_000 else "small") for at, request in rig.requests]
    began = sent[0][0]
    assert sorted((at - began, kind) for at, kind in sent) == [
        (0, "large"), (0, "small"), (0, "small"), (100, "large"), (200, "large"),
    ]  # fmt: skip
    for _, request in rig.requests:
        assert request.headers["content-length"] == str(len(request.content))


async def test_the_end_may_come_just_before_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    async with rig.agent() as (bus, store):
        commit = store.commit

        async def commit_and_end() -> int:
            seq = await commit()
            rig.scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()  # all but the one that is about to send has ended
            return seq

        monkeypatch.setattr(store, "commit", commit_and_end)
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            await anext(events)
    async with rig.agent() as (_, store):
        assert await owed(store) in [(0, 0), (1, 0)]  # imported or still owed, and the role ended in order


async def test_an_hour_of_silence_then_one_import_and_one_event(tmp_path: Path, patient_clock: MockClock) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS if trio.current_time() >= began + 3600 else down(request))
    async with rig.agent() as (bus, store):
        began = trio.current_time()
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            assert (await anext(events)).outcome == "passed"
        await trio.sleep(3600)
        assert len(await store.read(kinds=("ImportFinished",))) == 1
        assert await alerts(store) == [("Alert", "polarize"), ("AlertCleared", "polarize")]
    times = [at - began for at, _ in rig.requests]
    assert 3600 <= times[-1] <= 3900
    waits = [round(later - sooner) for sooner, later in itertools.pairwise(times)]
    assert waits[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert set(waits[9:]) == {300}
    assert len({response_of(request) for _, request in rig.requests}) == len(times)


@pytest.mark.parametrize(
    "fault",
    [
        lambda request: LOGIN_PAGE,
        lambda request: httpx.Response(500, text="oops"),
        lambda request: httpx.Response(200, text='{"status":"SUCC'),
        lambda request: httpx.Response(200, content=b"x" * (role.MAX_REPLY + 1)),
    ],
    ids=["a page with code 200", "code 500", "half an answer", "an endless answer"],
)
async def test_what_is_no_answer_is_tried_again(tmp_path: Path, patient_clock: MockClock, fault: Handler) -> None:
    rig = Rig(tmp_path, lambda request: fault(request) if len(rig.requests) < 3 else SUCCESS)
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            assert (await anext(events)).outcome == "passed"
    assert len(rig.requests) == 3


async def test_a_refusal_is_held_loud_and_tried_again_every_hour(tmp_path: Path, patient_clock: MockClock) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS if len(rig.requests) > 1 else httpx.Response(400, text="no project"))
    async with rig.agent() as (bus, store):
        with bus.subscribe(Alert) as loud, bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            alert = await anext(loud)
            assert alert.code == "ImportRefused.r-9"
            assert "no project" in alert.text
            assert await owed(store) == (1, 1)
            assert (await anext(events)).outcome == "passed"
        assert await owed(store) == (0, 0)
        assert [kind for kind, _ in await alerts(store)] == ["Alert", "AlertCleared"]
    first, second = (at for at, _ in rig.requests)
    assert 3600 <= second - first <= 3600 + 2 * role.LOOK_S


async def test_a_reload_tries_a_refused_report_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS if len(rig.requests) > 1 else httpx.Response(403))
    async with rig.agent() as (bus, store):
        with bus.subscribe(Alert) as loud, bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            await anext(loud)
            await store.commit()
            bus.publish(Reloaded())
            assert (await anext(events)).outcome == "passed"


async def test_a_refused_report_is_loud_again_after_a_restart(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda request: httpx.Response(403, text="go away"))
    async with rig.agent() as (bus, _):
        with bus.subscribe(Alert) as loud:
            rig.finish_a_run(bus)
            await anext(loud)
    async with rig.agent() as (_, store):
        assert await alerts(store) == [("Alert", "ImportRefused.r-9")] * 2
        assert await owed(store) == (1, 1)
    assert len(rig.requests) == 1


async def test_a_report_that_waits_holds_up_no_other(tmp_path: Path, patient_clock: MockClock) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return SUCCESS if b'filename="r-2.xml"' in request.content else down(request)

    rig = Rig(tmp_path, handler)
    async with rig.agent() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus, "r-1")
            rig.finish_a_run(bus, "r-2")
            assert (await anext(events)).run == "r-2"
        assert await owed(store) == (1, 0)


async def test_what_only_the_bus_can_tell_is_unknown_without_one(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda request: httpx.Response(200, json={"status": "TIMED_OUT"}))
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            event = await anext(events)
    assert (event.outcome, event.reason) == ("unknown", "TIMED_OUT")


async def test_a_polarize_that_never_answers_is_left_after_330_s(tmp_path: Path, patient_clock: MockClock) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    rig.delay_s = 10_000
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            event = await anext(events)
            assert trio.current_time() - rig.requests[0][0] == pytest.approx(330, abs=1)
    assert (event.outcome, event.reason) == ("unknown", "no answer in 330 s")


@pytest.mark.parametrize(
    ("more", "project"),
    [({"to_polarize": False}, "RHEL9"), ({"polarion": {"project": "RHEL9-51603"}}, "")],
    ids=["the suite does not want it", "no project anywhere, but a work item for a test of that name"],
)
async def test_what_is_not_to_be_submitted_is_not(tmp_path: Path, more: dict[str, object], project: str) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    rig.settings = msgspec.structs.replace(rig.settings, project=project)
    async with rig.agent() as (bus, store):
        rig.finish_a_run(bus, "r-1", more)
        own = b'<testsuites><properties><property name="polarion-project-id" value="OTHER"/></properties>'
        rig.finish_a_run(bus, "r-2", xml=XML.replace(b"<testsuites>", own))
        with bus.subscribe(ImportFinished) as events:
            assert (await anext(events)).run == "r-2"
        while await owed(store) != (0, 0):
            await trio.lowlevel.checkpoint()
    assert len(rig.requests) == 1
    assert b'"project":"OTHER"' in rig.requests[0][1].content


@pytest.mark.parametrize(
    ("xml", "reason"), [(None, "No such file"), (b"<testsuites><prop", "no XML")], ids=["it is gone", "it is cut"]
)
async def test_a_report_that_cannot_be_read_has_failed(tmp_path: Path, xml: bytes | None, reason: str) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    async with rig.agent() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus, xml=xml)
            event = await anext(events)
        assert await owed(store) == (0, 0)
    assert event.outcome == "failed"
    assert event.reason
    assert reason in event.reason
    assert rig.requests == []


# ---- Polarion --------------------------------------------------------------------------------------------------------


class Polarion:
    """Polarion's importer: `statuses` are what the queue says, one a poll; the last one stays."""

    def __init__(self, *statuses: str, log: str = "", login: int = 302) -> None:
        self.statuses, self.log, self.login = list(statuses), log, login
        self.paths: list[str] = []
        self.has_forgotten_us = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/polarion/")
        self.paths.append(path)
        if path == "j_security_check":
            self.has_forgotten_us = False
            return httpx.Response(self.login, headers={"set-cookie": "JSESSIONID=7"})
        is_known = (
            request.headers.get("cookie") == "JSESSIONID=7"
            if self.login == 302
            else request.headers.get("authorization") == "Basic dTpnZWhlaW0="
        )
        if self.has_forgotten_us or not is_known:
            return LOGIN_PAGE
        if path == "import/xunit":
            (name,) = re.findall(r'filename="([^"]+)"', request.content.decode())
            return httpx.Response(200, json={"files": {name: {"job-ids": [7]}}})
        if path == "import/xunit-queue":
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            return httpx.Response(200, json={"jobs": [{"id": 7, "status": status}]})
        assert (path, request.url.query) == ("import/xunit-log", b"jobId=7")
        return httpx.Response(200, text=self.log)


def polarion_rig(folder: Path, polarion: Polarion) -> Rig:
    rig = Rig(folder, polarion)
    secret = folder / "password"
    secret.write_text("geheim\n")
    secret.chmod(0o600)
    rig.settings = PolarizeSettings(
        mode="polarion",
        url="http://polarion.lab/polarion",
        project="RHEL9",
        user="u",
        password_file=str(secret),
    )
    return rig


@pytest.mark.parametrize("login", [302, 404], ids=["form", "basic"])
async def test_an_unmatched_test_makes_the_import_partial(tmp_path: Path, patient_clock: MockClock, login: int) -> None:
    polarion = Polarion("READY", "RUNNING", "SUCCESS", log="Unable to find work item for 'a'.", login=login)
    rig = polarion_rig(tmp_path, polarion)
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            assert await anext(events) == ImportFinished(
                run="r-9",
                mode="polarion",
                outcome="partial",
                unmatched=("a",),
                jobs=(7,),
                testrun_url="http://polarion.lab/polarion/#/project/RHEL9/testrun?id=r-9",
                log_url="http://polarion.lab/polarion/import/xunit-log?jobId=7",
            )
    assert polarion.paths == ["j_security_check", "import/xunit", *["import/xunit-queue"] * 3, "import/xunit-log"]
    polls = [at for at, request in rig.requests if request.url.path.endswith("queue")]
    assert [round(later - sooner) for sooner, later in itertools.pairwise(polls)] == [10, 10]


async def test_after_a_restart_polling_goes_on_and_nothing_is_sent_again(
    tmp_path: Path, patient_clock: MockClock
) -> None:
    polarion = Polarion("RUNNING")
    rig = polarion_rig(tmp_path, polarion)
    async with rig.agent() as (bus, _):
        rig.finish_a_run(bus)
        await until(lambda: "import/xunit-queue" in polarion.paths)
    assert polarion.paths.count("import/xunit") == 1
    polarion.statuses = ["SUCCESS"]
    async with rig.agent() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            event = await anext(events)
        assert await owed(store) == (0, 0)
    assert (event.outcome, event.jobs) == ("passed", (7,))
    assert polarion.paths.count("import/xunit") == 1


async def test_a_session_that_ends_is_begun_again(tmp_path: Path, patient_clock: MockClock) -> None:
    polarion = Polarion("RUNNING", "RUNNING", "SUCCESS")
    rig = polarion_rig(tmp_path, polarion)
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            await until(lambda: "import/xunit-queue" in polarion.paths)
            polarion.has_forgotten_us = True
            assert (await anext(events)).outcome == "passed"
    assert polarion.paths.count("j_security_check") == 2
    assert polarion.paths.count("import/xunit") == 1


async def test_a_password_that_others_may_read_is_not_used(
    tmp_path: Path, patient_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    rig = polarion_rig(tmp_path, Polarion("SUCCESS"))
    (tmp_path / "password").chmod(0o644)
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            await until(lambda: caplog.text.count("may be read by others") >= 2)
            assert rig.requests == []
            (tmp_path / "password").chmod(0o600)
            assert (await anext(events)).outcome == "passed"


async def test_a_job_that_failed_is_a_failed_import(tmp_path: Path, patient_clock: MockClock) -> None:
    rig = polarion_rig(tmp_path, Polarion("FAILED"))
    async with rig.agent() as (bus, _):
        with bus.subscribe(ImportFinished) as events:
            rig.finish_a_run(bus)
            event = await anext(events)
    assert (event.outcome, event.reason) == ("failed", "job 7: FAILED")


# ---- the CI Bus ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        broker = Broker(listener)
        yield broker
        await broker.cut()


def completion(response: str, status: str) -> Frame:
    headers = {"ack": "1", "message-id": "1", "subscription": "ci", "emissary": response}
    return Frame("MESSAGE", headers, f'{{"status":"{status}","log-url":"http://l"}}'.encode())


async def test_a_completion_ends_a_submission_whose_answer_does_not_come(tmp_path: Path, broker: Broker) -> None:
    rig = Rig(tmp_path, lambda request: SUCCESS)
    rig.delay_s = 10_000
    rig.cibus = CibusSettings(url=f"stomp://127.0.0.1:{broker.port}")
    async with rig.agent() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            await broker.accept()
            await broker.receipt(await broker.next())
            rig.finish_a_run(bus)
            while not rig.requests:
                await trio.lowlevel.checkpoint()
            await broker.send(completion(response_of(rig.requests[0][1]), "failed"))
            event = await anext(events)
            assert (await broker.next()).command == "ACK"
            assert len(await store.read(kinds=("ImportFinished",))) == 1  # on disk before it was acknowledged
        assert await owed(store) == (0, 0)
    assert (event.outcome, event.log_url) == ("failed", "http://l")


async def refused(rig: Rig, broker: Broker, bus: Bus, loud: Subscription[Event]) -> None:
    """A report that was submitted, and refused; the bus is heard."""
    await broker.accept()
    await broker.receipt(await broker.next())
    rig.finish_a_run(bus)
    assert isinstance(await anext(loud), Alert)


async def test_a_completion_ends_a_report_that_was_refused_since(tmp_path: Path, broker: Broker) -> None:
    rig = Rig(tmp_path, lambda request: httpx.Response(403))
    rig.cibus = CibusSettings(url=f"stomp://127.0.0.1:{broker.port}")
    async with rig.agent() as (bus, store):
        with bus.subscribe(Alert, AlertCleared) as loud:
            await refused(rig, broker, bus, loud)
            await broker.send(completion(response_of(rig.requests[0][1]), "passed"))
            assert await anext(loud) == AlertCleared(code="ImportRefused.r-9")
        assert await owed(store) == (0, 0)


async def test_a_completion_in_the_moment_of_a_reload_ends_the_report(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, lambda request: httpx.Response(403))
    rig.cibus = CibusSettings(url=f"stomp://127.0.0.1:{broker.port}")
    is_offered, is_heard, due = trio.Event(), trio.Event(), Outbox.due

    async def offered(self: Outbox, after: int = 0, limit: int = 256) -> list[Owed]:
        """What is due; not before the completion is heard, where it is due once more."""
        rows = await due(self, after, limit)
        if rig.requests:
            is_offered.set()
            await is_heard.wait()
        return rows

    monkeypatch.setattr(Outbox, "due", offered)
    async with rig.agent() as (bus, store):
        with bus.subscribe(Alert, AlertCleared) as loud:
            await refused(rig, broker, bus, loud)
            await store.commit()
            bus.publish(Reloaded())
            with trio.fail_after(20):
                await is_offered.wait()
            await broker.send(completion(response_of(rig.requests[0][1]), "passed"))
            assert await anext(loud) == AlertCleared(code="ImportRefused.r-9")
            is_heard.set()
            with trio.fail_after(60):
                while await owed(store) != (0, 0):
                    await trio.lowlevel.checkpoint()
    assert len(rig.requests) == 1


async def test_a_completion_lets_polarion_be_asked_at_once(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "POLL_S", 3600.0)  # by itself it would not ask while this test lasts
    polarion = Polarion("SUCCESS", log="Unable to find work item for 'a'.")
    rig = polarion_rig(tmp_path, polarion)
    rig.cibus = CibusSettings(url=f"stomp://127.0.0.1:{broker.port}")
    async with rig.agent() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            await broker.accept()
            await broker.receipt(await broker.next())
            rig.finish_a_run(bus)
            while (await store.get("polarize.r-9", Submission) or Submission(run="r-9")).phase != "polling":
                await trio.lowlevel.checkpoint()
            await broker.send(completion(response_of(rig.requests[1][1]), "partial"))
            with trio.fail_after(60):
                event = await anext(events)
    assert (event.outcome, event.unmatched) == ("partial", ("a",))
