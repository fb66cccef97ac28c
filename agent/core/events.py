"""The vocabulary of the bus and the journal: one struct for each kind of thing that happens on the machine.

An event's `kind` is its struct's name. It is shown as `{"seq", "at", "kind", "run"?, "test"?, "data": {...}}`
(ARCHITECTURE.md, "The way of the data"); the struct's fields are `data`. The kind stands outside `data`, because a
test record has a field of that name.

Source: protocols/settings.md, "Names that several folders share"; protocols/suites.md, "Records, events, result";
protocols/emissary.md, "Seneschal", "Mimir", "Polarize", "Entitlement and file monitor"; protocols/logs.md 2.3.
Events of coverage are in core/covered.py, those of what was learned from logs in core/learned.py.
"""

from typing import Any, Literal, TypeAlias, get_args

import msgspec

from agent.core.covered import (
    CoverageArmed,
    CoverageDisarmed,
    CoverageLost,
    CoverageReport,
    CoverageSession,
    CoverageWarning,
)
from agent.core.event import Event
from agent.core.learned import LogDrift, LogForecast, LogNovelty, LogRate

State = Literal["passed", "failed", "blocked", "skipped", "todo", "aborted", "lost"]
Verdict = Literal["lost", "aborted", "failed", "blocked", "passed", "skipped"]
RunState = Literal["received", "refused", "preparing", "running", "stopping", "reporting", "done"]
ReservationState = Literal["available", "reserved", "running", "returned", "lost"]


class AgentStarted(Event, frozen=True, kw_only=True):
    """The service is up. `instance` is the store's uuid: another value means another store.

    Alerts of a process before this one are over; what still is so is raised again.
    """

    version: str
    ident: str
    instance: str


class RoleChanged(Event, frozen=True, kw_only=True):
    """A role went to another state of core/supervise.py. `error` tells of its last failure."""

    name: str
    state: str
    restarts: int
    error: str | None = None


class LinkChanged(Event, frozen=True, kw_only=True):
    """An outgoing link went to another state. `error` says why it is not ready."""

    name: str
    state: str
    error: str | None = None


class Alert(Event, frozen=True, kw_only=True):
    """Something that a person must hear of, until AlertCleared with the same code. `since` is epoch seconds."""

    code: str
    text: str
    remedy: str
    since: float


class AlertCleared(Event, frozen=True, kw_only=True):
    """The alert of that code is over."""

    code: str


class Logged(Event, frozen=True, kw_only=True):
    """A client's message, tagged with the run and the test that were active when these were unambiguous.

    `timestamp` is the client's own, epoch seconds. Source: seeds/gator-websocket-api.md, "Log".
    """

    severity: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    message: str
    timestamp: float | None = None
    run: str | None = None
    test: str | None = None


class RunReceived(Event, frozen=True, kw_only=True):
    """A run was ordered and is on disk. `suite` is the document as it came; `base` the folder that holds it, if any.

    `origin` is who ordered it: "seneschal", "control", "demo". `deadline` is epoch seconds.
    """

    run: str
    suite: dict[str, Any]
    origin: str
    base: str | None = None
    reservation: str | None = None
    deadline: float | None = None


class RunRefused(Event, frozen=True, kw_only=True):
    """The run will not start. `reason` begins with busy draining bad_suite no_runner labels space or deadline."""

    run: str
    reason: str
    origin: str
    reservation: str | None = None


class RunStarted(Event, frozen=True, kw_only=True):
    """The run has its slot: it is accepted, and is prepared from now on. `source` names where the suite came from.

    `polarion` maps names or cases of tests to their work items. `attempt` is 2 and more for a resumed run.
    """

    run: str
    suite: str
    title: str
    runner: str
    driver: str
    source: str
    origin: str
    slot: int
    reservation: str | None = None
    polarion: dict[str, str] = msgspec.field(default_factory=dict)
    to_mimir: bool = True
    to_polarize: bool = True
    attempt: int = 1


class RunChanged(Event, frozen=True, kw_only=True):
    """The run went to another state of the table in protocols/suites.md, "A run"."""

    run: str
    state: RunState
    reason: str | None = None


class RunRecalled(Event, frozen=True, kw_only=True):
    """The Seneschal must be told again how a run stands: it ordered it once more, or has one that we do not know.

    Source: protocols/emissary.md, "Run states on the agent".
    """

    run: str
    why: str


