"""The lab's Polarize and Polarion over their port, with plain requests and with the agent's role as their client."""

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import httpx
import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, open_websocket_url

from agent.core import listen
from agent.core.bus import Bus
from agent.core.events import ImportFinished
from agent.core.guard import Guard
from agent.core.link import Dial, connect
from agent.core.metrics import Metrics
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.lab.polarize import MAX_DOCUMENT, Polarize
from agent.polarize import role, submit
from agent.polarize.settings import CibusSettings, Mode, PolarizeSettings
from tests import no_json
from tests.ended_run import finished, started

XML = (
    b'<testsuites><testsuite name="login" tests="2" failures="1" errors="0" skipped="0">'
    b'<testcase classname="a.js" name="one"/><testcase classname="a.js" name="two">'
    b'<failure type="failure" message="m"/></testcase></testsuite></testsuites>'
)
TOKEN = "lab-token"


def client_of(base_url: str, answer_s: float = 60) -> httpx.AsyncClient:
    """A client for one server, which has so many seconds to answer."""
    return httpx.AsyncClient(base_url=base_url, timeout=httpx.Timeout(60, read=answer_s), trust_env=False)


class Clock:
    """Epoch seconds, set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A lab's Polarize on a port of its own, and an agent for it."""

    def __init__(self, folder: Path, polarize: Polarize, address: str) -> None:
        self.folder, self.polarize, self.address = folder, polarize, address
        (folder / "password").write_text(TOKEN)
        (folder / "password").chmod(0o600)

    def settings(self, mode: Mode) -> PolarizeSettings:
        return PolarizeSettings(
            mode=mode,
            url=f"http://{self.address}{'/polarion' if mode == 'polarion' else ''}",
            project="SAMPLE",
            user="u" if mode == "polarion" else "",
            password_file=str(self.folder / "password") if mode == "polarion" else "",
        )

    async def imported(self, mode: Mode, run: str = "r-9", xml: bytes = XML) -> ImportFinished:
        """Let an agent submit the report of a run; the outcome."""
        path = self.folder / f"{run}.xml"
        path.write_bytes(xml)
        store = open_store(self.folder / f"state-{run}-{mode}", reserve=4096)
        bus = Bus(store)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                await nursery.start(
                    lambda task_status: role.run(
                        bus,
                        store,
                        self.settings(mode),
                        CibusSettings(),
                        "lab-07",
                        Health("polarize"),
                        random=Random(1),
                        metrics=Metrics(),
                        task_status=task_status,
                    )
                )
                with trio.fail_after(60), bus.subscribe(ImportFinished) as events:
                    bus.publish(started(run))
                    bus.publish(finished(run, path))
                    event = await anext(events)
                nursery.cancel_scope.cancel()
        finally:
            store.close()
        return event


@asynccontextmanager
async def serving(folder: Path, job_s: float = 0.0, clock: Callable[[], float] = time.time) -> AsyncIterator[Rig]:
    guard = Guard([(TOKEN, "control")], {}, False, (), trio.current_time)
    polarize = Polarize(folder / "lab", guard, job_s=job_s, clock=clock)
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(
            lambda task_status: listen.serve(
                ["127.0.0.1:0"],
                polarize.routes,
                guard,
                metrics=Metrics(),
                max_message=MAX_DOCUMENT,
                task_status=task_status,
            )
        )
        yield Rig(folder, polarize, address)
        nursery.cancel_scope.cancel()
    await polarize.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as rig:
        yield rig


@pytest.mark.parametrize("mode", ["polarize-http", "polarize-ws"])
async def test_an_agents_report_is_taken_and_kept(rig: Rig, mode: Mode) -> None:
    assert (await rig.imported(mode)).outcome == "passed"
    (item,) = await rig.polarize.imports()
    assert (item.testrun, item.project, item.how) == ("r-9", "SAMPLE", mode)
    assert item.counts == {"Passed": 1, "Failed": 1}
    assert item.response[1].startswith("lab-07.")
    assert rig.polarize.document("r-9").read_bytes().endswith(XML.removeprefix(b"<testsuites>"))


@pytest.mark.parametrize("mode", ["polarize-http", "polarize-ws"])
async def test_a_report_of_some_megabytes_is_taken(rig: Rig, mode: Mode) -> None:
    output = b"<system-out>" + "größer\n".encode() * 400_000 + b"</system-out>"
    assert (await rig.imported(mode, xml=XML.replace(b'message="m"/>', b'message="m"/>' + output))).outcome == "passed"
    assert rig.polarize.document("r-9").stat().st_size > 3_000_000


