"""The envelope on a websocket: both ends in memory, time by the mock clock."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MemorySendStream, MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream

import agent
from agent.core.channel import MAX_REQUESTS, MAX_WAITING, Channel, Refused, converse, ungrouped
from agent.core.envelope import BAD_IN_A_ROW, MAX_MESSAGE, Request
from agent.core.errors import ActionError, PeerUnreachable, ProtocolMisuse
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial, connect
from agent.core.listen import Route, serve
from agent.core.metrics import Metrics
from agent.core.upgraded import FRAGMENT

Talk = Callable[[Channel], Awaitable[None]]
AnyStream = trio.StapledStream[Any, Any]


@asynccontextmanager
async def websockets(
    pair: Callable[[], tuple[AnyStream, AnyStream]] = memory_stream_pair,
) -> AsyncIterator[tuple[WebSocketConnection, WebSocketConnection, Callable[[], None]]]:
    """A client's and a server's end of one connection in memory; and what cuts it: from then on nothing passes."""
    ours, theirs = pair()
    async with trio.open_nursery() as nursery:
        ends: dict[str, WebSocketConnection] = {}

        async def client() -> None:
            ends["client"] = await wrap_client_stream(nursery, ours, "lab:1", "/")  # type: ignore[arg-type]  # any stream

        async def server() -> None:
            ends["server"] = await (await wrap_server_stream(nursery, theirs)).accept()

        async with trio.open_nursery() as opening:
            opening.start_soon(client)
            opening.start_soon(server)

        def cut() -> None:
            for stream in (ours, theirs):
                assert isinstance(stream.send_stream, MemorySendStream)
                stream.send_stream.send_all_hook = None
                stream.send_stream.close_hook = None

        yield ends["client"], ends["server"], cut
        nursery.cancel_scope.cancel()


async def lab(request: Request) -> Mapping[str, Any]:
    match request.action:
        case "echo":
            return request.payload
        case "break":
            raise ZeroDivisionError("on purpose")
        case "flood":
            return {"text": "é" * (MAX_MESSAGE // 2)}
        case action:
            raise ActionError("unknown_action", f"nothing here answers {action!r}")


async def idle(channel: Channel) -> None:
    await trio.sleep_forever()


async def between(talk: Talk, answer: Callable[[Request], Awaitable[Mapping[str, Any]]] = lab) -> Metrics:
    """Let `talk` talk from a client's end to `answer` at a server's; the server's counters."""
    metrics = Metrics()
    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        # Not in step with the client: a ping that meets a close makes the library fail, which the real owners handle.
        nursery.start_soon(partial(converse, server, answer, idle, metrics=metrics, ping_s=7))
        await converse(client, lab, talk, metrics=Metrics())
    return metrics


def write_with(ws: WebSocketConnection, send_all: Callable[[bytes], Awaitable[None]]) -> None:
    """Let what goes out at this end go through a function."""
    stream = ws._stream
    assert isinstance(stream, trio.StapledStream)
    stream.send_stream.send_all = send_all


async def until_closed(work: Callable[[], Awaitable[None]]) -> None:
    """Do it again and again, until the websocket is closed."""
    try:
        while True:
            await work()
    except ConnectionClosed:
        return


async def next_json(ws: WebSocketConnection) -> Any:
    return json.loads(await ws.get_message())


class Told:
    """A source of frames."""

    def __init__(self, name: str, count: int) -> None:
        self.left = [f'{{"action":"told","posted":true,"payload":{{"n":"{name}{n}"}}}}' for n in range(count)]

    @property
    def has_more(self) -> bool:
        return bool(self.left)

    def take(self) -> str | None:
        return self.left.pop(0) if self.left else None


# ---- asking and answering ------------------------------------------------------------------------------------------


async def test_an_answer_finds_its_request() -> None:
    async def talk(channel: Channel) -> None:
        assert await channel.ask("echo", {"a": 1}) == {"a": 1}
        with pytest.raises(Refused) as refused:
            await channel.ask("nonsense", {})
        assert refused.value.code == "unknown_action"
        assert refused.value.reason == "unknown_action: nothing here answers 'nonsense'"

    await between(talk)


