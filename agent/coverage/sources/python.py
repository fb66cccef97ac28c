"""Python products: what agent/coverage/preload tells from inside of them, over a socket in the run's folder.

A product is preloaded by its PYTHONPATH, or by a .pth file of its own that imports `emissary_coverage` from `folder`.
The socket is there from start to stop: a process that finds it tells its lines, and one that has lost it is silent and
looks for it each second. Nothing runs here between the calls; what was told meanwhile the kernel keeps.

Source: drill sheet, "Probe sources", Python; the lines on the socket: preload/emissary_coverage.py.
"""

import errno
import logging
import os
import pkgutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from agent.core.lines import CutLine, Lines
from agent.core.payload import UNREADABLE
from agent.coverage.catalog import Catalog, Delta
from agent.coverage.python import Module, read_module
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Asking, Lost, Warned, listed
from agent.coverage.sources.product import Chosen
from agent.coverage.sources.reading import Reading, Stamp, stamp_if_same

log = logging.getLogger(__name__)

# Of a file. Python's own compiler lets no other thread run meanwhile: for two seconds, where it is all short functions.
MOST_BYTES = 512 * 1024
FLUSH_S = 1.0  # a process that holds the interpreter for longer is not waited for
MOST_PROCESSES = 512  # connected at a time; more wait until some have ended
MOST_LINE = 512 * 1024  # bytes: 10**6 lines of a file are half of it
BACKLOG = 4096
READ_SIZE = 256 * 1024
MOST_READS = 64  # of a process in one look: one that tells without an end would hold up the agent
SOCKET = "python.sock"
PRELOADED = ("sitecustomize.py", "emissary_coverage.py", "emissary_coverage_pytest.py")
# By these pytest finds the plugin in any folder of its path.
PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: emissary_coverage\nVersion: 1\n",
    "entry_points.txt": "[pytest11]\nemissary_coverage = emissary_coverage_pytest\n",
}


class _Place(NamedTuple):
    file: str
    test: str


class _Line(msgspec.Struct, frozen=True):
    pid: int = 0
    python: str = ""
    why: str = ""
    test: str = ""
    file: str = ""
    lines: str = ""
    flushed: int = 0


_decode = msgspec.json.Decoder(_Line).decode


def reading() -> Reading[Module]:
    """Reads the Python of products."""
    return Reading(read_module, (".py",), MOST_BYTES)


