"""The lab on one port: Seneschal, Mimir, Polarize, Polarion and Drill, their state in one folder, a page that shows it.

| path | what |
|---|---|
| `/seneschal`, `/mimir` | websockets, by the token |
| `/xunit/import`, `/ws/xunit/import`, `/polarion/...` | Polarize and Polarion, lab/polarize.py |
| `/agent/attach`, `/api/...` | Drill's admin, lab/drill.py |
| `/` | the page: on this machine, or by the token; asked for no HTML: `{"result": {"id": "eman"}}` |
| `/socket.io/`, `/services` | the Eman hub, eman/hub.py |
| `/lab/runs` | by the token: GET all runs, POST a suite document to be run next; DELETE `/lab/runs/RUN` ends one |
| `/lab/faults` | the switches, by the token: GET them, POST some: `{"polarize": {"html": 2}, "mimir": {"late_s": 1}}` |

Source: protocols/emissary.md, "Real peers for tests"; protocols/settings.md, "[lab]".
"""

import fcntl
import html
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import msgspec
import trio

from agent.core import listen
from agent.core.errors import ActionError, AgentError
from agent.core.guard import Guard, is_loopback, require
from agent.core.head import Head, HttpError, host_name
from agent.core.listen import Body, Response, Route
from agent.core.metrics import Metrics
from agent.core.payload import UNREADABLE
from agent.core.token import own_token
from agent.eman.hub import HubServer, any_key, port_connections
from agent.eman.messages import IAm
from agent.eman.settings import HubSettings
from agent.lab.drill import FILES, Drill
from agent.lab.mimir import Mimir
from agent.lab.polarize import MAX_DOCUMENT, Polarize
from agent.lab.queue import LabRun
from agent.lab.seneschal import Seneschal
from agent.seneschal.messages import MAX_SUITE

log = logging.getLogger(__name__)

MAX_SHOWN = 200  # rows of each table of the page
MAX_SWITCHES = 64 * 1024  # bytes of a request that turns some
ENDED = ("done", "refused", "lost", "dropped")  # states of the lab's runs


class FolderUnusable(AgentError):
    """The lab cannot have its state in this folder: another lab has, or what is there cannot be read or written."""


class Lab:
    """A lab that serves: what it plays, where it listens, and the file with the token that agents show."""

    def __init__(
        self,
        data: Path,
        metrics: Metrics,
        guard: Guard,
        token_file: Path,
        eman: Callable[[IAm], bool] | None,
        hub: HubSettings,
        drill: Drill,
    ) -> None:
        self.token_file, self.address, self.drill = token_file, "", drill
        try:
            self.mimir = Mimir(data, metrics=metrics)
            self.seneschal = Seneschal(data, self.mimir, metrics=metrics)
            self.polarize = Polarize(data, guard)
        except (sqlite3.Error, *UNREADABLE) as err:
            remedy = "Make room on its disk, or move away what another version left there."
            raise FolderUnusable(f"{data}: the lab's state there cannot be used: {err}", remedy=remedy) from err
        self.hub = HubServer(hub, eman, metrics=metrics, page=self._page) if eman else None

    @property
    def url(self) -> str:
        """The address of Polarize and of the page; Polarion's is that and `/polarion`."""
        return f"http://{self.address}"

    @property
    def ws_url(self) -> str:
        """With `/seneschal` or `/mimir` behind it, their address."""
        return f"ws://{self.address}"

    def routes(self) -> list[Route]:
        """All that the port answers."""
        return [
            *(self.hub.routes if self.hub else [Route("/", self._page, scope="open")]),
            Route("/seneschal", websocket=self.seneschal.serve),
            Route("/mimir", websocket=self.mimir.serve),
            Route("/lab/runs", self._runs, methods=("GET", "POST"), max_body=MAX_SUITE),
            Route("/lab/runs/*", self._cancel, methods=("DELETE",)),
            Route("/lab/faults", self._switch, methods=("GET", "POST"), max_body=MAX_SWITCHES),
            *self.polarize.routes,
            *self.drill.routes,
        ]

    async def _runs(self, head: Head, body: Body) -> Response:
        """GET: [{"run", "suite", "state", "agent", "verdict", "reason"}], the oldest first. POST: {"run"}."""
        if head.method == "POST":
            try:
                suite = msgspec.json.decode(await body.read(), type=dict[str, Any])
            except UNREADABLE as err:
                raise HttpError(400, f"a suite document, as JSON, is expected: {err}") from err
            return _json({"run": self.seneschal.enqueue(suite)})
        names = ("run", "suite", "state", "agent", "verdict", "reason")
        return _json([dict(zip(names, (*_row(run), run.reason), strict=True)) for run in self.seneschal.runs()])

    async def _cancel(self, head: Head, body: Body) -> Response:
        run = head.path.removeprefix("/lab/runs/")
        try:
            await self.seneschal.cancel(run, "ended by a user of the lab")
        except ActionError as err:
            raise HttpError(404 if err.code == "no_such_run" else 500, err.what) from err
        return _json({"run": run})

    async def _switch(self, head: Head, body: Body) -> Response:
        switches: dict[str, msgspec.Struct] = {
            "polarize": self.polarize.faults,
            "seneschal": self.seneschal.faults,
            "mimir": self.mimir.faults,
            "drill": self.drill.switches,
        }
        if head.method == "POST":
            try:
                given = msgspec.json.decode(await body.read(), type=dict[str, dict[str, Any]])
                changes = [(switches[name], _checked(switches[name], some)) for name, some in given.items()]
            except KeyError as err:
                raise HttpError(400, f"{err} has no switches; {', '.join(switches)} have") from err
            except UNREADABLE as err:
                raise HttpError(400, str(err)) from err
            for faults, some in changes:
                for name, value in some.items():
                    setattr(faults, name, value)
        return _json(switches)

    async def _page(self, head: Head, body: Body) -> Response:
        _look(head)
        agents = [(ident, it.version, it.slots, ", ".join(it.labels)) for ident, it in self.seneschal.agents().items()]
        runs = [_row(run) for run in reversed(self.seneschal.runs()[-MAX_SHOWN:])]
        imports = [
            (item.testrun, item.project, item.how, item.status, _counted(item.counts), ", ".join(item.unmatched))
            for item in reversed((await self.polarize.imports())[-MAX_SHOWN:])
        ]
        drill = [
            (name, it.plugin.build, it.state(), len(it.plugin.classes), sum(it.plugin.probes.values()), it.bad_frames)
            for name, it in self.drill.agents.items()
        ]
        sessions = [
            (
                *(it.config.id, one.start.session_id, one.start.test_type, one.state),
                *(one.totals.classes, one.totals.covered),
                *((name, f"{it.coverage_path}/{name}?session={quote(one.start.session_id)}") for name in FILES),
            )
            for it, one in self.drill.rows()[:MAX_SHOWN]
        ]
        text = _PAGE.format(
            agents=_table(("ident", "version", "slots", "labels"), agents),
            runs=_table(("run", "suite", "state", "agent", "verdict"), runs),
            imports=_table(("test run", "project", "by", "status", "records", "unmatched"), imports),
            drill=_table(("agent", "build", "state", "classes", "probes", "bad frames"), drill),
            sessions=_table(("agent", "session", "type", "state", "classes", "covered", *FILES), sessions),
        )
        headers = (("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", "default-src 'none'"))
        return Response(200, headers, text.encode())


