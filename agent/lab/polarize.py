"""The lab's Polarize and Polarion importer: both of Polarize's interfaces, Polarion's upload, queue and logs.

Strict as the real ones are: without both parts Polarize never answers; a document that an importer would refuse is
refused. What is taken is on disk before the answer: the document as a file, the import in SQLite. `faults` are switches
for everything that goes wrong with the real ones.

Source: protocols/emissary.md, "Polarize", "Real peers for tests".
"""

import logging
import re
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar
from urllib.parse import parse_qsl

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.errors import ActionError, DocumentError
from agent.core.guard import Guard
from agent.core.head import Head, HttpError
from agent.core.listen import Body, Response, Route
from agent.core.payload import UNREADABLE
from agent.lab import xunit
from agent.lab.transaction import transaction
from agent.polarize.messages import WsData, WsFrame, Xargs

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_DOCUMENT = 65 * 1024 * 1024  # bytes: an xUnit document of 64 MiB with what goes around it
MAX_KEPT = 1000  # imports; the oldest go first, with their documents
MAX_SESSIONS = 100
SILENT_S = 3600.0  # how long "never" is, so that no client can hold connections for ever
JOB_S = 1.0  # how long a job of Polarion's queue takes: half of it READY, half RUNNING
PAGE = "<!DOCTYPE html>\n<html><body><h1>Maintenance</h1></body></html>\n"
LOGIN_PAGE = (
    '<!DOCTYPE html>\n<html><body><form action="j_security_check"><input name="j_password"></form></body></html>\n'
)


Count = Annotated[int, msgspec.Meta(ge=0)]


