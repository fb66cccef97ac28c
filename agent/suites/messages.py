"""The suite document: what `suite.toml`, or the same tree as JSON, says about a suite; and the result document.

The structs hold a checked document; agent/suites/document.py reads one and says what is wrong with it. Times are
seconds (0: no limit), sizes are bytes (a document may write "64MiB"; 0: no limit). `msgspec.to_builtins(suite)` is the
tree again.

Source: protocols/suites.md, "The suite document", "Records, events, result".
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from agent.core.config import GIB, MIB, Size
from agent.core.events import Artifact, Counts, State, Verdict, Warned

Runner: TypeAlias = Literal["ava", "pytest", "tap", "command", "gator"]
CodeState: TypeAlias = Literal["passed", "failed", "blocked", "skipped"]  # what an exit code can mean

_YEAR_S = 366 * 86_400

# `$(?!\n)`, since Python's `$` also stands before a last line break.
Id = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,128}$(?!\n)", description="1 to 128 of the characters A-Z a-z 0-9 . _ -"),
]
Title = Annotated[str, msgspec.Meta(max_length=1024)]
Text = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"^[^\x00]*$", description="at most 4096 characters")]
Arg = Annotated[
    str, msgspec.Meta(max_length=65_536, pattern=r"^[^\x00]*$", description="at most 65536 characters and no NUL")
]
Argv = Annotated[tuple[Arg, ...], msgspec.Meta(min_length=1, max_length=4096)]
Args = Annotated[tuple[Arg, ...], msgspec.Meta(max_length=4096)]
Paths = Annotated[tuple[Text, ...], msgspec.Meta(max_length=4096)]
EnvName = Annotated[
    str, msgspec.Meta(max_length=256, pattern=r"^[^=\x00]+$", description="a name without = and NUL, as HTTP_PROXY")
]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=_YEAR_S)]
ExitCode = Annotated[str, msgspec.Meta(pattern=r"^(\d|[1-9]\d|1\d\d|2[0-4]\d|25[0-5])$(?!\n)", description="0 to 255")]


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Where the suite's files come from: exactly one of `dir`, `archive` and `git`.

    `dir` is a folder. `archive` is a URL or path of a tar, tar.gz or zip, `sha256` its digest in hex. `git` is an https
    or ssh address, `ref` a branch, tag or commit, `depth` how many commits are fetched.
    """

    dir: Text | None = None
    archive: Text | None = None
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Fa-f]{64}$(?!\n)", description="64 hex digits")] | None = None
    git: Text | None = None
    ref: Text | None = None
    depth: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a run may take.

    `stall` is the time without a new result, `test` one test's time, `grace` the wait after a signal. `output` and
    `test_output` are what is kept of the run's and of one test's output (`test_output` 0: nothing of it); `memory` and
    `processes` hold for the runner with all its children. 0, or "" for `memory`: no limit.
    """

    setup: Seconds = 600
    run: Seconds = 3600
    stall: Seconds = 600
    test: Seconds = 0
    grace: Seconds = 10
    output: Annotated[Size, msgspec.Meta(ge=0)] = 64 * MIB
    test_output: Annotated[Size, msgspec.Meta(ge=0, le=16 * MIB)] = 64 * 1024
    memory: Annotated[Size, msgspec.Meta(ge=0)] | Literal[""] = ""
    processes: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class Requires(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the machine must have, else the run is refused. `runners` is as `{"ava": ">=6"}`, `disk` in bytes."""

    labels: Paths = ()
    runners: dict[Id, Text] = {}
    disk: Annotated[Size, msgspec.Meta(ge=0, le=1024 * 1024 * GIB)] = 0


class Watch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is watched while the suite runs: paths of logs, names or files of rules for them, paths of files."""

    logs: Paths = ()
    rules: Paths = ()
    files: Paths = ()


class Polarion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the run is told to Polarion.

    `properties` are test run properties without their prefix `polarion-`, such as `{"testrun-type-id": "regression"}`;
    those called `parameter-<name>` go to every test. `cases` maps a test's `name` or `case` to the id of its work item.
    """

    project: Id | None = None
    title: Title | None = None
    template: Title | None = None
    lookup: Literal["id", "name", "custom"] = "name"
    properties: dict[Id, Title | bool | int] = {}
    cases: dict[str, Title] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Who is told of the run. Without `polarion` the xUnit document has no Polarion properties."""

    mimir: bool = True
    polarize: bool = True
    polarion: Polarion | None = None


class Suite(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A checked suite document. Without `source` the files are in the document's folder.

    `cwd` is relative to the source, `files` are globs relative to `cwd`. `command` and the entries of `setup` and
    `teardown` are argv lists. `codes` maps exit codes of runner `command` to a state, over the usual ones.
    """

    id: Id
    title: Title = ""
    runner: Runner
    driver: Literal["tap", "events"] = "tap"
    source: Source | None = None
    cwd: Text = "."
    files: Paths = ()
    match: Paths = ()
    command: Args = ()
    args: Args = ()
    env: dict[EnvName, Arg] = {}
    env_pass: tuple[EnvName, ...] = ()
    setup: tuple[Argv, ...] = ()
    teardown: tuple[Argv, ...] = ()
    limits: Limits = Limits()
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    min_tests: Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] = 1
    resumable: bool = False
    requires: Requires = Requires()
    watch: Watch = Watch()
    coverage: bool = False
    report: Report = Report()
    codes: dict[ExitCode, CodeState] = {}


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A test, hook, crash or rest in the result document: the last word of a `TestFinished` of the run.

    `count`, how many tests a rest stands for (null: not even that is known), is there for a rest alone.
    Source: protocols/suites.md, "Records, events, result".
    """

    case: str
    name: str
    file: str | None
    kind: Literal["test", "hook", "crash", "rest"]
    state: State
    started: float | None
    ended: float
    duration: float | None
    attempt: int
    message: str | None
    details: dict[str, Any]
    at: str | None
    log: tuple[str, ...]
    output: str
    known_failure: bool
    rev: int
    count: int | msgspec.UnsetType | None = msgspec.UNSET


class ResultDocument(msgspec.Struct, frozen=True, kw_only=True):
    """`result.json`, and what `agent demo --json` prints: one line. `started`, `ended` are epoch seconds.

    Source: protocols/suites.md, "Records, events, result".
    """

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
    tests: tuple[ResultRecord, ...]
    warnings: tuple[Warned, ...]
    artifacts: dict[str, Artifact]