async def serve_lab(
    address: str,
    data: Path,
    suites: Sequence[Mapping[str, Any]] = (),
    *,
    eman: Callable[[IAm], bool] | None = None,
    hub: HubSettings | None = None,
    task_status: trio.TaskStatus[Lab] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve a lab at "HOST:PORT" until cancelled, with its state in `data`, and hand out the suite documents.

    A document that is still in the queue from before is not queued again. `eman` decides about the keys of services of
    the Eman hub; without it there is one on loopback only, and takes all. `hub` is what else is set of it.
    `started` gives the lab. Raises OSError (the address cannot be bound, the folder not be written), FolderUnusable,
    TokenUnusable.
    """
    hub = hub or HubSettings()
    lock = _lock(data)
    try:
        token_file = data / "token"
        user = own_token(data / "login")  # what Drill's login gives: who has it need not hear of a restart
        guard = Guard([(own_token(token_file), "control"), (user, "read")], {}, False, hub.origins, trio.current_time)
        metrics = Metrics()
        is_open = is_loopback(listen.split_address(address)[0])
        if eman is None and is_open:
            eman = any_key
        drill = Drill(metrics, user, is_open, _look, trio.current_time)
        lab = Lab(data, metrics, guard, token_file, eman, hub, drill)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(lab.mimir.run)
                await nursery.start(lab.seneschal.run)
                if lab.hub:
                    await nursery.start(lab.hub.run)
                for suite in suites:
                    if not any(run.suite == suite and run.state not in ENDED for run in lab.seneschal.runs()):
                        lab.seneschal.enqueue(suite)

                # What agents send in one message is bounded by themselves; a document for Polarize is the largest.
                serve = partial(
                    listen.serve, [address], lab.routes(), guard, metrics=metrics, max_message=MAX_DOCUMENT,
                    max_connections=port_connections(hub),
                )  # fmt: skip
                (lab.address, *_) = await nursery.start(serve)
                log.info("lab listens address=%s data=%s", lab.address, data)
                task_status.started(lab)
        finally:
            with trio.CancelScope(shield=True):
                await lab.polarize.close()
    finally:
        os.close(lock)
    raise AssertionError("a port serves until it is cancelled")


def _look(head: Head) -> None:
    """Who sees the page: who is on this machine and names it so (no other site can), or shows the token."""
    if not (is_loopback(head.peer) and is_loopback(host_name(head.headers.get("host") or ""))):
        require(head, "read")


def _lock(data: Path) -> int:
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(lock)
        raise FolderUnusable(f"{data}: another lab uses this folder", remedy="Stop it, or use another one.") from err
    return lock


def _checked(faults: msgspec.Struct, given: Mapping[str, Any]) -> dict[str, Any]:
    """Some switches as the struct holds them. Raises msgspec.ValidationError."""
    known = msgspec.structs.asdict(faults)
    if unknown := given.keys() - known.keys():
        raise msgspec.ValidationError(f"unknown switches: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    checked = msgspec.convert(known | dict(given), type(faults))
    return {name: getattr(checked, name) for name in given}


def _row(run: LabRun) -> tuple[object, ...]:
    """Run, suite, state, agent, verdict."""
    verdict = run.complete.verdict if run.complete else ""
    return run.run, run.suite.get("id", ""), run.state, run.ident or "", verdict


def _json(value: object) -> Response:
    return Response(200, (("Content-Type", "application/json"),), msgspec.json.encode(value))


def _table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def _cell(value: object) -> str:
    """A pair is a link: its text and where it leads."""
    if isinstance(value, tuple):
        text, to = value
        return f'<a href="{html.escape(to)}">{html.escape(text)}</a>'
    return html.escape(str(value))


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Lab</title></head><body>
<h1>Lab</h1>
<h2>Agents</h2>
{agents}<h2>Runs</h2>
{runs}<h2>Imports</h2>
{imports}<h2>Coverage</h2>
{drill}<h3>Sessions</h3>
{sessions}</body></html>
"""
