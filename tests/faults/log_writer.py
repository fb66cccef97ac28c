"""A program that writes a log as fast as it is told and rotates it in every way, and keeps a ledger of what it did.

    python -m tests.faults.log_writer FOLDER BYTES_PER_S SECONDS SEED

FOLDER/log/x is the log. Among its lines are marks, `mark N ...`, to be matched. FOLDER/ledger has a JSON array a line:

    ["mark", N, incarnation, offset]     a mark; each content that begins at offset 0 of the path is an incarnation
    ["end", incarnation, how, began, ended]    rename, dated, copytruncate, truncate, delete; epoch seconds
    ["left", incarnation, bytes]         at the end: so many of its first bytes still stand in a file of the folder
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

TICK_S = 0.02
MARKS = 1500  # a second
KEPT = 6  # old generations
LINE = b"2026-01-05 10:00:00,123 INFO worker %06d: nothing that anybody looks for, request %08x took %d ms\n"
NOTHING = b"".join(LINE % (n, n * 2654435761 % 2**32, n % 997) for n in range(20_000))


class Log:
    """The log, and what became of its incarnations."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.path, self.random = folder / "log/x", random
        self.path.parent.mkdir(exist_ok=True)
        self.ledger = (folder / "ledger").open("w")
        self.left: dict[Path, tuple[int, int]] = {}  # old files: incarnation and size
        self.marks = self.incarnation = self.offset = 0
        self.half = b""
        self.packing: subprocess.Popen[bytes] | None = None
        self.fd, self.began = -1, time.time()
        self.create()

    def note(self, *what: Any) -> None:
        self.ledger.write(json.dumps(what) + "\n")

    def create(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self.begin()

    def begin(self) -> None:
        self.incarnation, self.offset, self.began = self.incarnation + 1, 0, time.time()

    def end(self, how: str) -> None:
        self.note("end", self.incarnation, how, self.began, time.time())

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
        while data:
            data = data[os.write(self.fd, data) :]

    def shift(self) -> Path:
        """Make room for x.1."""
        for number in range(KEPT, 0, -1):
            for ending in ("", ".gz"):
                old = self.path.with_name(f"x.{number}{ending}")
                if not old.exists():
                    continue
                if number == KEPT:
                    old.unlink()
                    self.left.pop(old, None)
                else:
                    new = old.with_name(f"x.{number + 1}{ending}")
                    old.rename(new)
                    if old in self.left:
                        self.left[new] = self.left.pop(old)
        return self.path.with_name("x.1")

    def pack(self) -> None:
        """Compress an old generation, as logrotate does."""
        if self.packing and self.packing.poll() is None:
            return
        old = self.path.with_name(f"x.{self.random.randint(2, KEPT)}")
        if old in self.left:
            del self.left[old]
            self.packing = subprocess.Popen(["nice", "gzip", "-1", "-f", old])

    def rotate(self) -> None:
        how = self.random.choice(["rename", "rename", "dated", "copytruncate", "copytruncate", "truncate", "delete"])
        self.end_line()
        if self.packing and self.packing.poll() is None and how in ("rename", "copytruncate"):
            self.packing.wait()  # or it would pack another file than was meant
        if how == "rename" or how == "dated":
            there = self.shift() if how == "rename" else self.path.with_name(f"x-{time.time_ns()}")
            self.path.rename(there)
            for _ in range(self.random.choice([0, 0, 1, 3])):  # it has not heard of it yet
                self.write(100_000, 3)
            self.end_line()
            self.left[there] = (self.incarnation, self.offset)
            self.end(how)
            self.create()
            dated = sorted(self.path.parent.glob("x-*"))
            for old in dated[:-2]:
                old.unlink()
                del self.left[old]
        elif how == "copytruncate":
            there = self.shift()
            shutil.copyfile(self.path, there)
            self.left[there] = (self.incarnation, self.offset)
            for _ in range(self.random.choice([0, 0, 1, 3])):  # these are lost, if they are not read at once
                self.write(100_000, 3)
            self.end_line()
            os.ftruncate(self.fd, 0)
            self.end(how)
            self.begin()
        elif how == "truncate":
            os.ftruncate(self.fd, 0)
            self.end(how)
            self.begin()
        else:
            self.path.unlink()
            self.end(how)
            self.create()

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
        due = (now - began) * rate
        if due > written:
            size = min(int(due - written), 4 << 20)
            log.write(max(size, 2000), max(1, int(MARKS * size / rate)))
            written = max(written + size, due - rate)  # at most a second is made up for
        if now >= rotate_at:
            log.rotate()
            if random.random() < 0.2:
                log.pack()
            rotate_at = now + random.choice([random.uniform(0, 0.1), random.uniform(0.2, 2), random.uniform(0.2, 2)])
        time.sleep(TICK_S)  # noqa: TID251 - it is a program of its own, without a loop
    log.close()


if __name__ == "__main__":
    main()
