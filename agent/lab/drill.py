"""The lab's Drill admin: agents attach by websocket, users start and stop sessions by HTTP, coverage is shown.

| path | what |
|---|---|
| `/agent/attach` | websocket: agents of type NODEJS |
| `POST /api/login` | a token in the header Authorization, for `Authorization: Bearer` |
| `GET /api/agents`, `GET POST PATCH DELETE /api/agents/{id}` | who is known; register, change, forget |
| `POST /api/agents/{id}/plugins/test2code/dispatch-action` | an action; `/api/groups/{g}/...`: for a group |
| `GET /api/agents/{id}/plugins/test2code/data/coverage` | totals, by session and test; `?session=` with its probes |
| `.../data/coverage/lcov.info`, `.../cobertura.xml` | the same as files, of all sessions or of one |

Answers hold `code`, with `data` or a `message`. On the wire classes have no lines: in the files line n is probe n - 1.

Source: protocols/drill.md, "The wire", "The lab's admin".
"""

import logging
import time
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.channel import ungrouped
from agent.core.errors import PeerBrokeProtocol, PeerUnreachable
from agent.core.guard import require
from agent.core.head import Head, HttpError
from agent.core.listen import Body, Response, Route
from agent.core.metrics import Metrics
from agent.core.payload import UNREADABLE
from agent.lab import coverage
from agent.lab.drillwire import (
    PLUGIN,
    Action,
    AgentConfig,
    AgentSession,
    Start,
    read_action,
    read_config,
    read_frame,
)
from agent.lab.test2code import Plugin, Session

log = logging.getLogger(__name__)

MAX_BODY = 16 * 1024 * 1024  # bytes; ADD_SESSION_DATA carries whole V8 profiles
MAX_AGENTS = 1000
MAX_BUILDS = 16  # of an agent whose coverage is kept
MAX_KEPT = 1_000_000  # entries (of a class and a test) of all sessions that are over: about 400 MiB
PING_S, SILENT_S = 10.0, 20.0  # s between pings, and for the answer to one
BIG = 256 * 1024  # bytes of a frame that is decoded in a thread
FILES = ("lcov.info", "cobertura.xml")
METHODS = ("GET", "POST", "PATCH", "DELETE")


