"""The payloads of the Seneschal link, both ways. Times are epoch seconds, `lease` and `leases` seconds from now.

Source: protocols/emissary.md, "Seneschal".
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from agent.core.events import Counts, RunState, Verdict

MAX_SUITE = 256 * 1024  # bytes of a suite document in `run`; larger sources come by archive or git
OFFER_LEASE_S = 60.0  # how long an `available` holds
RUN_LEASE_S = 600.0  # how long a run is the agent's without an `update` that names it

RunId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$(?!\n)")]
Ident: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,128}$(?!\n)")]
Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]
Result: TypeAlias = Literal["SUCCESS", "FAILURE", "ABORTED"]
Severity: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what every reader of JSON has exactly
Heard: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**48)]  # numbers go on above it: there has to be room


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """How one run stands. `test` is the one that runs now, `since` when it or the state began."""

    run: RunId
    state: RunState
    since: float
    test: str | None = None


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """`register`. `server` is the control URL; `instance` the store's uuid; `runners` {name: version}."""

    ident: Ident
    server: str
    version: str
    instance: Text
    slots: Count
    profile: dict[str, Any] = {}
    labels: tuple[str, ...] = ()
    runners: dict[str, str] = {}
    runs: tuple[RunReport, ...] = ()


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `register`. `last_seq` is the highest owed delivery it has; `runs` those it believes to be here.

    It wants an `update` every `heartbeat` seconds, and is given up when nothing of it comes for `deadline` seconds.
    """

    session: str
    time: float
    last_seq: Heard
    heartbeat: Annotated[float, msgspec.Meta(ge=0.1)] = 5
    deadline: Annotated[float, msgspec.Meta(gt=0)] = 20
    runs: tuple[str, ...] = ()


class Available(msgspec.Struct, frozen=True, kw_only=True):
    """`available`: all offers that stand, one for each free slot. It replaces what was offered before."""

    slots: Count
    lease: Annotated[float, msgspec.Meta(gt=0)]
    reservations: tuple[Text, ...]


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """`update`, the heartbeat. In `metrics`, `sub_*` count tests, `msg_*` log messages; `own` are the agent's own."""

    ident: Ident
    metrics: dict[str, Any]
    runs: tuple[RunReport, ...]


class Updated(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `update`: for how long each named run is the agent's from now on."""

    time: float | None = None
    leases: dict[str, float] = {}


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """`accepted`: the run has its slot."""

    seq: Count
    run: RunId
    reservation: Text


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """`refused`. `reason` begins with one of: busy draining bad_suite no_runner labels space deadline."""

    seq: Count
    run: RunId
    reason: Annotated[str, msgspec.Meta(pattern=r"^(busy|draining|bad_suite|no_runner|labels|space|deadline)\b")]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact of a run: where to fetch it, its digest, its bytes."""

    url: str
    sha256: str
    size: Count


class Complete(msgspec.Struct, frozen=True, kw_only=True):
    """`complete`. `code` is the runner's exit, 128+n by signal n, -1 where no runner came to an end.

    `late`: the lease had lapsed before this could be told.
    """

    seq: Count
    ident: Ident
    run: RunId
    result: Result
    code: int
    metrics: dict[str, Any]
    verdict: Verdict
    counts: Counts
    started: float | None = None
    ended: float | None = None
    reason: str | None = None
    late: bool = False
    artifacts: dict[str, Link] = {}


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """`log`, posted: the seed's fields, and the run and test it belongs to."""

    message: str
    timestamp: float | None = None
    severity: Severity = "INFO"
    run: str | None = None
    test: str | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """`run`: take this suite on that offer. `deadline` is by the Seneschal's clock."""

    run: RunId
    reservation: Text
    suite: dict[str, Any]
    deadline: float | None = None
    lease: Annotated[float, msgspec.Meta(gt=0)] = RUN_LEASE_S


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """`cancel`: end the run; its `complete` says ABORTED."""

    run: RunId
    reason: str
