"""What travels between Gator's tiers, wrappers and tasks: payloads of each action, one set per dialect.

    D0    PyPI gator-eda 0.1: D1 with `id` for `ident`
    D1    the seed
    D2    Gator main, 2024 on: numbers for results, a summary of its own

Unknown keys are ignored everywhere. What both forms of a key can be is told at the struct; dialects.py translates.

Source: seeds/gator-websocket-api.md; protocols/gator.md, "The wire", "Dialects", "Direction".
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

Dialect: TypeAlias = Literal["d0", "d1", "d2", "emissary"]  # the last: D2, and what only we understand
State: TypeAlias = Literal["PENDING", "LAUNCHED", "STARTED", "COMPLETE"]
Result: TypeAlias = Literal["UNKNOWN", "SUCCESS", "FAILURE", "ABORTED"]
Severity: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
Number: TypeAlias = int | float
Path: TypeAlias = tuple[str, ...]  # idents, from the one who tells it down to a job

STATES: Final[tuple[State, ...]] = ("PENDING", "LAUNCHED", "STARTED", "COMPLETE")  # D2's numbers
RESULTS: Final[tuple[Result, ...]] = ("UNKNOWN", "SUCCESS", "FAILURE", "ABORTED")
SEVERITIES: Final[dict[Severity, int]] = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
MAX_MESSAGE_IN: Final = 16 * 1024 * 1024  # bytes
# Real peers take at most 1 MiB a message.
MAX_PATHS: Final = 1000  # entries of failed_ids and running_ids
MAX_PATH_TEXT: Final = 100_000  # characters of all of these
MAX_METRICS: Final = 1000  # names of a task, and of what one report tells
MAX_TIME: Final = 253_402_300_800  # epoch seconds: the year 10,000
MAX_VALUE: Final = 1e300  # of a metric: sums of greater ones are no numbers
RESERVED: Final = ("msg_", "sub_")  # beginnings of metrics' names that are counted by the layers themselves

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what every reader of JSON has exactly


class Log(msgspec.Struct, frozen=True):
    """`log`. An unknown severity means INFO, a missing timestamp (epoch seconds) now, and so does an impossible one."""

    message: str
    severity: Any = "INFO"
    timestamp: Number | None = None

    @property
    def at(self) -> float | None:
        return float(self.timestamp) if self.timestamp is not None and 0 <= self.timestamp < MAX_TIME else None


class Metric(msgspec.Struct, frozen=True):
    """`metric`: the last value of a name counts."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    value: (
        Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
        | Annotated[float, msgspec.Meta(ge=-MAX_VALUE, le=MAX_VALUE)]
    )


class Named(msgspec.Struct, frozen=True):
    """What `spec`, `register`, `update` and `complete` have in common. D0 says `id`."""

    ident: str | None = None
    id: str | None = None
    emissary: dict[str, Any] | None = None
    resume: bool = False


class Register(msgspec.Struct, frozen=True):
    """`register`: where the child's own port is. `resume`: it was here before (ours)."""

    server: str
    resume: bool = False


class Report(msgspec.Struct, frozen=True):
    """`update` and `complete` of D0 and D1. The `sub_*` stand beside the metrics, in them, or both."""

    metrics: dict[str, Number]
    sub_total: Count | None = None
    sub_active: Count | None = None
    sub_passed: Count | None = None
    sub_failed: Count | None = None
    failed_ids: list[list[str]] = []


class Summary2(msgspec.Struct, frozen=True):
    """D2's summary: jobs and tiers counted together, lists of paths to leaf jobs."""

    metrics: dict[str, Number]
    failed_ids: list[list[str]] = []
    running_ids: list[list[str]] = []


class Exact(msgspec.Struct, frozen=True):
    """What layers of ours tell beside: the jobs alone, as (total, active, passed, failed)."""

    jobs: tuple[Count, Count, Count, Count] | None = None


class Report2(msgspec.Struct, frozen=True):
    """`update` and `complete` of D2."""

    summary: Summary2
    result: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    code: int = 0
    emissary: Exact = Exact()


class Complete(msgspec.Struct, frozen=True):
    """What D0's and D1's `complete` has beside the report."""

    result: str
    code: int


class GetMessages(msgspec.Struct, frozen=True):
    """`get_messages`: log entries by `uid`; D1 takes `after` as the first, D2 as the last before."""

    after: Annotated[int, msgspec.Meta(ge=0, lt=2**63 - 1)] = 0  # SQLite's numbers
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10


class Children(msgspec.Struct, frozen=True):
    """`children`: those behind `after`, at most `limit` of them (ours: a message takes some thousand)."""

    after: str | None = None
    limit: Count | None = None


class Resolve(msgspec.Struct, frozen=True):
    """`resolve`: D1 says `path`, D2 `root_path`, `nest_path` and `depth` levels of children."""

    path: list[str] | None = None
    root_path: list[str] = []
    nest_path: list[str] = []
    depth: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


class Options(msgspec.Struct, frozen=True):
    """`update_scheduler_opts`: more slots for a tier."""

    options: dict[str, Any]


class ApiJob(msgspec.Struct, frozen=True):
    """One layer as D2 tells it. Times are epoch seconds, or null."""

    uidx: int
    root: int
    path: list[str]
    ident: str
    status: int
    metrics: dict[str, Number]
    server_url: str
    db_file: str
    started: float | None
    updated: float | None
    stopped: float | None
    result: int
    owner: None
    children: "list[ApiJob]"
    expected_children: int


class ChildState(msgspec.Struct, frozen=True):
    """One child as the seed's `children` tells it. Times are whole epoch seconds, unset ones 0."""

    state: State
    result: Result
    server: str
    metrics: dict[str, Number]
    exitcode: int
    started: int
    updated: int
    completed: int
    pruned: bool = False
