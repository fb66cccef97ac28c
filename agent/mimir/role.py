"""Mimir on trio: what the outbox owes it goes out in upserts, one at a time; what gathers meanwhile goes as the next.

Source: protocols/emissary.md, "Mimir", "The envelope" (`seq`), "Link states".
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec
import trio

import agent
from agent.core import link
from agent.core.bus import Bus
from agent.core.channel import Channel, Refused
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerBrokeProtocol
from agent.core.events import AnyEvent, RunStarted, decode, scope
from agent.core.held import Held
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.store import Owed, Store
from agent.core.supervise import Health
from agent.mimir.graph import Batch, Told, is_told, tell
from agent.mimir.messages import LEASE_S, RENEW_S, Registered

log = logging.getLogger(__name__)

SINK = "mimir"
MAX_RUNS = 64  # runs whose RunStarted is remembered
UPSERT_S = 60.0  # s for a hang of one delivery; an answer is waited for 10 s


async def run(
    bus: Bus,
    store: Store,
    ident: str,
    health: Health,
    *,
    dial: link.Dial,
    platform: Mapping[str, Any],
    metrics: Metrics,
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Tell Mimir what is owed to it, for ever. Events are owed from `started` on.

    `platform` are the props of this machine's TestPlatform: hostname, arch, os, profile, labels, version, server.
    """
    box = store.owe(SINK, is_told)
    held = Held(bus, store, box, clock=clock)
    started: dict[str, RunStarted | None] = {}

    async def run_started(event: AnyEvent, before: int) -> RunStarted | None:
        """The last RunStarted of the event's run, up to journal number `before`."""
        name, _ = scope(event)
        if name is None:
            return None
        if isinstance(event, RunStarted):
            started[name] = event
        elif name not in started:
            rows = await store.read(run=name, kinds=["RunStarted"])
            found = [decode(row.kind, row.data) for row in rows if row.seq < before]
            started[name] = next((e for e in reversed(found) if isinstance(e, RunStarted)), None)
        while len(started) > MAX_RUNS:
            del started[next(iter(started))]
        return started[name]

    async def told(owed: Owed) -> Told:
        event = decode(owed.event.kind, owed.event.data)
        return tell(event, ident, platform, await run_started(event, owed.event.seq))

    async def batches(rows: Sequence[Owed]) -> list[Batch]:
        batch, all_of_them = Batch(), []
        for owed in rows:
            try:
                meant = await told(owed)
            except (KeyError, msgspec.DecodeError) as err:  # journalled by another version
                held.hold(owed.n, f"{owed.event.kind} cannot be read: {err}")
                continue
            if not batch.take(owed.n, meant):
                all_of_them.append(batch)
                batch = Batch()
                batch.take(owed.n, meant)
        return [*all_of_them, batch] if batch.events else all_of_them

    async def deliver(channel: Channel, batch: Batch) -> None:
        if batch:
            try:
                with health.busy(limit=UPSERT_S):
                    await channel.ask("upsert", batch.payload())
            except Refused as err:
                metrics.count("mimir_refused_total")
                if len(batch.events) == 1:
                    held.hold(batch.seq, err.reason)
                else:
                    for half in batch.halves():
                        await deliver(channel, half)
                return
            metrics.count("mimir_upserts_total")
        box.ack(batch.seq)

    async def present() -> dict[str, Any]:
        """What the machine is now. Its events told it before; but Mimir may be new to us, or have lost its data."""
        try:
            entitlement = await bus.ask("entitlement", {})
        except ActionError:  # nobody looks for it
            return dict(platform)
        return {**platform, "entitlement": entitlement["name"]} if entitlement["source"] != "none" else dict(platform)

    async def renew(channel: Channel, ahead_s: float) -> NoReturn:
        """Not owed: what is not renewed in time is of no use later. The machine itself is told once a connection."""
        props = await present()
        while True:
            now = trio.current_time() + ahead_s
            try:
                reservations = (await bus.ask("reservations", {}))["reservations"]
            except ActionError:  # no Seneschal: nothing is reserved
                reservations = []
            vertices = [{"id": ident, "label": "TestPlatform", "props": {**props, "seen": now}}]
            props = {}
            vertices += [
                {"id": offer["id"], "label": "Reservation", "props": {"lease_until": now + LEASE_S}}
                for offer in reservations
            ]
            try:
                await channel.ask("upsert", {"vertices": vertices, "edges": []})
            except Refused as err:
                metrics.count("mimir_refused_total")
                log.warning("renewal refused reason=%s", err.reason)
            await trio.sleep(RENEW_S)

    async def talk(channel: Channel) -> None:
        channel.state("registering")
        asked = trio.current_time()
        hello = {"ident": ident, "instance": store.instance, "version": agent.__version__}
        answer = _registered(channel, await channel.ask("register", hello))
        # Of the clock that never steps: leases must not lapse because the date was set while the line was up.
        ahead_s = answer.time - (asked + trio.current_time()) / 2
        channel.state("replaying")
        await box.heard(answer.last_seq)
        await store.commit()
        after, is_ready = 0, False
        async with trio.open_nursery() as nursery:
            while True:
                rows = await box.peek(after)
                if not rows:
                    if not is_ready:
                        is_ready = True
                        channel.state("ready")
                        nursery.start_soon(renew, channel, ahead_s)
                    await held.settle()
                    rows = await box.due(after)
                after = rows[-1].n
                for batch in await batches(rows):
                    await deliver(channel, batch)

    async def answer(request: Request) -> Mapping[str, Any]:
        raise ActionError("unknown_action", f"an agent answers nothing to Mimir, not even {request.action!r}")

    task_status.started()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(held.run)
        await link.keep(SINK, dial, answer, talk, publish=bus.publish, metrics=metrics, random=random.Random())
    raise AssertionError("a link never ends")


def _registered(channel: Channel, payload: Mapping[str, Any]) -> Registered:
    try:
        return read(payload, Registered)
    except ActionError as err:
        raise PeerBrokeProtocol(f"{channel.peer} answered register: {err.what}", remedy="Look at its version.") from err