class TestsSelected(Event, frozen=True, kw_only=True):
    """The runner will run these tests, by `file` and `name` of their records: what is left of them can be named."""

    run: str
    suite: str
    tests: tuple[tuple[str | None, str], ...]
    attempt: int = 1


class TestStarted(Event, frozen=True, kw_only=True):
    """A test began, as its runner told. `started` is epoch seconds."""

    run: str
    suite: str
    case: str
    name: str
    file: str | None
    started: float
    attempt: int = 1

    @property
    def test(self) -> str:
        """The test's name in streams and in Mimir: `run:case`."""
        return f"{self.run}:{self.case}"


class TestFinished(Event, frozen=True, kw_only=True):
    """A record: a test (or hook, crash, rest) has its state. A correction has the same `case` and a higher `rev`.

    `started`, `ended` are epoch seconds by the agent's clock, `duration` seconds by the runner's. `count` is the number
    of unreported tests of a `rest` (null: not even that is known).
    Source: protocols/suites.md, "Records, events, result".
    """

    run: str
    suite: str
    case: str
    name: str
    file: str | None
    kind: Literal["test", "hook", "crash", "rest"] = "test"
    state: State
    started: float | None = None
    ended: float
    duration: float | None = None
    attempt: int = 1
    message: str | None = None
    details: dict[str, Any] = msgspec.field(default_factory=dict)
    at: str | None = None
    log: tuple[str, ...] = ()
    output: str = ""
    known_failure: bool = False
    count: int | None = None
    rev: int = 1

    @property
    def test(self) -> str:
        """The test's name in streams and in Mimir: `run:case`."""
        return f"{self.run}:{self.case}"


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How many tests ended in which state, over the kinds `test` and `rest`."""

    total: int = 0
    passed: int = 0
    failed: int = 0
    blocked: int = 0
    skipped: int = 0
    todo: int = 0
    aborted: int = 0
    lost: int = 0


class Warned(msgspec.Struct, frozen=True):
    """A warning in a result document."""

    code: str
    text: str


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the run's folder. `path` is absolute, `size` in bytes."""

    path: str
    sha256: str
    size: int


class SuiteFinished(Event, frozen=True, kw_only=True):
    """The run is over: the result document without `tests`. `started`, `ended` are epoch seconds."""

    run: str
    suite: str
    runner: str
    driver: str
    verdict: Verdict
    result: Literal["SUCCESS", "FAILURE", "ABORTED"]
    code: int | None
    signal: str | None
    reason: str | None
    started: float
    ended: float
    counts: Counts
    warnings: tuple[Warned, ...] = ()
    artifacts: dict[str, Artifact] = msgspec.field(default_factory=dict)


class SlotsChanged(Event, frozen=True, kw_only=True):
    """How many slots are free, of how many; with `draining` none is offered."""

    free: int
    total: int
    draining: bool


class ReservationChanged(Event, frozen=True, kw_only=True):
    """An offer of a slot went to another state. `id` is `ident/slot/n`; times are epoch seconds."""

    id: str
    state: ReservationState
    holder: str | None = None
    run: str | None = None
    lease_until: float | None = None
    available_at: float | None = None
    reserved_at: float | None = None
    running_at: float | None = None
    returned_at: float | None = None
    recovered_at: float | None = None


class Reloaded(Event, frozen=True, kw_only=True):
    """The settings were read again: what a peer refused is offered to it once more."""


class ImportFinished(Event, frozen=True, kw_only=True):
    """The final report of a run was imported, or not. `unmatched`: tests that the importer knows no work item for."""

    run: str
    mode: str
    outcome: Literal["passed", "partial", "failed", "unknown"]
    unmatched: tuple[str, ...] = ()
    jobs: tuple[int, ...] = ()
    testrun_url: str | None = None
    log_url: str | None = None
    reason: str | None = None


