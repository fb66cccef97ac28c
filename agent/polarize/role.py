"""The final report on trio: each finished run is submitted until its import has an outcome; the CI Bus is heard.

A run's report is owed by the outbox `polarize`; it has a task of its own, so that one that waits holds up no other, and
its `Submission` as a checkpoint. What the CI Bus says of a submission ends it too. With `cibus.publish` the outbox
`cibus` owes the bus a message for each run that ended.

Source: protocols/emissary.md, "Polarize", "CI Bus".
"""

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NoReturn, cast

import msgspec
import trio
from trio_websocket import ConnectionClosed
from wsproto.events import TextMessage

from agent.core import link
from agent.core.bus import Bus
from agent.core.errors import DocumentError, PeerError, PeerRefused, PeerUnreachable
from agent.core.events import (
    Alert,
    AlertCleared,
    AnyEvent,
    ImportFinished,
    Reloaded,
    RunStarted,
    SuiteFinished,
    decode,
)
from agent.core.metrics import Metrics
from agent.core.store import HELD_RETRY_S, Outbox, Owed, Store
from agent.core.supervise import Health
from agent.core.tls import TlsSettings, client_context
from agent.core.token import TokenUnusable, read_token
from agent.polarize import submit
from agent.polarize.cibus import Line
from agent.polarize.progress import Submission, follow
from agent.polarize.settings import CibusSettings, PolarizeSettings
from agent.polarize.submit import Finished, HttpRequest, Later, Pending, Refused, Reply, Report, Unmatched

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

REPLY_S = 330.0  # Polarize itself waits 300 s for the bus
QUICK_REPLY_S = 60.0  # for what has nothing to wait for: login, queue, log
MAX_REPLY = 8 * 1024 * 1024  # bytes; a log of many tests is the largest
MAX_FRAME = 1024 * 1024  # bytes of a message of Polarize's websocket
UPLOADS = 16  # documents in memory at a time
LARGE = 4 * 1024 * 1024  # bytes; of documents above it there is one at a time
PIECE = 64 * 1024  # bytes of a body that must go out within the client's time for a write
LOUD_TRIES = 7  # failures in a row, two minutes of them, until a person is told
LOOK_S = 300.0  # how often held reports are looked at
FRAGMENT = 64 * 1024  # characters of a message to it that go out in one frame
TOO_BIG = 1009  # close code of a websocket


