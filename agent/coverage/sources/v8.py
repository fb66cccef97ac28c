"""Coverage of Node: files that V8 writes into a folder, made classes and probes.

    <run dir>/v8/begun-<pid>-<thread>-<pid>-<thread>    by hook.cjs: a process or thread began, and whose child it is
    <run dir>/v8/coverage-<pid>-<ms>-<thread>.json      by Node, each `hook_s` and at its end: what ran since the last

Each is read when it is complete and then deleted. A (pid, thread) belongs to the first test file that any of its
reports names, or else to the one its parent belongs to.

Source: drill sheet, "Probe sources", V8; "Failure behaviour".
"""

import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
import trio

import agent
from agent.core.processtree import Proc, stat_of
from agent.coverage.catalog import Catalog, Delta
from agent.coverage.javascript import Script, script
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Asking, Lost, Warned, listed
from agent.coverage.sources.product import Chosen
from agent.coverage.sources.reading import Reading, Stamp, stamp_if_same
from agent.coverage.v8profile import Loaded, NotAProfile, Transformed, covered, file_of, is_test, loaded, session_data

log = logging.getLogger(__name__)

HOOK = Path(agent.__file__).parent / "coverage/hook.cjs"
SUFFIXES = (".js", ".mjs", ".cjs")
TRANSLATED = (".ts", ".mts", ".cts", ".tsx", ".jsx")  # Node runs them by a loader, or without their types
MOST_BYTES = 4 * 2**20  # of a file; larger ones were made by a tool, and nobody reads their coverage
FOLDER_LIMIT = 256 * 2**20  # bytes: protocols/drill.md, "Failure behaviour"
REPORT_LIMIT = 64 * 2**20  # bytes of one report: a hundred times what Node's own modules take
STALE_S = 5.0  # a report that does not parse and has not grown for so long stays as it is
STALE_DEAD_S = 0.5  # when its process is dead, or one that we cannot see
FINAL_LOOKS, LOOK_S = 20, 0.05  # at the end of a session: for reports that are being written
MOST_WORKERS = 20_000  # processes and threads that are remembered; the oldest are forgotten first

_REPORT = re.compile(r"coverage-([0-9]{1,10})-([0-9]{1,15})-([0-9]{1,10})\.json")
_BEGUN = re.compile(r"begun-([0-9]{1,10})-([0-9]{1,10})-([0-9]{1,10})-([0-9]{1,10})")

_Key = tuple[int, int]  # pid and thread


class _Worker(msgspec.Struct):
    """A thread of Node that is covered. `proc` is None when its process had ended before we could look."""

    proc: Proc | None
    parent: _Key = (0, 0)
    test: str = ""
    has_reported: bool = False


class _Product(msgspec.Struct):
    """A file of the catalog, as it was when it was read."""

    script: Script
    stamp: Stamp
    digest: bytes


def reading() -> Reading[Script]:
    """Reads the JavaScript of products."""
    return Reading(script, SUFFIXES, MOST_BYTES)


class _Report(msgspec.Struct, frozen=True, order=True):
    """A report in the folder, by its age."""

    ms: int
    name: str
    key: _Key
    size: int
    modified_s: float