class ImportFaults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong, until it is switched back. Numbers count down: so many answers are spoilt.

    `late_s`: each answer comes so much later. `silent`: there is none. `html`: a page with code 200. `error`: code 500.
    `half`: the connection breaks in the middle of the answer. `duplicate`: on the websocket the result comes twice.
    `job_ids`: what Polarion gives for them. `status`: what Polarize says, or the end of Polarion's jobs.
    `unmatched`: work items (ids or names) that Polarion does not find.
    """

    late_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    silent: bool = False
    html: Count = 0
    error: Count = 0
    half: Count = 0
    duplicate: bool = False
    job_ids: Literal["good", "null", "zero"] = "good"
    status: str = "SUCCESS"
    unmatched: list[str] = []


class Import(msgspec.Struct, frozen=True, kw_only=True):
    """One document that was taken. `times`: how often its test run was imported; `at` is epoch seconds."""

    job: int
    testrun: str
    project: str
    how: str
    response: tuple[str, str]
    status: str
    counts: dict[str, int]
    unmatched: tuple[str, ...]
    at: float
    times: int


class Polarize:
    """Polarize and Polarion of one lab, in `data`/polarize.db and `data`/imports/. `routes` are where they listen.

    Polarion's password is the lab's token, by its login form. `clock` gives epoch seconds.
    """

    def __init__(
        self, data: Path, guard: Guard, *, job_s: float = JOB_S, clock: Callable[[], float] = time.time
    ) -> None:
        self.faults = ImportFaults()
        self._folder, self._guard, self._job_s, self._clock = data / "imports", guard, job_s, clock
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._disk = _Disk(data / "polarize.db")
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._sessions: deque[str] = deque(maxlen=MAX_SESSIONS)
        self.routes = (
            Route("/xunit/import", self._import_http, scope="open", methods=("POST",), max_body=MAX_DOCUMENT),
            Route("/ws/xunit/import", websocket=self._import_ws, scope="open"),
            Route("/polarion/j_security_check", self._log_in, scope="open", methods=("POST",), max_body=4096),
            Route("/polarion/import/xunit", self._upload, scope="open", methods=("POST",), max_body=MAX_DOCUMENT),
            Route("/polarion/import/xunit-queue", self._queue, scope="open"),
            Route("/polarion/import/xunit-log", self._log, scope="open"),
        )

    async def imports(self) -> list[Import]:
        """What was taken, oldest first."""
        return await self._work(self._disk.all)

    def document(self, testrun: str) -> Path:
        """Where the document of a test run is kept."""
        return self._folder / f"{testrun}.xml"

    async def close(self) -> None:
        """Close the file."""
        await self._work(self._disk.close)

    # ---- Polarize ----------------------------------------------------------------------------------------------------

    async def _import_http(self, head: Head, body: Body) -> Response:
        parts = read_multipart(head.headers.get("content-type") or "", await body.read())
        if "xunit" not in parts or "xargs" not in parts:
            log.info("a part is missing parts=%s: no answer", ",".join(parts))
            await self._never()
        return await self._answer(
            msgspec.json.encode(await self._result(parts["xunit"], parts["xargs"], "polarize-http"))
        )

    async def _import_ws(self, head: Head, ws: WebSocketConnection) -> None:
        frame = await ws.get_message()
        try:
            sent = msgspec.json.decode(frame, type=WsFrame)
            data = msgspec.json.decode(sent.data) if isinstance(sent.data, str) else sent.data
            given = msgspec.convert(data, WsData)
        except UNREADABLE as err:
            await ws.send_message(_json({"result": "error", "message": f"Failed uploading necessary files: {err}"}))
            return
        if sent.ack:
            ack = {"op": f"{sent.op}-response", "type": sent.type, "ack": False, "tag": sent.tag}
            await ws.send_message(_json({**ack, "data": "Received message"}))
        listener = f"umb-{secrets.token_hex(4)}"
        await ws.send_message(_json({"id": listener, "message": "Listening to VirtualTopic.qe.ci.>"}))
        try:
            result = await self._result(given.xunit.encode(), given.xargs.encode(), "polarize-ws")
        except HttpError as err:
            return await ws.aclose(1011, err.text[:100])
        await self._spoil_ws(ws)
        # The real one loses the tag.
        answer = _json({"op": "-response", "type": "na", "ack": False, "tag": "xunitImportWS", "data": result})
        for _ in range(2 if self.faults.duplicate else 1):
            await ws.send_message(answer)
        # It leaves the closing to the client.
        try:
            await ws.get_message()
        except ConnectionClosed:
            log.debug("submitter gone peer=%s", head.peer)

    async def _result(self, xml: bytes, xargs: bytes, how: str) -> dict[str, Any]:
        try:
            given = msgspec.json.decode(xargs, type=Xargs)
            document = await self._work(xunit.read, xml)
            selector = given.xunit.selector
            if (given.project, given.xunit.testrun.id) != (document.project, document.testrun):
                raise _xargs_no("project and test run")
            if (selector.name, selector.value) != document.response:
                raise _xargs_no("the selector")
        except (DocumentError, *UNREADABLE) as err:
            log.info("refused how=%s: %s", how, err)
            return {"status": "ERROR", "result": "", "errors": str(err), "new-xunit-path": None}
        taken = await self._take(xml, document, how)
        return {"status": taken.status, "result": "", "errors": "", "new-xunit-path": str(self.document(taken.testrun))}

    # ---- Polarion ----------------------------------------------------------------------------------------------------

    async def _log_in(self, head: Head, body: Body) -> Response:
        form = dict(parse_qsl((await body.read()).decode(errors="replace")))
        try:
            if form.get("j_username"):
                self._guard.check(form.get("j_password", ""), head.peer)
                session = secrets.token_urlsafe(24)
                self._sessions.append(session)
                cookie = f"JSESSIONID={session}; Path=/polarion; HttpOnly; SameSite=Strict"
                return Response(303, (("Set-Cookie", cookie), ("Location", "/polarion/")))
        except ActionError as err:
            log.info("login refused peer=%s: %s", head.peer, err.what)
        return _page(LOGIN_PAGE)

    def _is_in(self, head: Head) -> bool:
        sent = re.findall(r"\bJSESSIONID=([\w-]+)", head.headers.get("cookie") or "")
        return any(secrets.compare_digest(session, known) for session in sent for known in self._sessions)

    async def _upload(self, head: Head, body: Body) -> Response:
        raw = await body.read()
        if not self._is_in(head):
            return _page(LOGIN_PAGE)
        content_type = head.headers.get("content-type") or ""
        if (xml := read_multipart(content_type, raw).get("file")) is None:
            return Response(400, (("Content-Type", "text/plain"),), b"the part file is missing\n")
        (name,) = re.findall(rb'filename="([^"\r\n]*)"', raw[:4096])[:1] or [b"file"]
        reply: dict[str, Any] = {}
        try:
            document = await self._work(xunit.read, xml)
        except DocumentError as err:
            reply = {"error-message": str(err), "job-ids": None}
        else:
            match self.faults.job_ids:
                case "good":
                    reply = {"job-ids": [(await self._take(xml, document, "polarion")).job]}
                case "null":
                    reply = {"job-ids": None}
                case "zero":
                    reply = {"job-ids": [0]}
        return await self._answer(msgspec.json.encode({"files": {name.decode(errors="replace"): reply}}))

    async def _queue(self, head: Head, body: Body) -> Response:
        if not self._is_in(head):
            return _page(LOGIN_PAGE)
        wanted = set(head.query.get("jobIds", "").split(","))
        jobs = [
            {"id": item.job, "status": self._status(item)}
            for item in await self.imports()
            if str(item.job) in wanted and item.how == "polarion"
        ]
        return await self._answer(msgspec.json.encode({"jobs": jobs, "maxPages": 1}))

    def _status(self, item: Import) -> str:
        age = self._clock() - item.at
        if age < self._job_s:
            return "READY" if age < self._job_s / 2 else "RUNNING"
        return item.status

    async def _log(self, head: Head, body: Body) -> Response:
        if not self._is_in(head):
            return _page(LOGIN_PAGE)
        wanted = head.query.get("jobId", "")
        item = next((item for item in await self.imports() if str(item.job) == wanted), None)
        if item is None:
            return Response(404, (("Content-Type", "text/plain"),), b"no such job\n")
        lines = [f"Starting import of XUnit results for test run {item.testrun}"]
        lines += [f"Unable to find work item for '{name}'." for name in item.unmatched]
        lines += [f"{sum(item.counts.values())} test records, status {item.status}"]
        return await self._answer("".join(f"{line}\n" for line in lines).encode(), "text/plain; charset=utf-8")

    # ---- both --------------------------------------------------------------------------------------------------------

    async def _take(self, xml: bytes, document: xunit.Document, how: str) -> Import:
        counts: dict[str, int] = {}
        for case in document.cases:
            counts[case.verdict] = counts.get(case.verdict, 0) + 1
        unknown = set(self.faults.unmatched)
        item = Import(
            job=0,
            testrun=document.testrun,
            project=document.project,
            how=how,
            response=document.response,
            status=self.faults.status,
            counts=counts,
            unmatched=tuple(case.id for case in document.cases if case.id in unknown or case.name in unknown),
            at=self._clock(),
            times=1,
        )
        try:
            return await self._work(self._keep, xml, item)
        except (ActionError, OSError) as err:
            log.error("not imported testrun=%s error=%s", item.testrun, err)  # noqa: TRY400 - the disk, not a bug
            raise HttpError(500, f"the document cannot be kept: {err}") from err

    def _keep(self, xml: bytes, item: Import) -> Import:
        path = self.document(item.testrun)
        aside = path.with_suffix(".new")
        try:
            aside.write_bytes(xml)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        kept, gone = self._disk.add(item)
        for testrun in gone:
            self.document(testrun).unlink(missing_ok=True)
        log.info("imported testrun=%s how=%s job=%d times=%d", kept.testrun, kept.how, kept.job, kept.times)
        return kept

    async def _answer(self, body: bytes, kind: str = "application/json") -> Response:
        """The answer, or what the faults make of it."""
        faults = self.faults
        await self._delay()
        if faults.html:
            faults.html -= 1
            return _page(PAGE)
        if faults.error:
            faults.error -= 1
            raise HttpError(500, "told to fail")
        if faults.half:
            faults.half -= 1
            return Response(200, (("Content-Type", kind), ("Content-Length", str(len(body)))), _half(body))
        return Response(200, (("Content-Type", kind),), body)

    async def _spoil_ws(self, ws: WebSocketConnection) -> None:
        await self._delay()
        if self.faults.html:
            self.faults.html -= 1
            await ws.send_message(PAGE)
        if self.faults.error or self.faults.half:
            self.faults.error, self.faults.half = max(0, self.faults.error - 1), max(0, self.faults.half - 1)
            await ws.aclose(1011, "told to fail")

    async def _delay(self) -> None:
        if self.faults.silent:
            await self._never()
        await trio.sleep(self.faults.late_s)

    async def _never(self) -> NoReturn:
        await trio.sleep(SILENT_S)
        raise HttpError(503, "there was no answer")

    async def _work(self, call: Callable[..., T], *args: Any) -> T:
        """SQLite and files in a thread, one call at a time."""
        return await trio.to_thread.run_sync(call, *args, limiter=self._one_at_a_time)


class _Disk:
    """The imports, one row a test run and way. Calls block."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what is answered is on disk
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS import(job INTEGER PRIMARY KEY AUTOINCREMENT, testrun TEXT UNIQUE, value BLOB)"
        )

    def add(self, item: Import) -> tuple[Import, list[str]]:
        """The import with its job, in place of its test run's earlier one; the test runs that are not kept any more."""
        row = self._db.execute("SELECT value FROM import WHERE testrun = ?", (item.testrun,)).fetchone()
        item = msgspec.structs.replace(item, times=_read(0, row[0]).times + 1 if row else 1)
        put = "INSERT OR REPLACE INTO import(testrun, value) VALUES(?, ?)"
        beyond = "SELECT testrun FROM import ORDER BY job DESC LIMIT -1 OFFSET ?"
        with transaction(self._db):
            job = self._db.execute(put, (item.testrun, msgspec.json.encode(item))).lastrowid
            old = self._db.execute(beyond, (MAX_KEPT,)).fetchall()
            self._db.executemany("DELETE FROM import WHERE testrun = ?", old)
        return msgspec.structs.replace(item, job=int(job or 0)), [testrun for (testrun,) in old]

    def all(self) -> list[Import]:
        return [_read(job, value) for job, value in self._db.execute("SELECT job, value FROM import ORDER BY job")]

    def close(self) -> None:
        self._db.close()


