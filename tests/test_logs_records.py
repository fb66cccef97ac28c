"""Records against rules: what is told of them, when, and what is kept for a restart."""

from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from agent.core.events import LogContext, LogGap, LogMatched, LogSource, LogSuppressed
from agent.logs.limits import ERRORS
from agent.logs.records import Reached
from agent.logs.scanner import LINE_MAX
from tests.logs_records_house import KEY, house, record, rules_of

MD = {"id": "md", "regex": r"array (?<name>\w+) degraded(?<_PID>)(?<UNIT>x)?", "severity": "error", "class": "disk"}


async def test_a_match_is_told_with_fields_and_kept_with_its_cursor(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        records = await here.begin(MD)
        await records.take([record(7, "array md0 degraded", _PID="712"), record(8, "fine")])
        (event,) = await here.told(LogMatched)
        assert (event.path, event.generation, event.offset, event.length) == ("journal:", 1, 7, 18)
        assert event.captures == {"name": "md0", "_PID": "712", "UNIT": None}
        assert (event.rule, event.class_, event.count, event.run) == ("md", "disk", 1, "r")
        assert await here.store.get(KEY, Reached) == Reached(generation=1, cursor="c7", offset=7)
        shown = records.shown()
        assert (shown.path, shown.state, shown.offset, shown.gaps) == ("journal:", "IDLE", 8, 0)
    async with house(tmp_path) as here:
        records = await here.begin(MD)
        assert records.reached == Reached(generation=1, cursor="c8", offset=8)
        await records.take([record(7, "array md0 degraded", _PID="712")])
        first, again = await here.told(LogMatched)
        assert first.id == again.id
        assert [source.what for source in await here.told(LogSource)] == ["found"]


async def test_lines_of_one_record_are_one_event(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        records = await here.begin(MD, {"id": "end", "regex": "^x$"})
        message = "two\r\narray a degraded\r\narray b degraded\nx\n"
        await records.take([record(1, message), record(2, ""), record(3, "array c degraded")])
        told = [(event.rule, event.offset, event.text, event.count) for event in await here.told(LogMatched)]
        assert told == [
            ("md", 1, "array a degraded", 2), ("end", 1, "x", 1), ("md", 3, "array c degraded", 1),
        ]  # fmt: skip


async def test_a_line_longer_than_the_scanner_takes_is_one_match(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        records = await here.begin({"id": "x", "regex": "other"})
        await records.take([record(1, "other " * LINE_MAX), record(2, "other")])
        told = [(event.offset, event.count, event.flags) for event in await here.told(LogMatched)]
        assert told == [(1, 1, ("window",)), (2, 1, ())]


async def test_context_is_looked_for_in_what_is_remembered(tmp_path: Path) -> None:
    rule = {
        "id": "failed",
        "regex": "failed(?<_PID>)",
        "context": {"until": "started (?<job>.+)(?<_PID>)", "same": ["_PID"], "before": 1},
    }
    async with house(tmp_path) as here:
        records = await here.begin(rule)
        await records.take(
            [
                record(1, "started a", _PID="1"),
                record(2, "started b", _PID="2"),
                record(3, "working", _PID="1"),
                record(4, "failed", _PID="1"),
                record(5, "failed", _PID="3"),
            ]
        )
        found, lost = await here.told(LogMatched)
        assert [(anchor.offset, anchor.text) for anchor in found.context.anchors] == [(1, "started a")]
        assert (found.context.before, found.context.found, found.context.cut) == (("started b", "working"), True, False)
        assert (lost.context.before, lost.context.found, lost.context.cut) == (("failed",), False, True)


async def test_what_follows_completes_a_match(tmp_path: Path, autojump_clock: MockClock) -> None:
    after = {"id": "after", "regex": "^a", "context": {"after": 2, "wait_s": 3}}
    oops = {
        "id": "oops",
        "regex": "BUG",
        "multiline": {"start": "^-- cut", "continuation": "^(BUG|RIP| )", "wait_s": 60},
    }
    async with house(tmp_path) as here:
        records = await here.begin(after, oops)
        await records.take([record(1, "a1\nb\nc\nd"), record(2, "-- cut"), record(3, "BUG 1"), record(4, "a2")])
        await records.take([record(5, "-- cut"), record(6, " pre")])
        await records.take([record(7, "BUG 2"), record(8, "RIP"), record(9, "BUG 3"), record(10, "done")])
        matched = {event.id: event.text for event in await here.told(LogMatched)}
        contexts = await here.told(LogContext)
        assert [(matched[one.match], one.after, one.record) for one in contexts] == [
            ("a1", ("b", "c"), ()),
            ("BUG 1", (), ("-- cut", "BUG 1")),
            ("a2", ("-- cut", " pre"), ()),
            ("BUG 2", (), ("-- cut", " pre", "BUG 2", "RIP", "BUG 3")),
        ]
        await records.take([record(11, "a3"), record(12, "z")])
        await trio.sleep(2.9)
        assert len(await here.told(LogContext)) == 4
        await trio.sleep(0.2)
        assert (await here.told(LogContext))[4].after == ("z",)
        await records.take([record(13, "a4")])
        records.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert (await here.told(LogContext))[5].after == ()


async def test_a_rate_tells_what_it_drops(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        records = await here.begin({"id": "x", "regex": "x", "rate": {"burst": 2, "per_s": 0.1}})
        await records.take([record(number, "x") for number in range(1, 6)])
        assert [event.offset for event in await here.told(LogMatched)] == [1, 2]
        await trio.sleep(10.5)
        (dropped,) = await here.told(LogSuppressed)
        assert (dropped.path, dropped.count, dropped.first_offset, dropped.last_offset) == ("journal:", 3, 3, 5)
        await records.take([record(9, "x")])
        assert (await here.told(LogMatched))[2].suppressed == 3
        assert (records.matches["x"], records.suppressed["x"]) == (6, 3)


async def test_how_far_it_came_is_kept_each_second_without_a_match(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        records = await here.begin(MD)
        for number in range(1, 11):
            await records.take([record(number, "fine")])
            await trio.sleep(0.3)
        await here.store.commit()
        kept = await here.store.get(KEY, Reached)
        assert kept is not None
        assert 6 <= kept.offset < 10
        await trio.sleep(1)
        assert await here.store.get(KEY, Reached) == records.reached


async def test_a_regex_that_gives_up_is_counted_and_paused_and_others_go_on(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        records = await here.begin({"id": "slow", "regex": "^(a+)+$"}, {"id": "good", "regex": "good"})
        await records.take([record(number, "a" * 40 + "!") for number in range(ERRORS + 5)] + [record(900, "good")])
        await records.take([record(901, "a" * 40 + "!"), record(902, "good")])
        assert records.limit_errors["slow"] == ERRORS + 5
        assert [event.offset for event in await here.told(LogMatched)] == [900, 902]
        assert [event.what for event in await here.told(LogSource)] == ["found", "limit"]


async def test_rules_that_changed_hold_from_the_next_records_on(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        records = await here.begin({"id": "old", "regex": "x", "context": {"after": 5, "wait_s": 60}})
        await records.take([record(1, "x")])
        records.use(rules_of({"id": "new", "regex": "x"}, {"id": "elsewhere", "regex": "x", "files": ["/var/log/*"]}))
        await records.take([record(2, "x")])
        assert [event.rule for event in await here.told(LogMatched)] == ["old", "new"]
        await records.take([record(number, "y") for number in range(3, 9)])
        assert [context.after for context in await here.told(LogContext)] == [("x", "y", "y", "y", "y")]


async def test_what_was_lost_is_told(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        records = await here.begin(MD)
        records.lose(3, None, "vacuumed")
        (gap,) = await here.told(LogGap)
        assert (gap.path, gap.generation, gap.from_, gap.to, gap.why) == ("journal:", 1, 3, None, "vacuumed")
        assert records.shown().gaps == 1


@pytest.mark.parametrize("message", [b"", b"\n", b"\r\n", b"\xff\0", b"\n\n"])
async def test_odd_messages_are_lines_as_well(tmp_path: Path, message: bytes) -> None:
    async with house(tmp_path) as here:
        records = await here.begin({"id": "all", "regex": "^"})
        await records.take([record(1, message)])
        (event,) = await here.told(LogMatched)
        assert event.count == max(1, message.count(b"\n"))


async def test_a_context_that_waits_goes_on_after_a_crash_and_is_told_once(tmp_path: Path) -> None:
    trace = {"id": "t", "regex": "boom", "multiline": {"start": "^T", "continuation": "^ ", "wait_s": 60}}
    after = {"id": "a", "regex": "^a", "context": {"after": 3, "wait_s": 60}}
    async with house(tmp_path) as here:
        records = await here.begin(trace, after)
        await records.take([record(1, "T boom"), record(2, " boom"), record(3, "a"), record(4, "b")])
        first = await here.told(LogMatched, LogContext)
        assert [(event.match, event.count, event.record) for event in first if isinstance(event, LogContext)] == [
            (first[0].id, 2, ("T boom", " boom"))
        ]
        kept = await here.store.get(KEY, Reached)
    async with house(tmp_path) as here:
        here.store.put(KEY, kept)  # as a crash leaves it; the end just now was orderly
        await here.store.commit()
        ended = len(await here.told(LogContext))
        records = await here.begin(trace, after)
        await records.take([record(5, "c"), record(6, "d")])
        (context,) = (await here.told(LogContext))[ended:]
        assert (context.match, context.after, context.run) == (first[1].id, ("b", "c", "d"), "r")
    async with house(tmp_path) as here:
        here.store.put(KEY, kept)
        await here.store.commit()
        ended = len(await here.told(LogContext))
        await here.begin(trace)  # the rule is gone
        (context,) = (await here.told(LogContext))[ended:]
        assert (context.match, context.after) == (first[1].id, ("b",))
