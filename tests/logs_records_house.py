"""Records of a test's own, matched on a real bus and store; and a `journalctl` that plays entries from a file."""

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import trio

from agent.core.bus import Bus
from agent.core.events import AnyEvent, decode
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.logs import rules
from agent.logs.analysis import Analysis
from agent.logs.records import Reached, Record, Records
from agent.logs.source import Rules

KEY = "logs.source:test"
NO_LIMIT = {"burst": 1_000_000, "per_s": 0}


def rules_of(*tables: dict[str, Any]) -> Rules:
    return Rules(rules.from_tables("test", [{"rate": NO_LIMIT, **table} for table in tables]))


def record(number: int, message: str | bytes, **fields: str) -> Record:
    text = message.encode() if isinstance(message, str) else message
    return Record(f"c{number}", number, text, {name: value.encode() for name, value in fields.items()})


class House:
    """A store and a bus; `records` is the log under test, begun at its start."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self.store, self.bus, self.metrics, self._nursery = store, Bus(store), Metrics(), nursery
        self.records: Records

    def log(self, rules: Rules, path: str = "journal:") -> Records:
        self.records = Records(
            path, rules, KEY, lambda: ("r", None), Analysis(self.bus.publish, lambda: 0.0, trio.current_time()),
            bus=self.bus, store=self.store, metrics=self.metrics, health=Health("logs"),
        )  # fmt: skip
        return self.records

    async def begin(self, *tables: dict[str, Any]) -> Records:
        """A log of which nothing comes by itself: the test calls take()."""
        records, has_begun = self.log(rules_of(*tables)), trio.Event()

        async def stream(records: Records) -> NoReturn:
            has_begun.set()
            while True:
                await trio.sleep_forever()

        self._nursery.start_soon(records.run, stream)
        await has_begun.wait()
        records.begin(records.reached or Reached(generation=1, cursor="", offset=0))
        return records

    async def told(self, *kinds: type[AnyEvent]) -> list[Any]:
        """The events of these kinds in the journal."""
        await self.store.commit()
        rows = await self.store.read(kinds=[kind.__name__ for kind in kinds], limit=10_000)
        return [decode(row.kind, row.data) for row in rows]


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    store = open_store(folder / "state", reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            async with trio.open_nursery() as inner:
                yield House(store, inner)
                inner.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    finally:
        store.close()


# Beside the entries a file "fault" may hold what it is to say before it ends; it lives on when that is empty.
PROGRAM = r"""#!PYTHON -SE
import os, select, sys
FOLDER = "FOLDER_OF_IT"
options = dict(one.split("=", 1) if "=" in one[2:] else (one, "") for one in sys.argv[1:])
with open(FOLDER + "/asked", "a") as file:
    print(*sys.argv[1:], file=file)
assert options.pop("--output") == "export"

def entries():
    with open(FOLDER + "/entries", "rb") as file:
        while size := file.read(8):
            text = file.read(int(size))
            yield text.split(b"\n")[0].decode().partition("=")[2], text

if os.path.exists(FOLDER + "/fault"):
    with open(FOLDER + "/fault") as file:
        print(file.read(), file=sys.stderr)
    sys.exit(7)
if "--reverse" in options:
    known = list(entries())
    if "--cursor" in options:
        cursors = [cursor for cursor, _ in known]
        at = cursors.index(options["--cursor"]) if options["--cursor"] in cursors else len(known) - 1
        known = known[: at + 1]
    for _, text in known[::-1][: int(options["--lines"])]:
        sys.stdout.buffer.write(text)
    sys.exit(0)
assert "--follow" in options and "--no-tail" in options
after, known = options.get("--after-cursor"), [cursor for cursor, _ in entries()]
done = set(known[: known.index(after) + 1]) if after in known else set()
gone = select.poll()
gone.register(1, select.POLLERR)  # nobody reads us any more
while not os.path.exists(FOLDER + "/end"):
    for cursor, text in entries():
        if cursor not in done:
            sys.stdout.buffer.write(text)
            done.add(cursor)
    sys.stdout.buffer.flush()
    if gone.poll(10):
        sys.exit(0)
os.remove(FOLDER + "/end")
"""


class FakeJournal:
    """A folder with a program `journalctl` and the entries that it plays. Put `bin` into PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        self._count = 0
        (folder / "entries").touch()
        program = PROGRAM.replace("PYTHON", sys.executable, 1).replace("FOLDER_OF_IT", str(folder))
        (self.bin / "journalctl").write_text(program)
        (self.bin / "journalctl").chmod(0o755)

    @property
    def path(self) -> str:
        """A PATH in which it comes first."""
        return f"{self.bin}:{os.environ['PATH']}"

    def write(self, *messages: str, **fields: str) -> None:
        """Entries, all with these fields."""
        for message in messages:
            self._count += 1
            given = "".join(f"{name}={value}\n" for name, value in fields.items())
            self.write_raw(f"__CURSOR={self.cursor(self._count)}\n{given}MESSAGE={message}\n\n".encode())

    def write_raw(self, entry: bytes) -> None:
        """At once, as journald does: a reader sees all of it or nothing."""
        with (self.folder / "entries").open("ab", buffering=0) as file:
            file.write(b"%08d" % len(entry) + entry)

    @staticmethod
    def cursor(number: int) -> str:
        return f"s=f1;i={number:x};b=1;m=1;t=1;x={number:x}"

    def forget(self, number: int) -> None:
        """Vacuum all but the last entries."""
        rest = (self.folder / "entries").read_bytes()
        kept = []
        while rest:
            size = int(rest[:8])
            kept.append(rest[: 8 + size])
            rest = rest[8 + size :]
        scratch = self.folder / "scratch"
        scratch.write_bytes(b"".join(kept[-number:]))
        scratch.rename(self.folder / "entries")

    def fail(self, text: str) -> None:
        (self.folder / "fault").write_text(text)

    def work(self) -> None:
        (self.folder / "fault").unlink()

    def end(self) -> None:
        """Let the one that follows come to its end."""
        (self.folder / "end").touch()

    def asked(self) -> Sequence[str]:
        """The options of each call."""
        return (self.folder / "asked").read_text().splitlines()
