"""The envelope on one open websocket, either end: ask, post, answer, ping, and notice a dead line.

`converse` runs a connection in one nursery: a reader, one writer, the answers in order of arrival, pings, a watch over
the other side's silence, and the caller's own `talk`. Messages leave in fragments of 64 KiB, so that a ping or a pong
waits for at most one of them. On a server's end a short one leaves at once, past the writer, where nothing else waits
and the kernel has room.

Source: protocols/emissary.md, "The envelope", "Link states" and the last rule of "Run states".
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol, TypeAlias

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection
from wsproto.connection import ConnectionState
from wsproto.events import TextMessage
from wsproto.utilities import LocalProtocolError

import agent
from agent.core.envelope import (
    MAX_MESSAGE,
    Answer,
    Envelope,
    Foreign,
    ReqId,
    Request,
    Stray,
    Unreadable,
    error,
    success,
)
from agent.core.errors import ActionError, PeerRefused, PeerUnreachable, ProtocolMisuse
from agent.core.metrics import Metrics
from agent.core.upgraded import FRAGMENT, Upgraded, text_frames

log = logging.getLogger(__name__)

MAX_REQUESTS = 64  # requests of the peer that wait for their answer; then no more are read
MAX_WAITING = 64 * 1024  # characters of these, where there are several: decoded they may take 25 times the memory
CLOSE_S = 2.0  # s for the closing handshake
LAST_REQUESTS_S = 10.0  # s for what was asked before the connection ended
GOODBYE_S = 0.2  # s for the close frame of a cancelled connection: nobody reads the answer any more
IDENTITY: Mapping[str, Any] = {"tool": "emissary", "version": agent.__version__}

_LOST = (PeerUnreachable, ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError)

Answerer = Callable[[Request], Awaitable[Mapping[str, Any] | msgspec.Raw]]
AtOnce = Callable[[Request], Mapping[str, Any] | None]
Elder = Callable[[Mapping[str, Any]], Awaitable[str | None]]
Tell = Callable[[str], None]


class Refused(PeerRefused):
    """An error answer to a request of ours. `reason` is as it came, "code: text"; `code` its first word."""

    def __init__(self, peer: str, action: str, reason: str) -> None:
        super().__init__(f"{peer} refused {action}: {reason}", remedy="Nothing was changed there.")
        self.reason = reason
        self.code = reason.partition(":")[0]


class _Close(msgspec.Struct, frozen=True):
    """What the writer carries out after all that was given to it before."""

    code: int
    reason: str


class Source(Protocol):
    """Messages that wait for their turn at the writer. `take` gives the next frame's text, if `has_more`."""

    @property
    def has_more(self) -> bool: ...

    def take(self) -> str | None: ...


class _Text:
    """A message of a task that waits until the writer takes it; `given_up` when it waits no more."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.taken = trio.Event()
        self.given_up = False


class _Rest(msgspec.Struct, frozen=True):
    """The rest of a frame that the kernel took in part."""


class _Asked:
    """A request of ours that waits for its answer."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: Answer | None = None


