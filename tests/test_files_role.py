"""The two roles of the folder with a real bus, store and disk; D-Bus is a bus of the test's own."""

import base64
import errno
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
from trio.testing import MockClock

from agent.core.bus import Bus, Subscription
from agent.core.errors import ActionError
from agent.core.events import (
    Alert,
    AlertCleared,
    AnyEvent,
    Counts,
    EntitlementChanged,
    FileChanged,
    FileGap,
    RunReceived,
    RunStarted,
    SuiteFinished,
    decode,
)
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.files import follow, role
from agent.files.disk import carry_out
from agent.files.entitlement import RHSM1, SUBSCRIPTION_MANAGER
from agent.files.looks import Look, Looked, Survey, Surveyed
from agent.files.messages import PATH_DESCRIBED
from agent.files.settings import EntitlementSettings, FilesSettings, FileWatch
from tests import suites_house
from tests.dbus_bus import OWNER, fake_bus
from tests.files_eyes import say

E = TypeVar("E", FileChanged, EntitlementChanged)
FIRST_S = 60.0


class House:
    """A bus and a store in a temporary folder, and what is needed to start a role twice."""

    def __init__(self, bus: Bus, store: Store, nursery: trio.Nursery) -> None:
        self.bus, self.store, self.metrics, self._nursery = bus, store, Metrics(), nursery

    async def start(self, start: Any) -> trio.CancelScope:
        """Start a role in a scope of its own."""

        async def in_scope(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(start)
                    task_status.started(scope)

        scope: trio.CancelScope = await self._nursery.start(in_scope)
        return scope

    async def files(self, **settings: Any) -> trio.CancelScope:
        made = FilesSettings(**settings)
        return await self.start(
            partial(role.run_files, self.bus, self.store, made, Health("files"), metrics=self.metrics)
        )

    async def entitlement(self, pki: Path, bus: str, enabled: Any = True) -> trio.CancelScope:
        made = EntitlementSettings(enabled=enabled, bus=bus)
        return await self.start(
            partial(role.run_entitlement, self.bus, self.store, made, Health("entitlement"), pki=pki)
        )

    async def journal(self, *kinds: type[AnyEvent]) -> list[Any]:
        await self.store.commit()
        rows = await self.store.read(kinds=[kind.__name__ for kind in kinds])
        return [decode(row.kind, row.data) for row in rows]


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    store = open_store(folder / "state", reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield House(Bus(store), store, nursery)
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def first(events: Subscription[E]) -> E:
    with trio.fail_after(FIRST_S):
        return await anext(events)


async def test_what_the_settings_name_is_watched(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    watch = FileWatch(path=f"{tmp_path}/etc", content=True)
    async with house(tmp_path) as here:
        await here.files(watch=(watch,), content_allow=(f"{tmp_path}/etc",))
        with here.bus.subscribe(FileChanged) as events:
            (tmp_path / "etc/rhsm.conf").write_text("[server]\n")
            event = await first(events)
        assert (event.what, event.path, event.content, event.run) == (
            "created", f"{tmp_path}/etc/rhsm.conf", b"[server]\n", None,
        )  # fmt: skip
        (kept,) = await here.journal(FileChanged)
        assert kept == event
        assert dict((name, value) for name, labels, value in here.metrics)["files_changes_total"] == 1


async def test_a_client_watches_and_unwatches(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    async with house(tmp_path) as here:
        await here.files()
        answer = await here.bus.ask("watch_file", {"path": f"{tmp_path}/etc", "recursive": True, "content": True})
        assert answer == {"watch": "w-1"}
        with here.bus.subscribe(FileChanged) as events:
            (tmp_path / "etc/secret").write_text("x")
            event = await first(events)
        assert (event.what, event.content, event.no_content) == ("created", None, "not_allowed")
        assert await here.bus.ask("unwatch_file", {"watch": "w-1"}) == {}
        with pytest.raises(ActionError, match="watch w-1 is not known here") as refused:
            await here.bus.ask("unwatch_file", {"watch": "w-1"})
        assert refused.value.code == "not_found"


async def test_what_a_client_watches_is_taken_up_again_unless_it_was_passing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    async with house(tmp_path) as here:
        scope = await here.files()
        await here.bus.ask("watch_file", {"path": f"{tmp_path}/a"})
        await here.bus.ask("watch_file", {"path": f"{tmp_path}/b", "passing": True})
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await here.files()
        with here.bus.subscribe(FileChanged) as events:
            for name in ("b", "a"):
                (tmp_path / name / "file").write_text("x")
            assert (await first(events)).path == f"{tmp_path}/a/file"
        assert await here.bus.ask("watch_file", {"path": f"{tmp_path}/b"}) == {"watch": "w-3"}
        assert await here.bus.ask("unwatch_file", {"watch": "w-1"}) == {}


async def test_a_client_may_come_and_go_while_a_disk_hangs_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mnt", "a", "b"):
        (tmp_path / name).mkdir()
    answers = threading.Event()

    def slow(acts: Sequence[Survey | Look], *more: Any) -> Iterator[Surveyed | Looked]:
        if any("mnt" in act.path for act in acts):
            answers.wait()
        return carry_out(acts, *more)

    async with house(tmp_path) as here:
        scope = await here.files()
        await here.bus.ask("watch_file", {"path": f"{tmp_path}/a"})
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(follow, "carry_out", slow)
        monkeypatch.setattr(role, "START_S", 0.0)
        await here.files(watch=(FileWatch(path=f"{tmp_path}/mnt"),))
        with here.bus.subscribe(FileChanged) as events, trio.fail_after(FIRST_S):
            assert await here.bus.ask("unwatch_file", {"watch": "w-1"}) == {}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.bus.ask, "watch_file", {"path": f"{tmp_path}/b"})
                await trio.testing.wait_all_tasks_blocked()
                answers.set()
            for name in ("a", "b"):
                (tmp_path / name / "file").write_text("x")
            assert (await first(events)).path == f"{tmp_path}/b/file"
            assert await here.bus.ask("unwatch_file", {"watch": "w-2"}) == {}


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk below `mnt` that answers when this is set."""
    (tmp_path / "mnt").mkdir()
    answers = threading.Event()

    def slow(acts: Sequence[Survey | Look], *more: Any) -> Iterator[Surveyed | Looked]:
        if any("mnt" in act.path for act in acts):
            answers.wait()
        return carry_out(acts, *more)

    monkeypatch.setattr(follow, "carry_out", slow)
    yield answers
    answers.set()


async def test_who_waits_for_a_watch_is_answered_when_the_role_begins_anew(
    tmp_path: Path, hanging: threading.Event
) -> None:
    answers: list[Any] = []

    async def watch() -> None:
        answers.append(await here.bus.ask("watch_file", {"path": f"{tmp_path}/mnt"}))

    async with house(tmp_path) as here:
        scope = await here.files()
        with trio.fail_after(FIRST_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert answers == [{"watch": "w-1"}]
        hanging.set()
        await here.files()
        with here.bus.subscribe(FileChanged) as events:
            (tmp_path / "mnt/file").write_text("x")
            assert (await first(events)).path == f"{tmp_path}/mnt/file"


@pytest.mark.parametrize("passing", [False, True])
async def test_who_leaves_before_the_answer_watches_nothing(
    passing: bool, tmp_path: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "MAX_WATCHES", 1)
    async with house(tmp_path) as here:
        await here.files()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.bus.ask, "watch_file", {"path": f"{tmp_path}/mnt", "passing": passing})
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        hanging.set()
        assert await here.bus.ask("watch_file", {"path": f"{tmp_path}/mnt"}) == {"watch": "w-2"}
        with pytest.raises(ActionError, match="watch w-1 is not known here"):
            await here.bus.ask("unwatch_file", {"watch": "w-1"})


@pytest.mark.parametrize(
    ("action", "payload", "reason"),
    [
        ("watch_file", {}, "bad_payload: key path is missing"),
        ("watch_file", {"path": 5}, "bad_payload: key path: Expected `str`, got `int`"),
        ("watch_file", {"path": "etc"}, f"bad_payload: key path: expected {PATH_DESCRIBED}, got 'etc'"),
        ("watch_file", {"path": "/etc/../root"}, f"bad_payload: key path: expected {PATH_DESCRIBED}"),
        ("watch_file", {"path": "/a\0b"}, f"bad_payload: key path: expected {PATH_DESCRIBED}"),
        ("watch_file", {"path": "/" + "x" * 4096}, f"bad_payload: key path: expected {PATH_DESCRIBED}"),
        ("look_file", {"path": ""}, f"bad_payload: key path: expected {PATH_DESCRIBED}, got ''"),
        ("watch_file", {"path": "/a", "recursive": "yes"}, "bad_payload: key recursive: Expected `bool`, got `str`"),
        ("unwatch_file", {"watch": "settings-0"}, "not_found: watch settings-0 is not known here"),
        ("look_file", {"path": "/nonexistent/file"}, "not_found: /nonexistent/file: there is no such file"),
    ],
)
async def test_what_cannot_be_done_says_why(action: str, payload: dict[str, Any], reason: str, tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.files()
        with pytest.raises(ActionError) as refused:
            await here.bus.ask(action, payload)
        assert refused.value.reason.startswith(reason)


async def test_so_many_watches_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "MAX_WATCHES", 2)
    async with house(tmp_path) as here:
        await here.files()
        for _ in range(2):
            await here.bus.ask("watch_file", {"path": "/nonexistent/file"})
        with pytest.raises(ActionError, match="2 paths are watched already") as refused:
            await here.bus.ask("watch_file", {"path": "/nonexistent/file"})
        assert refused.value.code == "too_big"


async def test_what_cannot_be_looked_at_is_not_told_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def lstat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if path == "/closed/file":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "lstat", lstat)
    async with house(tmp_path) as here:
        await here.files()
        with pytest.raises(ActionError) as refused:
            await here.bus.ask("look_file", {"path": "/closed/file"})
        assert refused.value.reason == "bad_payload: /closed/file: Permission denied"


async def test_how_a_file_is_now(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    async with house(tmp_path) as here:
        await here.files(content_allow=(str(tmp_path),))
        answer = await here.bus.ask("look_file", {"path": f"{tmp_path}/file"})
        assert set(answer) == {"path", "size", "mtime", "mode", "owner", "sha256", "content", "no_content"}
        assert (answer["size"], base64.b64decode(answer["content"])) == (1, b"x")
        assert msgspec.json.encode(answer)


RUN = {"run": "r-1", "suite": "s", "runner": "tap", "driver": "tap"}
STARTED = RunStarted(title="S", source="", origin="control", slot=0, **RUN)  # type: ignore[arg-type]  # of one type
FINISHED = SuiteFinished(
    verdict="passed", result="SUCCESS", code=0, signal=None, reason=None, started=1.0, ended=2.0, counts=Counts(),
    **RUN,  # type: ignore[arg-type]  # of one type
)  # fmt: skip


def received(*paths: str, base: str | None = None) -> RunReceived:
    return RunReceived(run="r-1", suite={"id": "s", "watch": {"files": list(paths)}}, origin="control", base=base)


async def test_a_runs_files_are_watched_while_it_runs_and_their_events_carry_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "MAX_OF_RUN", 2)  # the gap of the third path says that the two others are watched
    async with house(tmp_path) as here:
        await here.files()
        with here.bus.subscribe(FileChanged) as events, here.bus.subscribe(FileGap) as gaps:
            here.bus.publish(received(f"{tmp_path}/conf", "below.conf", "more", base=str(tmp_path)))
            here.bus.publish(STARTED)
            await anext(gaps)
            (tmp_path / "conf").write_text("1")
            assert say(await first(events)) == f"created {tmp_path}/conf [r-1]"
            (tmp_path / "below.conf").write_text("1")  # just before the end: it still belongs to the run
            here.bus.publish(FINISHED)
            assert say(await first(events)) == f"created {tmp_path}/below.conf [r-1]"
            await here.bus.ask("watch_file", {"path": f"{tmp_path}/conf"})
            (tmp_path / "conf").write_text("22")
            assert say(await first(events)) == f"modified {tmp_path}/conf"


async def test_a_real_suite_has_its_files_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "MAX_OF_RUN", 2)
    (tmp_path / "etc").mkdir()
    (tmp_path / "project/out").mkdir(parents=True)
    # It writes once its files are watched, which the gap of the path that is one too many says.
    program = f"echo 1..1; read go < {tmp_path}/go; echo x > {tmp_path}/etc/f; echo ok 1; echo x > out/g"
    os.mkfifo(tmp_path / "go")
    async with suites_house.house(tmp_path) as suites, trio.open_nursery() as nursery:
        start = partial(role.run_files, suites.bus, suites.store, FilesSettings(), Health("files"), metrics=Metrics())
        await nursery.start(start)
        with suites.bus.subscribe(FileChanged) as events, suites.bus.subscribe(FileGap) as gaps:
            watch = {"files": [f"{tmp_path}/etc", "out", "one/too/many"]}
            run = await suites.order(command=["sh", "-c", program], watch=watch)
            assert (await anext(gaps)).run == run
            async with await trio.open_file(tmp_path / "go", "w") as go:
                await go.write("go\n")
            assert say(await first(events)) == f"created {tmp_path}/etc/f [{run}]"
            while (changed := say(await anext(events))) != f"created {tmp_path}/project/out/g [{run}]":
                assert f"{tmp_path}/etc/f [{run}]" in changed
            assert (await suites.finished()).verdict == "passed"
        nursery.cancel_scope.cancel()


async def test_a_run_that_goes_on_when_the_role_comes_back_is_watched_again(tmp_path: Path) -> None:
    async def runs(payload: dict[str, Any]) -> dict[str, Any]:
        return {"runs": [{"run": "unknown"}, {"run": "r-1"}]}

    async with house(tmp_path) as here:
        here.bus.publish(received(f"{tmp_path}/conf", "relative"))
        with (
            here.bus.answer("runs", runs),
            here.bus.subscribe(FileChanged) as events,
            here.bus.subscribe(FileGap) as gaps,
        ):
            await here.files()
            await anext(gaps)
            (tmp_path / "conf").write_text("1")
            assert say(await first(events)) == f"created {tmp_path}/conf [r-1]"


async def test_the_watches_of_a_run_are_no_clients_whatever_the_run_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "MAX_OF_RUN", 1)
    async with house(tmp_path) as here:
        await here.files()
        with here.bus.subscribe(FileGap) as gaps:
            here.bus.publish(msgspec.structs.replace(received(f"{tmp_path}/a", f"{tmp_path}/b"), run="w-1"))
            here.bus.publish(msgspec.structs.replace(STARTED, run="w-1"))
            await anext(gaps)
        with pytest.raises(ActionError, match="watch w-1/0 is not known here"):
            await here.bus.ask("unwatch_file", {"watch": "w-1/0"})


async def test_what_cannot_be_watched_for_a_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "MAX_OF_RUN", 2)
    async with house(tmp_path) as here:
        await here.files()
        with here.bus.subscribe(FileGap) as gaps:
            here.bus.publish(received("relative", f"{tmp_path}/b", f"{tmp_path}/c"))
            here.bus.publish(STARTED)
            said = [say(await anext(gaps)) for _ in range(2)]
        assert said == [
            f"gap relative: is not watched: it is not {PATH_DESCRIBED} [r-1]",
            f"gap {tmp_path}/c: is not watched: a run has 2 paths [r-1]",
        ]


async def test_a_lack_of_watches_is_an_alert_with_its_remedy(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        files = role._Files(here.bus, here.store, FilesSettings(), Health("files"), Metrics(), lambda: 5.0)
        files._lack(3)
        files._lack(0)
        alert, cleared = await here.journal(Alert, AlertCleared)
        assert (alert.code, alert.since) == ("files.watches", 5.0)
        assert "for 3 directories" in alert.text
        assert "fs.inotify.max_user_watches" in alert.remedy
        assert cleared == AlertCleared(code="files.watches")


# ---- entitlement ---------------------------------------------------------------------------------------------------


def facts(event: EntitlementChanged) -> tuple[int, str, str, int | None]:
    return event.status, event.name, event.source, event.previous


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    for name in ("entitlement", "product", "consumer"):
        (tmp_path / "pki" / name).mkdir(parents=True)
    return tmp_path / "pki"


async def test_the_status_at_the_start_at_a_change_and_when_the_bus_goes_and_comes(tmp_path: Path, pki: Path) -> None:
    word = ["Current"]

    def answer(name: str, *call: Any) -> tuple[str, tuple[Any, ...]] | str:
        return (
            ("s", (json.dumps({"status": word[0]}),)) if name == RHSM1 else "org.freedesktop.DBus.Error.ServiceUnknown"
        )

    async with house(tmp_path) as here, fake_bus(tmp_path, answer) as d_bus:
        d_bus.owners[RHSM1] = OWNER
        with here.bus.subscribe(EntitlementChanged) as events:
            await here.entitlement(pki, d_bus.address)
            assert facts(await first(events)) == (0, "valid", RHSM1, None)
            word[0] = "Invalid"
            await d_bus.signal("/com/redhat/RHSM1/Entitlement", "com.redhat.RHSM1.Entitlement", "EntitlementChanged")
            assert facts(await first(events)) == (1, "expired or invalid", RHSM1, 0)
            d_bus.hang_up()
            assert facts(await first(events)) == (5, "registration required", "certificates", 1)
            assert facts(await first(events)) == (1, "expired or invalid", RHSM1, 5)
        answer_ = await here.bus.ask("entitlement", {"history": True})
        assert {key: answer_[key] for key in ("status", "name", "raw", "source", "registered")} == {
            "status": 1, "name": "expired or invalid", "raw": "Invalid", "source": RHSM1, "registered": False,
        }  # fmt: skip
        assert [was["status"] for was in answer_["history"]] == [0, 1, 5, 1]
        assert "history" not in await here.bus.ask("entitlement", {})


async def test_a_touched_certificate_asks_again(tmp_path: Path, pki: Path) -> None:
    asked = trio.Event()
    calls: list[str] = []

    def answer(name: str, *call: Any) -> tuple[str, tuple[Any, ...]]:
        calls.append(name)
        if len(calls) == 2:
            asked.set()
        return "s", (json.dumps({"status": "Current"}),)

    async with house(tmp_path) as here, fake_bus(tmp_path, answer) as d_bus:
        with here.bus.subscribe(EntitlementChanged) as events:
            await here.entitlement(pki, d_bus.address)
            await first(events)
            began = trio.current_time()
            (pki / "entitlement/69.pem").write_text("certificate")
            with trio.fail_after(FIRST_S):
                await asked.wait()
            assert trio.current_time() - began >= 2


async def test_clients_may_have_it_asked_again_every_ten_seconds(tmp_path: Path, pki: Path) -> None:
    numbers = iter(range(100))

    def answer(name: str, *call: Any) -> tuple[str, tuple[Any, ...]] | str:
        if name == SUBSCRIPTION_MANAGER:
            return "i", (next(numbers),)
        return "org.freedesktop.DBus.Error.ServiceUnknown"

    async with house(tmp_path) as here, fake_bus(tmp_path, answer) as d_bus:
        await here.entitlement(pki, d_bus.address)
        wishes = [{}, {"refresh": True}, {"refresh": True}, {}]
        assert [(await here.bus.ask("entitlement", wish))["status"] for wish in wishes] == [0, 1, 1, 1]


async def test_without_a_bus_the_certificates_tell(tmp_path: Path, pki: Path) -> None:
    (pki / "consumer/cert.pem").write_text("certificate")
    async with house(tmp_path) as here:
        with here.bus.subscribe(EntitlementChanged) as events:
            await here.entitlement(pki, f"unix:path={tmp_path}/nobody")
            assert facts(await first(events)) == (-1, "unknown", "certificates", None)
            assert (await here.bus.ask("entitlement", {}))["registered"]
            (pki / "consumer/cert.pem").unlink()
            assert facts(await first(events)) == (5, "registration required", "certificates", -1)
            assert not (await here.bus.ask("entitlement", {}))["registered"]


@pytest.mark.parametrize(
    ("closed", "told"),
    [("consumer", (-1, "unknown", "certificates", None)), ("pki", (-1, "unknown", "none", None))],
)
async def test_certificates_that_are_closed_to_the_agent_are_not_taken_for_none(
    closed: str, told: tuple[Any, ...], tmp_path: Path, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | os.PathLike) and f"/{closed}/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    async with house(tmp_path) as here:
        with here.bus.subscribe(EntitlementChanged) as events:
            await here.entitlement(pki, f"unix:path={tmp_path}/nobody")
            assert facts(await first(events)) == told


@pytest.mark.parametrize(("enabled", "told"), [("auto", []), (True, [(-1, "unknown", "none", None)])])
async def test_where_nothing_is_there_auto_is_silent(
    enabled: Any, told: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path) as here:
        await here.entitlement(tmp_path / "no-pki", f"unix:path={tmp_path}/nobody", enabled)
        answer = await here.bus.ask("entitlement", {})
        assert (answer["status"], answer["source"]) == (-1, "none")
        assert [facts(event) for event in await here.journal(EntitlementChanged)] == told
    loud = (
        f"no D-Bus at=unix:path={tmp_path}/nobody error=[Errno 2] No such file or directory: the certificates must do"
    )
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(text.startswith(loud) for text in warned) == bool(told)


async def test_the_history_outlives_the_agent_and_is_bounded(
    tmp_path: Path, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "MAX_HISTORY", 2)
    async with house(tmp_path) as here:
        for _ in range(3):
            scope = await here.entitlement(pki, f"unix:path={tmp_path}/nobody")
            await here.bus.ask("entitlement", {})
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
        events = await here.journal(EntitlementChanged)
        assert [event.previous for event in events] == [None, 5, 5]
        await here.entitlement(pki, f"unix:path={tmp_path}/nobody")
        assert len((await here.bus.ask("entitlement", {"history": True}))["history"]) == 2


async def test_the_bus_is_looked_for_ever_more_rarely(
    tmp_path: Path, pki: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []

    class Enough(Exception):
        pass

    async def nobody_wishes() -> None:
        times.append(trio.current_time())
        if len(times) > 8:
            raise Enough
        await trio.sleep_forever()

    async with house(tmp_path) as here:
        settings = EntitlementSettings(bus=f"unix:path={tmp_path}/nobody")
        entitlement = role._Entitlement(here.bus, here.store, settings, Health("e"), pki, lambda: 0.0)
        monkeypatch.setattr(entitlement._asking, "wait", nobody_wishes)
        with pytest.raises(Enough):
            await entitlement.keep_asking()
    gaps = [round(later - earlier) for earlier, later in pairwise(times)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60]
