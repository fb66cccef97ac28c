"""A test machine of a lab: `agent run` as a process of its own, to be killed; the lab is in the test's process."""

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from agent.core.processtree import tree
from agent.lab.queue import LabRun, Owed, Queue
from agent.lab.server import Lab, serve_lab
from agent.mimir.messages import Query, VertexLabel

LOOK_S = 0.02  # between two looks at what only a file or a port can tell
LIMIT_S = 240.0  # for what a good machine does in a second; pytest ends a test after 300 s
HERE = Path(__file__).parents[2]

# What Mimir and Polarize call a state; protocols/suites.md, "States".
RESULTS = {
    "passed": "PASSED", "failed": "FAILED", "blocked": "BLOCKED", "skipped": "SKIPPED", "todo": "SKIPPED",
    "aborted": "BLOCKED", "lost": "BLOCKED",
}  # fmt: skip
ELEMENTS = {"passed": None, "failed": "failure", "skipped": "skipped", "todo": "skipped"}  # others: error

SETTINGS = """\
ident = "{ident}"
[state]
dir = "{folder}/state"
reserve = "{reserve}"
[control]
listen = ["127.0.0.1:0"]
[suites]
roots = ["{folder}"]
[seneschal]
url = "ws://{address}/seneschal"
token_file = "{token}"
[mimir]
url = "ws://{address}/mimir"
token_file = "{token}"
[polarize]
url = "http://{address}"
project = "LAB"
"""


async def until(condition: Callable[[], Awaitable[Any]], within_s: float = LIMIT_S) -> Any:
    """Look until the condition gives something; that. Raises trio.TooSlowError."""
    with trio.fail_after(within_s):
        while True:
            if found := await condition():
                return found
            await trio.sleep(LOOK_S)