async def test_both_ends_ask_on_the_same_socket() -> None:
    got: list[Any] = []

    async def ask(name: str, channel: Channel) -> None:
        got.append(await channel.ask("echo", {"from": name}))
        await trio.sleep_forever()

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, client, lab, partial(ask, "client"), metrics=Metrics()))
        nursery.start_soon(partial(converse, server, lab, partial(ask, "server"), metrics=Metrics()))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sorted(got, key=str) == [{"from": "client"}, {"from": "server"}]


async def test_an_error_of_ours_is_answered_internal_and_the_connection_lives(caplog: pytest.LogCaptureFixture) -> None:
    async def talk(channel: Channel) -> None:
        with pytest.raises(Refused, match="internal: the request failed here; the log has the details"):
            await channel.ask("break", {})
        assert await channel.ask("echo", {}) == {}

    metrics = await between(talk)
    assert list(metrics) == [("link_internal_errors_total", (), 1)]
    assert "ZeroDivisionError: on purpose" in caplog.text


@pytest.mark.parametrize("action", ["identify", ""])
async def test_who_is_there_is_answered_without_the_role(action: str) -> None:
    async def talk(channel: Channel) -> None:
        assert await channel.ask(action, {}) == {"tool": "emissary", "version": agent.__version__}

    await between(talk)


async def test_requests_are_answered_in_order_of_arrival(autojump_clock: MockClock) -> None:
    async def slow_first(request: Request) -> Mapping[str, Any]:
        await trio.sleep(1 if request.req_id == 0 else 0)
        return {}

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, slow_first, idle, metrics=Metrics()))
        for number in range(3):
            await client.send_message(json.dumps({"action": "a", "req_id": number}))
        assert [(await next_json(client))["rsp_id"] for _ in range(3)] == [0, 1, 2]
        nursery.cancel_scope.cancel()


async def test_a_posted_request_gets_no_answer_unless_it_cannot_be_read() -> None:
    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, lab, idle, metrics=Metrics()))
        for action in ("echo", "nonsense", "break"):
            await client.send_message(json.dumps({"action": action, "posted": True}))
        await client.send_message(json.dumps({"action": "echo", "posted": True, "payload": []}))
        answer = await next_json(client)
        assert answer == {"result": "error", "rsp_id": 0, "reason": "bad_payload: payload is a list, not an object"}
        nursery.cancel_scope.cancel()


async def test_stray_answers_are_counted_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    caplog.set_level(logging.INFO)
    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, lab, idle, metrics=metrics))
        await client.send_message('{"result":"error","rsp_id":null,"reason":"bad_json: what you sent"}')
        await client.send_message('{"action":"echo"}')
        assert (await next_json(client))["result"] == "success"
        nursery.cancel_scope.cancel()
    assert list(metrics) == [("link_stray_answers_total", (), 1)]
    assert "bad_json: what you sent" in caplog.text


async def test_ten_unreadable_frames_are_answered_and_then_the_socket_closes_with_1007() -> None:
    metrics = Metrics()
    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, lab, idle, metrics=metrics))
        for _ in range(BAD_IN_A_ROW):
            await client.send_message(b"binary")
            assert (await next_json(client))["reason"].startswith("bad_json: a binary frame")
        with pytest.raises(ConnectionClosed) as closed:
            await client.get_message()
        assert closed.value.reason is not None
        assert closed.value.reason.code == 1007
    assert list(metrics) == [("link_bad_frames_total", (), BAD_IN_A_ROW)]


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x" * 1_000_000, "é" * 300_000, "x" * (FRAGMENT - 1), ""])
async def test_a_message_of_any_size_arrives_whole(text: str) -> None:
    async def talk(channel: Channel) -> None:
        assert await channel.ask("echo", {"text": text}) == {"text": text}

    await between(talk)


