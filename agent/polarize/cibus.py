"""The connection to the CI Bus on trio, held for ever: completions are heard, and ended runs published.

One durable topic subscription with a selector for what concerns this agent, and the same filter again here, since not
every broker knows selectors. A message is acknowledged after what it leads to is on disk.

Source: protocols/emissary.md, "CI Bus".
"""

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Literal, NoReturn
from urllib.parse import urlsplit

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.channel import ungrouped
from agent.core.errors import PeerError, PeerRefused, PeerUnreachable
from agent.core.events import Alert, AlertCleared, LinkChanged, SuiteFinished, decode
from agent.core.store import Outbox, Owed, Store
from agent.core.tls import TlsSettings, TlsUnusable, client_context
from agent.core.token import TokenUnusable, read_token
from agent.polarize import submit
from agent.polarize.messages import Completion, SuiteResult
from agent.polarize.settings import CibusSettings
from agent.polarize.stomp import Connected, Failed, Message, Receipt, Session

log = logging.getLogger(__name__)

TOPIC = "/topic/VirtualTopic.qe.ci.>"
PUBLISH_TOPIC = "/topic/VirtualTopic.qe.ci.jenkins"
CONNECT_S = 10.0
LEAVE_S = 1.0  # for the last frame
FIRST_RETRY_S, MAX_RETRY_S, GOOD_AFTER_S = 1.0, 60.0, 60.0
LOUD_AFTER_S = 60.0  # without a connection, then an Alert

Complete = Callable[[str, submit.Finished], None]


