"""The websocket to a parent tier, for a layer that is a process of its own: registers, reports, and outlives it.

    connect -> spec -> register -> update ... -> complete -> close 1000

Who loses the parent goes on working and connects again. To ours it registers with `resume`; to a foreign one it must
not register twice, and says only what is due. Of updates the newest is told; what happened to single jobs (ours) goes
with them, numbered, until it was taken. The newest is told again when an interval passes without another.

Source: protocols/gator.md, "State machine" (Reconnect), "Dialects", "Direction".
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from random import Random
from typing import Any, Final

import msgspec
import trio
from trio_websocket import WebSocketConnection

import agent
from agent.core.channel import CLOSE_S, Channel, Refused, Tell, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerBrokeProtocol, PeerRefused, PeerUnreachable
from agent.core.events import Alert, AlertCleared, LinkChanged
from agent.core.link import Dial, redial
from agent.gator import dialects, messages
from agent.gator.answers import told_layer
from agent.gator.dialects import wrong
from agent.gator.layer import Below, Place, Shared
from agent.gator.messages import MAX_MESSAGE_IN, Dialect, Result, Severity
from agent.gator.port import DEADLINE_S, IDENTITY, PING_S
from agent.gator.spec import MAX_SPEC
from agent.gator.summary import Summary

log = logging.getLogger(__name__)

FIRST_S: Final = 30.0  # for the first connection, with the spec
LAST_TRY_S: Final = 2.0  # for a parent that is not there, when what we run was stopped
MAX_LOGS: Final = 10_000  # messages that wait for the parent; then the oldest are dropped
MAX_EVENTS: Final = 500  # in one update
MAX_OUTPUT: Final = 32 * 1024 * 1024  # bytes of events that wait; beyond, outputs of jobs are only in their folders
ASK_S: Final = 10.0  # for the answer to `complete`; then it is told again, until the parent was deaf for too long
OURS: Final = {"version": agent.__version__}
_encode = msgspec.json.Encoder().encode


class Uplink:
    """The parent at `address`, for the layer called `ident`. It is an Above (layer.py)."""

    def __init__(self, ident: str, address: str, shared: Shared) -> None:
        self.ident, self.address = ident, address
        self.below: Below | None = None
        self.gave_up = False  # the parent is gone for good: nobody hears the end
        self.superseded = False  # it has given us up, or another runs in our place
        self._shared = shared
        self._dial = Dial(url=f"ws://{address}" if "/" in address else f"ws://{address}/")
        forced = shared.settings.dialect
        self._forced: Dialect | None = None if forced == "auto" else forced
        self._dialect: Dialect | None = None
        self._plain = False
        self._spec: str | None = None
        self._place: Place | None = None
        self._refusal: Exception | None = None
        self._server = ""
        self._latest: tuple[Summary, Result] | None = None
        self._final: tuple[Summary, Result, int] | None = None
        self._completing: float | None = None  # when it was first sent: it may have arrived
        self._done = False
        self._hurried: float | None = None  # what we run was stopped; or has ended, if that was later
        self._logs: deque[tuple[Severity, str, float]] = deque(maxlen=MAX_LOGS)
        self._dropped = 0  # of these, since that was told
        self._sent: list[tuple[Severity, str, float]] = []  # since the last answer
        self._events: deque[bytes] = deque()
        self._event_bytes = 0  # of all of these
        self._first_event = 0  # the number of the first of these
        self._changed = trio.Event()
        self._since = trio.current_time()  # when there was last a connection
        self._connected = False
        self._trouble = "no connection"  # why there was none, or why it ended
        self._idle = trio.Event()  # no connection is open
        self._idle.set()

    @property
    def _name(self) -> str:
        """The address without the secret that it may end in."""
        return self.address.partition("/")[0]

    # ---- for the layer ----------------------------------------------------------------------------------------------

    async def fetch_spec(self) -> str:
        """What we are to run. Raises PeerUnreachable, PeerRefused, PeerBrokeProtocol."""
        await self._until(lambda: self._spec is not None)
        assert self._spec is not None
        return self._spec

    async def register(self, server: str) -> Place:
        """Raises as fetch_spec."""
        self._server = server
        self._news()
        await self._until(lambda: self._place is not None)
        assert self._place is not None
        return self._place

    def hurry(self) -> None:
        """What we run is stopped by a signal: whoever sent it does not wait long for a parent that is not there."""
        self._hurried = trio.current_time()

    def update(self, summary: Summary, result: Result) -> None:
        self._latest = (summary, result)
        self._news()

    async def complete(self, summary: Summary, result: Result, code: int) -> None:
        self._latest = (summary, result)
        self._final = (summary, result, code)
        if self._hurried is not None:
            self._hurried = trio.current_time()
        self._news()
        await self._until(lambda: self._done or self.gave_up or self.superseded)

    async def until_superseded(self) -> None:
        """Returns when what we run is not wanted any more."""
        while not self.superseded:
            await self._changed.wait()

    def log(self, severity: Severity, message: str, at: float) -> None:
        self._dropped += len(self._logs) == MAX_LOGS
        self._logs.append((severity, message, at))
        self._news()

    def tell(self, event: dict[str, Any]) -> None:
        """What happened to a job below us; a parent of ours wants to know."""
        if self._dialect != "emissary" or (event["event"] == "output" and self._event_bytes > MAX_OUTPUT):
            return
        told = _encode(event)
        self._events.append(told)
        self._event_bytes += len(told)
        self._news()

    def _news(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self._refusal is not None:
                raise self._refusal
            if self.gave_up and self._final is None:
                raise PeerUnreachable(
                    f"the parent at {self._name} was not to be reached: {self._trouble}",
                    remedy="Look at its address, and whether it runs.",
                )
            await self._changed.wait()

    # ---- the connection ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hold the connection until all is told, or nobody is there any more. Run it beside the layer."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up, nursery.cancel_scope)
            nursery.start_soon(self._keep)
            await self._until_over()
            with trio.move_on_after(2 * CLOSE_S):
                await self._idle.wait()
            nursery.cancel_scope.cancel()

    async def _until_over(self) -> None:
        while not (self._done or self.superseded or self._refusal):
            await self._changed.wait()

    async def _keep(self) -> None:
        await redial("gator", self._dial, self._use, publish=self._heard, random=Random(), max_message=MAX_MESSAGE_IN)

    async def _give_up(self, scope: trio.CancelScope) -> None:
        while True:
            now, patience = trio.current_time(), self._shared.settings.resume_wait_s
            since = self._since
            if self._place is None:
                patience = FIRST_S
            elif self._hurried is not None and self._final is not None:
                patience, since = min(patience, LAST_TRY_S), max(since, self._hurried)
            is_deaf = self._completing is not None and now - self._completing >= patience + ASK_S
            if is_deaf or (not self._connected and now - since >= patience):
                log.error("parent gone for good parent=%s error=%s", self._name, self._trouble)
                self.gave_up = True
                self._news()
                scope.cancel()
            await trio.sleep(1)

    def _heard(self, event: LinkChanged | Alert | AlertCleared) -> None:
        match event:
            case LinkChanged(state="ready"):
                self._connected = True
            case LinkChanged(state="offline"):
                self._trouble = event.error or self._trouble
                if self._connected:
                    self._connected, self._since = False, trio.current_time()
            case Alert() if self._place is None:  # nobody will mend it while we wait for our first words
                self._refusal = PeerRefused(event.text, remedy=event.remedy)
                self._news()
            case Alert():
                log.warning("%s. %s", event.text, event.remedy)
            case _:
                pass

    async def _use(self, ws: WebSocketConnection, tell: Tell) -> None:
        headers = {name.lower(): value for name, value in ws.handshake_headers}
        server = headers.get(b"server", b"").decode("latin-1")

        async def talk(channel: Channel) -> None:
            await self._talk(channel, server)

        self._idle = trio.Event()
        try:
            await converse(
                ws,
                self._answer,
                talk,
                metrics=self._shared.metrics,
                deadline_s=DEADLINE_S,
                ping_s=PING_S,
                identity=IDENTITY,
                tell=tell,
            )
        finally:
            self._idle.set()

    async def _talk(self, channel: Channel, server: str) -> None:
        try:
            if self._spec is None:
                self._spec = _spec_in(await channel.ask("spec", self._names() | {"emissary": OURS}), channel)
                self._news()
            while not self._server:
                await self._changed.wait()
            if self._place is None or self._dialect == "emissary":
                await self._register(channel, server)
        except Refused as err:
            if self._place is None:
                self._refusal = err
            else:
                self._stop_for(err)
            self._news()
            return
        except PeerBrokeProtocol as err:
            self._refusal = err
            self._news()
            return
        channel.state("ready")
        self._dropped += max(0, len(self._logs) + len(self._sent) - MAX_LOGS)
        self._logs, self._sent = deque([*self._sent, *self._logs], maxlen=MAX_LOGS), []
        told: tuple[Summary, Result] | None = None
        interval_s = self._shared.options.interval_s
        while not (self._done or self.superseded):
            changed = self._changed
            is_over = self._completing is not None  # an update behind the end is an error for some parents
            if self._latest is not None and not is_over and (self._latest is not told or self._events):
                told = self._latest
                await self._tell_update(channel, *told)
            elif self._logs:
                await self._tell_log(channel)
            elif self._final is not None:
                await self._tell_complete(channel, *self._final)
            else:
                with trio.move_on_after(interval_s) as silence:
                    await changed.wait()
                if silence.cancelled_caught:  # the layer waits, perhaps for a slow disk: who is silent would be lost
                    told = None

    def _names(self) -> dict[str, Any]:
        return {"ident": self.ident, "id": self.ident}

    async def _register(self, channel: Channel, server: str) -> None:
        payload = self._names() | {"server": self._server, "emissary": OURS}
        if self._place is not None:
            payload["resume"] = True
        answer = await channel.ask("register", payload)
        says_id = "\nid:" in f"\n{self._spec}" and "\nident:" not in f"\n{self._spec}"
        self._dialect = self._forced or dialects.parent_dialect(answer, spec_says_id=says_id)
        self._plain = dialects.is_plain_dialect(self._dialect, server)
        if self._dialect == "emissary":
            channel.max_message = MAX_MESSAGE_IN
        path, uidx = answer.get("path", []), answer.get("uidx", 0)
        if not isinstance(path, list) or not all(isinstance(part, str) for part in path) or not isinstance(uidx, int):
            raise PeerBrokeProtocol(f"{channel.peer} answered register: path or uidx", remedy="Look at its version.")
        self._place = Place(tuple(path), uidx)
        self._news()

    async def _tell_update(self, channel: Channel, summary: Summary, result: Result) -> None:
        assert self._dialect is not None
        payload = dialects.report(self._dialect, self.ident, summary, result, plain=self._plain)
        if events := self._next_events():
            numbered = {"first": self._first_event, "events": list(map(msgspec.Raw, events))}
            payload["emissary"] = {**payload.get("emissary", {}), **numbered}
        try:
            await channel.ask("update", payload)
        except Refused as err:
            self._stop_for(err)
            log.warning("update refused reason=%s", err.reason)
        for _ in events:
            self._event_bytes -= len(self._events.popleft())
        self._first_event += len(events)
        self._sent = []

    def _next_events(self) -> list[bytes]:
        """The oldest, as many as one message takes."""
        size, taken = 0, list[bytes]()
        for event in islice(self._events, MAX_EVENTS):
            size += len(event)
            if taken and size > MAX_MESSAGE_IN // 2:
                break
            taken.append(event)
        return taken

    async def _tell_log(self, channel: Channel) -> None:
        if self._dropped:
            what = f"{self._dropped} messages of '{self.ident}' were too many to be told here; its own files have them"
            now = int(self._shared.clock())
            await channel.post("log", {"severity": "WARNING", "message": what, "timestamp": now})
            self._dropped = 0
        severity, message, at = self._logs.popleft()
        self._sent.append((severity, message, at))
        await channel.post("log", {"severity": severity, "message": message, "timestamp": int(at)})
        if len(self._sent) >= MAX_LOGS // 10:
            await channel.ask("", {})  # whoever answers has heard what came before
            self._sent = []

    async def _tell_complete(self, channel: Channel, summary: Summary, result: Result, code: int) -> None:
        assert self._dialect is not None
        again = self._completing is not None and self._dialect != "emissary"
        if self._completing is None:
            self._completing = trio.current_time()
        if not (again and await self._has_arrived(channel)):
            payload = dialects.completion(self._dialect, self.ident, summary, result, code, plain=self._plain)
            try:
                await channel.ask("complete", payload, timeout_s=ASK_S)
            except Refused as err:
                self._stop_for(err)
                log.warning("complete refused reason=%s", err.reason)
        self._done = True
        self._news()

    async def _has_arrived(self, channel: Channel) -> bool:
        """Does a foreign parent have our end already? It would take a second one for an error."""
        try:
            children = dialects.read_children(await channel.ask("children", {}))
        except (Refused, ActionError) as err:
            log.warning("parent does not tell its children error=%s", err)
            return False
        return self.ident in children and children[self.ident].state == "COMPLETE"

    def _stop_for(self, err: Refused) -> None:
        """Another runs in our place, or we were given up: end what we run."""
        if "superseded" in err.reason:
            log.error("given up by the parent reason=%s", err.reason)
            self.superseded = True
            self._news()

    # ---- downward ---------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request) -> Mapping[str, Any]:
        below = self.below
        match request.action:
            case "stop":
                if below is not None:
                    await below.stop()
                return {}
            case "get_tree":
                states = await below.states() if below is not None else "LAUNCHED"
                return {self.ident: states} if isinstance(states, str) else states
            case "resolve" if below is not None:
                return await told_layer(below.resolve, request.payload)
            case "update_scheduler_opts" if below is not None:
                given: messages.Options = dialects.read("update_scheduler_opts", request.payload, messages.Options)
                return await below.options(given)
            case action:
                raise wrong(f"Unknown action '{action}'")


def _spec_in(answer: Mapping[str, Any], channel: Channel) -> str:
    text = answer.get("spec")
    if not isinstance(text, str) or len(text) > MAX_SPEC:
        raise PeerBrokeProtocol(f"{channel.peer} answered spec without one", remedy="Look at its version.")
    return text