async def test_a_big_message_lets_a_ping_overtake_it(autojump_clock: MockClock) -> None:
    async with websockets() as (_, server, _), trio.open_nursery() as nursery:
        written: list[int] = []

        async def write_slowly(data: bytes) -> None:
            written.append(len(data))
            await trio.sleep(1)

        write_with(server, write_slowly)

        async def talk(channel: Channel) -> None:
            await channel.post("big", {"text": "x" * 10 * FRAGMENT})
            await trio.sleep_forever()

        nursery.start_soon(partial(converse, server, lab, talk, metrics=Metrics()))
        await trio.sleep(4.5)
        nursery.start_soon(server.ping)
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    piece = FRAGMENT + 10
    assert written in ([6, *[piece] * 4, 6, piece], [piece, 6, *[piece] * 3, 6, piece])  # pings have 6 bytes


async def test_more_than_the_limit_is_not_sent_and_not_answered() -> None:
    async def talk(channel: Channel) -> None:
        with pytest.raises(ProtocolMisuse, match=r"a message of 10486.. bytes; at most 1048576 are allowed"):
            await channel.post("echo", {"text": "é" * (MAX_MESSAGE // 2)})
        with pytest.raises(Refused, match=r"too_big: the answer has 10486.. bytes; ask for less"):
            await channel.ask("flood", {})
        assert await channel.ask("echo", {}) == {}

    await between(talk)


# ---- time ----------------------------------------------------------------------------------------------------------


async def test_an_answer_that_does_not_come_is_an_unreachable_peer(autojump_clock: MockClock) -> None:
    async def never(request: Request) -> Mapping[str, Any]:
        await trio.sleep_forever()

    async def talk(channel: Channel) -> None:
        with pytest.raises(PeerUnreachable, match="did not answer run within 10 s"):
            await channel.ask("run", {})
        assert trio.current_time() == pytest.approx(10)

    await between(talk, never)


async def test_both_ends_notice_a_silent_line_within_the_deadline(autojump_clock: MockClock) -> None:
    noticed: list[float] = []

    async def end(ws: WebSocketConnection) -> None:
        with pytest.raises(PeerUnreachable, match="sent nothing for 20 s"):
            await converse(ws, lab, idle, metrics=Metrics())
        noticed.append(trio.current_time())

    async with websockets() as (client, server, cut), trio.open_nursery() as nursery:
        nursery.start_soon(end, client)
        nursery.start_soon(end, server)
        await trio.sleep(1000.5)  # pings alone keep it up
        assert noticed == []
        cut()
    assert noticed == [pytest.approx(1020, abs=0.5)] * 2


@pytest.mark.parametrize("deadline_s", [8, 50])
async def test_the_deadline_may_become_another_one(autojump_clock: MockClock, deadline_s: float) -> None:
    async def talk(channel: Channel) -> None:
        await trio.sleep(1)
        channel.expect(deadline_s)
        await trio.sleep_forever()

    async with websockets() as (client, _, cut):
        cut()
        with pytest.raises(PeerUnreachable, match=f"sent nothing for {deadline_s} s"):
            await converse(client, lab, talk, metrics=Metrics())
        assert trio.current_time() == pytest.approx(deadline_s, abs=0.5)


async def test_a_peer_that_sends_but_takes_nothing_is_given_up(autojump_clock: MockClock) -> None:
    async with websockets() as (client, server, _), trio.open_nursery() as nursery:

        async def chatter() -> None:
            await client.send_message('{"action":"echo","posted":true}')
            await trio.sleep(1)

        async def write_never(data: bytes) -> None:
            await trio.sleep_forever()

        async def talk(channel: Channel) -> None:
            while True:
                await channel.post("event", {})

        nursery.start_soon(until_closed, chatter)
        write_with(server, write_never)
        with pytest.raises(PeerUnreachable, match="took nothing for 20 s"):
            await converse(server, lab, talk, metrics=Metrics())
        nursery.cancel_scope.cancel()


async def test_what_we_are_too_busy_to_read_is_no_silence_of_the_peer(autojump_clock: MockClock) -> None:
    async def slow(request: Request) -> Mapping[str, Any]:
        await trio.sleep(30)
        return {}

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, slow, idle, metrics=Metrics()))
        nursery.start_soon(lambda: send_all_requests(client))
        for number in range(MAX_REQUESTS + 10):
            assert (await next_json(client))["rsp_id"] == number
        nursery.cancel_scope.cancel()


async def test_of_large_requests_a_few_are_read_and_the_others_when_these_are_answered() -> None:
    """Who takes no answers would have us keep 64 of them, decoded, a MiB each."""
    answers, sent, count = trio.Event(), 0, 20

    async def slow(request: Request) -> Mapping[str, Any]:
        await answers.wait()
        return {}

    async with websockets(lockstep_stream_pair) as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, slow, idle, metrics=Metrics()))

        @nursery.start_soon
        async def send() -> None:
            nonlocal sent
            for number in range(count):
                payload = {"text": "x" * MAX_WAITING}
                await client.send_message(json.dumps({"action": "a", "req_id": number, "payload": payload}))
                sent += 1

        await wait_all_tasks_blocked()
        assert sent <= 4  # answered, read, and two with the library
        answers.set()
        assert [(await next_json(client))["rsp_id"] for _ in range(count)] == list(range(count))
        nursery.cancel_scope.cancel()


