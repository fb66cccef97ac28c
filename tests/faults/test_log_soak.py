"""A log written at 50 MB/s and rotated in every way, while the agent that follows it is killed again and again.

At the end each mark was matched under one id, unless a gap was told where it stood and no file has it any more. What
came and went while no agent ran, or was cut before one could look, and left no file, is not asked for.

Source: protocols/logs.md 5, and 9, acceptance 4.
"""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import trio

from tests.faults.station import HERE, Station, peak_mib, until

RATE = 50_000_000  # bytes a second
CUT_S = 60.0  # s without --soak
QUIET_S = 8.0  # s without an event at the end: longer than a file is drained that nobody writes to
MAX_MIB = 200
NOTICE_S = 0.5  # s in which a new file is noticed, and that is on disk; what a kill prevents

SETTINGS = """\
ident = "{ident}"
[state]
dir = "{folder}/state"
reserve = "4KiB"
journal_max = "16GiB"
[control]
listen = ["127.0.0.1:0"]
[logs]
rules = ["{folder}/rules.toml"]
[[logs.watch]]
name = "x"
path = "{folder}/log/x"
"""
RULES = r"""
version = 1
[[rule]]
id = "mark"
regex = '^mark (?<n>\d+)'
rate = { burst = 20, per_s = 0 }
"""

Place = tuple[int, int]  # incarnation and offset


