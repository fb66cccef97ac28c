"""A program that writes a log as fast as it is told and rotates it in every way, and keeps a ledger of what it did.

    python -m tests.faults.log_writer FOLDER BYTES_PER_S SECONDS SEED

FOLDER/log/x is the log. Among its lines are marks, `mark N ...`, to be matched. FOLDER/ledger has a JSON array a line:

    ["mark", N, incarnation, offset]     a mark; each content that begins at offset 0 of the path is an incarnation
    ["late", N]                          that mark was written when its file had left the path for LATE_S or longer
    ["end", incarnation, how]            rename, dated, copytruncate, truncate, delete, blink
    ["blinked", N]                       a blink is over; the marks that come have N and more
    ["left", incarnation, bytes]         at the end: so many of its first bytes still stand in a file of the folder

FOLDER/orders is what it is told meanwhile, a line each: `seen N` when a match of mark N is on the agent's disk, `blink`
when a file shall come and go at once. Content is cut, deleted or compressed once some of it was seen: what an
agent that was down, or slow, could never have known of is not destroyed. A blink alone does that.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from bisect import bisect_right
from pathlib import Path
from random import Random
from typing import Any

TICK_S = 0.02
MARKS = 1500  # a second
KEPT = 6  # old generations
LATE_S = 4.0  # less than an agent drains a file that nobody writes to
MAX_KEPT = 1 << 30  # bytes in old files: when nothing is seen any more, nothing is written
MAX_WAITING = 100 << 20  # bytes in the log, while nothing of it was seen
WAYS = ["rename", "rename", "dated", "copytruncate", "copytruncate", "truncate", "delete"]
LINE = b"2026-01-05 10:00:00,123 INFO worker %06d: nothing that anybody looks for, request %08x took %d ms\n"
NOTHING = b"".join(LINE % (n, n * 2654435761 % 2**32, n % 997) for n in range(20_000))


class Log:
    """The log, and what became of its incarnations."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.path, self.random = folder / "log/x", random
        self.path.parent.mkdir(exist_ok=True)
        self.ledger = (folder / "ledger").open("w")
        (folder / "orders").touch()
        self.orders = (folder / "orders").open()
        self.left: dict[Path, tuple[int, int]] = {}  # old files: incarnation and size
        self.marks = self.incarnation = self.offset = 0
        self.firsts: list[int] = []  # the first mark of each incarnation
        self.seen = set[int]()  # incarnations
        self.half = b""
        self.how = ""  # it is to be rotated next, and was to be already
        self.packing: subprocess.Popen[bytes] | None = None
        self.fd = -1
        self.create()

    def note(self, *what: Any) -> None:
        self.ledger.write(json.dumps(what) + "\n")

    def obey(self) -> None:
        """Take what was ordered."""
        for order in self.orders.readlines():
            match order.split():
                case ["seen", number]:
                    self.seen.add(bisect_right(self.firsts, int(number)))
                case ["blink"]:
                    self.blink()

    def create(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self.begin()

    def begin(self) -> None:
        self.incarnation, self.offset = self.incarnation + 1, 0
        self.firsts.append(self.marks)
        self.half = b"%016x %d\n" % (self.random.getrandbits(64), self.incarnation)  # no two begin alike

    def end(self, how: str) -> None:
        self.note("end", self.incarnation, how)

    def write(self, size: int, marks: int) -> None:
        """Write about so many bytes, with marks in between; the last line may be cut, and is ended the next time."""
        parts, each = [self.half], size // marks
        self.offset += len(self.half)
        for _ in range(marks):
            start = NOTHING.find(b"\n", self.random.randrange(len(NOTHING) // 2)) + 1
            end = NOTHING.find(b"\n", start + self.random.randrange(2 * each)) + 1
            mark = b"mark %d %s\n" % (self.marks, b"x" * self.random.choice([0, 10, 300]))
            if self.random.random() < 0.001:
                mark = mark[:-1] + b"y" * 100_000 + b"\n"
            self.note("mark", self.marks, self.incarnation, self.offset + end - start)
            self.marks += 1
            parts += [NOTHING[start:end], mark]
            self.offset += end - start + len(mark)
        data, self.half = b"".join(parts), b""
        if self.random.random() < 0.3:
            cut = self.random.randrange(1, 10)
            data, self.half = data[:-cut], data[-cut:]
            self.offset -= cut
        self.put(data)

    def end_line(self) -> None:
        self.put(self.half)
        self.offset, self.half = self.offset + len(self.half), b""

    def put(self, data: bytes) -> None:
        self.ledger.flush()  # what is matched stands there
        while data:
            data = data[os.write(self.fd, data) :]

    def write_more(self) -> None:
        """Go on for a while, as one that has not heard of a rotation yet."""
        for _ in range(self.random.choice([0, 0, 1, 3])):
            self.write(100_000, 3)
        self.end_line()

    def shift(self) -> Path:
        """Make room for x.1."""
        there = {int(old.name.split(".")[1]): old for old in self.path.parent.glob("x.*")}
        for number, old in sorted(there.items(), reverse=True):
            if number >= KEPT and self.may_go(old):
                old.unlink()
                self.left.pop(old, None)
            else:
                new = old.with_name(old.name.replace(str(number), str(number + 1), 1))
                old.rename(new)
                if old in self.left:
                    self.left[new] = self.left.pop(old)
        return self.path.with_name("x.1")

    def may_go(self, old: Path) -> bool:
        return old not in self.left or self.left[old][0] in self.seen

    def pack(self) -> None:
        """Compress an old generation, as logrotate does."""
        if self.packing and self.packing.poll() is None:
            return
        old = self.path.with_name(f"x.{self.random.randint(2, KEPT)}")
        if old in self.left and self.may_go(old):
            del self.left[old]
            self.packing = subprocess.Popen(["nice", "gzip", "-1", "-f", old])

    def rotate(self) -> bool:
        """False: not yet, since nothing of it was seen."""
        how = self.how = self.how or self.random.choice(WAYS)
        if self.incarnation not in self.seen and how not in ("rename", "dated"):
            if self.offset < MAX_WAITING:
                return False
            how = "rename"
        self.how = ""
        self.end_line()
        if self.packing and self.packing.poll() is None and how in ("rename", "copytruncate"):
            self.packing.wait()  # or it would pack another file than was meant
        if how == "rename" or how == "dated":
            there = self.shift() if how == "rename" else self.path.with_name(f"x-{time.time_ns()}")
            since, first = time.monotonic(), self.marks
            self.path.rename(there)
            self.write_more()
            if time.monotonic() > since + LATE_S:
                for number in range(first, self.marks):
                    self.note("late", number)
            self.left[there] = (self.incarnation, self.offset)
            self.end(how)
            self.create()
            for old in sorted(self.path.parent.glob("x-*"))[:-2]:
                if self.may_go(old):
                    old.unlink()
                    del self.left[old]
        elif how == "copytruncate":
            there = self.shift()
            shutil.copyfile(self.path, there)
            self.left[there] = (self.incarnation, self.offset)
            self.write_more()  # these are lost, if they are not read at once
            os.ftruncate(self.fd, 0)
            self.end(how)
            self.begin()
        elif how == "truncate":
            os.ftruncate(self.fd, 0)
            self.end(how)
            self.begin()
        else:
            self.delete("delete")
        return True

    def delete(self, how: str) -> None:
        self.end_line()
        self.path.unlink()
        self.end(how)
        self.create()

    def blink(self) -> None:
        """Files come and go, seen or not."""
        for _ in range(self.random.choice([1, 2, 3])):
            self.delete("blink")
            self.write(100_000, 3)
        self.delete("blink")
        self.note("blinked", self.marks)
        self.ledger.flush()

    def close(self) -> None:
        self.end_line()
        self.left[self.path] = (self.incarnation, self.offset)
        if self.packing:
            self.packing.wait()
        for incarnation, size in self.left.values():
            self.note("left", incarnation, size)
        self.ledger.close()


def main() -> None:
    folder, rate, seconds, seed = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    random = Random(seed)
    log = Log(folder, random)
    began = time.monotonic()
    rotate_at = began + random.uniform(0.2, 2)
    written = 0.0
    while (now := time.monotonic()) < began + seconds:
        log.obey()
        due = (now - began) * rate
        if due > written and sum(size for _, size in log.left.values()) < MAX_KEPT:
            size = min(int(due - written), 4 << 20)
            log.write(max(size, 2000), max(1, int(MARKS * size / rate)))
            written = max(written + size, due - rate)  # at most a second is made up for
        if now >= rotate_at and log.rotate():
            if random.random() < 0.2:
                log.pack()
            rotate_at = now + random.choice([random.uniform(0, 0.1), random.uniform(0.2, 2), random.uniform(0.2, 2)])
        time.sleep(TICK_S)  # noqa: TID251 - it is a program of its own, without a loop
    log.close()


if __name__ == "__main__":
    main()