async def send_all_requests(ws: WebSocketConnection) -> None:
    for number in range(MAX_REQUESTS + 10):
        await ws.send_message(json.dumps({"action": "a", "req_id": number}))


# ---- ends ----------------------------------------------------------------------------------------------------------


async def test_when_the_peer_closes_converse_returns_and_the_channel_says_so() -> None:
    channels: list[Channel] = []

    async def talk(channel: Channel) -> None:
        channels.append(channel)
        await channel.ask("never", {})

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def close() -> None:
            await server.get_message()
            await server.aclose(4001, "another one came")

        await converse(client, lab, talk, metrics=Metrics())
        for late in (partial(channels[0].ask, "echo", {}), partial(channels[0].post, "echo", {})):
            with pytest.raises(PeerUnreachable, match=r"is closed \(4001 another one came\)"):
                await late()
        await channels[0].close()


async def test_others_who_wait_for_an_answer_hear_of_the_end() -> None:
    opened = trio.Event()
    channels: list[Channel] = []

    async def talk(channel: Channel) -> None:
        channels.append(channel)
        opened.set()
        await trio.sleep_forever()

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, client, lab, talk, metrics=Metrics()))
        await opened.wait()

        @nursery.start_soon
        async def ask() -> None:
            with pytest.raises(PeerUnreachable, match="is closed"):
                await channels[0].ask("never", {})

        await server.get_message()
        await server.aclose()


async def test_what_was_said_before_a_close_still_goes_out() -> None:
    async def talk(channel: Channel) -> None:
        await channel.post("last", {"text": "x" * 500_000})
        await channel.close(4001, "superseded")

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, lab, talk, metrics=Metrics()))
        assert (await next_json(client))["action"] == "last"
        with pytest.raises(ConnectionClosed) as closed:
            await client.get_message()
        assert closed.value.reason is not None
        assert (closed.value.reason.code, closed.value.reason.reason) == (4001, "superseded")


async def test_a_close_that_the_peer_does_not_answer_takes_two_seconds(autojump_clock: MockClock) -> None:
    async with websockets() as (client, _, cut):
        cut()
        await converse(client, lab, lambda channel: channel.close(), metrics=Metrics())
        assert trio.current_time() == pytest.approx(2)


async def test_who_reads_again_after_a_close_by_force_is_told_why(autojump_clock: MockClock) -> None:
    reads = trio.Event()

    async def stand_still_in_the_middle(channel: Channel) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.post, "told", {})
            await wait_all_tasks_blocked()
            await channel.close(1013, "subscription 1 does not keep up")

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        stream = server._stream
        assert isinstance(stream, trio.StapledStream)
        send = stream.send_stream.send_all

        async def send_when_read(data: bytes) -> None:
            await reads.wait()
            await send(data)

        write_with(server, send_when_read)
        nursery.start_soon(partial(converse, server, lab, stand_still_in_the_middle, metrics=Metrics()))
        await trio.sleep(3)
        reads.set()
        with pytest.raises(ConnectionClosed):
            await client.get_message()
        assert client.closed is not None
        assert (client.closed.code, client.closed.reason) == (1013, "subscription 1 does not keep up")