class Channel:
    """One open websocket that speaks the envelope. Made by `converse`; usable by other tasks as long as that runs.

    `peer` is the other side's address, `last_heard` the trio time of its last frame (pongs count). `state("ready")`
    tells the state of an outgoing link (core/link.py); a server's end has none to tell. `max_message` is the most bytes
    of one message from us: raised where a protocol allows more and the peer is known to take it.
    """

    def __init__(
        self, ws: WebSocketConnection, metrics: Metrics, tell: Tell, elder: Elder | None, at_once: AtOnce
    ) -> None:
        self.peer = ws.remote if isinstance(ws.remote, str) else ws.remote.url
        self.last_heard = trio.current_time()
        self.state = tell
        self.max_message = MAX_MESSAGE
        self._ws, self._metrics = ws, metrics
        self._elder = elder
        self._envelope = Envelope(knows_foreign=elder is not None)
        self._asked: dict[int, _Asked] = {}
        self._ended = trio.Event()
        # Bounded without a limit: each text has its caller waiting, and a source is in it once.
        self._outgoing, self._to_write = trio.open_memory_channel[_Item](math.inf)
        self._offered: set[Source] = set()
        self._to_carry_out = 0  # of what was given to the writer
        self._line = ws._stream if isinstance(ws._stream, Upgraded) else None  # where a message can leave at once
        self._requests, self._to_answer = trio.open_memory_channel[tuple[Request | Foreign, int]](math.inf)
        self._unanswered = self._waiting = 0  # requests that have been read, and the size of their frames
        self._has_room = trio.lowlevel.ParkingLot()  # the reader, while these are too many
        self._at_once = at_once
        self._late = deque[tuple[_Read, int] | str]()  # what came past the library, with its size; or an answer to it
        self._has_late = trio.Event()
        self._writing_since: float | None = None
        self._busy_reader = self._closing = False
        self._unsaid: _Close | None = None  # who does not read is still told why, if he does by then
        self._logged: set[str] = set()
        self._scope = trio.CancelScope()
        self._deadline_s, self._expects = math.inf, trio.Event()

    async def ask(self, action: str, payload: Mapping[str, Any], *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Send a request and wait for its answer; the answer's payload.

        Raises Refused for an error answer, PeerUnreachable when none came within `timeout_s` seconds or the connection
        ended, ProtocolMisuse for a message of more than `max_message` bytes.
        """
        number, text = self._envelope.ask(action, payload)
        self._asked[number] = asked = _Asked()
        try:
            with trio.move_on_after(timeout_s) as limit:
                await self.send(text)
                await asked.answered.wait()
        finally:
            del self._asked[number]
            self._envelope.give_up(number)
        if asked.answer is None:
            if limit.cancelled_caught:
                what = f"{self.peer} did not answer {action} within {timeout_s:g} s"
                raise PeerUnreachable(what, remedy="Look at the other side's log.")
            raise self._closed()
        if asked.answer.reason is not None:
            raise Refused(self.peer, action, asked.answer.reason)
        return asked.answer.payload

    async def post(self, action: str, payload: Mapping[str, Any] | msgspec.Raw) -> None:
        """Send a request that wants no answer. Raises PeerUnreachable when the connection ended, and ProtocolMisuse."""
        await self.send(self._envelope.post(action, payload))

    async def send(self, text: str) -> None:
        """Send a frame that is made already. Raises PeerUnreachable when the connection ended, and ProtocolMisuse."""
        size = len(text) if text.isascii() else len(text.encode())
        if size > self.max_message:
            what = f"a message of {size} bytes; at most {self.max_message} are allowed"
            raise ProtocolMisuse(what, remedy="Send it in parts or by a URL.")
        if self._say_now(text):
            await trio.lowlevel.checkpoint()
        elif not await self._hand_over(text):
            raise self._closed()

    def offer(self, source: Source) -> None:
        """Have its messages sent, one at each turn, until it has none; more may be offered at any time."""
        if source in self._offered:
            return
        if self._is_free():
            text = source.take()
            if text is not None and not self._say_now(text):
                self._give(_Text(text))
            if not source.has_more:
                return
        self._offered.add(source)
        self._give(source)

    def expect(self, deadline_s: float) -> None:
        """From now on give the peer up when it sends nothing, or takes nothing, for so many seconds."""
        self._deadline_s = deadline_s
        self._expects.set()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close, once all that was asked, posted or answered before is sent; by force when that takes too long."""
        last = _Close(code, reason)
        with trio.move_on_after(CLOSE_S) as limit:
            if not self._give(last):
                return
            await self._ended.wait()
        self._unsaid = last if limit.cancelled_caught and not self._closing else None
        self._scope.cancel()

    @property
    def unacknowledged(self) -> int:
        """On a server's end: how many bytes of ours the peer's machine has not taken. 0 when the connection ended."""
        return self._line.unacknowledged if self._line is not None else 0

    def _is_free(self) -> bool:
        """May a message leave at once: does nothing else wait to be written, and is no close under way?"""
        return self._line is not None and not self._to_carry_out and self._ws._wsproto.state is ConnectionState.OPEN

    def _say_now(self, text: str) -> bool:
        """Let a message leave at once, unless it must wait for others, for the kernel, or for its own fragments."""
        if self._line is None or not self._is_free() or len(text) > FRAGMENT:
            return False
        first, *others = text_frames(text)
        if others or not self._line.send_now(first):
            return False
        if self._line.has_rest:
            self._give(_Rest())
        return True

    def _give(self, item: "_Item") -> bool:
        """Let the writer do it after all that was given before; False when the connection ended."""
        try:
            self._outgoing.send_nowait(item)
        except trio.BrokenResourceError:
            return False
        self._to_carry_out += 1
        return True

    async def _hand_over(self, text: str) -> bool:
        """Wait until the writer has taken it; False when the connection ends before."""
        item = _Text(text)
        if not self._give(item):
            return False
        try:
            await item.taken.wait()
        except trio.Cancelled:
            item.given_up = True
            raise
        return not item.given_up

    def _closed(self) -> PeerUnreachable:
        return PeerUnreachable(
            f"the connection with {self.peer} is closed ({closing(self._ws)})", remedy="Wait for the next connection."
        )

    # ---- the tasks of `converse` ------------------------------------------------------------------------------------

    async def _run(
        self,
        answer: Answerer,
        talk: Callable[["Channel"], Awaitable[None]],
        identity: Mapping[str, Any],
        deadline_s: float,
        ping_s: float,
    ) -> None:
        self.expect(deadline_s)
        with ungrouped():
            async with trio.open_nursery() as answering:
                answering.start_soon(self._answer_all, answer, identity)
                try:
                    async with trio.open_nursery() as nursery:
                        self._scope = nursery.cancel_scope
                        nursery.start_soon(self._read)
                        if self._line is not None and self._line.is_diverted:
                            nursery.start_soon(self._read_past, self._line)
                        nursery.start_soon(self._write)
                        nursery.start_soon(self._ping, ping_s)
                        nursery.start_soon(self._watch)
                        await talk(self)
                        await self.close()
                finally:
                    self._ended.set()
                    for asked in self._asked.values():
                        asked.answered.set()
                if last := self._unsaid:
                    with trio.move_on_after(CLOSE_S):
                        await self._ws.aclose(last.code, last.reason)
                # What was asked before the end is carried out, though nobody hears the answer.
                for late in self._late:
                    if not isinstance(late, str) and isinstance(late[0], Request | Foreign):
                        self._requests.send_nowait((late[0], late[1]))
                self._requests.close()
                answering.cancel_scope.deadline = trio.current_time() + LAST_REQUESTS_S

    async def _read(self) -> None:
        try:
            while True:
                await self._take(await self._ws.get_message())
        except ConnectionClosed:
            if not self._closing:
                self._scope.cancel()

    async def _read_past(self, line: Upgraded) -> None:
        """Messages that come past the library, all of one look together. While some must wait no more are read."""

        def take(texts: list[str]) -> None:
            self.last_heard = trio.current_time()
            for text in texts:
                read = self._envelope.feed(text)
                if self._late or not self._is_done_at_once(read):
                    self._late.append((read, len(text)))
            if self._late:
                line.divert(None)
                self._has_late.set()

        while True:
            line.divert(take)
            await self._has_late.wait()
            while self._late:
                late = self._late[0]
                await (self._say(late) if isinstance(late, str) else self._carry_on(*late))
                self._late.popleft()
            self._has_late = trio.Event()

    def _is_done_at_once(self, read: "_Read") -> bool:
        match read:
            case Answer():
                self._hear(read)
            case Request() if not self._unanswered and read.action != "identify":
                if (text := self._answer_at_once(read)) is None:
                    return False
                if not read.posted and not self._say_now(text):
                    self._late.append(text)
            case _:
                return False
        return True

    def _hear(self, answer: Answer) -> None:
        asked = self._asked[answer.req_id]
        asked.answer = answer
        asked.answered.set()

    async def _take(self, frame: str | bytes) -> None:
        self.last_heard = trio.current_time()
        await self._carry_on(self._envelope.feed(frame), len(frame))

    async def _carry_on(self, read: "_Read", size: int) -> None:
        match read:
            case (Request() | Foreign()) as request:
                while self._unanswered >= (MAX_REQUESTS if self._waiting + size <= MAX_WAITING else 1):
                    self._busy_reader = True  # what we do not read is no silence of the peer
                    await self._has_room.park()
                    self._busy_reader, self.last_heard = False, trio.current_time()
                self._unanswered += 1
                self._waiting += size
                self._requests.send_nowait((request, size))
            case Answer() as answer:
                self._hear(answer)
            case Stray() as stray:
                self._metrics.count("link_stray_answers_total")
                self._log(logging.INFO, "answer to no request rsp_id=%.100r reason=%s", stray.rsp_id, stray.reason)
            case Unreadable() as bad:
                self._metrics.count("link_bad_frames_total")
                self._log(logging.WARNING, "unreadable frame reason=%s", bad.reason)
                await self._say(bad.answer)
                if bad.close:
                    await self.close(1007, "too many unreadable frames")

    def _log(self, level: int, what: str, *values: object) -> None:
        """What a peer does wrong again and again is logged once for each connection; the answers tell it each time."""
        log.log(logging.DEBUG if what in self._logged else level, f"{what} peer=%s", *values, self.peer)
        self._logged.add(what)

    async def _say(self, text: str) -> None:
        if not self._say_now(text):
            await self._hand_over(text)  # or the writer ended with the connection

    async def _write(self) -> None:
        # The reader decides when it is over: it may still have something that came before the close.
        try:
            with suppress(ConnectionClosed, LocalProtocolError):
                async for item in self._to_write:
                    await self._carry_out(item)
                    self._to_carry_out -= 1
        finally:
            self._writing_since = self._line = None
            self._give_back()

    def _give_back(self) -> None:
        """Nothing is written any more: whoever waits for it goes on."""
        with suppress(trio.WouldBlock):
            while True:
                item = self._to_write.receive_nowait()
                if isinstance(item, _Text):
                    item.given_up = True
                    item.taken.set()
        self._to_write.close()

    async def _carry_out(self, item: "_Item") -> None:
        match item:
            case _Close():
                self._closing = True  # the reader ends now, and leaves the handshake time
                await self._ws.aclose(item.code, item.reason)
                self._scope.cancel()
            case _Text():
                if not item.given_up:
                    item.taken.set()
                    await self._put(item.text)
            case _Rest():
                await self._transmit(b"")
            case _:
                self._offered.discard(item)
                if (text := item.take()) is not None:
                    if item.has_more:
                        self.offer(item)  # behind all that waits
                    await self._put(text)

    async def _put(self, text: str) -> None:
        # send_message() makes one frame of a message, and nothing overtakes a frame.
        for frame in text_frames(text) if self._ws.is_server else self._masked(text):
            await self._transmit(frame)

    def _masked(self, text: str) -> Iterator[bytes]:
        step = FRAGMENT if text.isascii() else FRAGMENT // 4  # characters; at most 4 bytes each
        for at in range(0, len(text), step):
            last = at + step >= len(text)
            yield self._ws._wsproto.send(TextMessage(data=text[at : at + step], message_finished=last))

    async def _transmit(self, data: bytes) -> None:
        """What the websocket's own `_send` does, less a turn of the loop for a lock that is free."""
        ws = self._ws
        if ws._wsproto.state is not ConnectionState.OPEN:
            raise LocalProtocolError("the websocket is closed or closing")
        self._writing_since = trio.current_time()
        try:
            ws._stream_lock.acquire_nowait()
        except trio.WouldBlock:
            await ws._stream_lock.acquire()
        try:
            await ws._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await ws._abort_web_socket()
            raise ConnectionClosed(ws._close_reason) from None
        finally:
            ws._stream_lock.release()
        self._writing_since = None

    async def _ping(self, ping_s: float) -> None:
        with suppress(ConnectionClosed, LocalProtocolError):
            while True:
                await self._ws.ping()
                self.last_heard = trio.current_time()
                await trio.sleep(ping_s)

    async def _watch(self) -> NoReturn:
        while True:
            now, deadline_s, self._expects = trio.current_time(), self._deadline_s, trio.Event()
            if self._busy_reader:
                self.last_heard = now
            silent_at = self.last_heard + deadline_s
            stuck_at = math.inf if self._writing_since is None else self._writing_since + deadline_s
            if now >= min(silent_at, stuck_at):
                what = "sent nothing" if now >= silent_at else "took nothing"
                raise PeerUnreachable(
                    f"{self.peer} {what} for {deadline_s:g} s",
                    remedy="Look at the network and at the other side's log.",
                )
            with trio.move_on_at(min(silent_at, stuck_at)):
                await self._expects.wait()

    async def _answer_all(self, answer: Answerer, identity: Mapping[str, Any]) -> None:
        async for request, size in self._to_answer:
            if isinstance(request, Foreign):
                await self._answer_foreign(request)
            else:
                text = await self._answer(request, answer, identity)
                if not request.posted:
                    await self._say(text)
            self._unanswered -= 1
            self._waiting -= size
            self._has_room.unpark_all()

    async def _answer_foreign(self, frame: Foreign) -> None:
        assert self._elder is not None
        try:
            text = await self._elder(frame.message)
        except ActionError as err:
            text = error(None, err.reason)
        except Exception:  # as below
            self._metrics.count("link_internal_errors_total")
            log.exception("older request failed peer=%s", self.peer)
            text = error(None, "internal: the request failed here; the log has the details")
        if text is None:
            await self.close()
        else:
            await self._say(text)

    async def _answer(self, request: Request, answer: Answerer, identity: Mapping[str, Any]) -> str:
        try:
            return self._success(request, identity if request.action == "identify" else await answer(request))
        except ActionError as err:
            return self._refusal(request, err)
        except Exception:  # one request must not end the connection
            log.exception("request failed peer=%s action=%s", self.peer, request.action)
            return self._failure(request)

    def _answer_at_once(self, request: Request) -> str | None:
        """None, when that has to wait."""
        try:
            payload = self._at_once(request)
            return None if payload is None else self._success(request, payload)
        except ActionError as err:
            return self._refusal(request, err)
        except Exception:  # as above
            log.exception("request failed peer=%s action=%s", self.peer, request.action)
            return self._failure(request)

    def _success(self, request: Request, payload: Mapping[str, Any] | msgspec.Raw) -> str:
        text = success(request.action, request.req_id, payload)
        return text if len(text) <= self.max_message // 4 else _bounded(request.req_id, text, self.max_message)

    def _refusal(self, request: Request, err: ActionError) -> str:
        if request.posted:
            self._log(logging.INFO, "posted request refused action=%r reason=%s", request.action, err.reason)
        return error(request.req_id, err.reason)

    def _failure(self, request: Request) -> str:
        self._metrics.count("link_internal_errors_total")
        return error(request.req_id, "internal: the request failed here; the log has the details")


_Item: TypeAlias = _Text | _Rest | _Close | Source
_Read: TypeAlias = Request | Answer | Unreadable | Stray | Foreign


async def converse(
    ws: WebSocketConnection,
    answer: Answerer,
    talk: Callable[[Channel], Awaitable[None]],
    *,
    metrics: Metrics,
    deadline_s: float = 20.0,
    ping_s: float = 5.0,
    identity: Mapping[str, Any] = IDENTITY,
    tell: Tell = lambda state: None,
    elder: Elder | None = None,
    at_once: AtOnce = lambda request: None,
) -> None:
    """Speak the envelope on an open websocket until either side closes it, or `talk` returns: then it closes with 1000.

    What the peer asked before it closed is still carried out, for at most 10 s.

    Requests are answered one by one in order of arrival: `answer` gives the payload or raises ActionError; any other
    error is logged and answered `internal`. `identify` (and an empty action) is answered with `identity`. A ping goes
    out every `ping_s` seconds. `tell` takes the states that `talk` gives to `channel.state`. `elder` answers objects of
    an older protocol (they have `op`) by the text it gives; for None the connection is closed with 1000. `at_once` is
    asked before `answer` where the route is diverted and nothing else waits: with hundreds of peers the turns of the
    loop are most of what an answer costs. It gives None for what it leaves to `answer`.

    Raises PeerUnreachable when the peer sends nothing, or takes nothing, for `deadline_s` seconds, and what `talk`
    raises. Who made the websocket closes it then.
    """
    await Channel(ws, metrics, tell, elder, at_once)._run(answer, talk, identity, deadline_s, ping_s)


def closing(ws: WebSocketConnection) -> str:
    """How a websocket was closed, for a log or an error: code and reason, or that it was cut."""
    if ws.closed is None:
        return "not by its peer"
    return f"{ws.closed.code} {ws.closed.reason or ws.closed.name}"


@contextmanager
def ungrouped() -> Iterator[None]:
    """Errors leave a nursery as a group; a group of one cause leaves this as that cause.

    Cancellation that comes with an error gives way to it, and so does a lost line: each task that shares it tells it,
    beside the task that knows why. Several other errors stay a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = list(_leaves(group.split(trio.Cancelled)[1]))
        causes = [err for err in errors if not isinstance(err, _LOST)] or errors[:1]
        if len(causes) != 1:
            raise
        raise causes[0] from causes[0].__cause__


def _leaves(err: BaseException | None) -> Iterator[BaseException]:
    if isinstance(err, BaseExceptionGroup):
        for inner in err.exceptions:
            yield from _leaves(inner)
    elif err is not None:
        yield err


def _bounded(req_id: ReqId, text: str, most: int) -> str:
    size = len(text.encode())
    return text if size <= most else error(req_id, f"too_big: the answer has {size} bytes; ask for less")
