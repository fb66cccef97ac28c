"""Each check of the state directory is good here, and warns or fails where the sheet says so; none changes a thing."""

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agent.checks import state
from agent.checks.subject import Finding, Subject
from agent.core.events import AgentStarted
from agent.core.store import SCHEMA, open_store
from agent.settings import Settings, StateSettings

MIB = 1 << 20


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    (tmp_path / "state").mkdir()
    return Subject(settings=Settings(state=StateSettings(dir=str(tmp_path / "state"))))


def statvfs(free: int, size: int, flags: int = 0) -> Callable[..., os.statvfs_result]:
    """A disk, in MiB."""
    return lambda path: os.statvfs_result([MIB, MIB, size, free, free, 0, 0, 0, flags, 255])


async def store_with(folder: Path, *events: AgentStarted, at: float) -> None:
    store = open_store(folder, reserve=4096)
    store.owe("mimir", lambda event: True)
    for event in events:
        store.append(event, at)
    await store._write_pending()
    store.close()


def started() -> AgentStarted:
    return AgentStarted(version="0", ident="lab-07", instance="i")


@pytest.mark.parametrize(
    ("free", "size", "flags", "status"),
    [
        (5000, 10_000, 0, "ok"),
        (1023, 4000, 0, "warn"),
        (5000, 100_000, 0, "warn"),
        (63, 100, 0, "fail"),
        (5000, 10_000, os.ST_RDONLY, "fail"),
    ],
)
def test_room(subject: Subject, monkeypatch: pytest.MonkeyPatch, free: int, size: int, flags: int, status: str) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(free, size, flags))
    found = state.disk(subject)
    assert (found.status, found.data["free"]) == (status, free * MIB)
    assert found.remedy.startswith("Remount it") == bool(flags)


def test_a_folder_that_may_not_be_written_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert state.disk(subject).detail == f"{subject.folder} cannot be written"


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    subject = Subject(settings=Settings(state=StateSettings(dir=str(tmp_path / "a/b"))))
    assert state.disk(subject).data["folder"] == f"{tmp_path}/a/b"
    assert state.fsync(subject).status in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("took", "status"), [(0.001, "ok"), (0.06, "warn"), (1.5, "fail")])
def test_the_median_of_ten_fsyncs_counts(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, took: float, status: str
) -> None:
    now = 0.0

    def fsync(fd: int) -> None:
        nonlocal now
        now += took

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = state.fsync(subject)
    assert (found.status, found.data["median_ms"]) == (status, 1000 * took)
    assert list(subject.folder.iterdir()) == []


