"""The CI Bus on trio, against a small broker of our own codec: what is heard, published, retried."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from agent.core.bus import Bus
from agent.core.events import Alert, AlertCleared, LinkChanged, SuiteFinished
from agent.core.store import Store, open_store
from agent.core.tls import server_context
from agent.polarize.cibus import Line
from agent.polarize.settings import CibusSettings
from agent.polarize.stomp import Frame, encode
from agent.polarize.submit import Finished
from tests.certificates import authority, issue
from tests.ended_run import finished
from tests.stomp_broker import CONNECTED, Broker


class Rig:
    """An agent's end of the bus; `heard` is what it made of the messages, `follows` the event that each leads to."""

    def __init__(self, broker: Broker, bus: Bus, store: Store) -> None:
        self.broker, self.bus, self.store = broker, bus, store
        self.heard: list[tuple[str, Finished]] = []
        self.follows: SuiteFinished | None = None

    def _complete(self, response: str, finished: Finished) -> None:
        self.heard.append((response, finished))
        if self.follows is not None:
            self.bus.publish(self.follows)

    def line(
        self,
        *,
        listens: bool = True,
        publishes: bool = False,
        vhost: str = "",
        destination: str = "",
        ca_file: str = "",
    ) -> Line:
        return Line(
            self.bus,
            self.store,
            CibusSettings(
                url=f"stomp{'+ssl' if ca_file else ''}://127.0.0.1:{self.broker.port}",
                vhost=vhost,
                destination=destination,
                ca_file=ca_file,
            ),
            ident="lab-07",
            response_name="emissary",
            complete=self._complete if listens else None,
            box=self.store.owe("cibus", lambda event: isinstance(event, SuiteFinished)) if publishes else None,
            random=Random(1),
        )


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    store = open_store(tmp_path, reserve=4096)
    async with listener, trio.open_nursery() as nursery:
        await nursery.start(store.run)
        rig = Rig(Broker(listener), Bus(store), store)
        yield rig
        await rig.broker.cut()
        nursery.cancel_scope.cancel()
    store.close()


@asynccontextmanager
async def running(line: Line) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        with trio.fail_after(60):
            yield
        nursery.cancel_scope.cancel()


def message(ack: str, response: str | None, body: object) -> Frame:
    headers = {"ack": ack, "message-id": ack, "subscription": "ci"}
    return Frame("MESSAGE", headers | ({"emissary": response} if response else {}), json.dumps(body).encode())


async def test_a_completion_of_ours_is_heard_and_each_message_acknowledged(rig: Rig) -> None:
    async with running(rig.line(vhost="bus.lab")):
        connect = await rig.broker.accept()
        assert connect.headers["host"] == "bus.lab"
        assert connect.headers["client-id"] == "emissary-lab-07"
        subscribe = await rig.broker.next()
        assert subscribe.headers["destination"] == "/topic/VirtualTopic.qe.ci.>"
        assert subscribe.headers["selector"] == "emissary LIKE 'lab-07.%'"
        assert subscribe.headers["activemq.subscriptionName"] == "emissary"
        assert subscribe.headers["ack"] == "client-individual"
        await rig.broker.send(
            message("1", None, {"status": "passed"}),
            message("2", "lab-070.abc", {"status": "passed"}),
            message("3", "lab-07.abc", {"status": "partial", "log-url": "http://l"}),
            message("4", "lab-07.def", {"something": "else"}),
        )
        assert [(await rig.broker.next()).headers["id"] for _ in range(4)] == ["1", "2", "3", "4"]
    assert rig.heard == [("lab-07.abc", Finished(outcome="partial", log_url="http://l"))]


async def test_a_queue_has_neither_subscription_name_nor_selector(rig: Rig) -> None:
    async with running(rig.line(destination="/queue/Consumer.emissary.VirtualTopic.qe.ci.>")):
        await rig.broker.accept()
        subscribe = await rig.broker.next()
    assert subscribe.headers["destination"] == "/queue/Consumer.emissary.VirtualTopic.qe.ci.>"
    assert not {"activemq.subscriptionName", "selector"} & subscribe.headers.keys()


async def test_a_message_is_acknowledged_only_when_what_follows_is_on_disk(rig: Rig) -> None:
    rig.follows = finished("r-1")
    async with running(rig.line()):
        await rig.broker.accept()
        await rig.broker.next()
        await rig.broker.send(message("1", "lab-07.abc", {"status": "passed"}))
        assert (await rig.broker.next()).command == "ACK"
        assert len(await rig.store.read(run="r-1")) == 1  # reads what is on disk, and waits for nothing


async def test_a_cut_line_is_made_again_and_states_are_told(rig: Rig) -> None:
    with rig.bus.subscribe(LinkChanged) as links:
        async with running(rig.line()):
            await rig.broker.accept()
            await rig.broker.receipt(await rig.broker.next())
            states = [(await anext(links)).state for _ in range(2)]
            await rig.broker.cut()
            await rig.broker.accept()
            await rig.broker.receipt(await rig.broker.next())
            states += [(await anext(links)).state for _ in range(3)]
    assert states == ["connecting", "ready", "offline", "connecting", "ready"]