async def test_what_was_asked_before_a_close_is_still_carried_out(autojump_clock: MockClock) -> None:
    done: list[Any] = []

    async def slow(request: Request) -> Mapping[str, Any]:
        await trio.sleep(1)
        done.append(request.req_id)
        return {}

    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        nursery.start_soon(partial(converse, server, slow, idle, metrics=Metrics()))
        for number in range(20):
            await client.send_message(json.dumps({"action": "a", "req_id": number, "posted": number % 2 == 0}))
        await client.aclose()
    assert done == list(range(9))  # in 10 s


async def test_what_talk_raises_leaves_alone() -> None:
    async def talk(channel: Channel) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"), ungrouped():
        await between(talk)


@pytest.mark.parametrize(
    ("group", "left"),
    [
        (ExceptionGroup("", [KeyError()]), KeyError),
        (ExceptionGroup("", [ExceptionGroup("", [KeyError()])]), KeyError),
        (ExceptionGroup("", [PeerUnreachable("a", remedy=""), PeerUnreachable("b", remedy="")]), PeerUnreachable),
        (ExceptionGroup("", [ConnectionClosed(None), ConnectionClosed(None)]), ConnectionClosed),
        (ExceptionGroup("", [ConnectionClosed(None), trio.BrokenResourceError()]), ConnectionClosed),
        (ExceptionGroup("", [PeerUnreachable("b", remedy=""), KeyError()]), KeyError),
        (ExceptionGroup("", [KeyError(), ValueError()]), ExceptionGroup),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), KeyboardInterrupt),
        (KeyError(), KeyError),
    ],
)
def test_a_group_of_one_cause_leaves_as_that_cause(group: BaseException, left: type[BaseException]) -> None:
    with pytest.raises(left), ungrouped():
        raise group


async def test_cancellation_passes_through() -> None:
    with trio.move_on_after(0) as scope:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught


# ---- sources -------------------------------------------------------------------------------------------------------


async def test_sources_take_turns_with_each_other_and_with_what_is_sent() -> None:
    heard: list[str] = []

    async def note(request: Request) -> Mapping[str, Any]:
        heard.append(request.payload["n"])
        return {}

    async def talk(channel: Channel) -> None:
        a, b = Told("a", 3), Told("b", 2)
        for source in (a, a, b):
            channel.offer(source)
        await channel.post("told", {"n": "c"})
        await wait_all_tasks_blocked()
        a.left += Told("again ", 1).left
        channel.offer(a)
        await channel.ask("told", {"n": "last"})

    await between(talk, note)
    assert heard == ["a0", "b0", "c", "a1", "b1", "a2", "again 0", "last"]


async def test_a_source_that_has_nothing_any_more_and_one_offered_after_the_end_send_nothing() -> None:
    channels: list[Channel] = []

    async def talk(channel: Channel) -> None:
        channels.append(channel)
        channel.offer(Told("nothing", 0))
        await channel.ask("echo", {})

    await between(talk)
    late = Told("late", 1)
    channels[0].offer(late)
    assert late.has_more


async def test_a_post_that_is_given_up_before_its_turn_is_not_sent(autojump_clock: MockClock) -> None:
    async with websockets() as (client, server, _), trio.open_nursery() as nursery:
        stuck = trio.Event()
        assert isinstance(client._stream, trio.StapledStream)
        send_all = client._stream.send_stream.send_all

        async def slow(data: bytes) -> None:
            await stuck.wait()
            await send_all(data)

        heard: list[str] = []

        async def note(request: Request) -> Mapping[str, Any]:
            heard.append(request.payload["n"])
            return {}

        async def talk(channel: Channel) -> None:
            write_with(client, slow)
            nursery.start_soon(channel.post, "told", {"n": "first"})
            await wait_all_tasks_blocked()
            with trio.move_on_after(1):
                await channel.post("told", {"n": "given up"})
            write_with(client, send_all)
            stuck.set()
            await channel.ask("told", {"n": "last"})

        nursery.start_soon(partial(converse, server, note, idle, metrics=Metrics()))
        await converse(client, lab, talk, metrics=Metrics())
        nursery.cancel_scope.cancel()
    assert heard == ["first", "last"]


