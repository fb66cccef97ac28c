"""A log written at 50 MB/s and rotated in every way, while the agent that follows it is killed again and again.

At the end each mark was matched under one id, unless a gap was told where it stood and no file has it any more. No time
is measured: what the agent could not have known of is not destroyed (log_writer.py), and files that come and go at once
do so while no kill can hide what it noticed of them.

Source: protocols/logs.md 5, and 9, acceptance 4.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import trio

from tests.faults.station import HERE, Station, peak_mib, until

RATE = 50_000_000  # bytes a second
CUT_S = 60.0  # s without --soak
LOOK_S = 0.1  # between two looks at the journal
STUCK_S = 100.0  # without any event, while one is missing
SEED = 1
MAX_MIB = 200

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
# With the blank behind it, a number is whole where a line without its end is matched, since the writer was slow.
RULES = r"""
version = 1
[[rule]]
id = "mark"
regex = '^mark (?<n>\d+) '
rate = { burst = 20, per_s = 0 }
"""

Place = tuple[int, int]  # incarnation and offset


class Told:
    """What the agent has told, read from its journal while it writes it."""

    def __init__(self, store: Path) -> None:
        self._store, self.seq = store, 0
        self.ids: dict[int, set[str]] = {}  # of each mark
        self.firsts: dict[int, int] = {}  # of each generation: the first mark that was told
        self.gaps: list[dict[str, Any]] = []
        self.ups = 0  # how often the role came up

    def read(self) -> bool:
        """Take what is new, if there is any."""
        if not self._store.exists():
            return False
        before = self.seq
        with closing(sqlite3.connect(f"file:{self._store}?mode=ro", uri=True, timeout=STUCK_S)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'journal'").fetchone():
                return False
            sql = "SELECT seq, kind, data FROM journal WHERE seq > ? ORDER BY seq"
            for seq, kind, data in db.execute(sql, (before,)):
                self.seq = seq
                event = json.loads(data)
                if kind == "LogMatched":
                    number = int(event["captures"]["n"])
                    self.ids.setdefault(number, set()).add(event["id"])
                    self.firsts.setdefault(event["generation"], number)
                elif kind == "LogGap":
                    self.gaps.append(event)
                elif kind == "RoleChanged":
                    self.ups += (event["name"], event["state"]) == ("logs", "running")
        return self.seq > before


class Ledger:
    """What the writer says that it wrote, read while it writes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self.marks: dict[int, Place] = {}
        self.late = set[int]()  # marks that need not be matched
        self.ends: Counter[str] = Counter()  # how incarnations ended
        self.blinked = 0  # the marks before that one were written when the last blink was over
        self.left: dict[int, int] = {}  # bytes of an incarnation that still stand in some file

    def read(self) -> None:
        """Take what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")[0]
        self._at += len(whole) + 1 if whole else 0
        for what, *values in map(json.loads, whole.splitlines()):
            match what, values:
                case "mark", [number, incarnation, offset]:
                    self.marks[number] = (incarnation, offset)
                case "late", [number]:
                    self.late.add(number)
                case "end", [_, how]:
                    self.ends[how] += 1
                case "blinked", [number]:
                    self.blinked = number
                case "left", [incarnation, size]:
                    self.left[incarnation] = max(size, self.left.get(incarnation, 0))


def covered(told: Told, ledger: Ledger) -> Iterator[tuple[Place, Place]]:
    """The ranges in which something may be lost, by what was told: from a place, up to another."""
    known = {generation: ledger.marks[number][0] for generation, number in told.firsts.items()}
    seen = sorted(set(known.values()))
    for gap in told.gaps:
        generation = gap["generation"]
        # One of which no mark was matched stood behind those of lower numbers.
        incarnation = known.get(generation) or max((known[one] for one in known if one < generation), default=0) + 1
        if gap["to"] is not None:
            yield (incarnation, gap["from"]), (incarnation, gap["to"])
        else:  # nobody knows how much: others may have come and gone before the next one was seen
            yield (incarnation, gap["from"]), (min((one for one in seen if one > incarnation), default=sys.maxsize), 0)


def missing(told: Told, ledger: Ledger, before: int) -> dict[int, Place]:
    """Of the marks before that one: those that are neither matched nor in a gap, or that some file has."""
    ranges = list(covered(told, ledger))
    return {
        number: place
        for number, place in ledger.marks.items()
        if number < before and number not in told.ids and number not in ledger.late
        if place[1] < ledger.left.get(place[0], 0) or not any(start <= place < end for start, end in ranges)
    }


class Soak:
    """The agent, the writer, and what both say."""

    def __init__(self, folder: Path) -> None:
        self.machine = Station(f"lab-{os.getpid()}", folder)
        self.told, self.ledger = Told(folder / "state/store.db"), Ledger(folder / "ledger")
        self.kills, self.peak = 0, 0.0
        self._folder, self._seen = folder, 0
        self._writer: subprocess.Popen[bytes] | None = None

    def is_writing(self) -> bool:
        """Does the writer run? Fails when it failed."""
        assert self._writer is not None
        assert not self._writer.poll()
        return self._writer.returncode is None

    def end(self) -> None:
        """Kill both."""
        self.machine.kill()
        if self._writer is not None:
            self._writer.kill()
            self._writer.wait()

    def write(self, seconds: float) -> None:
        """Start the writer."""
        argv = [sys.executable, "-m", "tests.faults.log_writer", str(self._folder), str(RATE), str(seconds), str(SEED)]
        self._writer = subprocess.Popen(argv, cwd=HERE)

    def order(self, *orders: str) -> None:
        with (self._folder / "orders").open("a") as file:
            file.writelines(f"{order}\n" for order in orders)

    def look(self) -> bool:
        """Read what the agent told, and tell the writer what was seen. Was anything new?"""
        is_new = self.told.read()
        self.ledger.read()
        self.order(*(f"seen {number}" for number in list(self.told.firsts.values())[self._seen :]))
        self._seen = len(self.told.firsts)
        assert self.machine.is_alive(), self.machine.log.read_text()[-4000:]
        return is_new

    async def wait(self, seconds: float) -> None:
        """Go on for a while."""
        end = trio.current_time() + seconds
        while trio.current_time() < end and self.is_writing():
            self.look()
            await trio.sleep(LOOK_S)

    async def start(self) -> None:
        """Start the agent; wait until it follows the log."""
        ups = self.told.ups
        self.machine.start()

        async def is_up() -> bool:
            self.look()
            return self.told.ups > ups

        await until(is_up, STUCK_S)

    async def kill(self) -> None:
        self.peak = max(self.peak, peak_mib(self.machine.pid))
        self.kills += 1
        await self.machine.end()

    async def blink(self) -> None:
        """Have files come and go, and wait until that is accounted for."""
        last = self.ledger.blinked
        self.order("blink")

        def lacking() -> str:
            """A match of a mark that was written after it: then what is in no gap will never be."""
            is_over = last < self.ledger.blinked <= max(self.told.ids, default=0) or not self.is_writing()
            return "" if is_over else "no mark behind a blink is matched"

        await self.until_nothing(lacking)
        await self.account(self.ledger.blinked)

    async def account(self, before: int = sys.maxsize) -> None:
        """Wait until the marks before that one are matched, or in a gap."""
        self.look()
        await self.until_nothing(lambda: missing(self.told, self.ledger, before))  # what is, is in no gap or in a file

    async def until_nothing(self, lacking: Callable[[], object]) -> None:
        """Wait until nothing is lacking. Fails when nothing comes any more."""
        came = trio.current_time()
        while lack := lacking():
            assert trio.current_time() < came + STUCK_S, lack
            await trio.sleep(5 * LOOK_S)
            if self.look():
                came = trio.current_time()


async def test_each_line_is_matched_once_or_its_gap_is_told(tmp_path: Path, soak_s: float) -> None:
    random = Random(SEED)
    (tmp_path / "agent.toml").write_text(SETTINGS.format(ident=f"lab-{os.getpid()}", folder=tmp_path))
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "log").mkdir()
    soak = Soak(tmp_path)
    told, ledger = soak.told, soak.ledger
    try:
        await soak.start()
        soak.write(soak_s or CUT_S)
        while True:
            await soak.wait(random.uniform(0, 8))
            if random.random() < 0.3:
                await soak.blink()
            if not soak.is_writing():
                break
            await soak.kill()
            await trio.sleep(random.choice([0, 0, random.uniform(0, 2)]))
            if random.random() < 0.3:  # killed again before it is up, perhaps
                soak.machine.start()
                await soak.wait(random.uniform(0, 1))
                await soak.kill()
            await soak.start()
        await soak.account()
        assert await soak.machine.end(signal.SIGTERM) == 0
    finally:
        soak.end()
    told.read()
    print(
        f"{len(ledger.marks)} marks, {ledger.ends}, {soak.kills} kills;"
        f" {len(ledger.marks) - len(told.ids)} marks lost, {len(told.gaps)} gaps; {soak.peak:.0f} MiB"
    )
    assert {number: ids for number, ids in told.ids.items() if len(ids) > 1} == {}, "under two ids"
    assert missing(told, ledger, sys.maxsize) == {}
    assert told.ids.keys() <= ledger.marks.keys()
    assert soak.peak < MAX_MIB