async def test_a_refusal_is_loud_until_the_broker_takes_us(rig: Rig) -> None:
    rig.broker.greeting = b"ERROR\nmessage:User name [x] is invalid\n\n\0"
    with rig.bus.subscribe(Alert, AlertCleared) as loud:
        async with running(rig.line()):
            await rig.broker.accept()
            alert = await anext(loud)
            assert isinstance(alert, Alert)
            assert alert.code == "link.cibus"
            assert "User name [x] is invalid" in alert.text
            rig.broker.greeting = CONNECTED
            await rig.broker.accept()
            await rig.broker.receipt(await rig.broker.next())
            assert await anext(loud) == AlertCleared(code="link.cibus")


@pytest.mark.parametrize("is_early", [True, False])
async def test_an_error_that_comes_with_what_is_before_it_is_told(rig: Rig, is_early: bool) -> None:
    refusal = Frame("ERROR", {"message": "the broker ends"})
    with rig.bus.subscribe(Alert) as loud:
        async with running(rig.line(publishes=True)):
            if is_early:
                rig.broker.greeting = CONNECTED + encode(refusal)
                await rig.broker.accept()
            else:
                await rig.broker.accept()
                await rig.broker.next()
                rig.follows = finished("r-1")  # which is to be published meanwhile
                await rig.broker.send(message("1", "lab-07.abc", {"status": "passed"}), refusal)
            assert "the broker ends" in (await anext(loud)).text
    assert len(rig.heard) == (not is_early)


async def test_an_ended_run_is_published_until_the_broker_has_it(rig: Rig) -> None:
    line = rig.line(listens=False, publishes=True)
    rig.bus.publish(finished("r-1"))
    async with running(line):
        await rig.broker.accept()
        assert (await rig.broker.next()).headers["run"] == "r-1"
        await rig.broker.cut()  # before the receipt: it comes again
        await rig.broker.accept()
        sent = await rig.broker.next()
        await rig.broker.receipt(sent)
        while (await rig.store.depths())["cibus"].waiting:
            await trio.lowlevel.checkpoint()
    assert sent.headers["destination"] == "/topic/VirtualTopic.qe.ci.jenkins"
    assert sent.headers["ident"] == "lab-07"
    assert sent.headers["emissary"].startswith("lab-07.")
    assert json.loads(sent.body) == {
        "import-results": [{"suite-name": "login", "status": "passed"}],
        "status": "passed",
    }


async def test_leaving_is_said(rig: Rig) -> None:
    async with running(rig.line()):
        await rig.broker.accept()
        await rig.broker.receipt(await rig.broker.next())
    assert (await rig.broker.next()).command == "DISCONNECT"


async def test_heart_beats_are_sent_and_their_absence_ends_the_line(rig: Rig, mock_clock: MockClock) -> None:
    with rig.bus.subscribe(LinkChanged) as links:
        async with running(rig.line()):
            await rig.broker.accept()
            await rig.broker.receipt(await rig.broker.next())
            assert [(await anext(links)).state for _ in range(2)] == ["connecting", "ready"]
            mock_clock.jump(6)  # half of the 10 s, and a little
            assert await rig.broker.receive() == b"\n"
            mock_clock.jump(16)  # 20 s without a word from the broker, and a little
            change = await anext(links)
    assert change.state == "offline"
    assert change.error == f"stomp://127.0.0.1:{rig.broker.port} is silent"


@pytest.mark.parametrize(
    ("greeting", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "STOMP: 'HTTP/1.1 400 Bad Request' is no command"),
        (b"CONNECTED\nversion:1.0\n\n\0", "STOMP: the broker speaks STOMP 1.0, not 1.2"),
    ],
)
async def test_what_is_no_broker_of_ours_is_said(rig: Rig, greeting: bytes, error: str) -> None:
    rig.broker.greeting = greeting
    with rig.bus.subscribe(LinkChanged) as links:
        async with running(rig.line()):
            await rig.broker.accept()
            assert (await anext(links)).state == "connecting"
            change = await anext(links)
    assert change.state == "offline"
    assert change.error
    assert change.error.startswith(error)


async def test_the_bus_may_be_reached_by_tls(rig: Rig, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    server = issue(ca, tmp_path, "bus")
    rig.broker.tls = server_context(server.cert, server.key)
    async with running(rig.line(ca_file=str(ca.cert))):
        await rig.broker.accept()
        assert (await rig.broker.next()).command == "SUBSCRIBE"


async def test_a_certificate_that_does_not_hold_is_loud(rig: Rig, tmp_path: Path) -> None:
    server = issue(authority(tmp_path), tmp_path, "bus")
    rig.broker.tls = server_context(server.cert, server.key)
    with rig.bus.subscribe(Alert) as loud:
        async with running(rig.line(ca_file=str(authority(tmp_path, "other").cert))):
            with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
                await rig.broker.accept()
            assert "certificate verify failed" in (await anext(loud)).text