class FileChanged(Event, frozen=True, kw_only=True):
    """A watched file or directory is not as it was. Of a deleted one, all that it was is null.

    `from` is where a moved one stood before; what moved with its folder is told too, without `owner` and `sha256`,
    which are as they were told. `mtime` is epoch seconds, `mode` as git writes it ("100644", "040755"), `owner`
    "user:group". Large files and those that cannot be read have no `sha256`. `content` (base64 in JSON) is there where
    it was asked for; where it is not, `no_content` says why: the file is not below files.content_allow, is a private
    key, has more than 704 KiB (more does not fit a message of 1 MiB), or cannot be read. `run` is the run whose suite
    watches the file.

    Source: protocols/emissary.md, "Entitlement and file monitor".
    """

    path: str
    from_: str | None = msgspec.field(default=None, name="from")
    what: Literal["created", "modified", "deleted", "moved", "attributes"]
    size: int | None = None
    mtime: float | None = None
    mode: str | None = None
    owner: str | None = None
    sha256: str | None = None
    content: bytes | None = None
    no_content: Literal["not_allowed", "private_key", "too_big", "unreadable"] | None = None
    run: str | None = None


class FileGap(Event, frozen=True, kw_only=True):
    """Changes at or below `path` may have gone unseen, for the reason in `why`; what is there now is told after it."""

    path: str
    why: str
    run: str | None = None


class EntitlementChanged(Event, frozen=True, kw_only=True):
    """The machine's entitlement status: at the start, and whenever it is another one.

    `status` is the number of protocols/emissary.md, "Entitlement and file monitor" (-1 unknown to 5 registration
    required), `name` its word; `raw` is what the source said, perhaps translated; `previous` is the status before.
    """

    status: int
    name: str
    raw: str
    source: str
    previous: int | None = None


class LogAnchor(msgspec.Struct, frozen=True):
    """A line that a rule's `until` found; `offset` is where it begins in its file."""

    offset: int
    text: str


class LogAround(msgspec.Struct, frozen=True, kw_only=True):
    """What stands before a match: anchors, nearest first; lines, oldest first, of which `elided` were left out.

    `found` is false when no chain of anchors fits in the `looked` bytes before the match. `cut`: there was more before,
    that cannot be read any more (journal and kernel: only the last lines are remembered). `until` gave up on
    `limit_errors` lines, of which nobody knows whether they match; after 100 the search ends.
    """

    found: bool
    anchors: tuple[LogAnchor, ...]
    before: tuple[str, ...]
    elided: int
    looked: int
    cut: bool = False
    limit_errors: int = 0


class LogMatched(Event, frozen=True, kw_only=True):
    """A rule matched a line. `offset` is where the line begins, `length` its bytes without its end.

    `id` is the same whenever the same line is matched again by the same rule. Text is UTF-8; other bytes are shown as
    `\\xNN`. `suppressed` matches of the rule were dropped by its rate before this one. `run` and `test` were active.

    Source: protocols/logs.md 2.3.
    """

    id: str
    path: str
    generation: int
    offset: int
    length: int
    line: int | None = None
    rule: str
    severity: Literal["debug", "info", "notice", "warning", "error", "critical"]
    class_: str | None = msgspec.field(default=None, name="class")
    class_by: str | None = None
    confidence: float | None = None
    template: int | None = None
    text: str
    captures: dict[str, str | None] = msgspec.field(default_factory=dict)
    count: int = 1
    suppressed: int = 0
    flags: tuple[Literal["partial", "window", "nul", "invalid_utf8"], ...] = ()
    context: LogAround | None = None
    run: str | None = None
    test: str | None = None


class LogContext(Event, frozen=True, kw_only=True):
    """What came behind a match, by its id in `match`: the lines `after` it, and the multi-line `record` it is in.

    `count` lines of the record matched the rule.
    """

    path: str
    match: str
    after: tuple[str, ...] = ()
    record: tuple[str, ...] = ()
    count: int = 1
    run: str | None = None
    test: str | None = None


class LogSuppressed(Event, frozen=True, kw_only=True):
    """A rule's rate dropped `count` matches since it was told last; the offsets are those of their lines."""

    path: str
    rule: str
    count: int
    first_offset: int
    last_offset: int


class LogSource(Event, frozen=True, kw_only=True):
    """What became of a log that is followed. `generation` counts the files that stood at the path."""

    path: str
    what: Literal["found", "rotated", "truncated", "replaced", "removed", "unreadable", "recovered", "lagging", "limit"]
    generation: int
    detail: str = ""


class LogGap(Event, frozen=True, kw_only=True):
    """Bytes of a log that were not matched; with `to` null possibly so, and nobody knows how many."""

    path: str
    generation: int
    from_: int = msgspec.field(name="from")
    to: int | None
    why: str


