"""One connection: acts in their order, what is large in a thread, a silent admin is dead after 30 s."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.errors import PeerUnreachable
from agent.coverage.attach import Attachment, Settle
from agent.coverage.merged import Batch
from agent.coverage.messages import announcement, parts
from agent.coverage.sessions import Announce, Part, Ping, Say
from tests.drill_transcripts import unit
from tests.test_core_channel import websockets

UNITS = [unit("./a.js"), unit("./b.js")]
COUNTS = {"./a.js": 8, "./b.js": 8}


class Ends:
    """Both ends of a connection, and what came of pings."""

    def __init__(self, ours: WebSocketConnection, theirs: WebSocketConnection) -> None:
        self.theirs, self.pongs, self.idle = theirs, list[int](), 0
        self.heard: list[str | bytes] = []
        self.settling, self.settled = trio.Event(), trio.Event()
        self.attachment = Attachment(ours, COUNTS, pong=self.pongs.append, idle=self.ask, settle=self.settle)

    def ask(self) -> Ping:
        self.idle += 1
        return Ping(1000 + self.idle)

    async def settle(self) -> None:
        self.settling.set()
        await self.settled.wait()

    async def receive(self, message: str | bytes) -> None:
        self.heard.append(message)


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    async with websockets() as (ours, theirs, _), trio.open_nursery() as nursery:
        made = Ends(ours, theirs)
        nursery.start_soon(made.attachment.serve, made.receive)
        yield made
        nursery.cancel_scope.cancel()


async def test_acts_go_out_in_their_order_and_a_pong_comes_back() -> None:
    async with ends() as both:
        batches = [Batch("t1", ["./a.js"], [1]), Batch("t2", ["./b.js"], [3])]
        both.attachment.put([Say("first"), Announce(tuple(UNITS)), Part("s1", batches), Ping(7), Say("last")])
        expected = [
            "first",
            *announcement(UNITS),
            *parts("s1", batches, COUNTS),
            "last",
        ]
        with trio.fail_after(60):
            assert [await both.theirs.get_message() for _ in expected] == expected
            await both.attachment.drained()
            await wait_all_tasks_blocked()
        assert both.pongs == [7]


async def test_what_must_be_on_the_disk_before_is_waited_for() -> None:
    heard: list[str | bytes] = []

    async def hear(both: Ends) -> None:
        while len(heard) < 3:
            heard.append(await both.theirs.get_message())

    async with ends() as both, trio.open_nursery() as nursery:
        nursery.start_soon(hear, both)
        both.attachment.put([Say("first"), Settle(), Say("second")])
        with trio.fail_after(60):
            await both.settling.wait()
        both.attachment.put([Say("third")])
        await wait_all_tasks_blocked(0.01)
        assert heard == ["first"]
        both.settled.set()
    assert heard == ["first", "second", "third"]


async def test_messages_are_received_one_after_the_other() -> None:
    async with ends() as both:
        for text in ("one", "two"):
            await both.theirs.send_message(text)
        await wait_all_tasks_blocked()
        assert both.heard == ["one", "two"]


async def test_an_idle_line_is_asked_and_lives(autojump_clock: MockClock) -> None:
    async with ends() as both:
        await trio.sleep(95)
        assert both.idle == 9
        assert both.pongs == [1000 + n for n in range(1, 10)]


async def test_a_silent_admin_is_dead_after_30_s_and_nobody_waits_for_its_queue(autojump_clock: MockClock) -> None:
    async with websockets() as (ours, theirs, cut), trio.open_nursery() as nursery:
        both = Ends(ours, theirs)
        began = trio.current_time()
        cut()
        nursery.start_soon(both.attachment.drained)
        with pytest.raises(PeerUnreachable, match="sent nothing for 30 s"):
            await both.attachment.serve(both.receive)
        assert trio.current_time() - began == pytest.approx(30)
        both.attachment.put([Say("too late")])
        await both.attachment.drained()


async def test_a_close_of_the_admin_ends_it() -> None:
    async with websockets() as (ours, theirs, _), trio.open_nursery() as nursery:
        both = Ends(ours, theirs)
        nursery.start_soon(theirs.aclose)
        with pytest.raises(ConnectionClosed):
            await both.attachment.serve(both.receive)