class Switches(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the admin behaves, until it is switched back.

    `auto_register`: an agent is registered as soon as it attaches. `ack_s`: how long an acknowledgement is waited for.
    """

    auto_register: bool = False
    ack_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0


class SystemSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """What agents are told to instrument, and by which header requests name their session."""

    packages: tuple[str, ...] = ()
    session_id_header_name: str = "drill-session-id"
    target_host: str = ""


class Registration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """The body of a registration, or of a change to one."""

    name: str | None = None
    description: str | None = None
    environment: str | None = None
    system_settings: SystemSettings | None = None
    plugins: tuple[str, ...] = (PLUGIN,)


class Known:
    """An agent that has attached once."""

    def __init__(self, config: AgentConfig) -> None:
        self.config, self.plugin = config, Plugin(config.build_version)
        self.builds = {config.build_version: self.plugin}
        self.name, self.description, self.environment = config.id, "", ""
        self.settings = SystemSettings()
        self.registered = trio.Event()
        self.link: Attached | None = None
        self.bad_frames = 0

    def attach(self, config: AgentConfig) -> None:
        """It is there, maybe with another build. What former builds had is kept, but for the oldest."""
        self.config = config
        build = config.build_version
        self.plugin = self.builds.pop(build) if build in self.builds else Plugin(build)
        self.builds[build] = self.plugin
        for oldest in list(self.builds)[:-MAX_BUILDS]:
            del self.builds[oldest]

    def settled(self, now: float) -> list[Plugin]:
        """All builds, the newest first, each with what has become of its sessions."""
        for plugin in self.builds.values():
            plugin.settle(now)
        return list(reversed(self.builds.values()))

    def change(self, given: Registration) -> None:
        """Take what is given."""
        self.name = self.name if given.name is None else given.name
        self.description = self.description if given.description is None else given.description
        self.environment = self.environment if given.environment is None else given.environment
        self.settings = given.system_settings or self.settings

    @property
    def coverage_path(self) -> str:
        """Where its coverage is."""
        return f"/api/agents/{quote(self.config.id)}/plugins/{PLUGIN}/data/coverage"

    def state(self) -> str:
        """ONLINE, BUSY (it is being told, or waits to be registered) or OFFLINE: a `BuildStatus` of Drill's API."""
        if self.link is None:
            return "OFFLINE"
        return "ONLINE" if self.link.ready.is_set() else "BUSY"

    def shown(self) -> dict[str, Any]:
        """As the API gives it; the keys of the type `Agent` of npm's @drill4j/types-admin, and its build."""
        registered = "REGISTERING" if self.state() == "BUSY" else "REGISTERED"
        settings = msgspec.to_builtins(self.settings)
        plugin = {"id": PLUGIN, "name": "Test2Code", "description": "", "type": "Custom", "available": True}
        return {
            "id": self.config.id,
            "name": self.name,
            "group": self.config.service_group_id,
            "description": self.description,
            "environment": self.environment,
            "status": registered if self.registered.is_set() else "NOT_REGISTERED",
            "agentType": self.config.agent_type,
            "buildVersion": self.config.build_version,
            "instanceIds": [self.config.instance_id] if self.link else [],
            "systemSettings": settings,
            "plugins": [plugin] if self.plugin.initialized else [],
            "activePluginsCount": int(self.plugin.initialized),
            "build": {
                "buildVersion": self.config.build_version,
                "buildStatus": self.state(),
                "systemSettings": settings,
                "instanceIds": [self.config.instance_id] if self.link else [],
            },
        }


class Attached:
    """One connection of an agent: what is said to it, and the acknowledgements that are awaited."""

    def __init__(self, ws: WebSocketConnection, switches: Switches) -> None:
        self.ws, self._switches = ws, switches
        self.ready, self.over = trio.Event(), trio.Event()
        self._awaited: list[tuple[str, trio.Event]] = []
        self._saying: set[trio.CancelScope] = set()

    async def say(self, topic: str, text: str, *acks: str) -> None:
        """Send a message; returns when all of `acks` (that of the topic, when none is named) have come.

        Raises HttpError 500 when one does not come in time, or the connection ends.
        """
        awaited = [(ack, trio.Event()) for ack in acks or (topic,)]
        self._awaited += awaited
        with trio.move_on_after(self._switches.ack_s) as scope:
            self._saying.add(scope)
            try:
                await self.ws.send_message(_text({"type": "MESSAGE", "destination": topic, "text": text}))
                for _, event in awaited:
                    await event.wait()
            except ConnectionClosed:
                self.lose()
            finally:
                self._saying.discard(scope)
                self._awaited = [one for one in self._awaited if one not in awaited]
        if missing := [ack for ack, event in awaited if not event.is_set()]:
            why = "the agent is gone" if self.over.is_set() else f"nothing came within {self._switches.ack_s:g} s"
            raise HttpError(500, f"no acknowledgement of {missing[0]}: {why}")

    def acked(self, destination: str) -> bool:
        """An acknowledgement came; was it awaited?"""
        for one in self._awaited:
            if one[0] == destination:
                one[1].set()
                self._awaited.remove(one)
                return True
        return False

    def lose(self) -> None:
        """The connection is over; who waits is told."""
        self.over.set()
        for scope in self._saying:
            scope.cancel()

    async def ping(self) -> None:
        """Find out that the agent is gone when the line does not say so."""
        while True:
            await trio.sleep(PING_S)
            with trio.move_on_after(SILENT_S) as limit:
                await self.ws.ping()
            if limit.cancelled_caught:
                self.lose()
                return


class Drill:
    """The admin of one lab. `is_open`: agents attach, and users log in, without showing anything first.

    `token` is what a login gives; `look` raises HttpError when a client may not see what the page shows; `clock` gives
    seconds that only grow.
    """

    def __init__(
        self, metrics: Metrics, token: str, is_open: bool, look: Callable[[Head], None], clock: Callable[[], float]
    ) -> None:
        self.switches = Switches()
        self.agents: dict[str, Known] = {}
        self._metrics, self._token, self._look, self._clock = metrics, token, look, clock
        self._one_at_a_time = trio.CapacityLimiter(1)  # who writes a document of coverage
        self.routes = (
            Route("/agent/attach", websocket=self._attach, scope="open" if is_open else "read"),
            Route(
                "/api/login", self._log_in, scope="open" if is_open else "read", methods=("POST",), max_body=MAX_BODY
            ),
            *(
                Route(path, self._api, scope="open", methods=METHODS, max_body=MAX_BODY)
                for path in ("/api/agents", "/api/agents/*", "/api/groups/*", "/api/service-groups/*")
            ),
        )

    # ---- agents ------------------------------------------------------------------------------------------------------

    async def _attach(self, head: Head, ws: WebSocketConnection) -> None:
        try:
            config, need_sync = _read_head(head)
        except PeerBrokeProtocol:
            self._metrics.count("lab_drill_bad_heads_total")
            raise
        agent = self._known(config)
        link, former = Attached(ws, self.switches), agent.link
        agent.link = link
        if former is not None:
            former.lose()
        log.info("agent attached id=%s build=%s sync=%s", config.id, config.build_version, need_sync)
        try:
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear, agent, link)
                    nursery.start_soon(link.ping)
                    nursery.start_soon(self._welcome, agent, link, need_sync)
                    await link.over.wait()
                    nursery.cancel_scope.cancel()
        finally:
            link.lose()
            if agent.link is link:
                agent.link = None
            log.info("agent left id=%s", config.id)

    def _known(self, config: AgentConfig) -> Known:
        agent = self.agents.get(config.id)
        if agent is None:
            if len(self.agents) == MAX_AGENTS:
                raise PeerUnreachable(f"{MAX_AGENTS} agents are known already", remedy="DELETE some.")
            agent = self.agents[config.id] = Known(config)
        agent.attach(config)
        return agent

    async def _hear(self, agent: Known, link: Attached) -> None:
        try:
            while True:
                raw = await link.ws.get_message()
                try:
                    big = len(raw) > BIG
                    frame, message = await trio.to_thread.run_sync(read_frame, raw) if big else read_frame(raw)
                except PeerBrokeProtocol as err:
                    agent.bad_frames += 1
                    self._metrics.count("lab_drill_bad_frames_total")
                    log.warning("%s agent=%s frame=%.200r", err, agent.config.id, raw)
                    continue
                if message is not None:
                    agent.plugin.hear(message, self._clock())
                elif frame.type != "MESSAGE_DELIVERED" or not link.acked(frame.destination):
                    log.info("not awaited agent=%s type=%s to=%s", agent.config.id, frame.type, frame.destination)
        except ConnectionClosed:
            link.lose()

    async def _welcome(self, agent: Known, link: Attached, need_sync: bool) -> None:
        """What an agent is told when it attaches, and when it is registered."""
        try:
            await link.say("/agent/logging/update-config", _text({"level": "INFO"}))
            await link.say("/agent/change-header-name", agent.settings.session_id_header_name)
            if self.switches.auto_register:
                agent.registered.set()
            await agent.registered.wait()
            await link.say("/plugin/state", "")  # of its sessions a lab that was restarted knows none
            if need_sync or not agent.plugin.initialized:  # it tells all of them then
                await self._load(agent, link)
            link.ready.set()
        except HttpError as err:
            log.warning("agent sent away id=%s: %s", agent.config.id, err.text)
            link.lose()

    async def _load(self, agent: Known, link: Attached) -> None:
        await link.say("/agent/set-packages-prefixes", _text({"packagesPrefixes": agent.settings.packages}))
        loaded = f"/agent/plugin/{PLUGIN}/loaded"
        await link.say("/agent/load", _text({"meta": {"id": PLUGIN}, "data": []}), loaded, "/agent/load")
        await link.say("/agent/change-header-name", agent.settings.session_id_header_name)
        await link.say("/agent/load-classes-data", "")
        toggled = f"/agent/plugin/{PLUGIN}/toggle"
        on = _text({"pluginId": PLUGIN, "forceValue": True})
        await link.say("/plugin/togglePlugin", on, toggled, "/plugin/togglePlugin")

    # ---- users -------------------------------------------------------------------------------------------------------

    async def _log_in(self, head: Head, body: Body) -> Response:
        if head.scope == "open":
            self._look(head)  # of this machine, and not by a name that was made to point here
        await body.read()  # names and passwords of other admins mean nothing here
        return Response(200, (("Authorization", self._token), ("Content-Type", "application/json")), b"{}")

    async def _api(self, head: Head, body: Body) -> Response:
        if head.method in ("GET", "HEAD"):
            self._look(head)
        else:
            require(head, "read")
        try:
            return await self._answer(head, head.path.split("/")[2:], await body.read())
        except HttpError as err:
            return _json({"code": err.status, "message": err.text}, err.status)

    async def _answer(self, head: Head, parts: list[str], body: bytes) -> Response:
        match "GET" if head.method == "HEAD" else head.method, parts:
            case "GET", ["agents"]:
                return _json([agent.shown() for agent in self.agents.values()])
            case "GET", ["agents", ident]:
                return _json(self._agent(ident).shown())
            case "POST", ["agents", ident]:
                return _json(await self._register(self._agent(ident), _registration(body)))
            case "PATCH", ["agents", ident]:
                return _json(await self._change(self._agent(ident), _registration(body)))
            case "DELETE", ["agents", ident]:
                return _json(await self._forget(self._agent(ident)))
            case "POST", ["agents", ident, "plugins", plugin, "dispatch-action"]:
                return _json(await self._dispatch(self._agent(ident), plugin, read_action(body)))
            case "POST", ["groups" | "service-groups", group, "plugins", plugin, "dispatch-action"]:
                return _json(await self._dispatch_to_group(group, plugin, read_action(body)))
            case "GET", ["agents", ident, "plugins", plugin, "data", "coverage", *name]:
                agent = self._agent(ident)
                _check_plugin(plugin)
                return await self._coverage(agent, head.query.get("session"), "/".join(name))
        raise HttpError(404, f"{head.method} {head.path} is nothing here")

    def _agent(self, ident: str) -> Known:
        if (agent := self.agents.get(ident)) is None:
            raise HttpError(404, f"no agent {ident!r} has attached")
        return agent

    async def _register(self, agent: Known, given: Registration) -> Mapping[str, Any]:
        for plugin in given.plugins:
            _check_plugin(plugin)
        agent.change(given)
        agent.registered.set()
        if agent.link is not None:
            with trio.move_on_after(self.switches.ack_s):
                await _first(agent.link.ready, agent.link.over)
            if agent.link is None or not agent.link.ready.is_set():
                raise HttpError(500, "the agent is registered, and did not acknowledge what it was told")
        return agent.shown()

    async def _change(self, agent: Known, given: Registration) -> Mapping[str, Any]:
        agent.change(given)
        if agent.link is not None and given.system_settings is not None:
            await agent.link.say("/agent/set-packages-prefixes", _text({"packagesPrefixes": agent.settings.packages}))
            await agent.link.say("/agent/change-header-name", agent.settings.session_id_header_name)
        return agent.shown()

    async def _forget(self, agent: Known) -> Mapping[str, Any]:
        """It attaches again when it is there, and waits to be registered."""
        shown = agent.shown()
        try:
            if agent.link is not None:
                await agent.link.say("/plugin/unload", PLUGIN)
        finally:
            if self.agents.get(agent.config.id) is agent:  # nobody else has forgotten it meanwhile
                del self.agents[agent.config.id]
            if agent.link is not None:
                agent.link.lose()
        return shown

    async def _dispatch(self, agent: Known, plugin: str, action: Action) -> dict[str, Any]:
        _check_plugin(plugin)
        link = agent.link
        if link is None or not link.ready.is_set():
            raise HttpError(400, f"agent {agent.config.id!r} is not online, or not registered")
        on = agent.plugin
        told = on.carry_out(action)
        self._forget_oldest()
        key = uuid4().hex[:8]
        text = _text({"id": PLUGIN, "message": _text(told), "confirmationKey": key})
        await link.say("/plugin/action", text, f"/plugin/action/{key}", "/plugin/action")
        if isinstance(told.payload, AgentSession):  # it has acknowledged a START that it refused, too
            session = on.sessions.get(told.payload.session_id)
            if session is not None and session.state == "cancelled":
                raise HttpError(409, f"agent {agent.config.id!r} did not start session {told.payload.session_id!r}")
        return {"code": 200, "data": told}

    async def _dispatch_to_group(self, group: str, plugin: str, action: Action) -> list[dict[str, Any]]:
        """The answers of the agents of a group, in the order of their ids. A session has one id in all of them."""
        agents = sorted((one for one in self.agents.values() if one.config.service_group_id == group), key=_ident)
        if not group or not agents:
            raise HttpError(404, f"no agent of a group {group!r} has attached")
        if isinstance(action, Start) and not action.payload.session_id:
            action = Start(msgspec.structs.replace(action.payload, session_id=str(uuid4())))
        answers: list[dict[str, Any]] = [{} for _ in agents]

        async def ask(index: int, agent: Known) -> None:
            try:
                answers[index] = await self._dispatch(agent, plugin, action)
            except HttpError as err:
                answers[index] = {"code": err.status, "message": err.text}

        async with trio.open_nursery() as nursery:
            for index, agent in enumerate(agents):
                nursery.start_soon(ask, index, agent)
        return answers

    # ---- coverage ----------------------------------------------------------------------------------------------------

    async def _coverage(self, agent: Known, session: str | None, name: str) -> Response:
        plugins = agent.settled(self._clock())
        plugin = next((one for one in plugins if session in one.sessions), None) if session else agent.plugin
        if plugin is None:
            raise HttpError(404, f"no session {session!r} is known")
        sessions = [one for ident, one in plugin.sessions.items() if session in (None, "", ident)]
        taken = coverage.take(plugin, sessions)
        match name:
            case "":
                shown = _shown_coverage(agent, plugin, sessions)
                return await self._write(
                    lambda: _json(shown | ({"reached": coverage.probes(taken)} if session else {}))
                )
            case "lcov.info":
                return await self._write(lambda: _file(coverage.lcov(taken), "text/plain; charset=utf-8"))
            case "cobertura.xml":
                now = time.time()
                return await self._write(lambda: _file(coverage.cobertura(taken, now), "application/xml"))
        raise HttpError(404, f"there is {' and '.join(FILES)}, and no {name!r}")

    async def _write(self, write: Callable[[], Response]) -> Response:
        """Of a large product it takes seconds, in which agents would think that the lab is gone."""
        return await trio.to_thread.run_sync(write, limiter=self._one_at_a_time, abandon_on_cancel=True)

    def _forget_oldest(self) -> None:
        """Sessions that are over are kept as long as there is room for what they reached; the newest is."""
        ended = [
            (session.settles, ident, plugin)
            for agent in self.agents.values()
            for plugin in agent.settled(self._clock())
            for ident, session in plugin.sessions.items()
            if session.state == "finished"
        ]
        kept = 0
        for number, (_, ident, plugin) in enumerate(sorted(ended, key=itemgetter(0), reverse=True)):
            kept += len(plugin.sessions[ident].reached)
            if number and kept > MAX_KEPT:
                log.info("session forgotten for want of room session=%s build=%s", ident, plugin.build)
                del plugin.sessions[ident]

    def rows(self) -> list[tuple[Known, Session]]:
        """What the page shows: each session of each agent, the newest first."""
        return [
            (agent, session)
            for agent in self.agents.values()
            for plugin in agent.settled(self._clock())
            for session in reversed(plugin.sessions.values())
        ]


