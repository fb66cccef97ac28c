"""Submitting one xUnit document: what is sent in each mode, and what the replies mean. Without I/O.

Each mode builds its request from a `Report`; each reply, whatever it is, becomes a member of `Reply`, which
`progress.follow` applies to the submission. Randomness is an argument.

Source: protocols/emissary.md, "Polarize", "CI Bus".
"""

import base64
import re
import string
import uuid
from collections.abc import Sequence
from random import Random
from typing import Literal, TypeAlias, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from xml.parsers import expat

import msgspec

from agent.core import xmltext
from agent.core.errors import DocumentError
from agent.core.payload import UNREADABLE
from agent.polarize.messages import (
    Completion,
    Custom,
    ImportAccepted,
    ImportReply,
    Queue,
    Selector,
    Server,
    SuiteFlags,
    TestRun,
    WsData,
    WsFrame,
    Xargs,
    XunitArgs,
)
from agent.polarize.settings import PolarizeSettings

MAX_UNMATCHED = 1000
MAX_JOBS = 100  # of one document; all of them are asked for in one URL

_WAIT = {"PENDING", "QUEUED", "TIMED_OUT", "NO_MESSAGE", "EMPTY_MESSAGE"}
_GOES_ON = {"PENDING", "QUEUED"}  # on the websocket bus messages follow these
_TRY_LATER = {408, 425, 429}  # of the 4xx, those that speak of the moment and not of the request
_UNMATCHED = re.compile(r"Unable to find (?:\*unique\* )?work item for '(.+)'")
_WS_SCHEMES = {"http": "ws", "https": "wss"}

# ---- what is sent --------------------------------------------------------------------------------------------------


class HttpRequest(msgspec.Struct, frozen=True):
    """An HTTP request; `headers` without what the connection adds. The body in pieces: a document is not copied."""

    method: Literal["GET", "POST"]
    url: str
    headers: dict[str, str] = {}
    body: tuple[bytes, ...] = ()


class WsRequest(msgspec.Struct, frozen=True):
    """The one frame that is sent on a websocket to `url`; its ack carries `tag`."""

    url: str
    tag: str
    text: str


class Report(msgspec.Struct, frozen=True):
    """A document ready to be sent. `properties` are those of `testsuites`, `response` is its name and its value."""

    run: str
    xml: bytes
    properties: dict[str, str]
    response: tuple[str, str]

    @property
    def file_name(self) -> str:
        """How the file is called on the wire; a run id needs no quoting."""
        return f"{self.run}.xml"