class _Process:
    """A process of the product on its connection."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.lines = Lines(MOST_LINE)
        self.pid = 0
        self.flushed = 0
        self.is_garbled = False

    def read(self) -> Iterator[bytes]:
        """The lines that have come. At its end, or when it is broken, the socket is closed."""
        for _ in range(MOST_READS):
            if not self.is_open:
                return
            try:
                data = self.socket.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.socket.close()
                return
            yield from self.lines.feed(data)

    @property
    def is_open(self) -> bool:
        return self.socket.fileno() >= 0

    def ask(self, what: bytes) -> None:
        try:
            self.socket.send(what, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            log.debug("coverage process=%s does not read", self.pid)
        except OSError:
            pass  # its end is what will be read


class Python:
    """The source `python`: see `Source`. What products load is in `folder`.

    `modules` reads the product's files, and knows those that sources before it have read.
    """

    def __init__(
        self,
        settings: CoverageSettings,
        catalog: Catalog,
        run_dir: Path,
        asking: Asking,
        modules: Reading[Module],
    ) -> None:
        self._asking, self._modules = asking, modules
        self.folder = run_dir / "python"
        self._settings, self._catalog, self._run_dir = settings, catalog, run_dir
        self._chosen = Chosen(settings.include, settings.exclude)
        self._roots: list[str] = []
        self._probe_of: dict[str, dict[int, int]] = {}  # by file
        self._read_as: dict[str, tuple[Stamp, bytes]] = {}  # by file, with the digest of its text
        self._changed: set[str] = set()
        self._by_lines: set[str] = set()  # files that this Python cannot compile, until one of them runs
        self._listener: socket.socket | None = None
        self._processes: list[_Process] = []
        self._ran: dict[_Place, int] = {}  # bit n for line n, of what was told and is not collected
        self._told: list[Warned | Lost] = []
        self._one = trio.CapacityLimiter(1)  # who makes probes of lines, in a thread
        self._asked = 0
        self._connected = 0  # since the start
        self._reasons: dict[str, None] = {}  # why processes cannot be covered, since the start
        self._is_empty = True
        self._is_crowded = False

    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder)}

    async def prepare(self, roots: Sequence[Path]) -> None:
        product = await self._modules.read(roots, self._chosen, self._asking)
        self._roots = product.roots
        for _, file, module, stamp, digest in product.files:
            if not module.unit.probe_count:
                continue
            if self._catalog.add([module.unit]):
                product.left_out.setdefault("another root has a file of that name", []).append(file)
                continue
            if module.why:
                log.info("coverage file=%s is known by its lines only: %s", file, module.why)
                self._by_lines.add(file)
            self._probe_of[file], self._read_as[file] = module.probe_of, (stamp, digest)
        for why, files in product.left_out.items():
            self._told.append(Warned(f"{listed(files)}: not covered, {why}"))
        await trio.to_thread.run_sync(self._write_preloaded)

    async def start(self) -> None:
        if self._listener is None:
            self._connected, self._reasons, self._is_empty = 0, {}, True
            self._ran.clear()
            self._listener = _listen(self._run_dir)
            return
        self._asked += 1  # for one more session; the others go on
        for process in self._processes:
            process.ask(b'{"restart":%d}\n' % self._asked)

    async def collect(self, *, final: bool = False) -> list[Delta]:
        await trio.lowlevel.checkpoint()
        self._look()
        if final and self._processes:
            await self._flush()
        if not self._ran:
            return []
        ran, self._ran = self._ran, {}
        try:
            with self._asking(", ".join(self._roots)):
                return await trio.to_thread.run_sync(self._deltas, ran, abandon_on_cancel=True, limiter=self._one)
        except trio.Cancelled:  # each process has told it only once
            self._ran = {place: self._ran.get(place, 0) | ran.get(place, 0) for place in ran | self._ran}
            raise

    async def stop(self) -> None:
        await trio.lowlevel.checkpoint()
        for process in self._processes:
            process.socket.close()
        self._processes = []
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            (self._run_dir / SOCKET).unlink(missing_ok=True)

    def alive(self) -> bool:
        self._look()
        return bool(self._processes)

    def told(self) -> list[Warned | Lost]:
        told, self._told = self._told, []
        return told

    def why_empty(self) -> str:
        if not self._is_empty:
            return ""
        if self._reasons:
            return f"Python is not covered: {'; '.join(self._reasons)}."
        if self._connected:
            ran = "One Python process" if self._connected == 1 else f"{self._connected} Python processes"
            return f"{ran} ran no line of the {len(self._probe_of)} Python files below {self._below()}."
        return "No Python process was seen: none was started in the session, or not with the agent's PYTHONPATH."

    def _below(self) -> str:
        return ", ".join(self._roots) or "no root"

    # ---- files: in a thread ----

    def _deltas(self, ran: dict[_Place, int]) -> list[Delta]:
        """The probes of these lines; none of a file that is no more the one that was read."""
        same: dict[str, bool] = {}
        deltas = []
        for (file, test), lines in ran.items():
            if file not in same:
                same[file] = self._is_same(file)
            unit = self._catalog.of_file(file)
            probes = _probes(lines, self._probe_of[file]) if same[file] else 0
            if unit is not None and probes:
                self._is_empty = False
                deltas.append(Delta(unit.class_id, probes, test))
        if run := {file for file, _ in ran if same[file]} & self._by_lines:  # what is no Python at all does not run
            self._by_lines -= run
            what = f"the agent's Python {'.'.join(map(str, sys.version_info[:2]))} cannot compile this"
            self._told.append(Warned(f"{listed(run)}: lines without code count too, as not reached, for {what}"))
        return deltas

    def _is_same(self, file: str) -> bool:
        if file in self._changed:
            return False
        stamp, digest = self._read_as[file]
        if same := stamp_if_same(file, stamp, digest, MOST_BYTES):
            self._read_as[file] = same, digest
            return True
        self._changed.add(file)
        self._told.append(Lost(1, f"{file} has changed since its lines were read"))
        return False

    def _write_preloaded(self) -> None:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = self.folder / "emissary_coverage-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        for name in PRELOADED:
            _write(self.folder / name, pkgutil.get_data("agent.coverage", f"preload/{name}") or b"")
        for name, text in PLUGIN.items():
            _write(info / name, text.encode())
        where = (self._run_dir / SOCKET, self._settings.arm, *(f"{root.rstrip('/')}/" for root in self._roots))
        _write(self.folder / "where", b"\0".join(map(os.fsencode, where)))

    # ---- what processes tell ----

    def _look(self) -> None:
        """Take in who has connected and what was told."""
        self._accept()
        for process in self._processes:
            self._hear(process)
        self._processes = [process for process in self._processes if process.is_open]

    def _accept(self) -> None:
        while self._listener is not None and len(self._processes) < MOST_PROCESSES:
            try:
                connected, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no file number is left, say: those who wait go on waiting
                if error.errno not in (errno.ECONNABORTED, errno.EINTR) and not self._is_crowded:
                    self._is_crowded = True
                    self._told.append(Warned(f"Python processes wait to tell their coverage: {error.strerror}"))
                return
            connected.setblocking(False)
            process = _Process(connected)
            self._connected += 1
            self._hear(process)
            if process.is_open:
                self._processes.append(process)

    def _hear(self, process: _Process) -> None:
        for data in process.read():
            try:
                if isinstance(data, CutLine):
                    raise msgspec.DecodeError(f"a line of {len(data) + data.dropped} bytes")
                line = _decode(data)
                lines = _bits(line.lines) if line.lines else 0
            except UNREADABLE as error:
                if not process.is_garbled:
                    process.is_garbled = True
                    self._told.append(Lost(1, f"process {process.pid} told what cannot be read: {error}"))
                continue
            if line.pid:
                process.pid = line.pid
                if line.why and line.why not in self._reasons:
                    self._reasons[line.why] = None
                    self._told.append(Warned(f"a Python process ({line.pid}) is not covered: {line.why}"))
            process.flushed = max(process.flushed, line.flushed)
            if lines and line.file in self._probe_of:
                place = _Place(line.file, line.test)
                self._ran[place] = self._ran.get(place, 0) | lines

    async def _flush(self) -> None:
        """Have each process tell what it still has."""
        self._asked += 1
        with trio.move_on_after(FLUSH_S):
            async with trio.open_nursery() as nursery:
                for process in self._processes:
                    process.ask(b'{"flush":%d}\n' % self._asked)
                    nursery.start_soon(self._await_flushed, process, self._asked)
        slow = [process.pid for process in self._processes if process.is_open and process.flushed < self._asked]
        if slow:
            what = f"what process {', '.join(map(str, slow))} ran last may be missing: no answer in {FLUSH_S:g} s"
            self._told.append(Warned(what))
        self._look()

    async def _await_flushed(self, process: _Process, number: int) -> None:
        while process.is_open and process.flushed < number:
            await trio.lowlevel.wait_readable(process.socket)
            self._hear(process)


def _bits(text: str) -> int:
    """Bit n for line n. Raises msgspec.DecodeError for what is no hexadecimal number."""
    if not text.isascii() or not text.isalnum():
        raise msgspec.DecodeError(f"lines {text[:40]!r}")
    try:
        return int(text, 16)
    except ValueError as error:
        raise msgspec.DecodeError(f"lines {text[:40]!r}") from error


def _probes(lines: int, probe_of: dict[int, int]) -> int:
    """Bit n for probe n, of the lines that have one."""
    probes = 0
    while lines:
        lowest = lines & -lines
        probe = probe_of.get(lowest.bit_length() - 1)
        if probe is not None:
            probes |= 1 << probe
        lines ^= lowest
    return probes


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: products read it at any time."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_bytes(data)
    aside.rename(path)


@contextmanager
def _short(folder: Path) -> Iterator[Path]:
    """The folder by a name that fits into a socket's address, which has room for 107 bytes."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{number}")
    finally:
        os.close(number)


def _listen(folder: Path) -> socket.socket:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(folder) as short:
            listener.bind(str(short / SOCKET))
        (folder / SOCKET).chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
