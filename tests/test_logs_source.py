"""One source: regexes that give up are counted and paused, rules change between blocks."""

from pathlib import Path

import trio

from agent.core.bus import Bus
from agent.core.events import LogContext, LogMatched, LogSource, LogSuppressed
from agent.core.metrics import Metrics
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.logs import rules
from agent.logs.follow import Followed
from agent.logs.limits import ERRORS
from agent.logs.source import Done, Rules, Source
from agent.logs.tail import Tail


async def has_room() -> bool:
    return True


async def test_a_regex_that_gives_up_is_counted_and_paused_and_others_go_on(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "log"
    path.write_bytes((b"a" * 40 + b"!\n") * (ERRORS + 5) + b"good\n")
    tables = [{"id": "slow", "regex": "^(a+)+$"}, {"id": "good", "regex": "good"}]
    store = open_store(tmp_path / "state", reserve=4096)
    bus, metrics = Bus(store), Metrics()
    await nursery.start(store.run)
    source = Source(
        str(path), Rules(rules.from_tables("test", tables)), "key", lambda: ("r", None),
        bus=bus, store=store, metrics=metrics,
    )  # fmt: skip
    tail = Tail(str(path), start="start")
    source.followed = Followed(tail, source, Health("logs"), links=True, room=has_room)
    with bus.subscribe(LogMatched) as events, bus.subscribe(LogSource) as told:
        nursery.start_soon(source.followed.run)
        await source.followed.settle()
        assert (await anext(events)).run == "r"
        assert [(await anext(told)).what for _ in range(2)] == ["found", "limit"]
        assert source.limit_errors["slow"] >= ERRORS
        source.use(Rules(rules.from_tables("test", [{"id": "new", "regex": "good"}])))
        with path.open("ab") as file:
            file.write(b"good\n")
        await source.followed.settle()
        assert (await anext(events)).rule == "new"
    await store.commit()
    done = await store.get("key", Done)
    assert (done.generation, done.checkpoints[0].offset) == (1, path.stat().st_size)
    nursery.cancel_scope.cancel()


async def test_rules_that_change_lose_no_context_and_no_count(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x 1\nx 2\na\n")
    old = {"id": "x", "regex": "^x", "rate": {"burst": 1, "per_s": 0.01}, "context": {"after": 3, "wait_s": 60}}
    store = open_store(tmp_path / "state", reserve=4096)
    bus = Bus(store)
    await nursery.start(store.run)
    source = Source(
        str(path), Rules(rules.from_tables("test", [old])), "key", lambda: (None, None),
        bus=bus, store=store, metrics=Metrics(),
    )  # fmt: skip
    source.followed = Followed(Tail(str(path), start="start"), source, Health("logs"), links=True, room=has_room)
    with bus.subscribe(LogContext) as contexts, bus.subscribe(LogSuppressed) as dropped:
        nursery.start_soon(source.followed.run)
        await source.followed.settle()
        source.use(Rules(rules.from_tables("test", [{"id": "other", "regex": "b"}, old])))
        with path.open("ab") as file:
            file.write(b"b\n")
        await source.followed.settle()
        assert (await anext(contexts)).after == ("x 2", "a", "b")
        assert (await anext(dropped)).count == 1
    nursery.cancel_scope.cancel()
