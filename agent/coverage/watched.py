"""What is covered together: the sources of one run, or of the product that runs by itself, and what they saw.

Source: protocols/drill.md, "Probe sources"; protocols/suites.md, "The suite document" (`coverage`).
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio

import agent
from agent.core import release
from agent.coverage import report
from agent.coverage.catalog import Catalog, Delta, Unit
from agent.coverage.merged import Budget, Merged
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources import Asking, Lost, Source, Warned

log = logging.getLogger(__name__)

Make = Callable[[SourceName, CoverageSettings, Catalog, Path, Asking], Source]

FULL = (errno.ENOSPC, errno.EDQUOT)
AGAIN_S = 5.0  # s between two tries to write a report on a full disk
LOOK_S = 30.0  # s for one look of all sources
MAX_WARNINGS = 20  # in the result of a run


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """`coverage_open`: a runner will be started for this run in this folder. `report`: its suite asks for coverage.

    What it reaches is kept in the file `kept`, should the run be resumed.
    """

    run: str
    dir: str
    report: bool = False
    kept: str | None = None


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """`coverage_close`: the runners of this run have ended. Its report goes into the folder `artifacts`.

    There is none when the run `resumes` at the agent's next start.
    """

    run: str
    artifacts: str
    resumes: bool = False


class SavedRun(msgspec.Struct, frozen=True):
    """What a run had reached when the agent ended. `entries` are class id, test, probes in hex, of classes that had
    this digest.
    """

    digest: str
    folded: bool
    entries: list[tuple[str, str, str]]


class Watched:
    """The sources of one run. `seen` is what the run's own report will hold; None where none was asked for.

    It is kept in the file `kept`, so that the report of a run that is resumed holds all of it. The folder is new, and
    goes with it, unless it `stays`: what starts while the agent does not run finds there what to load.
    """

    def __init__(
        self,
        settings: CoverageSettings,
        names: Iterable[SourceName],
        folder: Path,
        make: Make,
        asking: Asking,
        *,
        project: Path | None = None,
        kept: Path | None = None,
        report: bool = False,
        stays: bool = False,
    ) -> None:
        self._folder, self._project, self._kept, self._stays = folder, project, kept, stays
        if not stays:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=stays)
        self._catalogs = {name: Catalog() for name in names}
        self._of_name = {
            name: make(name, settings, catalog, folder, asking) for name, catalog in self._catalogs.items()
        }
        self._sources = [*self._of_name.values()]
        self._is_started = False
        self._budget = Budget(settings.max_pending_mib * 2**20, self._make_room)
        self.seen = Merged(self._budget) if report else None
        self._is_kept = True  # nothing was seen since it was kept
        self._keeps = True  # the last time it was written, it could be
        self._digest = ""  # of the classes
        self.warnings: list[str] = []
        self._refused: set[str] = set()
        self._told: list[Warned | Lost] = []
        self._hangs = False  # the last look was given up

    def env(self) -> dict[str, str]:
        """What a runner gets."""
        return {name: value for source in self._sources for name, value in source.env().items()}

    async def prepare(self, roots: Sequence[Path]) -> None:
        """Read the product's files."""
        for source in self._sources:
            await source.prepare(roots)
        if self.seen is not None and self._kept is not None:
            await trio.to_thread.run_sync(self._resume, self.seen, self._kept)

    def units(self) -> dict[str, Unit]:
        """The classes of all sources, by class id."""
        return {name: unit for catalog in self._catalogs.values() for name, unit in catalog.units.items()}

    def reported(self) -> dict[str, Unit]:
        """What a report lists: the classes of the sources that saw anything. Where none did, of all."""
        seen = set() if self.seen is None else {class_id for class_id, _, _ in self.seen.entries()}
        useful = [catalog.units for catalog in self._catalogs.values() if not seen.isdisjoint(catalog.units)]
        return {name: unit for units in useful for name, unit in units.items()} or self.units()

    async def let_count(self, counts: bool) -> None:
        """From now on probes count, or no more."""
        if counts != self._is_started:
            self._is_started = counts
            for source in self._sources:
                await (source.start() if counts else source.stop())

    async def count_anew(self) -> None:
        """A session begins beside others: lines that a process tells once only it is to tell again."""
        from agent.coverage.sources.python import Python

        for source in self._sources:
            if self._is_started and isinstance(source, Python):
                await source.start()

    async def collect(self, take: Callable[[Sequence[Delta]], None], *, final: bool = False) -> None:
        """What is new goes to `take`, and into the run's own report, as soon as a source has given it away."""
        with trio.move_on_after(LOOK_S) as limit:
            for source in self._sources:
                deltas = await source.collect(final=final)
                self.see(deltas)
                take(deltas)
        hung, self._hangs = self._hangs, limit.cancelled_caught
        if self._hangs and not hung:
            self._told.append(Warned(f"What ran last may be missing: no answer of the disk in {LOOK_S:g} s."))

    async def attend(self) -> None:
        """Between two looks: what must not be missed until the next. It is cancelled at any time."""
        from agent.coverage.sources.jacoco import Jacoco

        for source in self._sources:
            if self._is_started and isinstance(source, Jacoco):
                await source.attend()

    def see(self, deltas: Iterable[Delta]) -> None:
        """Take what was seen for the run's own report."""
        if self.seen is not None:
            self._is_kept = False
            self._refused |= self.seen.add(deltas)

    async def write(self, folder: Path, units: Mapping[str, Unit], at: float) -> report.Totals:
        """Write the run's report of these classes into the folder; `at` is seconds since 1970.

        A full disk is waited for, as long as whoever asks will. Raises OSError for all else.
        """
        found, covered = list(units.values()), self.covered(units)

        def written() -> report.Totals:
            release.write(folder / "lcov.info", report.lcov(found, covered))
            xml = report.cobertura(found, covered, at=at, version=agent.__version__)
            release.write(folder / "cobertura.xml", xml)
            return report.totals(found, covered)

        while True:
            try:
                return await trio.to_thread.run_sync(written, abandon_on_cancel=True)
            except OSError as err:
                if err.errno not in FULL:
                    raise
                log.error("cannot write the coverage folder=%s error=%s", folder, err)  # noqa: TRY400 - each time
            await trio.sleep(AGAIN_S)

    def covered(self, units: Mapping[str, Unit]) -> dict[str, dict[str, int]]:
        """What the run reached of these classes: class id to test to probes."""
        found: dict[str, dict[str, int]] = {}
        for class_id, test, probes in self.seen.entries() if self.seen is not None else ():
            if class_id in units:
                found.setdefault(class_id, {})[test] = probes
        return found

    def alive(self) -> bool:
        """Does a covered process live?"""
        return any(source.alive() for source in self._sources)

    def told(self) -> list[Warned | Lost]:
        """What is to be said, new since the last call."""
        told, self._told = self._told, []
        told += [each for source in self._sources for each in source.told()]
        if self._refused:
            told.append(Lost(len(self._refused), "coverage.max_pending_mib is reached; new classes are refused"))
            self._refused = set()
        return told

    def warn(self, text: str) -> None:
        """Something that the run's result shall say."""
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def why_empty(self) -> str:
        """Why no source saw anything; "" when one did."""
        reasons = [source.why_empty() for source in self._sources]
        return "" if "" in reasons else " ".join(reasons)

    def why_no_jvm(self) -> str:
        """Why none of the JVMs that are asked told anything; "" when one did, and where none is to be asked."""
        jacoco = self._of_name.get("jacoco")
        return jacoco.why_empty() if jacoco is not None else ""

    def has_tests(self, file: str) -> None:
        """The runner told that a file holds tests; its path is below the project's folder, or absolute."""
        from agent.coverage.sources.v8 import V8

        for source in self._sources:
            if isinstance(source, V8) and self._project is not None:
                source.has_tests(self._project / file)

    def map_profile(self, data: str) -> list[Delta]:
        """The deltas of an ADD_SESSION_DATA. Raises AgentError for what no source can read. For a thread."""
        from agent.coverage.sources.v8 import V8

        return [delta for source in self._sources if isinstance(source, V8) for delta in source.of_session_data(data)]

    async def keep(self) -> None:
        """Write down what was seen since it was written last."""
        if self._is_kept or self.seen is None or self._kept is None:
            return
        self._is_kept = True
        entries = [(class_id, test, f"{probes:x}") for class_id, test, probes in self.seen.entries()]
        saved = msgspec.json.encode(SavedRun(self._digest, self.seen.folded, entries))
        try:
            await trio.to_thread.run_sync(release.write, self._kept, saved, 0o600)
        except OSError as err:
            self._is_kept = False  # it is tried again
            if self._keeps:
                log.error("coverage cannot be kept file=%s error=%s", self._kept, err)  # noqa: TRY400 - the run goes on
            self._keeps = False
        else:
            self._keeps = True

    def _resume(self, seen: Merged, kept: Path) -> None:
        """What was kept before, where the product is still the same. Runs in a thread."""
        whole = Catalog()
        whole.units = self.units()
        self._digest = whole.digest()
        try:
            saved = msgspec.json.decode(kept.read_bytes(), type=SavedRun)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as err:
            log.error("coverage of an earlier start is lost file=%s error=%s", kept, err)  # noqa: TRY400
            return
        if saved.digest != self._digest:
            log.warning("coverage of an earlier start is dropped, the product has changed file=%s", kept)
            return
        seen.folded = saved.folded
        seen.add(Delta(class_id, int(probes, 16), test) for class_id, test, probes in saved.entries)

    async def remove(self) -> None:
        """Let nothing count, and delete the folder, unless it stays."""
        await self.let_count(False)
        if not self._stays:
            await trio.to_thread.run_sync(partial(shutil.rmtree, self._folder, ignore_errors=True))

    def _make_room(self, need: int) -> bool:
        if self.seen is not None and not self.seen.folded:
            self.seen.fold()
        return self._budget.used + need <= self._budget.limit