class V8:
    """The source for AVA's and all other Node. Its folder is made below `run_dir`, for the agent's user alone.

    `scripts` reads the product's files, and knows those that sources before it have read.
    """

    def __init__(
        self,
        settings: CoverageSettings,
        catalog: Catalog,
        run_dir: Path,
        asking: Asking,
        scripts: Reading[Script],
    ) -> None:
        self._asking, self._scripts = asking, scripts
        self._one = trio.CapacityLimiter(1)  # who looks into the folder, in a thread
        self._hook_s = settings.hook_s
        self._chosen = Chosen(settings.include, settings.exclude)
        self._catalog = catalog
        self._folder = run_dir / "v8"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._roots: list[str] = []
        self._products: dict[str, _Product] = {}
        self._test_files: set[str] = set()
        self._workers: dict[_Key, _Worker] = {}
        self._waiting: dict[_Key, dict[str, int]] = {}  # bits by class, of workers whose test is not known yet
        self._counts = False
        self._before = set[str]()  # reports that were there at the start; their dates say nothing: it may be set
        self._unfinished: set[str] = set()  # reports that did not parse when they were last read
        self._changed: set[str] = set()
        self._translated: set[str] = set()  # files that Node ran, and that are no JavaScript
        self._told: list[Warned | Lost] = []
        self._reports = self._matched = 0  # since the start

    def env(self) -> dict[str, str]:
        """For a runner's environment; NODE_OPTIONS is to be added to its own, and its own NODE_V8_COVERAGE to stay."""
        folder = os.path.abspath(self._folder)
        hook = str(HOOK).replace("\\", r"\\").replace('"', r"\"")
        return {
            "NODE_V8_COVERAGE": folder,
            "NODE_OPTIONS": f'--require "{hook}"',
            "EMISSARY_V8": folder,
            "EMISSARY_V8_MS": str(round(self._hook_s * 1000)),
        }

    async def prepare(self, roots: Sequence[Path]) -> None:
        """Read the JavaScript below the roots into the catalog."""
        found = await self._scripts.read(roots, self._chosen, self._asking)
        self._roots = found.roots
        self._products = {each.file: _Product(each.made, each.stamp, each.digest) for each in found.files}
        refused = self._catalog.add(each.made.unit for each in found.files)
        for unit in refused:
            del self._products[str(unit.file)]
        if refused:
            found.left_out["another root has a file of that name"] = [str(unit.file) for unit in refused]
        for why, files in found.left_out.items():
            self._tell(Warned(f"{listed(files)}: not covered, {why}"))
        log.info("coverage of node files=%d", len(self._products))

    async def start(self) -> None:
        """Reports written from now on count."""
        self._before = await trio.to_thread.run_sync(self._names, limiter=self._one)
        self._counts = True
        self._changed.clear()
        self._waiting.clear()
        self._reports = self._matched = 0

    async def stop(self) -> None:
        """No report counts."""
        self._counts = False
        self._waiting.clear()

    async def collect(self, *, final: bool = False) -> list[Delta]:
        """What the complete reports in the folder say. `final` waits a second for those that are being written."""
        await self._look()
        if final:
            for _ in range(FINAL_LOOKS):
                if not self._unfinished:
                    break
                await trio.sleep(LOOK_S)
                await self._look()
            if self._unfinished:
                count = len(self._unfinished)
                self._tell(Warned(f"{count} reports of Node were still being written when the session ended"))
        return self._resolve(final=final)

    def alive(self) -> bool:
        """Is a covered process alive? One whose begin or report was in the folder when it was last looked at."""
        return any(map(_lives, list(self._workers.values())))

    def told(self) -> list[Warned | Lost]:
        """What is to be said, new since the last call."""
        told, self._told = self._told, []
        return told

    def why_empty(self) -> str:
        """Why nothing was collected since the start; "" when something was."""
        if self._matched:
            return ""
        if self._changed:
            return f"What Node ran of the product is not what was read: {self._list(self._changed)}."
        if self._translated:
            return f"What Node ran of the product is no JavaScript: {self._list(self._translated)}."
        if self._reports:
            return (
                f"{self._reports} reports of Node named none of the {len(self._products)} files that were read. "
                "Look at roots, include and exclude."
            )
        return "No Node process that was started with the coverage's environment has written a report."

    def has_tests(self, file: Path) -> None:
        """A runner told that this file holds tests: for names that tell it to nobody. Its path is absolute."""
        self._test_files.add(os.path.realpath(file))

    def of_session_data(self, data: str) -> list[Delta]:
        """What ADD_SESSION_DATA brings: a V8 profile of another process, or of a browser. Raises NotAProfile.

        A script of a browser is the file whose path below its root the address has. Scripts of other files are ignored.
        """
        test, scripts = session_data(data)
        bits: dict[str, int] = {}
        for each in scripts:
            product = self._products.get(file_of(each.url) or "") or self._served(each.url)
            if product is not None:
                self._add(bits, each, product)
        return [Delta(class_id, probes, test) for class_id, probes in bits.items()]

    def _served(self, url: str) -> _Product | None:
        try:
            parts = urlsplit(url)
        except ValueError:
            return None
        if parts.scheme not in ("http", "https"):
            return None
        unit = self._catalog.units.get(_class_id(unquote(parts.path).lstrip("/")))
        return None if unit is None else self._products.get(str(unit.file))

    def _tell(self, what: Warned | Lost) -> None:
        log.warning("coverage of node: %s", what)
        self._told.append(what)

    async def _look(self) -> None:
        with self._asking(", ".join(self._roots)):  # reports name its files, which are looked at
            await trio.to_thread.run_sync(self._take_all, abandon_on_cancel=True, limiter=self._one)

    # What blocks: in a thread, while the one task that calls waits, or has given it up

    def _take_all(self) -> None:
        reports = self._found()
        self._drop_oldest(reports)
        checked: dict[str, bool] = {}
        translated = set(self._translated)
        self._unfinished.clear()
        damaged = [why for report in reports if (why := self._take(report, checked))]
        if damaged:  # on a full disk every process that ends leaves some: told together
            count = "A report of Node was" if len(damaged) == 1 else f"{len(damaged)} reports of Node were"
            self._tell(Warned(f"{count} dropped: {listed(damaged)}"))
        if changed := {file for file, is_same in checked.items() if not is_same} - self._changed:
            self._changed |= changed
            names = self._list(changed)
            self._tell(Warned(f"{names}: changed on disk since the classes were read: that coverage is dropped"))
        if found := self._translated - translated:
            self._tell(Warned(f"{self._list(found)}: not covered, as it is no JavaScript. Run what it is compiled to."))

    def _names(self) -> set[str]:
        """What is in the folder."""
        if not self._folder.is_dir():
            return set()  # a test of the product cleaned up too much; Node makes it anew
        return set(os.listdir(self._folder))

    def _found(self) -> list[_Report]:
        """Reports in the folder, the oldest first; what tells of a begin is taken in."""
        reports: list[_Report] = []
        for path in map(self._folder.joinpath, self._names()):
            begun, found = _BEGUN.fullmatch(path.name), _REPORT.fullmatch(path.name)
            if not (begun or found):
                continue
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                if begun:
                    path.unlink()
            except FileNotFoundError:
                continue
            if begun:
                pid, thread, *parent = map(int, begun.groups())
                self._remember((pid, thread), _Worker(_proc(pid), (parent[0], parent[1])))
            elif found:
                pid, ms, thread = map(int, found.groups())
                reports.append(_Report(ms, path.name, (pid, thread), status.st_size, status.st_mtime))
        return sorted(reports)

    def _remember(self, key: _Key, worker: _Worker) -> _Worker:
        if len(self._workers) >= MOST_WORKERS:
            del self._workers[next(iter(self._workers))]
        self._workers[key] = worker
        return worker

    def _drop_oldest(self, reports: list[_Report]) -> None:
        total = sum(report.size for report in reports if report.size <= REPORT_LIMIT)
        dropped = 0
        for report in list(reports):
            if report.size <= REPORT_LIMIT and total <= FOLDER_LIMIT:
                continue
            total -= report.size if report.size <= REPORT_LIMIT else 0
            dropped += 1
            reports.remove(report)
            self._unlink(report)
        if dropped:
            why = f"{dropped} reports of Node were dropped: the folder had more than {FOLDER_LIMIT // 2**20} MiB"
            self._tell(Lost(len(self._products), why))

    def _take(self, report: _Report, checked: dict[str, bool]) -> str:
        """Read one report and delete it, unless it is still being written. What is wrong with it, if it is dropped."""
        try:
            data = (self._folder / report.name).read_bytes()
            scripts = loaded(data)
        except NotAProfile as error:
            if time.time() - report.modified_s < (STALE_S if _proc(report.key[0]) else STALE_DEAD_S):
                self._unfinished.add(report.name)
                return ""
            self._unlink(report)
            return f"{report.name}, {report.size} bytes: {error.what}"
        except OSError as error:
            self._unlink(report)
            return f"{report.name}, it cannot be read: {error.strerror or error}"
        worker = self._workers.get(report.key) or self._remember(report.key, _Worker(_proc(report.key[0])))
        worker.has_reported = True
        files = [(each, file) for each in scripts if (file := file_of(each.url)) is not None]
        if not worker.test:
            worker.test = next((self._shown(file) for _, file in files if self._has_tests(file)), "")
        if self._counts and report.name not in self._before:
            self._reports += 1
            bits = self._waiting.setdefault(report.key, {})
            for each, file in files:
                product = self._products.get(file)
                if product is None:
                    if file.endswith(TRANSLATED) and self._is_chosen(file):
                        self._translated.add(file)
                elif self._is_same(file, product, checked):
                    self._add(bits, each, product)
        self._unlink(report)
        return ""

    def _add(self, bits: dict[str, int], each: Loaded, product: _Product) -> None:
        unit = product.script.unit
        try:
            probes = covered(each, product.script)
        except (NotAProfile, Transformed) as error:
            if str(unit.file) not in self._changed:
                self._changed.add(str(unit.file))
                self._tell(Warned(str(error)))
            return
        if probes:
            self._matched += 1
            bits[unit.class_id] = bits.get(unit.class_id, 0) | probes

    def _is_same(self, file: str, product: _Product, checked: dict[str, bool]) -> bool:
        """Is the file as it was when it was read? Looked at once for all reports that are read together."""
        if file not in checked:
            stamp = stamp_if_same(file, product.stamp, product.digest, MOST_BYTES)
            checked[file] = stamp is not None
            product.stamp = stamp or product.stamp
        return checked[file]

    def _is_chosen(self, file: str) -> bool:
        return any(file.startswith(f"{root}/") for root in self._roots) and self._chosen.takes(self._shown(file))

    def _has_tests(self, file: str) -> bool:
        is_ours = "/node_modules/" not in file or any(file.startswith(f"{root}/") for root in self._roots)
        return file in self._test_files or (is_ours and is_test(self._shown(file)))

    def _shown(self, file: str) -> str:
        """A file's path below its root, or below the folder that it and the first root are in."""
        for root in self._roots:
            if file.startswith(f"{root}/"):
                return os.path.relpath(file, root)
        shared = os.path.commonpath([file, *self._roots[:1]]) if self._roots else "/"
        return os.path.relpath(file, shared) if shared != "/" else os.path.basename(file)

    def _list(self, files: Iterable[str]) -> str:
        return listed(map(self._shown, files))

    def _unlink(self, report: _Report) -> None:
        (self._folder / report.name).unlink(missing_ok=True)

    # Whose it is

    def _resolve(self, *, final: bool) -> list[Delta]:
        """Deltas of the workers whose test file is known, or can no longer become known."""
        merged: dict[tuple[str, str], int] = {}
        for key, bits in list(self._waiting.items()):
            test = self._test_of(key)
            if test is None and not final:
                continue
            del self._waiting[key]
            for class_id, probes in bits.items():
                merged[class_id, test or ""] = merged.get((class_id, test or ""), 0) | probes
        return [Delta(class_id, probes, test) for (class_id, test), probes in merged.items()]

    def _test_of(self, key: _Key) -> str | None:
        """A worker's test file, or that of whose child it is; None when an ancestor may still tell, "" for none."""
        seen: set[_Key] = set()
        may_tell = False
        while key not in seen and (worker := self._workers.get(key)):
            if worker.test:
                return worker.test
            may_tell = may_tell or (not worker.has_reported and _lives(worker))
            seen.add(key)
            key = worker.parent
        return None if may_tell else ""


def _class_id(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder or '.'}/{name}"


def _proc(pid: int) -> Proc | None:
    """The process, if it lives."""
    now = stat_of(pid)
    return None if now is None or now.ended else now.proc


def _lives(worker: _Worker) -> bool:
    """Does its process live? One that has ended is not asked for again."""
    if worker.proc is not None and _proc(worker.proc.pid) != worker.proc:
        worker.proc = None
    return worker.proc is not None
