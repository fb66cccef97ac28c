"""What AVA does, scenario by scenario, and what must come of it: shared by the drivers' tests and by the real AVAs.

tests/data/ava/project holds the test files; tests/data/ava/<row>.tap and <row>.events are what AVA 7.0.0 wrote for them
on Node 20, to its standard output and to the observer's pipe (its folders are called /project there).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from agent.core.events import TestFinished
from agent.suites.messages import Suite
from agent.suites.runners.driver import DriverEvent

DATA = Path(__file__).parent / "data/ava"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """`both` are final records, `state[/kind] file › name[ xCOUNT]`; `tap` and `events` those that differ.

    `tap_race` is what a real AVA says besides, by TAP, in one run of hundreds.
    """

    name: str
    files: tuple[str, ...]
    args: tuple[str, ...] = ()
    code: int = 1
    both: str = ""
    tap: str = ""
    tap_race: str = ""
    events: str = ""
    stopped: str | None = None  # SIGINT was sent, for that reason

    def suite(self, driver: str) -> Suite:
        return Suite(
            id="rows", runner="ava", driver="events" if driver == "events" else "tap", files=self.files, args=self.args
        )

    def expected(self, driver: str) -> list[str]:
        own = self.events if driver == "events" else self.tap
        return sorted(line.strip() for line in (self.both + own).splitlines() if line.strip())

    def wire(self, driver: str) -> bytes:
        return (DATA / f"{self.name}.{driver}").read_bytes()


def final(told: Iterable[DriverEvent]) -> dict[str, TestFinished]:
    """The last word on each case. A correction must follow what it corrects."""
    records: dict[str, TestFinished] = {}
    for event in told:
        if isinstance(event, TestFinished):
            assert event.rev == (records[event.case].rev + 1 if event.case in records else 1), event.case
            records[event.case] = event
    return records


def shown(records: Iterable[TestFinished]) -> list[str]:
    """Records as the rows write them; a rest of unknown size has `x?`."""
    lines = []
    for record in records:
        kind = "" if record.kind == "test" else f"/{record.kind}"
        what = f"{record.file} › {record.name}" if record.file else record.name
        count = f" x{record.count or '?'}" if record.kind == "rest" else ""
        lines.append(f"{record.state}{kind} {what}{count}")
    return sorted(lines)


STRANGE = 'No tests found in stranger.js, make sure to import "ava" at the top of your test file'
MISSING = "Cannot find package 'not-installed-anywhere' imported from /project/crash-load.js"

# AVA's main process dies of process.exit() in its TAP reporter, now and then only after it has seen the worker's end.
_EXIT_SEEN = "blocked/crash crash-exit.js › crash-exit.js exited with a non-zero exit code: 3"

ROWS: Sequence[Row] = (
    Row(
        name="states",
        files=("states.js",),
        both="""
        passed states.js › passes
        passed states.js › passes and logs
        failed states.js › a wrong value
        failed states.js › a wrong value and a message
        failed states.js › throws
        failed states.js › throws what is no error
        failed states.js › rejects
        failed states.js › no assertion
        failed states.js › plan
        skipped states.js › skipped
        todo states.js › to be done
        passed states.js › known to fail, fails
        failed states.js › known to fail, passes
        passed states.js › prints what looks like results
        failed states.js › times out
        failed states.js › never settles
        failed states.js › a failed snapshot
        """,
    ),
    Row(
        name="titles",
        files=("titles.js",),
        both=f"""
        skipped titles.js › a real skip
        skipped titles.js › a skip # SKIP
        todo titles.js › a real todo
        todo titles.js › a todo # TODO
        passed titles.js › passes # SKIP
        passed titles.js › passes # SKIP because
        passed titles.js › passes # TODO
        failed titles.js › fails # TODO
        failed titles.js › fails # SKIP
        passed titles.js › logs # SKIP
        passed titles.js › white space everywhere
        passed titles.js › back\\slash \\# and # hash
        passed titles.js › red
        passed titles.js › žluťoučký kůň 🐎 漢字
        passed titles.js › a › b
        passed titles.js › 1..5
        failed titles.js › titles.js exited with a non-zero exit code: 1
        passed titles.js › titles.js exited due to SIGKILL
        failed titles.js › No tests found in titles.js
        failed titles.js › TypeError: thrown
        failed titles.js › uncaught-exception
        failed titles.js › before hook
        failed titles.js › beforeEach hook for nothing
        failed titles.js › hunting for before hook
        passed titles.js › {"x" * 1015}… (cut)
        """,
    ),
    Row(
        name="hook-before",
        files=("hook-before.js",),
        both="""
        skipped hook-before.js › third
        blocked/hook hook-before.js › before hook
        """,
        tap="blocked/rest hook-before.js › (not reported) x2",
        events="""
        blocked hook-before.js › first
        blocked hook-before.js › second
        """,
    ),
    Row(
        name="hook-each",
        files=("hook-each.js",),
        both="""
        passed hook-each.js › one
        blocked/hook hook-each.js › beforeEach hook for two
        passed hook-each.js › three
        blocked/hook hook-each.js › cleanup for three
        failed hook-each.js › beforeEach hook
        """,
        tap="blocked/rest hook-each.js › (not reported) x1",
        events="blocked hook-each.js › two",
    ),
    Row(
        name="hook-after",
        files=("hook-after.js",),
        both="""
        passed hook-after.js › works
        passed hook-after.js › works too
        blocked/hook hook-after.js › put it all away
        """,
    ),
    Row(
        name="crash-uncaught",
        files=("crash-uncaught.js",),
        both="""
        passed crash-uncaught.js › done before
        blocked/crash crash-uncaught.js › RangeError: out of nowhere
        """,
        tap="blocked/rest crash-uncaught.js › (not reported) x2",
        events="""
        blocked crash-uncaught.js › never ends
        blocked crash-uncaught.js › never starts
        """,
    ),
    Row(
        name="crash-nonerror",
        files=("crash-nonerror.js",),
        both="blocked/crash crash-nonerror.js › uncaught-exception\n",
        tap="blocked/rest crash-nonerror.js › (not reported) x1",
        events="blocked crash-nonerror.js › never ends",
    ),
    Row(
        name="crash-rejection",
        files=("crash-rejection.js",),
        both="""
        passed crash-rejection.js › leaves a rejection behind
        blocked/crash crash-rejection.js › Error: nobody cares
        """,
    ),
    Row(
        name="crash-load",
        files=("crash-load.js",),
        both=f"blocked/crash crash-load.js › Error [ERR_MODULE_NOT_FOUND]: {MISSING}",
    ),
    Row(
        name="crash-syntax",
        files=("crash-syntax.js",),
        both="blocked/crash crash-syntax.js › SyntaxError: missing ) after argument list",
    ),
    Row(
        name="crash-duplicate",
        files=("crash-duplicate.js",),
        both="blocked/crash crash-duplicate.js › Error: Duplicate test title: twice",
    ),
    Row(
        name="crash-exit",
        files=("crash-exit.js",),
        both="passed crash-exit.js › done before\n",
        tap="lost/rest (not reported) x?",
        tap_race=_EXIT_SEEN,
        events="""
        blocked/crash crash-exit.js › process.exit() was called in crash-exit.js
        blocked crash-exit.js › exits
        blocked crash-exit.js › never starts
        """,
    ),
    Row(
        name="crash-exit-early",
        files=("crash-exit.js", "good.js"),
        args=("--serial",),
        both="passed crash-exit.js › done before\n",
        tap="lost/rest (not reported) x?",
        tap_race=_EXIT_SEEN,
        events="""
        blocked/crash crash-exit.js › process.exit() was called in crash-exit.js
        blocked crash-exit.js › exits
        blocked crash-exit.js › never starts
        lost/crash AVA ended with exit code 1 before it was done: 1 of 2 files had not begun
        """,
    ),
    Row(
        name="crash-kill",
        files=("crash-kill.js",),
        args=("--no-worker-threads",),
        both="""
        passed crash-kill.js › done before
        blocked/crash crash-kill.js › crash-kill.js exited due to SIGKILL
        """,
        tap="blocked/rest crash-kill.js › (not reported) x2",
        events="""
        blocked crash-kill.js › kills
        blocked crash-kill.js › never starts
        """,
    ),
    Row(
        name="empty",
        files=("good.js", "empty.js"),
        code=0,
        both="""
        passed good.js › good
        blocked/crash empty.js › No tests found in empty.js
        """,
    ),
    Row(
        name="stranger",
        files=("stranger.js",),
        both=f"blocked/crash stranger.js › {STRANGE}",
    ),
    Row(
        name="fail-fast",
        files=("fast.js",),
        args=("--fail-fast",),
        both="failed fast.js › fails\n",
        tap="skipped/rest fast.js › (not reported) x15",
        events="\n".join(f"skipped fast.js › later {number}" for number in range(15)),
    ),
    Row(
        name="nothing",
        files=("nope.js",),
        both="blocked/crash AVA ended with exit code 1: no file or title matched, or no test was selected",
    ),
    Row(
        name="no-match",
        files=("good.js",),
        args=("--match=nothing",),
        both="blocked/crash AVA ended with exit code 1: no file or title matched, or no test was selected",
    ),
    Row(
        name="several",
        files=("good.js", "crash-load.js", "crash-uncaught.js", "hook-before.js", "stranger.js"),
        args=("--serial",),
        both=f"""
        passed good.js › good
        passed crash-uncaught.js › done before
        blocked/crash crash-uncaught.js › RangeError: out of nowhere
        blocked/crash crash-load.js › Error [ERR_MODULE_NOT_FOUND]: {MISSING}
        blocked/crash stranger.js › {STRANGE}
        skipped hook-before.js › third
        blocked/hook hook-before.js › before hook
        """,
        tap="""
        blocked/rest hook-before.js › (not reported) x2
        blocked/rest (not reported) x2
        """,
        events="""
        blocked hook-before.js › first
        blocked hook-before.js › second
        blocked crash-uncaught.js › never ends
        blocked crash-uncaught.js › never starts
        """,
    ),
    Row(
        name="prefixes",
        files=("many/alpha.test.js", "./many/__tests__/test-beta.spec.js"),
        both="""
        passed many/alpha.test.js › same
        failed many/alpha.test.js › alpha
        passed many/__tests__/test-beta.spec.js › same
        skipped many/__tests__/test-beta.spec.js › beta
        """,
    ),
    Row(
        name="globs",
        files=("many/**/*.js",),
        tap="""
        passed alpha › same
        failed alpha › alpha
        passed beta › same
        skipped beta › beta
        """,
        events="""
        passed many/alpha.test.js › same
        failed many/alpha.test.js › alpha
        passed many/__tests__/test-beta.spec.js › same
        skipped many/__tests__/test-beta.spec.js › beta
        """,
    ),
    Row(
        name="hang",
        files=("hang.js", "good.js"),
        stopped="limits.stall: no result for 600 s",
        both="""
        passed good.js › good
        passed hang.js › done before
        """,
        tap="aborted/rest (not reported) x2",
        events="""
        aborted hang.js › hangs
        aborted hang.js › never starts
        """,
    ),
)
