"""The SQLite file of a layer, as real readers take it: by position."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from agent.gator import layerdb
from agent.gator.layerdb import GROUP, OWN, LayerDb, read_job, sync_all

COMMON = {
    "Attribute": ["db_uid", "name", "value"],
    "Metric": ["db_uid", "scope", "name", "value"],
    "LogEntry": ["db_uid", "severity", "message", "timestamp"],
}
CHILD = ["db_uid", "ident", "server_url", "db_file", "started", "updated", "stopped", "result", "expected_children"]
PROC = ["db_uid", "nproc", "cpu", "mem", "vmem", "timestamp"]


def columns(file: Path) -> dict[str, list[str]]:
    db = sqlite3.connect(file)
    tables = [
        row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite%'")
    ]
    found = {table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")] for table in tables}
    db.close()
    return found


@pytest.mark.parametrize("is_many", [True, False])
def test_tables_and_columns_are_gators_in_gators_order(tmp_path: Path, is_many: bool) -> None:
    for is_tier, more in ((True, {"ChildEntry": CHILD}), (False, {"ProcStat": PROC})):
        db = LayerDb(tmp_path / "db.sqlite", is_tier=is_tier, is_many=is_many)
        db.close(db.take())
        assert columns(tmp_path / "db.sqlite") == COMMON | more
        assert [path.name for path in tmp_path.iterdir()] == ["db.sqlite"]  # no journal is left


def test_of_a_metric_the_last_value_is_kept_in_one_row(tmp_path: Path) -> None:
    db = LayerDb(tmp_path / "db.sqlite", is_tier=False, is_many=False)
    db.metric(OWN, "lint", 1)
    db.metric(OWN, "lint", 2)
    db.flush(db.take())
    db.metric(OWN, "lint", 2.5)
    db.metric("child", "lint", 7)
    db.metric("child", "sum", 2**64)  # of many children
    db.close(db.take())
    found = sqlite3.connect(tmp_path / "db.sqlite")
    assert found.execute("SELECT * FROM Metric").fetchall() == [
        (1, OWN, "lint", 2.5),
        (2, "child", "lint", 7),
        (3, "child", "sum", 2.0**64),
    ]
    found.close()


def test_messages_have_uids_that_can_be_read_from(tmp_path: Path) -> None:
    db = LayerDb(tmp_path / "db.sqlite", is_tier=False, is_many=True)
    assert [db.log("INFO", text, 1.5) for text in ("a", "b\ud800", "c")] == [1, 2, 3]
    db.flush(db.take())
    assert [(row.uid, row.severity, row.message, row.timestamp) for row in db.read_logs(2, 1)] == [(2, 20, "b?", 1.5)]
    db.close(db.take())


def test_no_more_messages_are_read_at_once_than_one_answer_takes(tmp_path: Path) -> None:
    db = LayerDb(tmp_path / "db.sqlite", is_tier=False, is_many=True)
    for _ in range(30):
        db.log("INFO", "\x01" * 10_000, 1.0)  # six bytes each in JSON
    db.flush(db.take())
    assert len(db.read_logs(1, 10_000)) == 16
    assert [row.uid for row in db.read_logs(17, 10_000)] == [*range(17, 31)]
    db.close(db.take())


@pytest.mark.parametrize("is_many", [True, False])
def test_what_a_killed_layer_left_in_the_same_folder_does_not_come_back(tmp_path: Path, is_many: bool) -> None:
    killed = LayerDb(tmp_path / "db.sqlite", is_tier=False, is_many=False)
    killed.log("INFO", "old", 1.0)
    killed.flush(killed.take())
    again = shutil.copytree(tmp_path, tmp_path / "again")  # as it is on the disk at that moment
    killed.close(killed.take())
    assert (again / "db.sqlite-wal").stat().st_size
    db = LayerDb(again / "db.sqlite", is_tier=False, is_many=is_many)
    db.log("INFO", "new", 2.0)
    db.close(db.take())
    found = sqlite3.connect(again / "db.sqlite")
    assert found.execute("SELECT message FROM LogEntry").fetchall() == [("new",)]
    found.close()
    assert [path.name for path in again.iterdir()] == ["db.sqlite"]


def test_after_a_full_disk_only_messages_are_missing(tmp_path: Path) -> None:
    db = LayerDb(tmp_path / "db.sqlite", is_tier=False, is_many=False)
    assert db._db is not None
    db._db.execute("PRAGMA max_page_count=10")
    db.log("INFO", "x" * 100_000, 1.0)
    db.attributes({"ident": "a"})
    db.metric(OWN, "lint", 1)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        db.flush(db.take())
    db._db.execute("PRAGMA max_page_count=1000")
    db.attributes({"result": 1})
    db.metric(OWN, "lint", 2)
    db.close(db.take())
    found = sqlite3.connect(tmp_path / "db.sqlite")
    assert found.execute("SELECT name, value FROM Attribute").fetchall() == [("ident", "a"), ("result", "1")]
    assert found.execute("SELECT name, value FROM Metric").fetchall() == [("lint", 2)]
    assert found.execute("SELECT * FROM LogEntry").fetchall() == []
    found.close()


def test_beyond_a_limit_messages_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerdb, "MAX_LOGS", 2)
    db = LayerDb(tmp_path / "db.sqlite", is_tier=False, is_many=True)
    assert [db.log("INFO", "x", 0) for _ in range(3)] == [1, 2, 0]
    db.close(db.take())


def test_a_layer_that_has_ended_is_read_back_with_its_children(tmp_path: Path) -> None:
    own = {"uidx": 1, "root": 0, "started": 1.5, "stopped": 2.5, "result": "1"}
    job = LayerDb(tmp_path / "job.sqlite", is_tier=False, is_many=False)
    job.attributes({"ident": "j", "path": "g", **own})
    job.metric(OWN, "lint", 3)
    job.close(job.take())
    tier = LayerDb(tmp_path / "tier.sqlite", is_tier=True, is_many=False)
    tier.attributes({"ident": "g", "path": "", **own})
    tier.children([("j", str(tmp_path / "job.sqlite"), 1)])
    tier.child(1, "h:1", 1.0, 2.0, 2.0, 1)
    tier.metric(GROUP, "lint", 3)
    tier.close(tier.take())
    told = read_job(tmp_path / "tier.sqlite", 1)
    assert (told.ident, told.path, told.metrics, told.status, told.result) == ("g", [], {"lint": 3}, 3, 1)
    (child,) = told.children
    assert (child.ident, child.path, child.started, child.stopped, child.metrics) == ("j", ["g"], 1.5, 2.5, {"lint": 3})
    assert read_job(tmp_path / "tier.sqlite", 0).children == []
    for broken in (b"no database", None):
        (tmp_path / "job.sqlite").unlink() if broken is None else (tmp_path / "job.sqlite").write_bytes(broken)
        (child,) = read_job(tmp_path / "tier.sqlite", 2).children
        assert (child.uidx, child.path, child.ident, child.started, child.stopped) == (1, ["g"], "j", 1.0, 2.0)
        assert (child.result, child.metrics, child.children) == (1, {}, [])


@pytest.mark.parametrize("count", [2, layerdb.MAX_SINGLY + 1])
def test_files_are_brought_onto_the_disk_one_by_one_or_together(tmp_path: Path, count: int) -> None:
    files = [tmp_path / str(n) for n in range(count)]
    for file in files:
        file.write_text("x")
    sync_all(tmp_path, files)
    with pytest.raises(OSError, match="none"):
        sync_all(tmp_path / "none", [tmp_path / "none"] * count)
