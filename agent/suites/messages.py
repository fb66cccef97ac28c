"""The suite document: what `suite.toml`, or the same tree as JSON, says about a suite.

The structs hold a checked document; agent/suites/document.py reads one and says what is wrong with it. Times are
seconds (0: no limit), sizes are bytes (a document may write "64MiB"; 0: no limit).

Source: protocols/suites.md, "The suite document".
"""

from typing import Literal, TypeAlias

import msgspec

Runner: TypeAlias = Literal["ava", "pytest", "tap", "command", "gator"]
CodeState: TypeAlias = Literal["passed", "failed", "blocked", "skipped"]  # what an exit code can mean

MiB = 1024 * 1024


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the suite's files come from: exactly one of `dir`, `archive` and `git`.

    `dir` is a folder. `archive` is a URL or path of a tar, tar.gz or zip, `sha256` its digest in hex. `git` is an https
    or ssh address, `ref` a branch, tag or commit, `depth` how many commits are fetched.
    """

    dir: str | None = None
    archive: str | None = None
    sha256: str | None = None
    git: str | None = None
    ref: str | None = None
    depth: int = 1


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a run may take.

    `stall` is the time without a new result, `test` one test's time, `grace` the wait after a signal. `output` and
    `test_output` are what is kept of the run's and of one test's output; `memory` and `processes` hold for the runner
    with all its children.
    """

    setup: float = 600
    run: float = 3600
    stall: float = 600
    test: float = 0
    grace: float = 10
    output: int = 64 * MiB
    test_output: int = 64 * 1024
    memory: int = 0
    processes: int = 0


class Requires(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine must have, else the run is refused. `runners` is as `{"ava": ">=6"}`, `disk` in bytes."""

    labels: tuple[str, ...] = ()
    runners: dict[str, str] = {}
    disk: int = 0


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """What is watched while the suite runs: paths of logs, names or files of rules for them, paths of files."""

    logs: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


class Polarion(msgspec.Struct, frozen=True, kw_only=True):
    """How the run is told to Polarion.

    `properties` are test run properties without their prefix `polarion-`, such as `{"testrun-type-id": "regression"}`.
    `cases` maps a test's `name` or `case` to the id of its work item.
    """

    project: str | None = None
    title: str | None = None
    template: str | None = None
    lookup: Literal["id", "name", "custom"] = "name"
    properties: dict[str, str] = {}
    cases: dict[str, str] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Who is told of the run. Without `polarion` the xUnit document has no Polarion properties."""

    mimir: bool = True
    polarize: bool = True
    polarion: Polarion | None = None


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """A checked suite document. Without `source` the files are in the document's folder.

    `cwd` is relative to the source, `files` are globs relative to `cwd`. `command` and the entries of `setup` and
    `teardown` are argv lists. `codes` maps exit codes of runner `command` to a state, over the usual ones.
    """

    id: str
    title: str = ""
    runner: Runner
    driver: Literal["tap", "events"] = "tap"
    source: Source | None = None
    cwd: str = "."
    files: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    env_pass: tuple[str, ...] = ()
    setup: tuple[tuple[str, ...], ...] = ()
    teardown: tuple[tuple[str, ...], ...] = ()
    limits: Limits = Limits()
    retries: int = 0
    min_tests: int = 1
    resumable: bool = False
    requires: Requires = Requires()
    watch: Watch = Watch()
    coverage: bool = False
    report: Report = Report()
    codes: dict[int, CodeState] = {}