class Line:
    """The connection, made again whenever it ends.

    `complete(response, finished)` gets each completion with a response value of this agent; None: nothing is listened
    to. `box` owes the bus a message for each SuiteFinished; None: nothing is published.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: CibusSettings,
        *,
        ident: str,
        response_name: str,
        complete: Complete | None,
        box: Outbox | None,
        random: Random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus, self._store, self._settings = bus, store, settings
        self._ident, self._name, self._complete, self._box = ident, response_name, complete, box
        self._random, self._clock = random, clock
        self._state, self._alert = "", ""
        self._ready_at = trio.current_time()  # or the start: when there was last a connection
        address = urlsplit(settings.url)
        self._host, self._port, self._secure = address.hostname or "", address.port or 61613, "+ssl" in address.scheme

    async def run(self) -> NoReturn:
        """Connect, converse, and again: 1 s doubling to 60 s, with full jitter; from the start after a good minute."""
        try:
            await self._connect_for_ever()
        finally:
            if self._state != "offline":
                self._become("offline")
            self._bus.publish(AlertCleared(code="link.cibus"))

    async def _connect_for_ever(self) -> NoReturn:
        retry_s = FIRST_RETRY_S
        while True:
            began = trio.current_time()
            self._become("connecting")
            try:
                await self._converse()
            except (PeerError, TokenUnusable, TlsUnusable) as err:
                if self._state == "ready":
                    self._ready_at = trio.current_time()
                self._become("offline", err.what)
                # What a broker refuses, a person must mend; a wrong address looks just like a broker that is down.
                is_loud = not isinstance(err, PeerUnreachable) or trio.current_time() - self._ready_at >= LOUD_AFTER_S
                if is_loud and self._alert != err.what:
                    self._alert = err.what
                    text = f"cibus: {err.what}"
                    self._bus.publish(Alert(code="link.cibus", text=text, remedy=err.remedy, since=self._clock()))
            if trio.current_time() - began >= GOOD_AFTER_S:
                retry_s = FIRST_RETRY_S
            await trio.sleep(self._random.uniform(0, retry_s))
            retry_s = min(2 * retry_s, MAX_RETRY_S)

    def _become(self, state: str, error: str | None = None) -> None:
        self._state = state
        log.info("link=cibus state=%s error=%s", state, error)
        self._bus.publish(LinkChanged(name="cibus", state=state, error=error))
        if state == "ready":
            self._alert = ""
            self._bus.publish(AlertCleared(code="link.cibus"))

    async def _converse(self) -> NoReturn:
        """One connection. Raises PeerError for all that ends it; TokenUnusable and TlsUnusable for files of ours."""
        session = Session(
            vhost=self._settings.vhost or self._host,
            client_id=f"emissary-{self._ident}",
            login=self._settings.login,
            passcode=read_token(Path(self._settings.password_file)) if self._settings.login else "",
        )
        stream: trio.abc.Stream | None = None
        try:
            with ungrouped():
                with trio.fail_after(CONNECT_S):
                    stream = tcp = await self._connect()
                    if self._secure:
                        stream = await self._shake_hands(tcp)
                    greeting = await self._greet(stream, session)
                await self._use(stream, session, greeting)
        except trio.TooSlowError as err:
            raise _unreachable(f"{self._settings.url} is silent") from err
        except (trio.BrokenResourceError, trio.ClosedResourceError) as err:
            raise _unreachable(f"{self._settings.url} is cut: {err.__cause__ or err}") from err
        finally:
            if stream is not None:
                with trio.move_on_after(LEAVE_S, shield=True):
                    await _leave(stream, session)
                await trio.aclose_forcefully(stream)

    async def _connect(self) -> trio.SocketStream:
        try:
            stream = await trio.open_tcp_stream(self._host, self._port)
        except OSError as err:
            raise _unreachable(f"{self._settings.url}: {err}") from err
        # A broker that sends no heart-beats would otherwise be waited for for ever after a cut.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return stream

    async def _shake_hands(self, tcp: trio.SocketStream) -> trio.abc.Stream:
        files = (self._settings.ca_file, self._settings.cert_file, self._settings.key_file)
        context = client_context(TlsSettings(*(Path(name) if name else None for name in files)))
        tls = trio.SSLStream(tcp, context, server_hostname=self._host)
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError as err:
            what = f"{self._settings.url}: TLS: {err.__cause__}"
            raise PeerRefused(what, remedy="Look at the certificates on both sides.") from err
        return tls

    async def _greet(self, stream: trio.abc.Stream, session: Session) -> Connected:
        await stream.send_all(session.connect())
        greeting: Connected | None = None
        while greeting is None:
            for happening in session.feed(await self._receive(stream)):
                match happening:
                    case Connected():
                        greeting = happening
                    case Failed(message):
                        raise self._refusal(message)
        return greeting

    async def _use(self, stream: trio.abc.Stream, session: Session, greeting: Connected) -> NoReturn:
        to_send, outgoing = trio.open_memory_channel[bytes](64)
        subscribed = ""
        published: dict[str, int] = {}  # receipt to outbox number

        async def write() -> NoReturn:
            # Twice as often as promised: a loop that is late for a moment is not yet silent.
            beat_s = greeting.send_every_s / 2 or math.inf
            while True:
                data = b"\n"
                with trio.move_on_after(beat_s):
                    data = await outgoing.receive()
                await stream.send_all(data)

        async def publish(box: Outbox) -> NoReturn:
            after = 0
            while True:
                for owed in await box.due(after):
                    if session.state != "connected":  # an ERROR was taken in this moment: who reads it tells
                        await trio.sleep_forever()
                    after = owed.n
                    receipt, data = session.send(PUBLISH_TOPIC, *self._announcement(owed))
                    published[receipt] = owed.n
                    await to_send.send(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            if self._complete is None:
                self._become("ready")
            else:
                subscribed, data = session.subscribe("ci", *self._subscription())
                await to_send.send(data)
            if self._box is not None:
                nursery.start_soon(publish, self._box)
            while True:
                with trio.fail_after(2 * greeting.expect_s or math.inf):
                    data = await self._receive(stream)
                for happening in session.feed(data):
                    match happening:
                        case Message():
                            await self._hear(happening)
                            if happening.ack is not None:
                                await to_send.send(session.acknowledge(happening.ack))
                        case Receipt(receipt) if receipt == subscribed:
                            self._become("ready")
                        case Receipt(receipt) if self._box is not None:
                            self._box.done(published.pop(receipt))
                        case Failed(message):
                            raise self._refusal(message)

    async def _hear(self, message: Message) -> None:
        """What concerns a submission of ours is on disk when this returns; the broker is told only then."""
        response = message.headers.get(self._name, "")
        if not response.startswith(f"{self._ident}."):
            return
        finished = submit.read_completion(message.body)
        if finished is None or self._complete is None:
            log.warning("a message that tells of no import response=%s bytes_cut=%d", response, message.cut)
            return
        self._complete(response, finished)
        await self._store.commit()

    def _subscription(self) -> tuple[str, dict[str, str]]:
        """Destination and headers.

        A queue is durable by itself, and gets no selector: what that skips stays in the queue, and ActiveMQ looks no
        further than 200 such messages, so that ours behind them would not come.
        """
        destination = self._settings.destination or TOPIC
        headers: dict[str, str] = {}
        if destination.startswith("/topic/"):
            headers = {
                "selector": f"{self._name} LIKE '{self._ident}.%'",
                "activemq.subscriptionName": "emissary",
            }
        return destination, headers

    def _announcement(self, owed: Owed) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the message that a run is over."""
        event = decode(owed.event.kind, owed.event.data)
        assert isinstance(event, SuiteFinished)
        status: Literal["passed", "failed"] = "passed" if event.verdict == "passed" else "failed"
        body = Completion(import_results=[SuiteResult(event.suite, status)], status=status)
        headers = {
            "content-type": "application/json",
            "amq-msg-type": "text",  # ActiveMQ makes bytes of what has a content-length; listeners expect text
            self._name: submit.new_response(self._ident, self._random),
            "ident": self._ident,
            "run": event.run,
        }
        return msgspec.json.encode(body), headers

    async def _receive(self, stream: trio.abc.Stream) -> bytes:
        if data := await stream.receive_some(65536):
            return bytes(data)
        raise _unreachable(f"{self._settings.url} closed the connection")

    def _refusal(self, message: str) -> PeerRefused:
        return PeerRefused(f"{self._settings.url}: {message}", remedy="Look at [cibus] and at the broker's log.")


async def _leave(stream: trio.abc.Stream, session: Session) -> None:
    """Say so, where the connection still takes it."""
    if session.state == "connected":
        _, data = session.disconnect()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            await stream.send_all(data)


def _unreachable(what: str) -> PeerUnreachable:
    return PeerUnreachable(what, remedy="Look at its address and whether it runs; it is tried again.")