def test_a_file_system_without_nameless_files_is_measured_too(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    assert state.fsync(subject).status in ("ok", "warn")
    assert list(subject.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "Remount it"), (errno.ENOSPC, "Make room"), (errno.EACCES, "Run it as")],
)
def test_a_disk_that_cannot_be_written_fails(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    found = state.fsync(subject)
    assert found.detail == f"{subject.folder}: {os.strerror(number)}"
    assert found.remedy.startswith(remedy)


def test_no_store_is_good(subject: Subject) -> None:
    assert state.integrity(subject).detail == "no store yet"
    assert state.last_event(subject.folder) == 0


@pytest.mark.parametrize("made", ["", "PRAGMA journal_mode=WAL"])
def test_a_store_of_which_only_the_file_was_made_is_none_yet(subject: Subject, made: str) -> None:
    path = subject.folder / "store.db"
    path.touch()
    with closing(sqlite3.connect(path)) as db:
        db.execute(made)
    assert state.integrity(subject) == ("ok", "no store yet", "", {})
    assert state.last_event(subject.folder) == 0


async def test_a_store_of_somebody_else_is_not_called_damaged(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store_with(subject.folder, started(), at=time.time())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = state.integrity(subject)
    assert (found.status, found.remedy) == ("fail", "Run it as the service's user, or as root.")
    assert state.last_event(subject.folder) == 0
    hidden = Subject(settings=Settings(state=StateSettings(dir="/" + "n" * 300)))  # not to be looked at, for root too
    assert state.integrity(hidden).detail == f"{hidden.folder}/store.db may not be read"
    assert state.disk(hidden).detail == "/ cannot be written"


async def test_a_store_is_read_and_left_as_it_is(subject: Subject) -> None:
    await store_with(subject.folder, started(), at=time.time())
    before = {path.name: path.stat().st_mtime_ns for path in subject.folder.iterdir()}
    found = state.integrity(subject)
    assert (found.status, found.detail) == ("ok", "whole")
    assert found.data["backlog"]["mimir"][0] == 1
    assert state.last_event(subject.folder) == pytest.approx(time.time(), abs=60)
    assert {path.name: path.stat().st_mtime_ns for path in subject.folder.iterdir()} == before


async def test_a_store_that_an_agent_has_open_is_read_beside_it(subject: Subject) -> None:
    store = open_store(subject.folder, reserve=4096)
    store.append(started(), time.time())
    await store._write_pending()
    assert state.integrity(subject).detail == "whole"
    assert state.last_event(subject.folder) > 0
    store.append(started(), time.time())
    await store._write_pending()
    assert store.seq == 2
    store.close()


async def test_what_is_undelivered_for_an_hour_is_a_warning(subject: Subject) -> None:
    await store_with(subject.folder, started(), at=time.time() - 3700)
    found = state.integrity(subject)
    assert found.status == "warn"
    assert found.detail.startswith("undelivered: mimir since 20")


async def test_a_damaged_store_fails(subject: Subject) -> None:
    await store_with(subject.folder, *[started()] * 2000, at=time.time())
    path = subject.folder / "store.db"
    data = bytearray(path.read_bytes())
    data[8192:-4096] = b"\xff" * (len(data) - 8192 - 4096)
    path.write_bytes(data)
    found = state.integrity(subject)
    assert found.status == "fail"
    assert f"Move {path} away" in found.remedy


def test_what_is_no_store_fails(subject: Subject) -> None:
    (subject.folder / "store.db").write_text("no database" * 1000)
    assert state.integrity(subject).detail.endswith("file is not a database")
    assert state.last_event(subject.folder) == 0


async def test_a_newer_schema_fails(subject: Subject) -> None:
    await store_with(subject.folder, started(), at=time.time())
    with sqlite3.connect(subject.folder / "store.db") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    found = state.integrity(subject)
    assert (found.status, found.remedy) == ("fail", "Install the newer release again.")


async def test_a_check_that_takes_too_long_says_how_far_it_came(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store_with(subject.folder, *[started()] * 20_000, at=time.time())
    monkeypatch.setattr(state, "QUICK_S", -1.0)
    found = state.integrity(subject)
    assert (found.status, found.data["complete"]) == ("ok", False)


async def test_the_store_of_an_agent_that_was_killed_is_read(subject: Subject, tmp_path: Path) -> None:
    store = open_store(subject.folder, reserve=4096)
    store.append(started(), time.time())
    await store._write_pending()
    shutil.copytree(subject.folder, tmp_path / "killed")
    store.close()
    killed = Subject(settings=Settings(state=StateSettings(dir=str(tmp_path / "killed"))))
    assert state.integrity(killed).detail == "whole"
    assert state.last_event(killed.folder) > 0


async def test_an_agent_that_starts_meanwhile_is_no_damage(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    await store_with(subject.folder, started(), at=time.time())
    answers = iter([False, False])
    monkeypatch.setattr(state, "_is_open", lambda path: next(answers, True))
    real, calls = state._integrity, list[Path]()

    def first_torn(path: Path) -> Finding:
        calls.append(path)
        found = real(path)
        return Finding("fail", "malformed") if len(calls) == 1 else found

    monkeypatch.setattr(state, "_integrity", first_torn)
    assert state.integrity(subject).status == "ok"
    assert len(calls) == 2