async def test_polarion_takes_a_report_by_its_queue_and_names_what_it_did_not_find(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.polarize.progress.POLL_S", 0.0)
    rig.polarize.faults.unmatched = ["two"]
    event = await rig.imported("polarion")
    assert (event.outcome, event.unmatched) == ("partial", ("two",))
    assert event.jobs == ((await rig.polarize.imports())[0].job,)
    assert event.testrun_url == f"http://{rig.address}/polarion/#/project/SAMPLE/testrun?id=r-9"


@pytest.mark.parametrize("mode", ["polarize-http", "polarize-ws", "polarion"])
@pytest.mark.parametrize("fault", ["html", "error", "half"])
async def test_a_spoilt_answer_leads_to_a_second_import_of_the_same_run(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, mode: Mode, fault: str
) -> None:
    monkeypatch.setattr("agent.polarize.progress.POLL_S", 0.0)
    monkeypatch.setattr("agent.polarize.progress.FIRST_RETRY_S", 0.0)
    setattr(rig.polarize.faults, fault, 1)
    assert (await rig.imported(mode)).outcome == "passed"
    (item,) = await rig.polarize.imports()
    assert item.times == 2
    assert getattr(rig.polarize.faults, fault) == 0


async def test_a_result_that_comes_twice_is_one_outcome(rig: Rig) -> None:
    rig.polarize.faults.duplicate = True
    assert (await rig.imported("polarize-ws")).outcome == "passed"
    (item,) = await rig.polarize.imports()
    assert item.times == 1


@pytest.mark.parametrize(("status", "outcome"), [("TIMED_OUT", "unknown"), ("FAILED", "failed")])
@pytest.mark.parametrize("mode", ["polarize-http", "polarize-ws"])
async def test_another_status_is_another_outcome(rig: Rig, mode: Mode, status: str, outcome: str) -> None:
    rig.polarize.faults.status = status
    assert (await rig.imported(mode)).outcome == outcome


@pytest.mark.parametrize("job_ids", ["null", "zero"])
async def test_polarion_may_give_no_job(rig: Rig, job_ids: str) -> None:
    rig.polarize.faults = type(rig.polarize.faults)(job_ids="null" if job_ids == "null" else "zero")
    async with client_of(f"http://{rig.address}") as client:
        await client.post("/polarion/j_security_check", data={"j_username": "u", "j_password": TOKEN})
        reply = await client.post("/polarion/import/xunit", files={"file": ("r.xml", document())})
    assert isinstance(submit.read_accepted(reply.status_code, reply.content, "r.xml"), submit.Refused)


async def test_a_late_answer_is_late(rig: Rig) -> None:
    rig.polarize.faults.late_s = 0.2
    began = trio.current_time()
    await rig.imported("polarize-http")
    assert trio.current_time() - began >= 0.2


def document() -> bytes:
    return submit.prepare(XML, "r-9", "SAMPLE", ("emissary", "lab-07.abc")).xml


def xargs(project: str = "SAMPLE") -> bytes:
    report = submit.prepare(XML, "r-9", "SAMPLE", ("emissary", "lab-07.abc"))
    return msgspec.json.encode(msgspec.structs.replace(submit.arguments(report), project=project))


@pytest.mark.parametrize(
    ("parts", "is_silent"),
    [(("xunit",), False), (("xargs",), False), (("xunit", "xargs"), True)],
    ids=["no xargs", "no xunit", "told to be silent"],
)
async def test_polarize_may_never_answer(rig: Rig, parts: tuple[str, ...], is_silent: bool) -> None:
    rig.polarize.faults.silent = is_silent
    contents = {"xunit": document(), "xargs": xargs()}
    files = {name: ("file", contents[name]) for name in parts}
    async with client_of(f"http://{rig.address}", answer_s=0.5) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/xunit/import", files=files)


@pytest.mark.parametrize(
    ("xml", "arguments", "complaint"),
    [
        (XML, xargs(), "polarion-project-id is missing"),
        (document(), b"{}", "missing required field"),
        (document(), xargs("OTHER"), "project and test run differ"),
        (document(), no_json.SPOILED[1], ""),
    ],
)
async def test_what_does_not_fit_is_an_error_with_code_200(
    rig: Rig, xml: bytes, arguments: bytes, complaint: str
) -> None:
    async with client_of(f"http://{rig.address}") as client:
        reply = await client.post("/xunit/import", files={"xunit": ("a.xml", xml), "xargs": ("a.json", arguments)})
    assert reply.status_code == 200
    assert reply.json()["status"] == "ERROR"
    assert complaint in reply.json()["errors"]
    assert await rig.polarize.imports() == []


@pytest.mark.parametrize("full", ["folder", "database"])
async def test_what_the_disk_does_not_take_is_told_of_and_no_half_is_left(rig: Rig, full: str) -> None:
    folder, disk = rig.folder / "lab/imports", rig.polarize._disk._db
    if full == "folder":
        folder.rmdir()
        folder.write_text("no folder")
    else:
        disk.execute("PRAGMA query_only = 1")
    async with client_of(f"http://{rig.address}") as client:
        files = {"xunit": ("a.xml", document()), "xargs": ("a.json", xargs())}
        reply = await client.post("/xunit/import", files=files)
        assert (reply.status_code, reply.text.startswith("the document cannot be kept: ")) == (500, True)
    async with connect(Dial(f"ws://{rig.address}/ws/xunit/import")) as ws:
        sent = {"xunit": document().decode(), "xargs": xargs().decode()}
        await ws.send_message(json.dumps({"op": "x", "type": "na", "tag": "t", "ack": False, "data": sent}))
        assert "Listening" in str(await ws.get_message())
        with pytest.raises(ConnectionClosed) as closed:
            await ws.get_message()
        assert closed.value.reason is not None
        assert closed.value.reason.code == 1011
        assert str(closed.value.reason.reason).startswith("the document cannot be kept: ")
    assert not list(folder.glob("*.new"))
    if full == "folder":
        folder.unlink()
        folder.mkdir()
    else:
        disk.execute("PRAGMA query_only = 0")
    assert (await rig.imported("polarize-http")).outcome == "passed"
    assert [item.times for item in await rig.polarize.imports()] == [1]


async def test_a_body_that_is_no_form_is_refused(rig: Rig) -> None:
    async with client_of(f"http://{rig.address}") as client:
        for kind, body in [("text/xml", XML), ("multipart/form-data; boundary=x", b"--x\r\ncontent-dispo")]:
            reply = await client.post("/xunit/import", content=body, headers={"content-type": kind})
            assert reply.status_code == 400


@pytest.mark.parametrize("ws_data", ["string", "object"])
async def test_the_websocket_says_what_the_real_one_says(rig: Rig, ws_data: str) -> None:
    settings = PolarizeSettings(
        mode="polarize-ws",
        url=f"http://{rig.address}",
        ws_data="object" if ws_data == "object" else "string",
    )
    report = submit.prepare(XML, "r-9", "SAMPLE", ("emissary", "lab-07.abc"))
    request = submit.polarize_ws(settings, report, "", Random(1))
    async with open_websocket_url(request.url) as ws:
        await ws.send_message(request.text)
        ack, notice, result = [json.loads(await ws.get_message()) for _ in range(3)]
    assert ack == {
        "op": "xunit-import-ws-response",
        "type": "na",
        "ack": False,
        "tag": request.tag,
        "data": "Received message",
    }
    assert notice["message"] == "Listening to VirtualTopic.qe.ci.>"
    assert (result["op"], result["tag"], result["data"]["status"]) == ("-response", "xunitImportWS", "SUCCESS")


async def test_a_frame_that_does_not_fit_is_an_error(rig: Rig) -> None:
    async with open_websocket_url(f"ws://{rig.address}/ws/xunit/import") as ws:
        await ws.send_message('{"op":"xunit-import-ws"}')
        reply = json.loads(await ws.get_message())
    assert reply["result"] == "error"


async def test_polarion_wants_its_login(rig: Rig) -> None:
    async with client_of(f"http://{rig.address}") as client:
        assert b"j_password" in (await client.get("/polarion/import/xunit-queue?jobIds=1")).content
        wrong = await client.post("/polarion/j_security_check", data={"j_username": "u", "j_password": "no"})
        assert isinstance(submit.read_login(wrong.status_code, wrong.content), submit.Refused)
        right = await client.post("/polarion/j_security_check", data={"j_username": "u", "j_password": TOKEN})
        assert submit.read_login(right.status_code, right.content) == "session"
        assert (await client.get("/polarion/import/xunit-queue?jobIds=1")).json() == {"jobs": [], "maxPages": 1}


async def test_imports_and_the_queue_survive_a_restart_of_the_lab(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        await rig.imported("polarize-http", "r-1")
        await rig.imported("polarize-http", "r-2")
        before = await rig.polarize.imports()
    async with serving(tmp_path) as rig:
        assert await rig.polarize.imports() == before
        await rig.imported("polarize-http", "r-1")
        assert [(item.testrun, item.times) for item in await rig.polarize.imports()] == [("r-2", 1), ("r-1", 2)]


async def test_a_job_goes_from_ready_over_running_to_its_end(tmp_path: Path) -> None:
    clock = Clock()
    seen = []
    async with serving(tmp_path, job_s=10, clock=clock) as rig, client_of(f"http://{rig.address}") as client:
        await client.post("/polarion/j_security_check", data={"j_username": "u", "j_password": TOKEN})
        taken = await client.post("/polarion/import/xunit", files={"file": ("r.xml", document())})
        (job,) = taken.json()["files"]["r.xml"]["job-ids"]
        for clock.now in (100.0, 104.0, 106.0, 111.0):
            queue = await client.get(f"/polarion/import/xunit-queue?jobtype=completed&jobIds={job}")
            seen += [item["status"] for item in queue.json()["jobs"]]
    assert seen == ["READY", "READY", "RUNNING", "SUCCESS"]