def read_multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    """The parts of a multipart/form-data body by name. Raises HttpError 400 for what is none."""
    found = re.search(r'multipart/form-data;.*\bboundary="?([^";,]{1,70})"?', content_type, re.IGNORECASE)
    if found is None:
        raise HttpError(400, "expected multipart/form-data with a boundary")
    mark = b"--" + found[1].strip().encode()
    pieces = (b"\r\n" + body).split(b"\r\n" + mark)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise HttpError(400, "the body ends before its last boundary")
    parts: dict[str, bytes] = {}
    for piece in pieces[1:-1]:
        head, blank, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = re.search(rb'content-disposition:\s*form-data;.*\bname="([^"\r\n]*)"', b" " + head, re.IGNORECASE)
        if not blank or name is None:
            raise HttpError(400, "a part without a content-disposition that names it")
        parts[name[1].decode(errors="replace")] = content
    return parts


def _read(job: int, value: bytes) -> Import:
    return msgspec.structs.replace(msgspec.json.decode(value, type=Import), job=job)


def _xargs_no(what: str) -> DocumentError:
    return DocumentError("xargs", 0, "", f"{what} differ from the document's properties", remedy="Make both agree.")


async def _half(body: bytes) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    raise trio.BrokenResourceError("told to break off")


def _page(text: str) -> Response:
    return Response(200, (("Content-Type", "text/html; charset=utf-8"),), text.encode())


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