class Told:
    """What the agent has told, read from its journal while it writes it."""

    def __init__(self, store: Path) -> None:
        self._store, self.seq = store, 0
        self.ids: dict[int, set[str]] = {}  # of each mark
        self.generations: dict[int, int] = {}  # the incarnation that a generation is
        self.places: dict[int, Place] = {}  # of each mark: generation and offset
        self.gaps: list[dict[str, Any]] = []
        self.sources: list[str] = []
        self.up: list[float] = []  # when the role came up

    def read(self) -> int:
        """Take what is new; how much that was."""
        if not self._store.exists():
            return 0
        with closing(sqlite3.connect(f"file:{self._store}?mode=ro", uri=True)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'journal'").fetchone():
                return 0
            sql = "SELECT seq, at, kind, data FROM journal WHERE seq > ? ORDER BY seq"
            rows = db.execute(sql, (self.seq,)).fetchall()
        for seq, at, kind, data in rows:
            self.seq = seq
            event = json.loads(data)
            if kind == "LogMatched":
                number = int(event["captures"]["n"])
                self.ids.setdefault(number, set()).add(event["id"])
                self.places[number] = (event["generation"], event["offset"])
            elif kind == "LogGap":
                self.gaps.append(event)
            elif kind == "LogSource":
                self.sources.append(event["what"])
            elif kind == "RoleChanged" and (event["name"], event["state"]) == ("logs", "running"):
                self.up.append(at)
        return len(rows)


class Ledger:
    """What the writer says that it wrote."""

    def __init__(self, path: Path) -> None:
        self.marks: dict[int, Place] = {}
        self.lives: dict[int, tuple[str, float, float]] = {}  # how an incarnation ended, when it began and ended
        self.left: dict[int, int] = {}  # bytes of an incarnation that still stand in some file
        for what, *values in map(json.loads, path.read_text().splitlines()):
            match what, values:
                case "mark", [number, incarnation, offset]:
                    self.marks[number] = (incarnation, offset)
                case "end", [incarnation, how, began, ended]:
                    self.lives[incarnation] = (how, began, ended)
                case "left", [incarnation, size]:
                    self.left[incarnation] = size


def covered(told: Told, ledger: Ledger) -> Iterator[tuple[Place, Place]]:
    """The ranges in which something may be lost, by what was told: from a place, up to another."""
    known = {told.places[number][0]: ledger.marks[number][0] for number in told.ids}
    seen = sorted(set(known.values()))
    for gap in told.gaps:
        generation = gap["generation"]
        # One of which no mark was matched stood behind those of lower numbers.
        incarnation = known.get(generation) or max((known[one] for one in known if one < generation), default=0) + 1
        if gap["to"] is not None:
            yield (incarnation, gap["from"]), (incarnation, gap["to"])
        else:  # nobody knows how much: it may have been cut, written and cut again before the next one was seen
            yield (incarnation, gap["from"]), (min((one for one in seen if one > incarnation), default=sys.maxsize), 0)


def write(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Start the writer."""
    argv = [sys.executable, "-m", "tests.faults.log_writer", str(folder), str(RATE), str(seconds), "1"]
    return subprocess.Popen(argv, cwd=HERE)


def unseen(told: Told, ledger: Ledger, down: list[float]) -> set[int]:
    """The incarnations that came and went while no agent ran, or were cut before a look, and are in no file.

    A cut of what nobody had read yet shows in nothing, where a file that came and went has its events.
    """
    away = [(since, min((at for at in told.up if at > since), default=float("inf"))) for since in down]
    return {
        incarnation
        for incarnation, (how, began, ended) in ledger.lives.items()
        if incarnation not in ledger.left
        and (
            ("truncate" in how and ended - began < NOTICE_S)
            or any(since <= began and ended <= until for since, until in away)
        )
    }


async def test_each_line_is_matched_once_or_its_gap_is_told(tmp_path: Path, soak_s: float) -> None:
    random, told = Random(1), Told(tmp_path / "state/store.db")
    machine = Station(f"lab-{os.getpid()}", tmp_path)
    (tmp_path / "agent.toml").write_text(SETTINGS.format(ident=machine.ident, folder=tmp_path))
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "log").mkdir()
    seconds, peak, down = soak_s or CUT_S, 0.0, list[float]()

    async def is_up() -> bool:
        told.read()
        return bool(told.up)

    machine.start()
    try:
        await until(is_up)
        with write(tmp_path, seconds) as writer:
            try:
                while writer.poll() is None:
                    with trio.move_on_after(random.uniform(0.5, 8)):
                        await trio.to_thread.run_sync(writer.wait, abandon_on_cancel=True)
                    assert machine.is_alive(), machine.log.read_text()[-4000:]
                    peak = max(peak, peak_mib(machine.pid))
                    told.read()
                    down.append(time.time() - NOTICE_S)
                    await machine.end()
                    await trio.sleep(random.choice([0, 0, random.uniform(0, 2)]))
                    machine.start()
            finally:
                writer.kill()
        assert writer.returncode == 0
        quiet = trio.current_time()
        with trio.fail_after(120 + seconds):
            while trio.current_time() < quiet + QUIET_S:
                await trio.sleep(0.5)
                if told.read():
                    quiet = trio.current_time()
        assert machine.is_alive(), machine.log.read_text()[-4000:]
        await machine.end(15)
    finally:
        machine.kill()
    told.read()
    ledger = Ledger(tmp_path / "ledger")

    assert {number: ids for number, ids in told.ids.items() if len(ids) > 1} == {}, "under two ids"
    lost = {number: ledger.marks[number] for number in sorted(ledger.marks.keys() - told.ids.keys())}
    ranges, unknown = list(covered(told, ledger)), unseen(told, ledger, down)
    silent = [
        (number, place)
        for number, place in lost.items()
        if not any(start <= place < end for start, end in ranges) and place[0] not in unknown
    ]
    print(
        f"{len(ledger.marks)} marks, {len(ledger.lives)} rotations, {len(down)} kills; {len(lost)} marks lost,"
        f" {len(told.gaps)} gaps; {peak:.0f} MiB"
    )
    assert silent == [], "lost, and no gap was told"
    there = [(number, place) for number, place in lost.items() if place[1] < ledger.left.get(place[0], 0)]
    assert there == [], "not matched, though a file has them"
    assert told.ids.keys() <= ledger.marks.keys()
    assert peak < MAX_MIB