def peak_mib(pid: int) -> float:
    """The most memory a process has had resident."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) / 1024


class Station:
    """A machine called `ident`, with its folder. `argv` goes before the agent's own."""

    def __init__(self, ident: str, folder: Path, argv: Sequence[str] = (sys.executable, "-m", "agent")) -> None:
        self.ident, self.folder, self.state = ident, folder, folder / "state"
        self._argv = argv
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "agent.log"

    def configure(self, address: str, token: Path, *, reserve: str = "4KiB", more: str = "") -> None:
        """Write agent.toml for a lab at that address."""
        text = SETTINGS.format(ident=self.ident, folder=self.folder, address=address, token=token, reserve=reserve)
        (self.folder / "agent.toml").write_text(text + more)

    def start(self) -> None:
        """Start the agent; it is up when the lab says so."""
        argv = [*self._argv, "run", "--config", str(self.folder / "agent.toml")]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(argv, cwd=HERE, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """The agent's process."""
        assert self._process is not None
        return self._process.pid

    def is_alive(self) -> bool:
        """Has it not ended?"""
        return self._process is not None and self._process.poll() is None

    async def end(self, by: int = signal.SIGKILL) -> int:
        """Send a signal and wait for its end; the exit code."""
        assert self._process is not None
        self._process.send_signal(by)
        code = await trio.to_thread.run_sync(self._process.wait)
        self._process = None
        return code

    def kill(self) -> None:
        """End it, whatever it does, and what it has started."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for run in self.runs():
            for stat in tree(run):
                os.kill(stat.proc.pid, signal.SIGKILL)

    def runs(self) -> list[str]:
        """The runs that have a folder here."""
        return [path.name for path in self.state.glob("runs/*")]

    def result(self, run: str) -> dict[str, Any]:
        """The result document of a run that is over."""
        loaded: dict[str, Any] = json.loads((self.state / "runs" / run / "result.json").read_text())
        return loaded

    def write_suite(self, script: str, **document: Any) -> dict[str, Any]:
        """A suite whose TAP a shell script prints; the document."""
        return {"id": "s", "runner": "tap", "command": ["sh", "-c", script], "source": self.source(), **document}

    def source(self) -> dict[str, str]:
        """The `source` of a suite in this machine's folder."""
        project = self.folder / "project"
        project.mkdir(exist_ok=True)
        return {"dir": str(project)}


class Heard:
    """Every `accepted`, `refused` and `complete` that the lab's queue took, repetitions of a delivery left out."""

    def __init__(self, queue: Queue) -> None:
        self.messages: dict[tuple[str, str, int], Owed] = {}
        self._owed = queue.owed
        queue.owed = self._hear  # type: ignore[method-assign] # to see what it is told, and change nothing

    def _hear(self, ident: str, instance: str, message: Owed, at: float) -> Any:
        acts = self._owed(ident, instance, message, at)
        self.messages[ident, instance, message.seq] = message
        return acts

    def count(self, run: str) -> Counter[str]:
        """How many of which message were told of a run."""
        return Counter(type(message).__name__ for message in self.messages.values() if message.run == run)


class Bench:
    """A lab, what it heard, and the machines that report to it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.heard = Heard(lab.seneschal._queue)

    async def outcomes(self, run: str) -> dict[str, str]:
        """The result of each TestOutcome of a run in Mimir, by case."""
        found = await self.vertices("TestOutcome", {})
        return {key.removeprefix(f"{run}:"): props["result"] for key, props in found if key.startswith(f"{run}:")}

    async def vertices(self, label: VertexLabel, where: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Id and props of all that match."""
        after: str | None = ""
        found: list[tuple[str, dict[str, Any]]] = []
        while after is not None:
            page = await self.lab.mimir.query(Query(label=label, where=where, after=after, limit=1000))
            found += [(vertex["id"], vertex["props"]) for vertex in page["vertices"]]
            after = page["next"]
        return found

    async def begun(self, run: str) -> LabRun:
        """Wait until an agent has accepted the run."""
        while (row := self.lab.seneschal._queue.runs[run]).state in ("queued", "sent"):
            await self.lab.seneschal.changed()
        return row

    async def told(self, run: str, within_s: float = LIMIT_S) -> LabRun:
        """Wait until Seneschal, Mimir and Polarize know the end of a run, or of what replaced it; that run."""
        with trio.fail_after(within_s):
            row = await self.lab.seneschal.ended(run)
        await until(lambda: self._is_over(row.run), within_s)
        return row

    async def agree(self, machine: Station, run: str, *, completes: Collection[int] = (1,)) -> dict[str, Any]:
        """Check that every side holds each test of a run that is over exactly once, as the result has it; the result.

        An attempt that was cut short by a kill is in Mimir beside the one that counts, and not in the import.
        """
        result = machine.result(run)
        assert self.heard.count(run)["Complete"] in completes
        (imported,) = await self.imports(run)
        assert imported.status == "SUCCESS"
        assert tree(run) == []
        assert await self.outcomes(run) == {record["case"]: RESULTS[record["state"]] for record in result["tests"]}
        last = {record["case"].removesuffix(f"@{record['attempt']}"): record for record in result["tests"]}
        imported = self.document(run)
        assert len(imported) == len(last)
        for record in last.values():
            if record["kind"] == "test":
                assert imported[record["name"]] == ELEMENTS.get(record["state"], "error")
        return result

    async def _is_over(self, run: str) -> bool:
        """Does Mimir know of the run's end, and of its import's?"""
        props = dict(await self.vertices("Run", {"state": "done"})).get(run, {})
        return "import_outcome" in props

    async def imports(self, run: str) -> list[Any]:
        """The imports of a run's document."""
        return [item for item in await self.lab.polarize.imports() if item.testrun == run.replace(".", "_")]

    def document(self, run: str) -> dict[str, str | None]:
        """Each test case of the imported document, and its verdict's element (None: passed)."""
        cases: dict[str, str | None] = {}
        for case in ET.parse(self.lab.polarize.document(run)).iter("testcase"):
            name = case.get("name") or ""
            assert name not in cases, f"{name} stands in the document twice"
            verdicts = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            cases[name] = verdicts[0] if verdicts else None
        return cases


@asynccontextmanager
async def bench(data: Path, address: str = "127.0.0.1:0") -> AsyncIterator[Bench]:
    """A lab that serves until the block ends, at a free port if no other is given."""
    async with trio.open_nursery() as nursery:
        yield Bench(await nursery.start(serve_lab, address, data))
        nursery.cancel_scope.cancel()