async def run(
    bus: Bus,
    store: Store,
    polarize: PolarizeSettings,
    cibus: CibusSettings,
    ident: str,
    health: Health,
    *,
    random: Random,
    metrics: Metrics,
    transport: "httpx.AsyncBaseTransport | None" = None,
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Submit the report of each finished run, and listen to and publish on the CI Bus, until cancelled.

    File names in the settings are absolute. `transport` takes the place of the network for HTTP. It is up when what is
    owed from before is under way. Raises TlsUnusable: a certificate of ours cannot be used.
    """
    owed = store.owe("polarize", _is_finished) if polarize.url else None
    to_publish = store.owe("cibus", _is_finished) if cibus.url and cibus.publish else None
    # The client is closed when no task can use it any more.
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        reports: _Reports | None = None
        if owed is not None:
            import httpx  # at first use: it takes a tenth of a second, and not every agent submits

            files = (polarize.ca_file, polarize.cert_file, polarize.key_file)
            tls = TlsSettings(*(Path(name) if name else None for name in files))
            client = httpx.AsyncClient(
                transport=transport,
                verify=client_context(tls) if polarize.url.startswith("https:") else False,  # no TLS, no roots
                timeout=httpx.Timeout(None, connect=30, write=60),
                limits=httpx.Limits(
                    max_keepalive_connections=0
                ),  # an answer on it is to the one request, and no late one
                headers={"accept-encoding": "identity"},
                trust_env=False,
            )
            peer = _Peer(polarize, tls, await stack.enter_async_context(client), random)
            reports = _Reports(bus, store, owed, peer, polarize, ident, health, random, metrics, clock, bool(cibus.url))
            await nursery.start(reports.run)
        if cibus.url:
            line = Line(
                bus,
                store,
                cibus,
                ident=ident,
                response_name=polarize.response_name,
                complete=reports.complete if reports else None,
                box=to_publish,
                random=random,
                clock=clock,
            )
            nursery.start_soon(line.run)
        task_status.started()


def _is_finished(event: AnyEvent) -> bool:
    return isinstance(event, SuiteFinished)


# ---- Polarize and Polarion -------------------------------------------------------------------------------------------


class _Peer:
    """Carries requests to Polarize or Polarion. Whatever they do, there is a Reply."""

    def __init__(
        self, settings: PolarizeSettings, tls: TlsSettings, client: "httpx.AsyncClient", random: Random
    ) -> None:
        self._settings, self._tls, self._client, self._random = settings, tls, client, random
        self._login: str | None = None  # "session" or "basic" while Polarion takes us

    async def submit(self, report: Report) -> Reply:
        """Send a document, and wait for what becomes of it as long as the mode allows."""
        settings, random = self._settings, self._random
        try:
            with trio.fail_after(REPLY_S):
                match settings.mode:
                    case "polarize-http":
                        request = submit.polarize_http(settings, report, self._password(), random)
                        return submit.read_polarize(*await self._fetch(request))
                    case "polarize-ws":
                        return await self._submit_by_websocket(report)
                    case "polarion":
                        request = submit.polarion_import(settings, report, random)
                        return await self._ask_polarion(
                            request, lambda status, body: submit.read_accepted(status, body, report.file_name)
                        )
        except trio.TooSlowError:
            why = f"no answer in {REPLY_S:g} s"
            return Later(why) if settings.mode == "polarion" else Pending(why)
        except PeerRefused as err:
            return Refused(err.what)
        except (PeerError, TokenUnusable) as err:
            return Later(err.what)

    async def poll(self, jobs: tuple[int, ...]) -> Reply:
        """How far Polarion's jobs are."""
        request = submit.polarion_queue(self._settings, jobs)
        return await self._ask_quickly(request, lambda status, body: submit.read_queue(status, body, jobs))

    async def read_logs(self, jobs: tuple[int, ...]) -> Reply:
        """The tests that the jobs' logs say were not found."""
        found: dict[str, None] = {}
        for job in jobs:
            reply = await self._ask_quickly(submit.polarion_log(self._settings, job), submit.read_log)
            if not isinstance(reply, Unmatched):
                return reply
            found |= dict.fromkeys(reply.tests)
        return Unmatched(tuple(found))

    async def _ask_quickly(self, request: HttpRequest, read: Callable[[int, bytes], Reply]) -> Reply:
        try:
            with trio.fail_after(QUICK_REPLY_S):
                return await self._ask_polarion(request, read)
        except trio.TooSlowError:
            return Later(f"no answer in {QUICK_REPLY_S:g} s")
        except (PeerError, TokenUnusable) as err:
            return Later(err.what)

    async def _ask_polarion(self, request: HttpRequest, read: Callable[[int, bytes], Reply]) -> Reply:
        if self._settings.user and self._login is None:
            how = submit.read_login(*await self._fetch(submit.polarion_login(self._settings, self._password())))
            if isinstance(how, Refused | Later):
                return how
            self._login = how
        if self._login == "basic":
            more = submit.basic(self._settings, self._password())
            request = msgspec.structs.replace(request, headers=request.headers | more)
        reply = read(*await self._fetch(request))
        if isinstance(reply, Refused | Later):
            self._login = None  # it may be the session that has ended
        return reply

    async def _fetch(self, request: HttpRequest) -> tuple[int, bytes]:
        """Status and body. Raises PeerUnreachable: anything went wrong before the answer was complete."""
        import httpx

        headers, content = request.headers, None
        if request.body:
            headers = headers | {"content-length": str(sum(map(len, request.body)))}
            content = _cut(request.body)
        try:
            async with self._client.stream(request.method, request.url, headers=headers, content=content) as reply:
                body = bytearray()
                # It is a generator, which the library's type does not say; left half read it must be closed.
                async with aclosing(cast("AsyncGenerator[bytes, None]", reply.aiter_bytes())) as chunks:
                    async for chunk in chunks:
                        body += chunk
                        if len(body) > MAX_REPLY:
                            raise _unreachable(f"{request.url} answered more than {MAX_REPLY} bytes")
                return reply.status_code, bytes(body)
        except (httpx.HTTPError, httpx.InvalidURL) as err:
            raise _unreachable(f"{request.url}: {str(err) or type(err).__name__}") from err

    async def _submit_by_websocket(self, report: Report) -> Reply:
        request = submit.polarize_ws(self._settings, report, self._password(), self._random)
        async with link.connect(link.Dial(request.url, tls=self._tls), max_message=MAX_FRAME) as ws:
            try:
                for at in range(0, len(request.text), FRAGMENT):
                    part, last = request.text[at : at + FRAGMENT], at + FRAGMENT >= len(request.text)
                    # The real service bounds the frame, to 1 MiB, and not the message; the library has no other way.
                    await ws._send(TextMessage(data=part, message_finished=last))
                while True:
                    frame = await ws.get_message()
                    reply = submit.read_ws(
                        frame if isinstance(frame, str) else frame.decode(errors="replace"), request.tag
                    )
                    if reply is not None:
                        return reply
            except ConnectionClosed as err:
                if err.reason is not None and err.reason.code == TOO_BIG:
                    return Refused(f"the document of {len(request.text)} characters is too big for {request.url}")
                return Later(f"{request.url} closed before it told the result: {err}")

    def _password(self) -> str:
        return read_token(Path(self._settings.password_file)) if self._settings.user else ""


async def _cut(body: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in body:
        for at in range(0, len(piece), PIECE):
            yield piece[at : at + PIECE]


def _unreachable(what: str) -> PeerUnreachable:
    return PeerUnreachable(what, remedy="It is tried again.")


# ---- what is owed ----------------------------------------------------------------------------------------------------


class _Case:
    """A run whose report, of `size` bytes, is owed under outbox number `n`."""

    def __init__(self, n: int, path: Path, size: int, submission: Submission) -> None:
        self.n, self.path, self.size, self.submission = n, path, size, submission
        self.heard = trio.Event()  # the bus spoke of it
        self.scope = trio.CancelScope()
        self.is_held = self.is_loud = False


class _Reports:
    """The reports that are owed, each with its task until it is imported, or refused and held."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        box: Outbox,
        peer: _Peer,
        settings: PolarizeSettings,
        ident: str,
        health: Health,
        random: Random,
        metrics: Metrics,
        clock: Callable[[], float],
        listens: bool,
    ) -> None:
        self._bus, self._store, self._box, self._peer = bus, store, box, peer
        self._settings, self._ident, self._health, self._random = settings, ident, health, random
        self._metrics, self._clock, self._listens = metrics, clock, listens
        self._cases: dict[str, _Case] = {}
        self._uploads, self._large = trio.CapacityLimiter(UPLOADS), trio.Lock()
        self._is_loud = False

    async def run(self, *, task_status: trio.TaskStatus[None]) -> NoReturn:
        """Take up what is owed, now and later. Up when the bus may be heard: all that is owed is known then."""
        for n, _, reason in await self._box.held():
            run, _, why = reason.partition(": ")
            if await self._remember(n, run):
                self._tell_refused(self._cases[run], why)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._retry_held_hourly)
                await nursery.start(self._retry_held_when_reloaded)
                after = 0
                while rows := await self._box.peek(after):
                    after = await self._take(rows, nursery)
                task_status.started()
                while True:
                    after = await self._take(await self._box.due(after), nursery)
        finally:
            for code in ("polarize", *map(_alert, self._cases)):  # raised again by who finds it so
                self._bus.publish(AlertCleared(code=code))

    def complete(self, response: str, finished: Finished) -> None:
        """The bus says that the submission with this response value is over."""
        case = next((case for case in self._cases.values() if response in case.submission.responses), None)
        if case is None:
            log.info("completion of no submission that waits response=%s outcome=%s", response, finished.outcome)
            return
        log.info("completion heard run=%s outcome=%s", case.submission.run, finished.outcome)
        if case.submission.phase in ("polling", "log"):
            case.heard.set()  # the importer itself tells more: which tests were not found
        else:
            self._finish(case, finished)
            case.scope.cancel()

    async def _take(self, rows: list[Owed], nursery: trio.Nursery) -> int:
        for owed in rows:
            run = str(owed.event.run)
            if run in self._cases:
                case = self._cases[run]
                case.n, case.is_held, case.scope = owed.n, False, trio.CancelScope()
            elif await self._is_over(owed) or not await self._remember(owed.n, run):
                self._box.done(owed.n)
                continue
            nursery.start_soon(self._carry, self._cases[run])
        return rows[-1].n

    async def _is_over(self, owed: Owed) -> bool:
        """Did the bus say so while the delivery got another number?"""
        await self._store.commit()
        over = await self._store.read(owed.event.seq, run=owed.event.run, kinds=("ImportFinished",), limit=1)
        return bool(over)

    async def _remember(self, n: int, run: str) -> bool:
        """Make the case of a run; False: it has no report to submit."""
        started = [decode(e.kind, e.data) for e in await self._store.read(run=run, kinds=("RunStarted",))]
        ended = [decode(e.kind, e.data) for e in await self._store.read(run=run, kinds=("SuiteFinished",))]
        document = None
        for event in started:
            assert isinstance(event, RunStarted)
            if not event.to_polarize:
                log.info("report not wanted run=%s", run)
                return False
        for event in ended:
            assert isinstance(event, SuiteFinished)
            document = event.artifacts.get("xunit.xml")
        if document is None:
            log.warning("no report run=%s: the run has no xunit.xml", run)
            return False
        submission = await self._store.get(_key(run), Submission)
        path = Path(document.path)
        self._cases[run] = _Case(n, path, document.size, submission or Submission(run=run))
        return True

    async def _carry(self, case: _Case) -> None:
        with case.scope:
            while True:
                case.heard = trio.Event()
                with trio.move_on_after(case.submission.delay_s(self._clock())):
                    await case.heard.wait()
                reply = await self._step(case)
                if reply is None:
                    log.warning("no report run=%s: neither suite nor polarize.project names one", case.submission.run)
                    return self._forget(case)
                self._note(case, reply)
                match follow(case.submission, reply, self._clock(), listens=self._listens):
                    case Submission() as following:
                        self._keep(case, following)
                    case Finished() as finished:
                        return self._finish(case, finished)
                    case Refused(why):
                        self._box.hold(case.n, f"{case.submission.run}: {why}", self._clock())
                        return self._tell_refused(case, why)

    async def _step(self, case: _Case) -> Reply | None:
        """Do what the phase asks; None: the report is for no project."""
        submission = case.submission
        match submission.phase:
            case "due":
                async with self._large if case.size > LARGE else nullcontext(), self._uploads:
                    return await self._submit(case)
            case "polling":
                with self._health.busy(limit=2 * QUICK_REPLY_S):
                    return await self._peer.poll(submission.jobs)
            case "log":
                with self._health.busy(limit=2 * QUICK_REPLY_S * len(submission.jobs)):
                    return await self._peer.read_logs(submission.jobs)
            case "listening":
                return Finished(outcome="unknown", reason=submission.why)

    async def _submit(self, case: _Case) -> Reply | None:
        run = case.submission.run
        try:
            xml = await trio.to_thread.run_sync(case.path.read_bytes)
            project = submit.project_of(xml) or self._settings.project
            if not project:
                return None
            response = submit.new_response(self._ident, self._random)
            report = submit.prepare(xml, run, project, (self._settings.response_name, response))
        except (DocumentError, FileNotFoundError) as err:
            return Finished(outcome="failed", reason=str(err))
        except OSError as err:
            return Later(f"{case.path}: {err.strerror}")
        del xml
        # On disk before it is sent: after a crash the bus may speak of it.
        self._keep(case, case.submission.sent_with(project, response))
        await self._store.commit()
        log.info("submitting run=%s mode=%s response=%s", run, self._settings.mode, response)
        with self._health.busy(limit=REPLY_S + QUICK_REPLY_S):
            return await self._peer.submit(report)

    def _note(self, case: _Case, reply: Reply) -> None:
        """Count and log what came, and tell a person when nothing comes any more."""
        self._metrics.count("polarize_replies_total", reply=type(reply).__name__.lower())
        if not isinstance(reply, Later):
            if self._is_loud:
                self._is_loud = False
                self._bus.publish(AlertCleared(code="polarize"))
            return
        log.warning("try again run=%s phase=%s: %s", case.submission.run, case.submission.phase, reply.why)
        if case.submission.tries + 1 >= LOUD_TRIES and not self._is_loud:
            self._is_loud = True
            text = f"reports cannot be submitted: {reply.why}"
            remedy = "Look at polarize.url and at its log; what is owed is kept and tried again."
            self._bus.publish(Alert(code="polarize", text=text, remedy=remedy, since=self._clock()))

    def _keep(self, case: _Case, submission: Submission) -> None:
        case.submission = submission
        self._store.put(_key(submission.run), submission)

    def _tell_refused(self, case: _Case, why: str) -> None:
        run, case.is_held, case.is_loud = case.submission.run, True, True
        log.error("import refused run=%s: %s", run, why)
        text = f"ImportRefused: the report of run {run}: {why}"
        remedy = "Correct what it says; it is submitted again every hour and at reload."
        self._bus.publish(Alert(code=_alert(run), text=text, remedy=remedy, since=self._clock()))

    def _finish(self, case: _Case, finished: Finished) -> None:
        """One event, and the delivery done, in one transaction."""
        run, jobs = case.submission.run, case.submission.jobs
        testrun_url, log_url = finished.testrun_url, finished.log_url
        if jobs:
            testrun_url = submit.polarion_testrun_url(self._settings, case.submission.project, run)
            log_url = submit.polarion_log(self._settings, jobs[0]).url
        log.info("import over run=%s outcome=%s unmatched=%d", run, finished.outcome, len(finished.unmatched))
        self._bus.publish(
            ImportFinished(
                run=run,
                mode=self._settings.mode,
                outcome=finished.outcome,
                unmatched=finished.unmatched,
                jobs=jobs,
                testrun_url=testrun_url,
                log_url=log_url,
                reason=finished.reason,
            )
        )
        self._metrics.count("polarize_imports_total", outcome=finished.outcome)
        self._forget(case)

    def _forget(self, case: _Case) -> None:
        run = case.submission.run
        if case.is_loud:
            self._bus.publish(AlertCleared(code=_alert(run)))
        self._box.done(case.n)
        self._store.forget(_key(run))
        del self._cases[run]

    async def _retry_held_hourly(self) -> NoReturn:
        while True:
            await trio.sleep(LOOK_S)
            await self._box.retry_held(self._clock() - HELD_RETRY_S)

    async def _retry_held_when_reloaded(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self._bus.subscribe(Reloaded) as reloads:
            task_status.started()
            async for _ in reloads:
                await self._box.retry_held(math.inf)


def _key(run: str) -> str:
    return f"polarize.{run}"


def _alert(run: str) -> str:
    return f"ImportRefused.{run}"
