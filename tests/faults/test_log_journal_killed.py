"""The agent is killed again and again while it follows the journal: each entry is told once, under one id.

Source: protocols/logs.md 5, "Journal and kernel"; protocols/settings.md, "durability".
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import trio

from tests.faults.station import Station, until
from tests.logs_records_house import FakeJournal

KILLS = 6
ENTRIES = 300  # between two kills

SETTINGS = """\
ident = "journal"
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
[logs]
rules = ["{folder}/rules.toml"]
[[logs.watch]]
name = "all"
journal = true
"""
RULES = r"""
version = 1
[[rule]]
id = "entry"
regex = '^entry (?<n>\d+)'
rate = { burst = 20, per_s = 0 }
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Station]:
    station = Station("journal", tmp_path)
    (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path))
    (tmp_path / "rules.toml").write_text(RULES)
    yield station
    station.kill()


async def test_each_entry_is_told_once(tmp_path: Path, machine: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, random, written = FakeJournal(tmp_path / "journal"), Random(5), 0
    monkeypatch.setenv("PATH", journal.path)

    async def events(kind: str) -> list[dict[str, object]]:
        store = machine.state / "store.db"
        if not store.exists():
            return []
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'journal'").fetchone():
                return []
            rows = db.execute("SELECT data FROM journal WHERE kind = ? ORDER BY seq", (kind,)).fetchall()
        found = [json.loads(data) for (data,) in rows]
        return [event for event in found if event["path"] == "journal:"]  # a hardware profile may watch files

    async def is_all_told() -> bool:
        return len(await events("LogMatched")) >= written

    machine.start()
    await until(lambda: events("LogSource"))
    for _ in range(KILLS):
        await until(is_all_told)  # it is up
        for _ in range(6):
            journal.write(*(f"entry {written + number}" for number in range(ENTRIES // 6)))
            written += ENTRIES // 6
            await trio.sleep(random.uniform(0, 0.01))
        await machine.end()  # in the middle of them
        machine.start()
    await until(is_all_told)
    told = await events("LogMatched")
    assert [event["text"] for event in told] == [f"entry {number}" for number in range(written)]
    assert len({event["id"] for event in told}) == written
    assert await events("LogGap") == []
