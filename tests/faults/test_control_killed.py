"""kill -9 of the agent while a client listens: with `since` it hears each event once, and all that was answered.

Source: protocols/emissary.md, "The envelope" (`subscribe`), acceptance 3; protocols/settings.md, "durability".
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.errors import PeerError
from agent.core.link import Dial, connect
from agent.core.metrics import Metrics
from tests.faults.station import LIMIT_S, Station, until

KILLS = 4
SETTINGS = """\
ident = "{ident}"
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Station]:
    station = Station(f"lab-{os.getpid()}", tmp_path)
    (tmp_path / "agent.toml").write_text(SETTINGS.format(ident=station.ident, folder=tmp_path))
    yield station
    station.kill()


class Listener:
    """A client that keeps what it heard over the lives of the agent."""

    def __init__(self, machine: Station) -> None:
        self._machine, self._lives = machine, 0
        self.heard: list[tuple[int, str]] = []
        self.answered: list[str] = []

    async def address(self) -> str:
        """Where the agent of this life listens, once it does."""
        self._lives += 1

        async def found() -> str | None:
            assert self._machine.is_alive(), self._machine.log.read_text()
            addresses = re.findall(r"control listens addresses=(\S+)", self._machine.log.read_text())
            return addresses[-1] if len(addresses) == self._lives else None

        return str(await until(found))

    async def listen(self, *, until_heard: int) -> None:
        """Say what is to be heard, and hear it, until the agent is killed or so much was heard."""

        async def take(request: Request) -> dict[str, Any]:
            self.heard += [(event["seq"], event["data"]["message"]) for event in request.payload["events"]]
            return {}

        async def talk(channel: Channel) -> None:
            since = self.heard[-1][0] if self.heard else 0
            await channel.ask("subscribe", {"kinds": ["Logged"], "since": since})
            while len(self.heard) < until_heard:
                message = f"message {len(self.answered)} of life {self._lives}"
                await channel.ask("log", {"message": message}, timeout_s=LIMIT_S)
                self.answered.append(message)

        dial = Dial(f"ws://{await self.address()}/", token_file=self._machine.state / "token")
        with suppress(PeerError):
            async with connect(dial) as ws:
                await converse(ws, take, talk, metrics=Metrics())


async def test_a_client_that_resumes_hears_each_event_once(machine: Station) -> None:
    listener, random = Listener(machine), Random(3)

    async def kill_when_heard(count: int) -> None:
        async def is_heard() -> bool:
            return len(listener.heard) >= count

        await until(is_heard)
        await machine.end()

    for _ in range(KILLS):
        machine.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_when_heard, len(listener.heard) + random.randint(1, 30))
            await listener.listen(until_heard=sys.maxsize)
    machine.start()
    await listener.listen(until_heard=len(listener.heard) + 50)
    assert machine.is_alive()
    numbers, messages = [seq for seq, _ in listener.heard], [message for _, message in listener.heard]
    assert numbers == sorted(set(numbers))
    assert len(messages) == len(set(messages))
    assert len(listener.answered) >= 50
    assert set(listener.answered) <= {*messages, listener.answered[-1]}, (
        "but for the last, all that was answered is told"
    )