# ---- answers at once ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def diverted(
    at_once: Callable[[Request], Mapping[str, Any] | None], answer: Callable[[Request], Awaitable[Mapping[str, Any]]]
) -> AsyncIterator[WebSocketConnection]:
    """A client's end of a connection whose server's route is diverted."""

    async def opened(head: Head, ws: WebSocketConnection) -> None:
        await converse(ws, answer, idle, metrics=Metrics(), deadline_s=60, ping_s=30, at_once=at_once)

    routes = [Route("/*", websocket=opened, scope="open", is_diverted=True)]
    guard = Guard((), {}, False, (), trio.current_time)
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(partial(serve, ["127.0.0.1:0"], routes, guard, metrics=Metrics()))
        with trio.fail_after(60):
            async with connect(Dial(url=f"ws://{address}/")) as ws:
                yield ws
        nursery.cancel_scope.cancel()


def request(number: int, action: str, **payload: object) -> str:
    return json.dumps({"action": action, "req_id": number, "payload": payload})


async def test_what_can_be_answered_at_once_is_and_keeps_its_turn() -> None:
    may_go_on, began = trio.Event(), trio.Event()
    seen: list[str] = []

    def at_once(asked: Request) -> Mapping[str, Any] | None:
        if asked.action == "later":
            return None
        seen.append("at once")
        if asked.action == "break":
            raise ZeroDivisionError("on purpose")
        if asked.action == "refuse":
            raise ActionError("", "not so")
        return asked.payload

    async def answer(asked: Request) -> Mapping[str, Any]:
        seen.append("later")
        began.set()
        await may_go_on.wait()
        return asked.payload

    async with diverted(at_once, answer) as ws:
        for number, action in enumerate(("now", "refuse", "break", "identify")):
            await ws.send_message(request(number, action))
        assert (await next_json(ws))["payload"] == {}
        assert (await next_json(ws))["reason"] == "not so"
        assert (await next_json(ws))["reason"].startswith("internal: ")
        assert seen == ["at once"] * 3
        seen.clear()
        await next_json(ws)
        for number, action in enumerate(("later", "now", "now")):
            await ws.send_message(request(number, action))
        await began.wait()
        await ws.send_message(request(3, "now"))
        may_go_on.set()
        assert [(await next_json(ws))["rsp_id"] for _ in range(4)] == [0, 1, 2, 3]
        await ws.send_message("no JSON")
        assert "not a JSON object" in (await next_json(ws))["reason"]
        await ws.send_message(request(5, "now"))
        await ws.send_message(request(6, "now", text="x" * 100_000))  # not a simple one: by the library
        await ws.send_message(request(7, "now"))
        assert [(await next_json(ws))["rsp_id"] for _ in range(3)] == [5, 6, 7]


async def test_who_asks_and_does_not_listen_is_not_read_either() -> None:
    count, asked_for = 0, 1000

    def at_once(asked: Request) -> Mapping[str, Any]:
        nonlocal count
        count += 1
        return {"text": "x" * 20_000}

    async def answer(asked: Request) -> Mapping[str, Any]:
        return at_once(asked)

    async with diverted(at_once, answer) as ws, trio.open_nursery() as nursery:

        async def ask_all() -> None:
            for number in range(asked_for):
                await ws.send_message(request(number, "now", text="y" * 10_000))

        nursery.start_soon(ask_all)  # 20 MB of answers: more than the kernel and the library hold
        before = 0
        while not count or before != count:
            before = count
            await trio.sleep(0.2)
        assert count < asked_for
        assert [(await next_json(ws))["rsp_id"] for _ in range(asked_for)] == list(range(asked_for))
    assert count == asked_for


async def test_what_was_asked_before_the_end_is_carried_out_past_the_library_too() -> None:
    may_go_on, done = trio.Event(), trio.Event()
    carried_out: list[int] = []

    async def answer(asked: Request) -> Mapping[str, Any]:
        await may_go_on.wait()
        carried_out.append(asked.payload["n"])
        if len(carried_out) == 10:
            done.set()
        return {}

    async with diverted(lambda asked: None, answer) as ws:
        for n in range(10):
            await ws.send_message(request(n, "keep", n=n))
        await ws.aclose()
        may_go_on.set()
        await done.wait()
    assert carried_out == list(range(10))