def testrun_id(run: str) -> str:
    """The test run's id, always ours: importing a run twice updates it instead of making a second one."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", run)


def new_response(ident: str, random: Random) -> str:
    """The value by which the completion of one submission is recognised: `<ident>.<12 letters>`."""
    return f"{ident}.{''.join(random.choices(string.ascii_lowercase, k=12))}"


def project_of(xml: bytes) -> str | None:
    """The Polarion project that the document itself names. Raises DocumentError."""
    return _Properties(xml).values.get("polarion-project-id")


def prepare(xml: bytes, run: str, project: str, response: tuple[str, str]) -> Report:
    """Put into an xUnit document what a submission needs: `response` and the test run's id always, project and lookup
    method where they are missing. `xml` is UTF-8 as suites/xunit.py writes it; the rest of it stays byte for byte.

    Raises DocumentError: it is no xUnit document.
    """
    found = _Properties(xml)
    kept = {name: value for name, value in found.values.items() if not name.startswith("polarion-response-")}
    ours = {"polarion-testrun-id": testrun_id(run), f"polarion-response-{response[0]}": response[1]}
    properties = {"polarion-project-id": project, "polarion-lookup-method": "name"} | kept | ours
    lines = (
        f'<property name="{xmltext.value(name)}" value="{xmltext.value(text)}"/>' for name, text in properties.items()
    )
    block = f"<properties>{''.join(lines)}</properties>\n".encode()
    whole = memoryview(xml)  # 64 MiB are not to be copied twice
    return Report(run, b"".join((whole[: found.start], block, whole[found.end :])), properties, response)


def arguments(report: Report, server: Server | None = None) -> Xargs:
    """The `xargs` that go with a report."""
    given = report.properties
    return Xargs(
        project=given["polarion-project-id"],
        xunit=XunitArgs(
            testrun=TestRun(
                id=given["polarion-testrun-id"],
                title=given.get("polarion-testrun-title", report.run),
                template_id=given.get("polarion-testrun-template-id", ""),
                testrun_type=given.get("polarion-testrun-type-id", ""),
            ),
            custom=Custom(
                test_suite=SuiteFlags(
                    dry_run=given.get("polarion-dry-run", "false") == "true",
                    set_testrun_finished=given.get("polarion-set-testrun-finished", "true") == "true",
                    include_skipped=given.get("polarion-include-skipped", "true") == "true",
                ),
                properties={
                    name.removeprefix("polarion-custom-"): value
                    for name, value in given.items()
                    if name.startswith("polarion-custom-")
                },
            ),
            selector=Selector(*report.response),
        ),
        servers={"polarion": server} if server else {},
    )


def polarize_http(settings: PolarizeSettings, report: Report, password: str, random: Random) -> HttpRequest:
    """Mode `polarize-http`: both parts, for the real service never answers while one is missing."""
    xargs = msgspec.json.encode(arguments(report, _server(settings, password)))
    parts = [
        ("xunit", report.file_name, "application/xml", report.xml),
        ("xargs", "xargs.json", "application/json", xargs),
    ]
    return _upload(f"{_base(settings)}/xunit/import", parts, random)


def polarize_ws(settings: PolarizeSettings, report: Report, password: str, random: Random) -> WsRequest:
    """Mode `polarize-ws`: one frame. `data` is text, the real service's quirk, unless the settings say "object"."""
    xargs = msgspec.json.encode(arguments(report, _server(settings, password))).decode()
    data = WsData(report.xml.decode(), xargs)
    tag = f"xunit-import-{uuid.UUID(int=random.getrandbits(128), version=4)}"
    frame = WsFrame(
        op="xunit-import-ws",
        type="na",
        tag=tag,
        ack=True,
        data=msgspec.json.encode(data).decode() if settings.ws_data == "string" else data,
    )
    base = urlsplit(_base(settings))
    url = base._replace(scheme=_WS_SCHEMES.get(base.scheme, base.scheme)).geturl()
    return WsRequest(f"{url}/ws/xunit/import", tag, msgspec.json.encode(frame).decode())


def polarion_login(settings: PolarizeSettings, password: str) -> HttpRequest:
    """The login form of Polarion; the reply's cookies are the session."""
    form = {"j_username": settings.user, "j_password": password, "submit": "Log In", "rememberme": "true"}
    return HttpRequest(
        "POST",
        f"{_base(settings)}/j_security_check",
        {"content-type": "application/x-www-form-urlencoded"},
        (urlencode(form).encode(),),
    )


def basic(settings: PolarizeSettings, password: str) -> dict[str, str]:
    """The header for a Polarion without a login form."""
    return {"authorization": "Basic " + base64.b64encode(f"{settings.user}:{password}".encode()).decode()}


def polarion_import(settings: PolarizeSettings, report: Report, random: Random) -> HttpRequest:
    """Mode `polarion`: the upload."""
    return _upload(
        f"{_base(settings)}/import/xunit", [("file", report.file_name, "application/xml", report.xml)], random
    )


def polarion_queue(settings: PolarizeSettings, jobs: Sequence[int]) -> HttpRequest:
    """Ask how far these jobs are."""
    ids = ",".join(map(str, jobs))
    return HttpRequest("GET", f"{_base(settings)}/import/xunit-queue?jobtype=completed&jobIds={ids}", _WANT_JSON)


def polarion_log(settings: PolarizeSettings, job: int) -> HttpRequest:
    """Ask for a job's log."""
    return HttpRequest("GET", f"{_base(settings)}/import/xunit-log?jobId={job}")


def polarion_testrun_url(settings: PolarizeSettings, project: str, run: str) -> str:
    """Where Polarion shows the test run."""
    return f"{_base(settings)}/#/project/{quote(project, safe='')}/testrun?id={testrun_id(run)}"


_WANT_JSON = {"accept": "application/json"}


def _base(settings: PolarizeSettings) -> str:
    return settings.url.rstrip("/")


def _server(settings: PolarizeSettings, password: str) -> Server | None:
    return Server(settings.user, password) if settings.user else None


