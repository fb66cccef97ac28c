"""What fails in a transaction of the lab leaves nothing behind, and nothing open."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.core.errors import ActionError
from agent.lab.transaction import transaction


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as db:
        db.execute("CREATE TABLE kept(value BLOB)")
        yield db


def rows(db: sqlite3.Connection) -> int:
    count: int = db.execute("SELECT count(*) FROM kept").fetchone()[0]
    return count


def test_on_a_full_disk_nothing_of_it_is_written_and_the_next_one_goes_on(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA max_page_count = 4")  # what SQLite sees of a full disk
    with pytest.raises(ActionError, match="this cannot be kept: database or disk is full"), transaction(db):
        db.executemany("INSERT INTO kept VALUES(?)", [(bytes(1000),)] * 100)
    assert rows(db) == 0
    with transaction(db):
        db.execute("INSERT INTO kept VALUES('a')")
    assert rows(db) == 1


def test_an_error_of_the_block_rolls_back(db: sqlite3.Connection) -> None:
    def rows_then_none() -> Iterator[tuple[str]]:
        yield ("a",)
        raise KeyError

    with pytest.raises(KeyError), transaction(db):
        db.executemany("INSERT INTO kept VALUES(?)", rows_then_none())
    assert (rows(db), db.in_transaction) == (0, False)


def test_a_commit_that_fails_rolls_back(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("CREATE TABLE parent(id INTEGER PRIMARY KEY)")
    db.execute("CREATE TABLE child(id INTEGER REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError), transaction(db):  # it is looked at when it is committed
        db.execute("INSERT INTO child VALUES(7)")
    assert not db.in_transaction
