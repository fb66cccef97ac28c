"""The log monitor on real files: what is told, rotation, restarts, rates, context, actions, runs."""

import os
import shutil
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from agent.core.bus import Bus, Subscription
from agent.core.errors import ActionError
from agent.core.event import Event
from agent.core.events import (
    Alert,
    AlertCleared,
    AnyEvent,
    LogContext,
    LogGap,
    LogMatched,
    LogRules,
    LogSource,
    LogSuppressed,
    RunStarted,
    TestStarted,
    decode,
)
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.logs import limits, paths, role, wake
from agent.logs.follow import Followed
from agent.logs.messages import WatchLog
from agent.logs.settings import LogsSettings, LogWatch
from agent.logs.source import Source
from agent.logs.watches import Watch, of_client
from tests import suites_house
from tests.restarted import Restarted

E = TypeVar("E", bound=Event)
FIRST_S = 20.0
RULES = r"""
version = 1
[[rule]]
id = "line"
regex = 'line (?<n>\d+)'
severity = "error"
rate = { burst = 1000000, per_s = 0 }
"""


@pytest.fixture(autouse=True)
def no_disk_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(wake, "AT_ONCE_S", FIRST_S)
    monkeypatch.setattr(role, "SETTLE_S", FIRST_S)


def of_suites(suites: suites_house.House, settings: LogsSettings, folder: Path) -> partial[Coroutine[Any, Any, None]]:
    """The role beside that of suites."""
    model = folder / "logs.model"
    return partial(role.run, suites.bus, suites.store, settings, Health("logs"), model=model, metrics=Metrics())


class House:
    """A bus, a store and a folder of logs and rules; the role can be started again."""

    def __init__(self, folder: Path, bus: Bus, store: Store, nursery: trio.Nursery) -> None:
        self.folder, self.bus, self.store, self.metrics = folder, bus, store, Metrics()
        self.log = folder / "logs/a.log"
        self.rules = folder / "rules.toml"
        self._role = Restarted(nursery)

    async def start(self, *watches: LogWatch) -> None:
        settings = LogsSettings(
            rules=(str(self.rules),),
            roots=(str(self.folder / "logs"),),
            watch=watches or (LogWatch(name="a", path=str(self.log)),),
        )
        model = self.folder / "logs.model"
        start = partial(role.run, self.bus, self.store, settings, Health("logs"), model=model, metrics=self.metrics)
        await self._role.start(start)

    async def stop(self) -> None:
        """Returns when the role has ended."""
        await self._role.stop()

    def write(self, *numbers: int, name: str = "a.log") -> None:
        with (self.folder / "logs" / name).open("a") as file:
            file.writelines(f"line {number}\n" for number in numbers)

    async def journal(self, *kinds: type[AnyEvent]) -> list[Any]:
        await self.store.commit()
        rows = await self.store.read(kinds=[kind.__name__ for kind in kinds], limit=10_000)
        return [decode(row.kind, row.data) for row in rows]


@asynccontextmanager
async def house(folder: Path, rules: str = RULES, *, settle_s: float = FIRST_S) -> AsyncIterator[House]:
    """`settle_s`: after so long a disk hangs."""
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "rules.toml").write_text(rules)
    store = open_store(folder / "state", reserve=4096)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(role, "SETTLE_S", settle_s)
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                async with trio.open_nursery() as roles:
                    yield House(folder, Bus(store), store, roles)
                    roles.cancel_scope.cancel()
                nursery.cancel_scope.cancel()
    finally:
        store.close()


async def first(events: Subscription[E]) -> E:
    with trio.fail_after(FIRST_S):
        return await anext(events)


async def numbers(events: Subscription[LogMatched], count: int) -> list[str | None]:
    return [(await first(events)).captures["n"] for _ in range(count)]


