"""What a layer tells of itself and of all below it: how many jobs and tiers, their metrics, which failed or run now.

Jobs and tiers are counted apart and exactly; the dialects differ in which of the two they tell.

Source: protocols/gator.md, "Dialects" (sums), "Decisions" (sums).
"""

from collections.abc import Iterable, Mapping
from itertools import islice

import msgspec

from agent.gator.messages import MAX_PATHS, Number, Path
from agent.gator.spec import Size


class Sums(msgspec.Struct, frozen=True):
    """How many are expected, run, passed, failed. What is pruned is in none."""

    total: int = 0
    active: int = 0
    passed: int = 0
    failed: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.total + other.total,
            self.active + other.active,
            self.passed + other.passed,
            self.failed + other.failed,
        )

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(
            self.total - other.total,
            self.active - other.active,
            self.passed - other.passed,
            self.failed - other.failed,
        )


class Summary(msgspec.Struct, frozen=True):
    """`metrics` are those of messages (`msg_*`) and the tasks' own. Paths begin with the layer's own ident."""

    jobs: Sums = Sums()
    tiers: Sums = Sums()
    metrics: Mapping[str, Number] = {}
    failed: tuple[Path, ...] = ()
    running: tuple[Path, ...] = ()


def expected(size: Size) -> Summary:
    """What is known of a child that has not told anything yet."""
    return Summary(jobs=Sums(total=size.jobs), tiers=Sums(total=size.tiers))


def job_summary(ident: str, metrics: Mapping[str, Number], *, passed: bool | None) -> Summary:
    """A wrapper's: one job that runs (`passed` None), or has ended."""
    path = ((ident,),)
    return Summary(
        jobs=Sums(1, int(passed is None), int(passed is True), int(passed is False)),  # JSON has other words for bools
        metrics=metrics,
        failed=path if passed is False else (),
        running=path if passed is None else (),
    )


def given_up(size: Size, ident: str, last: Summary) -> Summary:
    """A child's that was lost: what had passed has, all else of it failed. A tier names those that ran, too."""
    jobs = Sums(size.jobs, 0, last.jobs.passed, max(size.jobs - last.jobs.passed, 0))
    tiers = Sums(size.tiers, 0, last.tiers.passed, max(size.tiers - last.tiers.passed, 0))
    failed = (*last.failed, *last.running) if size.tiers else ()
    return Summary(jobs=jobs, tiers=tiers, metrics=last.metrics, failed=failed or ((ident,),))


class Total:
    """The running sum of many summaries, one for each child, kept up as they change."""

    def __init__(self) -> None:
        self.jobs, self.tiers = Sums(), Sums()
        self.metrics: dict[str, Number] = {}
        self._of: dict[str, Summary] = {}
        self._failed: dict[str, None] = {}
        self._running: dict[str, None] = {}

    def put(self, ident: str, new: Summary | None) -> None:
        """What a child tells now; None: it counts no more."""
        old = self._of.pop(ident, None)
        if old is not None:
            self.jobs, self.tiers = self.jobs - old.jobs, self.tiers - old.tiers
            for name, value in old.metrics.items():
                self.metrics[name] -= value
        self._failed.pop(ident, None)
        self._running.pop(ident, None)
        if new is None:
            return
        self._of[ident] = new
        self.jobs, self.tiers = self.jobs + new.jobs, self.tiers + new.tiers
        for name, value in new.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + value
        if new.failed:
            self._failed[ident] = None
        if new.running:
            self._running[ident] = None

    def get(self, ident: str) -> Summary:
        """What a child told last."""
        return self._of[ident]

    def failed(self, above: str) -> tuple[Path, ...]:
        """The failed jobs below `above`, at most MAX_PATHS."""
        return _paths(above, (self._of[ident].failed for ident in self._failed))

    def running(self, above: str) -> tuple[Path, ...]:
        """The jobs that run, likewise."""
        return _paths(above, (self._of[ident].running for ident in self._running))


def _paths(above: str, lists: Iterable[tuple[Path, ...]]) -> tuple[Path, ...]:
    return tuple(islice(((above, *path) for paths in lists for path in paths), MAX_PATHS))
