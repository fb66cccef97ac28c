"""One source: who watches it, regexes that give up, rules that change, context by index, records, crashes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.core.bus import Bus
from agent.core.events import LogContext, LogMatched, LogSource, LogSuppressed
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.logs import rules
from agent.logs.acts import Report
from agent.logs.analysis import Analysis
from agent.logs.context import Place
from agent.logs.follow import Blocks, Followed
from agent.logs.limits import ERRORS, PAUSE_S
from agent.logs.source import FEW, Done, Rules, Source, Together, Want
from agent.logs.tail import Tail

X = {"id": "x", "regex": "^x (?<u>\\w)", "rate": {"burst": 1, "per_s": 0}}


class Bench:
    """A log that is followed by a source."""

    def __init__(self, path: Path, bus: Bus, store: Store, done: Done) -> None:
        self.path = path
        analysis = Analysis(bus.publish, lambda: 0.0, trio.current_time())
        self.source = Source(
            str(path), "key", lambda run: (run, None), analysis, bus=bus, store=store, metrics=Metrics()
        )
        tail = Tail(str(path), done.checkpoints, "start", generation=done.generation, past=done.past)
        self.source.followed = Followed(tail, self.source, Health("logs"), links=True, room=has_room, blocks=Blocks())

    def use(self, **wants: Want) -> None:
        self.source.wants = wants
        self.source.use(Together(tuple(want.rules for want in wants.values())))

    async def write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)
        await self.source.followed.settle()


def has_room() -> bool:
    return True


def want(*tables: dict[str, Any], **more: Any) -> Want:
    return Want(Rules(rules.from_tables("test", tables)), **more)


@asynccontextmanager
async def bench(folder: Path, text: str, **wants: Want) -> AsyncIterator[tuple[Bench, Bus, Store]]:
    """The state in the folder is taken up; at the end nothing more is told, as by a kill."""
    (folder / "log").write_text(text)
    store = open_store(folder / "state", reserve=4096)
    bus = Bus(store)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            done = await store.get("key", Done) or Done()
            here = Bench(folder / "log", bus, store, done)
            here.use(**wants)
            here.source.resume(done)
            nursery.start_soon(here.source.followed.run)
            yield here, bus, store
            await store.commit()
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def test_a_regex_that_gives_up_is_counted_and_paused_and_others_go_on(tmp_path: Path) -> None:
    tables = want({"id": "slow", "regex": "^(a+)+$"}, {"id": "good", "regex": "good"}, run="r")
    async with bench(tmp_path, ("a" * 40 + "!\n") * (ERRORS + 5) + "good\n", w=tables) as (here, bus, store):
        with bus.subscribe(LogMatched) as events, bus.subscribe(LogSource) as told:
            await here.write("")
            assert (await anext(events)).run == "r"
            assert [(await anext(told)).what for _ in range(2)] == ["found", "limit"]
            assert here.source.limit_errors["slow"] >= ERRORS
            here.use(w=want({"id": "new", "regex": "good"}))
            await here.write("good\n")
            assert (await anext(events)).rule == "new"
        await store.commit()
        done = await store.get("key", Done)
        assert (done.generation, done.checkpoints[0].offset) == (1, here.path.stat().st_size)


HOSTILE = {"id": "x", "regex": "^x", "context": {"until": "^begin (a+)+$"}}
UNKNOWN = "begin " + "a" * 40 + "!\n"


async def test_an_until_that_gives_up_is_counted_and_told_and_paused(tmp_path: Path, mock_clock: MockClock) -> None:
    async with bench(tmp_path, "begin aa\n", w=want(HOSTILE)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events, bus.subscribe(LogSource) as told:

            async def around(text: str) -> tuple[int, int]:
                """Where it found its anchor, and over how many lines that nobody knows."""
                await here.write(text)
                context = (await anext(events)).context
                assert context is not None
                return context.anchors[0].offset, context.limit_errors

            assert await around(UNKNOWN + "x\n") == (0, 1)
            begun = here.path.stat().st_size
            assert await around("begin aa\nx\n") == (begun, 0)
            assert (await anext(told)).what == "found"
            assert here.source.limit_errors["x"] == 1
            for _ in range(ERRORS - 1):
                await here.write(UNKNOWN)
            paused = await anext(told)
            assert (paused.what, here.source.limit_errors["x"]) == ("limit", ERRORS)
            assert paused.detail == "an until of rule x gives up too often and is not indexed for a minute"
            begun = here.path.stat().st_size
            assert await around("begin a\n" + UNKNOWN + "x\n") == (begun, ERRORS + 1)  # by a search, which sees all
            assert here.source.limit_errors["x"] == ERRORS
            mock_clock.jump(PAUSE_S)
            begun = here.path.stat().st_size
            assert await around("begin aaa\nx\n") == (begun, 0)
            mock_clock.autojump_threshold = 0  # for the store


async def test_rules_that_change_lose_no_context_and_no_count(tmp_path: Path) -> None:
    old = {"id": "x", "regex": "^x", "rate": {"burst": 1, "per_s": 0.01}, "context": {"after": 3, "wait_s": 60}}
    async with bench(tmp_path, "", w=want(old)) as (here, bus, _):
        with bus.subscribe(LogContext) as contexts, bus.subscribe(LogSuppressed) as dropped:
            await here.write("x 1\nx 2\na\n")
            here.use(w=want({"id": "other", "regex": "b"}, old))
            await here.write("b\n")
            assert (await anext(contexts)).after == ("x 2", "a", "b")
            assert (await anext(dropped)).count == 1


async def test_all_who_watch_have_their_rules_from_where_they_came_and_each_line_is_told_once(tmp_path: Path) -> None:
    y = {"id": "y", "regex": "^[xy]"}
    async with bench(tmp_path, "x a\n", one=want(X)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("")
            here.use(one=want(X), two=want(X, y, since=Place(1, 8)))
            await here.write("x b\nx c\n")
            told = [await anext(events) for _ in range(4)]
            assert [(event.rule, event.offset) for event in told] == [("x", 0), ("x", 4), ("x", 8), ("y", 8)]
            here.use(one=want(X), two=want(X, run="r1"), three=want(X, run="r2"))
            await here.write("x d\n")
            assert [(await anext(events)).run for _ in range(2)] == ["r1", "r2"]


async def test_who_comes_later_may_have_the_file_from_its_beginning(tmp_path: Path) -> None:
    y = {"id": "y", "regex": "^y"}
    async with bench(tmp_path, "y 1\nx a\n", one=want(X)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("")
            assert here.source.followed.join("end") == Place(1, 8)
            assert here.source.followed.join(4) == Place(1, 4)
            here.source.join("two", want(y), "start")
            assert (here.source.wants["one"].seen, here.source.wants["two"].since) == (Place(1, 8), Place(1, 0))
            here.use(**here.source.wants)
            await here.write("x b\n")
            assert sorted([(await anext(events)).text for _ in range(3)]) == ["x a", "x b", "y 1"]


async def test_clients_see_no_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x a\ny b\n")
    (tmp_path / "log").symlink_to("real")
    y = {"id": "y", "regex": "^y"}
    async with bench(tmp_path, "x a\ny b\n", own=want(y), client=want(X, is_remote=True)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("y c\n")
            assert [(await anext(events)).text for _ in range(2)] == ["y b", "y c"]
        assert here.source.matches["x"] == 0


UNTIL = {**X, "context": {"until": "^begin (?<u>\\w)", "same": ["u"]}}


async def test_recent_anchors_are_known_even_when_their_file_is_gone(tmp_path: Path) -> None:
    async with bench(tmp_path, "begin a\nbegin b\n", w=want(UNTIL)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("")
            here.path.unlink()
            await here.write("x a\n")
            context = (await anext(events)).context
            assert context
            assert [anchor.text for anchor in context.anchors] == ["begin a"]


async def test_many_anchors_at_once_are_found_by_reading(tmp_path: Path) -> None:
    async with bench(tmp_path, "begin a\n" * (FEW + 1) + "x a\n", w=want(UNTIL)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("")
            await here.write("begin a\nx a\n")
            for offset in (8 * FEW, 8 * FEW + 12):
                context = (await anext(events)).context
                assert context
                assert [(anchor.offset, anchor.text) for anchor in context.anchors] == [(offset, "begin a")]


RECORD = {**X, "multiline": {"start": "^T", "continuation": "^x|^ ", "wait_s": 60}}


async def test_the_matches_of_a_record_are_counted(tmp_path: Path) -> None:
    async with bench(tmp_path, "", w=want(RECORD)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events, bus.subscribe(LogContext) as contexts:
            await here.write("T\nx a\n at\nx b\n")
            await here.write("x c\nT\nx d\nT\n")
            assert [(event.text, event.count) for event in [await anext(events), await anext(events)]] == [
                ("x a", 2),  # as far as it was written
                ("x d", 1),
            ]
            told = [await anext(contexts) for _ in range(2)]
            assert [(event.record, event.count) for event in told] == [
                (("T", "x a", " at", "x b", "x c"), 3),
                (("T", "x d"), 1),
            ]


async def test_what_is_kept_while_a_block_is_matched_is_of_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[int]] = []
    async with bench(tmp_path, "x a\n", w=want(RECORD)) as (here, _, store):
        await here.write("")
        followed, done = here.source.followed, Done()

        async def search(_: object) -> list[bytes]:
            """Of the first match it ends at once; of the second the store writes meanwhile."""
            nonlocal done
            if kept:
                await followed.own_turn()
                await store.commit()
                done = await store.get("key", Done)
            kept.append([waiting.next for waiting in done.waiting])
            return []

        monkeypatch.setattr(followed, "search", search)
        with here.path.open("a") as file:
            file.write("T\nx b\nT\nx c\n")
        here.source.tell(Report("rotated", 1))
        here.source.keep()
        followed.wake(wrote=True)
        followed.go_on()
        await followed.settle()
    assert kept == [[], [4]]
    assert done.checkpoints[0].offset == 4


async def test_a_context_that_was_open_at_a_crash_is_told_after_the_restart(tmp_path: Path) -> None:
    after = {**X, "context": {"after": 3, "wait_s": 60}}
    async with bench(tmp_path, "x a\n1\n", w=want(after, run="r")) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("")
            id = (await anext(events)).id
    async with bench(tmp_path, "x a\n1\n2\n", w=want(after, run="r")) as (here, bus, _):
        with bus.subscribe(LogContext) as contexts:
            await here.write("3\n")
            context = await anext(contexts)
            assert (context.match, context.after, context.run) == (id, ("1", "2", "3"), "r")
    async with bench(tmp_path, "x a\n1\n2\n3\n", w=want(after)) as (here, bus, store):
        await here.write("4\n")
        await store.commit()
        assert len(await store.read(kinds=("LogContext",))) == 1


async def test_other_rules_are_told_of_a_line_whose_beginning_was_matched(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench(tmp_path, "x a", w=want(X)) as (here, bus, _):
        with bus.subscribe(LogMatched) as events:
            await here.write("")
            await trio.sleep(3)
            event = await anext(events)
            assert (event.rule, event.flags) == ("x", ("partial",))
            here.use(w=want({"id": "y", "regex": "^x"}, X))  # it has the number that x had
            await here.write("b\nx c\n")
            told = [await anext(events) for _ in range(3)]
            assert [(event.rule, event.offset) for event in told] == [("y", 0), ("y", 5), ("x", 5)]