async def test_a_line_that_is_written_is_told_and_kept(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            event = await first(events)
        assert (event.path, event.rule, event.text, event.captures) == (str(here.log), "line", "line 1", {"n": "1"})
        assert (event.generation, event.offset, event.severity, event.run) == (1, 0, "error", None)
        assert await here.journal(LogMatched) == [event]
        listed = await here.bus.ask("list_logs", {})
        (source,) = listed["sources"]
        assert (source["path"], source["state"], source["offset"], source["lag"]) == (str(here.log), "IDLE", 7, 0)
        (rule,) = listed["rules"]
        assert rule.pop("ns_per_line") > 0
        assert rule == {"rule": "line", "matches": 1, "suppressed": 0, "limit_errors": 0}


async def test_a_file_that_is_there_is_followed_from_its_end(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write(1, 2)
        await here.start()
        with trio.fail_after(FIRST_S):
            while not (await here.bus.ask("list_logs", {}))["sources"][0]["offset"]:
                await trio.lowlevel.checkpoint()
        with here.bus.subscribe(LogMatched) as events:
            here.write(3)
            assert await numbers(events, 1) == ["3"]


def hang(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """Globs of a mount hang, until that is set; those that were looked for."""
    matching, answers, looked_for = paths.matching, threading.Event(), list[str]()

    def slow(pattern: str) -> list[str]:
        if "mnt" in pattern:
            answers.wait()
        found = matching(pattern)
        looked_for.append(pattern)
        return found

    monkeypatch.setattr(paths, "matching", slow)
    return answers, looked_for


async def test_a_glob_on_a_disk_that_hangs_holds_up_no_other_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, looked_for = hang(monkeypatch)

    async def until_read(path: Path) -> None:
        with trio.fail_after(FIRST_S):
            while True:
                listed = await here.bus.ask("list_logs", {})
                if any(source["path"] == str(path) and source["offset"] for source in listed["sources"]):
                    break
                await trio.lowlevel.checkpoint()

    late, other = tmp_path / "logs/mnt.log", f"{tmp_path}/logs/z*"
    async with house(tmp_path, settle_s=0.05) as here:
        here.write(1)
        here.write(2, name=late.name)
        with trio.fail_after(FIRST_S):
            await here.start(
                LogWatch(name="m", glob=f"{tmp_path}/logs/mnt*"),
                LogWatch(name="z", glob=other),
                LogWatch(name="a", path=str(here.log)),
            )
        with here.bus.subscribe(LogMatched) as events:
            await until_read(here.log)
            here.write(3)
            assert await numbers(events, 1) == ["3"]
            with trio.fail_after(FIRST_S):
                while other not in looked_for:
                    await trio.lowlevel.checkpoint()
            here.write(5, name="z.log")
            assert await numbers(events, 1) == ["5"]
            answers.set()
            await until_read(late)
            here.write(4, name=late.name)
            assert await numbers(events, 1) == ["4"]


async def test_a_client_may_end_what_hangs_before_it_is_followed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, found = threading.Event(), list[Watch]()

    def slow(id: str, asked: WatchLog) -> Watch:
        answers.wait()
        found.append(of_client(id, asked))
        return found[0]

    async with house(tmp_path, settle_s=0.05) as here:
        here.write(1)
        await here.start()
        kept = await here.bus.ask("watch_log", {"path": str(here.log)})
        await here.stop()
        monkeypatch.setattr(role, "of_client", slow)
        await here.start(LogWatch(name="z", path=f"{tmp_path}/logs/z.log"))
        await here.bus.ask("unwatch_log", {"watch": kept["watch"]})
        answers.set()
        with trio.fail_after(FIRST_S):
            while not found:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.1)
        listed = await here.bus.ask("list_logs", {})
        assert [source["path"] for source in listed["sources"]] == [f"{tmp_path}/logs/z.log"]


async def test_who_comes_as_the_last_other_goes_has_the_log_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = Followed.settle

    async def settle_and_end(followed: Followed) -> None:
        monkeypatch.setattr(Followed, "settle", settle)
        await settle(followed)
        await here.bus.ask("unwatch_log", one)

    async with house(tmp_path) as here:
        here.write(1)
        await here.start(LogWatch(name="z", path=f"{tmp_path}/logs/z.log"))
        one = {"watch": (await here.bus.ask("watch_log", {"path": str(here.log)}))["watch"]}
        monkeypatch.setattr(Followed, "settle", settle_and_end)
        with here.bus.subscribe(LogMatched) as events:
            await here.bus.ask("watch_log", {"path": str(here.log)})
            here.write(2)
            assert await numbers(events, 1) == ["2"]


async def test_many_globs_on_a_disk_that_hangs_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, looked_for = hang(monkeypatch)
    (tmp_path / "mountinfo").write_text(f"40 21 0:44 / {tmp_path}/mnt rw - nfs4 lab:/share rw")
    monkeypatch.setattr(wake, "MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(role, "AT_ONCE_S", 0.0)
    hung = [LogWatch(name=f"m{number}", glob=f"{tmp_path}/mnt/{number}*") for number in range(50)]
    async with house(tmp_path, settle_s=1.0) as here:
        await here.start(*hung, LogWatch(name="z", glob=f"{tmp_path}/logs/z*"))
        with trio.fail_after(FIRST_S):
            while not looked_for:
                await trio.lowlevel.checkpoint()
        assert set(looked_for) == {f"{tmp_path}/logs/z*"}
        answers.set()


async def test_no_line_is_lost_over_rotations(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            here.write(2)
            here.log.rename(f"{here.log}.1")
            here.write(3)
            here.write(4, name="a.log.1")
            assert sorted(map(str, await numbers(events, 3))) == ["2", "3", "4"]
        told = [(event.what, event.generation) for event in await here.journal(LogSource)]
        assert told == [("found", 1), ("rotated", 1), ("found", 2)]
        assert len({event.id for event in await here.journal(LogMatched)}) == 4


async def test_a_copied_and_truncated_file_is_known_and_the_gap_is_told(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            here.write(1, 2)
            assert await numbers(events, 2) == ["1", "2"]
            shutil.copy(here.log, f"{here.log}.1")
            os.truncate(here.log, 0)
            here.write(3)
            assert await numbers(events, 1) == ["3"]
        (gap,) = await here.journal(LogGap)
        assert (gap.path, gap.generation, gap.from_, gap.to) == (str(here.log), 1, 14, None)
        assert [event.generation for event in await here.journal(LogMatched)] == [1, 1, 2]


@pytest.mark.parametrize("rotates", [False, True])
async def test_what_was_written_meanwhile_is_told_once_after_a_restart(tmp_path: Path, rotates: bool) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            here.write(1, 2)
            assert await numbers(events, 2) == ["1", "2"]
    async with house(tmp_path) as here:
        here.write(3)
        if rotates:
            here.log.rename(f"{here.log}.1")
            here.write(4)
        with here.bus.subscribe(LogMatched) as events:
            await here.start()
            assert await numbers(events, 1 + rotates) == ["3", "4"][: 1 + rotates]
        kept = await here.journal(LogMatched)
        assert len({event.id for event in kept}) == len(kept) == 3 + rotates
        assert await here.journal(LogGap) == []


async def test_a_rate_limit_tells_what_it_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TELL_S", 0.1)
    rules = RULES.replace("burst = 1000000, per_s = 0", "burst = 2, per_s = 0.01")
    async with house(tmp_path, rules) as here:
        await here.start()
        with here.bus.subscribe(LogSuppressed) as dropped, here.bus.subscribe(LogMatched) as events:
            here.write(1, 2, 3, 4, 5)
            assert await numbers(events, 2) == ["1", "2"]
            event = await first(dropped)
        assert (event.rule, event.count, event.first_offset, event.last_offset) == ("line", 3, 14, 28)
        (counts,) = (await here.bus.ask("list_logs", {}))["rules"]
        assert (counts["matches"], counts["suppressed"]) == (5, 3)


async def test_context_stands_before_and_comes_behind(tmp_path: Path) -> None:
    rules = RULES + "[rule.context]\nuntil = 'begin (?<n>\\d+)'\nsame = ['n']\nafter = 2\nwait_s = 60\n"
    async with house(tmp_path, rules) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events, here.bus.subscribe(LogContext) as contexts:
            here.log.write_text("begin 7\nbegin 8\nline 7\nx\n")
            match = await first(events)
            with here.log.open("a") as file:
                file.write("y\r\nz\n")
            context = await first(contexts)
        assert match.context is not None
        assert (match.context.found, match.context.before) == (True, ("begin 8",))
        assert [(anchor.offset, anchor.text) for anchor in match.context.anchors] == [(0, "begin 7")]
        assert (context.match, context.after, context.record) == (match.id, ("x", "y"), ())


async def test_two_matches_in_one_record_are_one_event(tmp_path: Path) -> None:
    rules = RULES + "[rule.multiline]\nstart = '^T'\ncontinuation = '^ '\nwait_s = 60\n"
    async with house(tmp_path, rules) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events, here.bus.subscribe(LogContext) as contexts:
            here.log.write_text("T0\nT1\n line 1\n line 2\n more\nT2 line 3\n")
            assert await numbers(events, 2) == ["1", "3"]
            assert (await first(contexts)).record == ("T1", " line 1", " line 2", " more")


async def test_new_files_of_a_glob_are_read_from_their_beginning(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start(LogWatch(name="all", glob=f"{tmp_path}/logs/*.log*"))
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            here.log.rename(f"{here.log}.1")
            here.write(2)
            assert await numbers(events, 1) == ["2"]
        assert {event.path for event in await here.journal(LogMatched)} == {str(here.log)}


async def test_what_was_gone_before_it_was_looked_at_is_followed_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief, ended = [f"{tmp_path}/logs/brief.log"], trio.Event()
    end = Source.end

    def noted(source: Source) -> None:
        ended.set()
        end(source)

    monkeypatch.setattr(wake, "POLL_S", 0.01)
    monkeypatch.setattr(paths, "matching", lambda pattern: [*brief])
    monkeypatch.setattr(Source, "end", noted)
    async with house(tmp_path) as here:
        await here.start(LogWatch(name="all", glob=f"{tmp_path}/logs/*.log"))
        with trio.fail_after(FIRST_S):
            await ended.wait()
            brief.clear()
            while (await here.bus.ask("list_logs", {}))["sources"]:
                await trio.lowlevel.checkpoint()


async def test_a_name_that_is_no_text_is_followed_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.log")
    async with house(tmp_path) as here:
        watch = LogWatch(name="g", glob=f"{tmp_path}/logs/*.log")
        await here.start(watch)
        with here.bus.subscribe(LogMatched) as events:
            here.write(1, name=name)
            event = await first(events)
            assert (event.path, event.captures["n"]) == (f"{tmp_path}/logs/\\xff.log", "1")
            await here.stop()
            here.write(2, name=name)
            await here.start(watch)
            assert await numbers(events, 1) == ["2"]
            assert [source["path"] for source in (await here.bus.ask("list_logs", {}))["sources"]] == [event.path]
            (tmp_path / "logs" / name).unlink()
            await here.stop()
            await here.start(watch)
            here.write(3, name="b.log")
            assert await numbers(events, 1) == ["3"]


async def test_a_client_watches_and_is_remembered(tmp_path: Path) -> None:
    tables = [{"id": "mine", "regex": "mine"}]
    async with house(tmp_path) as here:
        other = tmp_path / "logs/b.log"
        other.write_text("mine\n")
        await here.start()
        answer = await here.bus.ask("watch_log", {"path": str(other), "rules": tables})
        assert answer == {"watch": "m1", "sources": 1}
        with here.bus.subscribe(LogMatched) as events:
            with other.open("a") as file:
                file.write("line 1\nmine\n")
            event = await first(events)
        assert (event.rule, event.offset) == ("mine", 12)
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            with other.open("a") as file:
                file.write("mine\n")
            assert (await first(events)).offset == 17
        assert await here.bus.ask("unwatch_log", {"watch": "m1"}) == {}
        assert len((await here.bus.ask("list_logs", {}))["sources"]) == 1
        with pytest.raises(ActionError, match="watch m1 is not known here"):
            await here.bus.ask("unwatch_log", {"watch": "m1"})


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({}, "bad_payload: expected one of path and glob"),
        ({"path": "a.log"}, "bad_payload: expected an absolute path, got 'a.log'"),
        ({"path": "/etc/passwd"}, "forbidden: /etc/passwd: is not below "),
        ({"path": "LOGS/link"}, "forbidden: LOGS/link: is not below "),
        ({"glob": "LOGS/../*"}, "forbidden: LOGS/../*: is not below "),
        ({"path": "LOGS"}, "bad_payload: LOGS: is not a regular file"),
        ({"path": "LOGS/a", "from": -1}, "bad_payload: key from: -1 is less than 0"),
        ({"path": "LOGS/a", "rules": "none"}, "not_found: no rule set is called 'none'"),
        (
            {"path": "LOGS/a", "rules": [{"id": "x", "regex": "("}]},
            "bad_payload: watch_log: [x].regex: missing closing parenthesis",
        ),
    ],
)
async def test_what_a_client_may_not_watch(tmp_path: Path, payload: dict[str, Any], reason: str) -> None:
    async with house(tmp_path) as here:
        logs = f"{tmp_path}/logs"
        os.symlink("/etc/passwd", f"{logs}/link")
        await here.start()
        asked = {
            key: value.replace("LOGS", logs) if isinstance(value, str) else value for key, value in payload.items()
        }
        with pytest.raises(ActionError) as refused:
            await here.bus.ask("watch_log", asked)
        assert refused.value.reason.startswith(reason.replace("LOGS", logs))


async def test_rules_are_read_again_and_bad_ones_change_nothing(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(Alert, AlertCleared) as alerts, here.bus.subscribe(LogMatched) as events:
            here.rules.write_text(RULES + "[[rule]]\nid = 'bad'\nregex = '('\n")
            await here.bus.ask("reload_rules", {})
            alert = await first(alerts)
            assert isinstance(alert, Alert)
            assert f"{here.rules}:10: rule[bad].regex" in alert.text
            here.write(1)
            assert (await first(events)).rule == "line"
            here.rules.write_text(RULES.replace('"line"', '"renamed"'))
            slow = "[[rule]]\nid = 'slow'\nregex = '\\d'\n"
            here.rules.write_text(RULES.replace('"line"', '"renamed"') + slow)
            assert await here.bus.ask("reload_rules", {}) == {"rules": 2, "slow": ["slow"]}
            assert isinstance(await first(alerts), AlertCleared)
            assert [event.slow for event in await here.journal(LogRules)] == [(), (), ("slow",)]
            here.write(2)
            assert (await first(events)).rule == "renamed"


async def test_events_carry_the_run_and_the_test_that_are_active(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
        here.bus.publish(
            RunStarted(run="r1", suite="s", title="", runner="tap", driver="", source="", origin="demo", slot=0)
        )
        here.bus.publish(TestStarted(run="r1", suite="s", case="c", name="c", file=None, started=0.0))
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            event = await first(events)
        assert (event.run, event.test) == ("r1", "r1:c")


async def test_a_suite_has_its_logs_followed_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RULES)
    (tmp_path / "logs").mkdir()
    program = f"printf 'line 1\\nline 2' >> {tmp_path}/logs/app.log; echo 1..1; echo ok 1 - a"
    async with suites_house.house(tmp_path) as suites, trio.open_nursery() as nursery:
        settings = LogsSettings(rules=(), roots=())
        await nursery.start(of_suites(suites, settings, tmp_path))
        with suites.bus.subscribe(LogMatched) as events:
            watch = {"logs": [f"{tmp_path}/logs/app.log"], "rules": [f"{tmp_path}/mine.toml"]}
            run = await suites.order(command=["sh", "-c", program], watch=watch)
            event = await first(events)
            assert (event.run, event.rule, event.path) == (run, "line", f"{tmp_path}/logs/app.log")
            assert (await suites.finished()).verdict == "passed"
            event = await first(events)  # its program died in this line
        assert (event.run, event.text, event.flags) == (run, "line 2", ("partial",))
        with trio.fail_after(FIRST_S):
            while (await suites.bus.ask("list_logs", {}))["sources"]:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_history_is_searched_for_clients(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write(1, name="a.log.1")
        here.write(2, 3)
        await here.start()
        found = await here.bus.ask("search_log", {"path": str(here.log), "rule": "line", "limit": 2, "budget_s": 60})
        assert [match["text"] for match in found["matches"]] == ["line 3", "line 2"]
        asked = {"path": str(here.log), "regex": "line", "from": found["next"], "budget_s": 60}
        found = await here.bus.ask("search_log", asked)
        assert [match["path"] for match in found["matches"]] == [f"{here.log}.1"]
        assert (found["complete"], found["next"]) == (True, None)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"path": "LOGS/a.log"}, "bad_payload: expected one of regex and rule"),
        ({"path": "LOGS/a.log", "regex": "x", "rule": "line"}, "bad_payload: expected one of regex and rule"),
        ({"path": "a.log", "regex": "x"}, "bad_payload: expected an absolute path, got 'a.log'"),
        ({"path": "LOGS/link", "regex": "x"}, "forbidden: LOGS/link: is not below "),
        ({"path": "LOGS/gone", "regex": "x"}, "not_found: LOGS/gone: No such file or directory"),
        ({"path": "LOGS/pipe", "regex": "x"}, "bad_payload: LOGS/pipe: is not a regular file"),
        ({"path": "LOGS/a.log", "rule": "none"}, "not_found: no rule of a watched log is called 'none'"),
        ({"path": "LOGS/a.log", "regex": "("}, "bad_payload: search_log: [search_log].regex: "),
        ({"path": "LOGS/a.log", "regex": "x", "limit": 0}, "bad_payload: "),
        ({"path": "LOGS/a.log", "regex": "x", "budget_s": 61}, "bad_payload: "),
    ],
)
async def test_what_a_client_may_not_search(tmp_path: Path, payload: dict[str, Any], reason: str) -> None:
    async with house(tmp_path) as here:
        logs = f"{tmp_path}/logs"
        here.write(1)
        os.symlink("/etc/passwd", f"{logs}/link")
        os.mkfifo(f"{logs}/pipe")
        await here.start()
        asked = {key: value.replace("LOGS", logs) if key == "path" else value for key, value in payload.items()}
        with pytest.raises(ActionError) as refused:
            await here.bus.ask("search_log", asked)
        assert refused.value.reason.startswith(reason.replace("LOGS", logs))


async def test_logs_that_are_not_watched_are_a_warning_in_the_runs_result(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/old.log").write_text("line 1\n")
    program = f"echo 'line 2' >> {tmp_path}/logs/old.log; echo 1..1; echo ok 1 - a"
    async with suites_house.house(tmp_path) as suites, trio.open_nursery() as nursery:
        settings = LogsSettings(rules=(), roots=())
        await nursery.start(of_suites(suites, settings, tmp_path))
        named = [f"{tmp_path}/logs/*.log", "", *("x" for _ in range(70))]
        run = await suites.order(command=["sh", "-c", program], watch={"logs": named, "rules": ["nowhere"]})
        finished = await suites.finished()
        texts = [warned.text for warned in finished.warnings if warned.code == "watch.logs"]
        assert (finished.run, finished.verdict) == (run, "passed")
        assert texts == [
            "8 logs are not watched: a run has 64 at most",
            "'' is not watched: it is no path of 1 to 4096 characters",
            "its logs are watched without rules: no rule set is called 'nowhere'. Name a file of logs.rules.",
        ]
        with pytest.raises(ActionError, match="is not running here"):
            await suites.bus.ask("warn_run", {"run": run, "code": "x", "text": "x"})
        nursery.cancel_scope.cancel()


async def test_a_glob_of_a_suite_has_what_is_written_from_now_on(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RULES)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/old.log").write_text("line 1\n")
    program = f"echo 'line 2' >> {tmp_path}/logs/old.log; echo 1..1; echo ok 1 - a"
    async with suites_house.house(tmp_path) as suites, trio.open_nursery() as nursery:
        settings = LogsSettings(rules=(), roots=())
        await nursery.start(of_suites(suites, settings, tmp_path))
        with suites.bus.subscribe(LogMatched) as events:
            watch = {"logs": [f"{tmp_path}/logs/*.log"], "rules": [f"{tmp_path}/mine.toml"]}
            await suites.order(command=["sh", "-c", program], watch=watch)
            assert await numbers(events, 1) == ["2"]
        await suites.finished()
        nursery.cancel_scope.cancel()


async def test_a_glob_of_a_suite_on_a_disk_that_hangs_holds_up_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, _ = hang(monkeypatch)
    monkeypatch.setattr(wake, "AT_ONCE_S", 0.0)
    (tmp_path / "mine.toml").write_text(RULES)
    (tmp_path / "logs").mkdir()
    program = f"echo 'line 1' >> {tmp_path}/logs/app.log; echo 1..1; echo ok 1 - a"
    async with suites_house.house(tmp_path) as suites, trio.open_nursery() as nursery:
        await nursery.start(of_suites(suites, LogsSettings(rules=(), roots=()), tmp_path))

        async def order(run: str, pattern: str) -> str:
            watch = {"logs": [f"{tmp_path}/{pattern}"], "rules": [f"{tmp_path}/mine.toml"]}
            return await suites.order(run, command=["sh", "-c", program], watch=watch)

        with suites.bus.subscribe(LogMatched) as events:
            hung, other = await order(suites_house.R[1], "mnt/*"), suites_house.R[2]
            assert (await suites.finished(hung)).verdict == "passed"
            monkeypatch.setattr(wake, "AT_ONCE_S", FIRST_S)
            await order(other, "logs/app.log")
            assert (await first(events)).run == other
            assert (await suites.finished(other)).verdict == "passed"
        answers.set()
        nursery.cancel_scope.cancel()


async def test_a_client_is_told_of_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, answers = paths.outside, threading.Event()

    def slow(path: str, roots: Sequence[str]) -> str | None:
        if "mnt" in path:
            answers.wait()
        return outside(path, roots)

    async with house(tmp_path) as here:
        await here.start()
        here.write(1)
        monkeypatch.setattr(paths, "outside", slow)
        with monkeypatch.context() as patched:
            patched.setattr(role, "SETTLE_S", 0.0)
            for action, payload in (("watch_log", {}), ("search_log", {"regex": "x"})):
                with pytest.raises(ActionError, match="mnt: the disk does not answer") as caught:
                    await here.bus.ask(action, {"path": f"{tmp_path}/logs/mnt", **payload})
                assert caught.value.code == "busy"
        found = await here.bus.ask("search_log", {"path": str(here.log), "regex": "line"})
        assert len(found["matches"]) == 1
        answers.set()