def _upload(url: str, parts: Sequence[tuple[str, str, str, bytes]], random: Random) -> HttpRequest:
    """A multipart/form-data request; `parts` are name, file name, content type and content."""
    boundary = f"{random.getrandbits(128):032x}"
    pieces: list[bytes] = []
    for name, file_name, kind, content in parts:
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"; filename="{file_name}"\r\n'
        pieces += [head.encode(), f"content-type: {kind}\r\n\r\n".encode(), content, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    headers = {"content-type": f"multipart/form-data; boundary={boundary}", **_WANT_JSON}
    return HttpRequest("POST", url, headers, tuple(pieces))


class _Enough(Exception):
    """Raised out of expat when the properties have been read: the tests behind them may be 64 MiB."""


class _Properties:
    """The properties of `testsuites`, and the bytes [start, end) that they, or nothing yet, take up."""

    def __init__(self, xml: bytes) -> None:
        self.values: dict[str, str] = {}
        self.start, self.end, self._path = -1, -1, list[str]()
        self._parser = expat.ParserCreate("UTF-8")
        self._parser.StartElementHandler, self._parser.EndElementHandler = self._begin, self._leave
        self._parser.StartDoctypeDeclHandler = self._doctype
        try:
            self._parser.Parse(xml, True)
        except _Enough:
            return
        except expat.ExpatError as err:
            raise _no_xunit(err.lineno, f"no XML: {expat.errors.messages[err.code]}") from err
        raise _no_xunit(self._parser.CurrentLineNumber, "a <testsuites> without a <testsuite>")

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        match self._path:
            case [] if name != "testsuites":
                raise _no_xunit(self._parser.CurrentLineNumber, f"its root is <{name[:40]}>, not <testsuites>")
            case ["testsuites"]:
                at = self._parser.CurrentByteIndex
                self.start = self.start if self.start >= 0 else at
                self.end = at
                if name != "properties":
                    raise _Enough
            case ["testsuites", "properties"] if name == "property":
                self.values[attributes.get("name", "")] = attributes.get("value", "")
        self._path.append(name)

    def _leave(self, name: str) -> None:
        self._path.pop()

    def _doctype(self, *_: object) -> None:
        raise _no_xunit(self._parser.CurrentLineNumber, "a document type declaration, which may hide entities")


def _no_xunit(line: int, what: str) -> DocumentError:
    return DocumentError("xunit.xml", line, "", what, remedy="The report is not submitted; look at the run's folder.")


# ---- what comes back -----------------------------------------------------------------------------------------------


class Accepted(msgspec.Struct, frozen=True):
    """Polarion has queued the document."""

    jobs: tuple[int, ...]


class Running(msgspec.Struct, frozen=True):
    """Not every job has ended."""


class JobsEnded(msgspec.Struct, frozen=True):
    """Every job has ended; `failed` says which did not succeed, if any."""

    failed: str | None


class Unmatched(msgspec.Struct, frozen=True):
    """The logs are read: the tests for which no work item was found, each once."""

    tests: tuple[str, ...]


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The import is over."""

    outcome: Literal["passed", "partial", "failed", "unknown"]
    unmatched: tuple[str, ...] = ()
    testrun_url: str | None = None
    log_url: str | None = None
    reason: str | None = None


class Pending(msgspec.Struct, frozen=True):
    """It was taken, and its end will not be told here: only the bus can."""

    why: str


class Refused(msgspec.Struct, frozen=True):
    """A definite no: the same request will be refused again."""

    why: str


class Later(msgspec.Struct, frozen=True):
    """It did not work this time."""

    why: str


Reply: TypeAlias = Accepted | Running | JobsEnded | Unmatched | Finished | Pending | Refused | Later

T = TypeVar("T")


def read_polarize(status: int, body: bytes) -> Reply:
    """Polarize's answer to the upload. It says 200 to everything, so the content decides."""
    match _read(status, body, ImportReply):
        case ImportReply() as reply:
            return _read_import(reply)
        case no:
            return no


def read_ws(text: str, tag: str) -> Reply | None:
    """One frame of Polarize's websocket; None: an ack or a notice, read on.

    There is one submission a connection, so any result is ours: the real one does not carry our tag.
    """
    try:
        frame = msgspec.json.decode(text)
    except UNREADABLE:
        return Later(f"a frame that is no JSON: {_start(text.encode())}")
    if not isinstance(frame, dict):
        return None
    if isinstance(reply := _data(frame.get("data")), ImportReply):
        return None if reply.status.upper() in _GOES_ON else _read_import(reply)
    message = frame.get("message")
    if frame.get("result") == "error":
        return Finished(outcome="failed", reason=_text(message))
    if isinstance(message, str) and message.startswith("Error getting messages"):
        return Pending(message[:500])
    return read_completion(message if isinstance(message, str) else msgspec.json.encode(message))


def read_accepted(status: int, body: bytes, file_name: str) -> Accepted | Refused | Later:
    """Polarion's answer to the upload. A login page with code 200 is an error (mkoura/dump2polarion#6)."""
    match _read(status, body, ImportAccepted):
        case ImportAccepted(files=files):
            reply = files.get(file_name) or (next(iter(files.values())) if len(files) == 1 else None)
            if reply is None:
                return Later(f"the reply does not name {file_name}")
            if reply.error_message:
                return Refused(reply.error_message[:500])
            if not reply.job_ids or 0 in reply.job_ids or len(reply.job_ids) > MAX_JOBS:
                return Refused(f"it was not queued: job ids {reply.job_ids}"[:500])
            return Accepted(tuple(reply.job_ids))
        case no:
            return no


def read_queue(status: int, body: bytes, jobs: Sequence[int]) -> Running | JobsEnded | Refused | Later:
    """How far the jobs are. A job that is not listed has not ended."""
    match _read(status, body, Queue):
        case Queue(jobs=listed):
            ended = {job.id: job.status for job in listed if job.status.upper() not in ("READY", "RUNNING")}
            if not set(jobs) <= ended.keys():
                return Running()
            bad = [f"job {job}: {ended[job][:100]}" for job in jobs if ended[job].upper() != "SUCCESS"]
            return JobsEnded("; ".join(bad) or None)
        case no:
            return no


def read_log(status: int, body: bytes) -> Unmatched | Refused | Later:
    """A job's log. Polarion shows its login page with code 200 when the session has ended."""
    if no := _no(status, body):
        return no
    if body.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return Later(f"a page instead of a log: {_start(body)}")
    found = dict.fromkeys(name[:1024] for name in _UNMATCHED.findall(body.decode(errors="replace")))
    return Unmatched(tuple(found)[:MAX_UNMATCHED])


def read_login(status: int, body: bytes) -> Literal["session", "basic"] | Refused | Later:
    """Polarion's answer to the login form: go on with its cookies, or without them by `basic`."""
    if status in (404, 405):
        return "basic"
    if 300 <= status < 400:  # to the page that was asked for
        return "session"
    if no := _no(status, body):
        return no
    if b"j_password" in body:
        return Refused("the login was refused: the form came again")
    return "session"


def read_completion(body: str | bytes) -> Finished | None:
    """The body of a message on the CI Bus; None: it is not of the completion of an import."""
    try:
        said = msgspec.json.decode(body, type=Completion)
    except UNREADABLE:
        return None
    if said.status is None and said.message is None:
        return None
    outcome = said.status if said.status and said.message is None else "failed"
    reason = said.message[:500] if said.message else None
    return Finished(outcome=outcome, testrun_url=said.testrun_url, log_url=said.log_url, reason=reason)


def _no(status: int, body: bytes) -> Refused | Later | None:
    if 200 <= status < 300:
        return None
    why = f"HTTP {status}: {_start(body)}" if body.strip() else f"HTTP {status}"
    return Refused(why) if 400 <= status < 500 and status not in _TRY_LATER else Later(why)


def _read(status: int, body: bytes, kind: type[T]) -> T | Refused | Later:
    if no := _no(status, body):
        return no
    try:
        return msgspec.json.decode(body, type=kind)
    except UNREADABLE as err:
        return Later(f"HTTP {status} and no reply that can be read ({err}): {_start(body)}")


def _read_import(reply: ImportReply) -> Finished | Pending:
    status = reply.status.upper()
    if status == "SUCCESS":
        return Finished(outcome="passed")
    if status in _WAIT:
        return Pending(status)
    return Finished(outcome="failed", reason=f"{reply.status[:100]}: {_text(reply.errors or reply.result)}")


def _data(data: object) -> ImportReply | None:
    """The result in a frame's `data`, which is an object or JSON text."""
    try:
        return msgspec.convert(msgspec.json.decode(data) if isinstance(data, str) else data, ImportReply)
    except UNREADABLE:
        return None


def _text(value: object) -> str:
    return (value if isinstance(value, str) else msgspec.json.encode(value).decode())[:500]


def _start(body: bytes) -> str:
    return repr(" ".join(body[:200].decode(errors="replace").split()))