class MonitorStep(Event, frozen=True, kw_only=True):
    """A planned step of a monitor's run has its state: one for each step and run, whatever happens.

    `ms` is milliseconds, by the monitor's clock or ours; `started_at`, `ended_at` are epoch seconds, null for what
    never began. `rc`, `signal` and the end of stderr tell of a process that ended when it should not.

    Source: protocols/monitors.md, "Results".
    """

    monitor: str
    run: str
    step: str
    state: Literal["ok", "error", "timeout", "crashed", "protocol_error", "not_run"]
    ms: float | None = None
    timed_by: Literal["monitor", "orchestrator"] | None = None
    started_at: float | None = None
    ended_at: float | None = None
    text: str | None = None
    cause: str | None = None
    metadata: dict[str, str | float] = msgspec.field(default_factory=dict)
    metadata_raw: str | None = None
    rc: int | None = None
    signal: str | None = None
    stderr_tail: str | None = None


class MonitorRun(Event, frozen=True, kw_only=True):
    """A run of a monitor is over. `ended_by` is the rung of the ladder that ended it, null: it was never started."""

    monitor: str
    run: str
    ended_by: Literal["self", "exit", "eof", "term", "kill"] | None
    rc: int | None
    signal: str | None
    dialect: str | None
    stray_results: int
    dropped_bytes: int
    duration_ms: int


class MonitorLog(Event, frozen=True, kw_only=True):
    """A line of a monitor, from its log messages, its stderr, or what is no message (noise)."""

    monitor: str
    run: str
    step: str | None
    source: Literal["noise", "log", "stderr", "agent"]
    level: Literal["debug", "info", "warning", "error"]
    text: str


class MonitorSkipped(Event, frozen=True, kw_only=True):
    """Ticks of a monitor that were left out: it still ran or waited, or it is given a rest."""

    monitor: str
    reason: Literal["overlap", "backoff"]
    count: int


class MonitorOrphan(Event, frozen=True, kw_only=True):
    """Processes of a run that outlived SIGKILL."""

    monitor: str
    run: str
    pids: tuple[int, ...]


class LogRules(Event, frozen=True, kw_only=True):
    """The rules of the log monitor were read, at its start and at each reload. `slow` ones run on every line."""

    rules: int
    slow: tuple[str, ...]


AnyEvent: TypeAlias = (
    AgentStarted
    | RoleChanged
    | LinkChanged
    | Alert
    | AlertCleared
    | Logged
    | RunReceived
    | RunRefused
    | RunStarted
    | RunChanged
    | RunRecalled
    | TestsSelected
    | TestStarted
    | TestFinished
    | SuiteFinished
    | SlotsChanged
    | ReservationChanged
    | Reloaded
    | ImportFinished
    | FileChanged
    | FileGap
    | EntitlementChanged
    | LogMatched
    | LogContext
    | LogSuppressed
    | LogSource
    | LogGap
    | LogForecast
    | LogDrift
    | LogNovelty
    | LogRate
    | LogRules
    | MonitorStep
    | MonitorRun
    | MonitorLog
    | MonitorSkipped
    | MonitorOrphan
    | CoverageArmed
    | CoverageDisarmed
    | CoverageSession
    | CoverageWarning
    | CoverageLost
    | CoverageReport
)

KINDS: dict[str, type[AnyEvent]] = {kind.__name__: kind for kind in get_args(AnyEvent)}


class Recorded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A committed event as it is shown: in streams, in the journal's readers, in `agent ctl watch`.

    `seq` is the journal's number, `at` epoch seconds; `data` is the event's struct as JSON, not yet decoded.
    """

    seq: int
    at: float
    kind: str
    run: str | None = None
    test: str | None = None
    data: msgspec.Raw


def scope(event: AnyEvent) -> tuple[str | None, str | None]:
    """The run and the test an event belongs to, for its envelope."""
    return getattr(event, "run", None), getattr(event, "test", None)


def of_all_attempts(case: str, attempt: int) -> str:
    """What the cases of all attempts of a test have in common: `file › name` of the second's `file › name@2`."""
    return case.removesuffix(f"@{attempt}") if attempt > 1 else case


def decode(kind: str, data: bytes | msgspec.Raw) -> AnyEvent:
    """Read an event back from its kind and its `data`.

    Raises msgspec.DecodeError for broken JSON, msgspec.ValidationError for fields that do not fit, KeyError for a kind
    that this version does not know.
    """
    return msgspec.json.decode(data, type=KINDS[kind])