def _read_head(head: Head) -> tuple[AgentConfig, bool]:
    """Who attaches, and does it want all from the beginning? Raises PeerBrokeProtocol."""
    config = read_config(head.headers.get("agentconfig"))
    need_sync = head.headers.get("needsync")
    what = ""
    if config.agent_type != "NODEJS":
        what = f"an agent of type {config.agent_type!r} speaks protobuf, which is not spoken here"
    elif head.headers.get("content-encoding") is not None:
        what = "the header Content-Encoding means frames in Zstandard, which are not read here"
    elif need_sync not in ("true", "false"):
        what = f"the header needSync is {need_sync!r}, neither true nor false"
    if what:
        raise PeerBrokeProtocol(what, remedy="It is not let in.")
    return config, need_sync == "true"


def _registration(body: bytes) -> Registration:
    try:
        return msgspec.json.decode(body or b"{}", type=Registration)
    except UNREADABLE as err:
        raise HttpError(400, f"the registration cannot be read: {err}") from err


def _check_plugin(plugin: str) -> None:
    if plugin != PLUGIN:
        raise HttpError(404, f"there is no plugin {plugin!r}; {PLUGIN} is the only one")


def _ident(agent: Known) -> str:
    return agent.config.id


async def _first(*events: trio.Event) -> None:
    """Wait for one of them."""
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)


def _shown_coverage(agent: Known, plugin: Plugin, sessions: list[Session]) -> dict[str, Any]:
    reached = plugin.reached(sessions)
    return {
        "agentId": agent.config.id,
        "buildVersion": plugin.build,
        "classes": len(plugin.classes),
        "probes": sum(plugin.probes.values()),
        "covered": sum(flags.bit_count() for flags in reached.values()),
        "badFrames": agent.bad_frames,
        "unknownSessions": plugin.unknown,
        "sessions": [_shown_session(session) for session in sessions],
    }


def _shown_session(session: Session) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(session.start),
        "state": session.state,
        "started": session.started,
        "parts": session.parts,
        "objects": session.objects,
        "flushes": session.flushes,
        "strange": session.strange,
        "late": session.late,
        **msgspec.to_builtins(session.totals),
        "tests": msgspec.to_builtins(session.tests),
    }


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _file(content: bytes, kind: str) -> Response:
    return Response(200, (("Content-Type", kind), ("Content-Disposition", "attachment")), content)


def _json(value: object, status: int = 200) -> Response:
    return Response(status, (("Content-Type", "application/json"),), msgspec.json.encode(value))
