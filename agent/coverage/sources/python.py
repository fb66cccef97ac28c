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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import trio

from agent.core.lines import CutLine, Lines
from agent.coverage.catalog import Catalog, Delta
from agent.coverage.python import Module, read_module
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Lost, Warned
from agent.coverage.sources.product import Chosen, files_below
from agent.coverage.sources.reading import MOST_BYTES, Reading, Stamp, stamp_of

log = logging.getLogger(__name__)

FLUSH_S = 1.0  # a process that holds the interpreter for longer is not waited for
MOST_PROCESSES = 512  # connected at a time; more wait until some have ended
MOST_LINE = 512 * 1024  # bytes: 10**6 lines of a file are half of it
BACKLOG = 4096
READ_SIZE = 256 * 1024
SOCKET = "python.sock"
PRELOADED = ("sitecustomize.py", "emissary_coverage.py", "emissary_coverage_pytest.py")
# By these pytest finds the plugin in any folder of its path.
PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: emissary_coverage\nVersion: 1\n",
    "entry_points.txt": "[pytest11]\nemissary_coverage = emissary_coverage_pytest\n",
}


class _Line(msgspec.Struct, frozen=True):
    pid: int = 0
    python: str = ""
    why: str = ""
    test: str = ""
    file: str = ""
    lines: str = ""
    flushed: int = 0


_decode = msgspec.json.Decoder(_Line).decode


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
        while self.is_open:
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

    `modules` are what sources before it have read.
    """

    def __init__(
        self,
        settings: CoverageSettings,
        catalog: Catalog,
        run_dir: Path,
        modules: Reading[Module] | None = None,
    ) -> None:
        self._modules = modules or Reading(read_module)
        self.folder = run_dir / "python"
        self._settings, self._catalog, self._run_dir = settings, catalog, run_dir
        self._chosen = Chosen(settings.include, settings.exclude)
        self._roots: list[Path] = []
        self._probe_of: dict[str, dict[int, int]] = {}  # by file
        self._seen_as: dict[str, Stamp] = {}  # by file, when it was read
        self._changed: set[str] = set()
        self._listener: socket.socket | None = None
        self._processes: list[_Process] = []
        self._found: dict[tuple[str, str], int] = {}  # file and test to probes
        self._told: list[Warned | Lost] = []
        self._asked = 0
        self._connected = 0  # since the start
        self._reasons: dict[str, None] = {}  # why processes cannot be covered, since the start
        self._is_empty = True
        self._is_crowded = False

    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder)}

    async def prepare(self, roots: Sequence[Path]) -> None:
        async with self._modules.one:
            await trio.to_thread.run_sync(self._prepare, roots)

    async def start(self) -> None:
        if self._listener is None:
            self._connected, self._reasons, self._is_empty = 0, {}, True
            self._found.clear()
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
        found, self._found = self._found, {}
        deltas = []
        for (file, test), probes in found.items():
            unit = self._catalog.of_file(file)
            if unit is not None:
                deltas.append(Delta(unit.class_id, probes, test))
        return deltas

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
            return "; ".join(self._reasons)
        if self._connected:
            ran = "one Python process" if self._connected == 1 else f"{self._connected} Python processes"
            return f"{ran} ran no line of the {len(self._probe_of)} Python files below {self._below()}"
        return "no Python process was seen: none was started in the session, or not with the agent's PYTHONPATH"

    def _below(self) -> str:
        return ", ".join(map(str, self._roots)) or "no root"

    # ---- the product's files: in a thread; nothing else is called meanwhile ----

    def _prepare(self, roots: Sequence[Path]) -> None:
        self._modules.begin()
        for root in (root.resolve() for root in roots):
            if root not in self._roots:
                self._roots.append(root)
            for path, file in files_below(root, self._chosen, {".py"}):
                self._read(path, file)
        self._write_preloaded()

    def _read(self, path: str, file: str) -> None:
        try:
            found = self._modules.read(path, file)
        except OSError as error:
            self._told.append(Warned(f"{file} cannot be read, and is not covered: {error.strerror}"))
            return
        if found is None:
            self._told.append(Warned(f"{file} is larger than {MOST_BYTES >> 20} MiB, and is not covered"))
            return
        module = found.made
        if not module.unit.probe_count:
            return
        if self._catalog.add([module.unit]):
            self._told.append(Warned(f"{file} is not covered: another root has a {path} too"))
            return
        if module.why:
            log.info("coverage file=%s is known by its lines only: %s", file, module.why)
        self._probe_of[file] = module.probe_of
        self._seen_as[file] = found.stamp
        self._changed.discard(file)

    def _write_preloaded(self) -> None:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = self.folder / "emissary_coverage-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        for name in PRELOADED:
            _write(self.folder / name, pkgutil.get_data("agent.coverage", f"preload/{name}") or b"")
        for name, text in PLUGIN.items():
            _write(info / name, text.encode())
        where = (self._run_dir / SOCKET, self._settings.arm, *(f"{str(root).rstrip('/')}/" for root in self._roots))
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
            except msgspec.DecodeError as error:
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
            if lines:
                self._count(line.file, line.test, lines)

    def _count(self, file: str, test: str, lines: int) -> None:
        probe_of = self._probe_of.get(file)
        if probe_of is None or self._is_changed(file):
            return
        probes = 0
        while lines:
            lowest = lines & -lines
            probe = probe_of.get(lowest.bit_length() - 1)
            if probe is not None:
                probes |= 1 << probe
            lines ^= lowest
        if probes:
            self._is_empty = False
            self._found[file, test] = self._found.get((file, test), 0) | probes

    def _is_changed(self, file: str) -> bool:
        """Is it another than the one that was read? Then its lines are others too."""
        if file not in self._changed:
            with suppress(OSError):
                if stamp_of(os.stat(file)) == self._seen_as[file]:
                    return False
            self._changed.add(file)
            self._told.append(Lost(1, f"{file} has changed since its lines were read"))
        return True

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
