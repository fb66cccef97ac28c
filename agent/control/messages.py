"""The control server's vocabulary: what each action takes and answers, and who may ask for it.

`ACTIONS` is the sheet's table. An action without a struct here is checked by the folder that answers it.

Source: protocols/emissary.md, "Control server"; protocols/logs.md (the log actions); seeds/gator-websocket-api.md
(log, children, get_tree).
"""

from typing import Annotated, Any, Literal

import msgspec

from agent.core.head import Scope
from agent.core.profile import Report

Policy = Literal["drop_oldest", "disconnect"]
Name = Annotated[str, msgspec.Meta(max_length=4096)]


class Nothing(msgspec.Struct, frozen=True, kw_only=True):
    """No field."""


class Auth(msgspec.Struct, frozen=True, kw_only=True):
    """The first request of a browser, which cannot set a header."""

    token: Name


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Only events of this run, of this test (`run:case`), of this file or what is below this folder, or was before."""

    run: Name | None = None
    test: Name | None = None
    path: Name | None = None


class Subscribe(msgspec.Struct, frozen=True, kw_only=True):
    """Events of some kinds (`*` and `?` match; none: all), from the number after `since` on, or from now on.

    `policy` says what becomes of a client that does not keep up.
    """

    kinds: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    since: Annotated[int, msgspec.Meta(ge=0)] | None = None
    filter: Filter = Filter()
    policy: Policy = "drop_oldest"


class Subscribed(msgspec.Struct, frozen=True, kw_only=True):
    """`seq` is the journal's highest number, `oldest` its lowest; 0 when it is empty."""

    sub: int
    seq: int
    oldest: int


class Unsubscribe(msgspec.Struct, frozen=True, kw_only=True):
    """End a subscription: nothing of it comes after the answer."""

    sub: int


class Gap(msgspec.Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """Events that are not told, by number, both ends included."""

    from_: int
    to: int


class RunSuite(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A suite document, or the path of one below suites.roots. `deadline` is epoch seconds, `run` an id to give it."""

    suite: dict[str, Any] | None = None
    path: Name | None = None
    deadline: float | None = None
    run: Name | None = None


class RunAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The run that was ordered."""

    run: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """Abort one run."""

    run: Name
    reason: Name = "cancelled by a control client"


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """A message for the event stream. `timestamp` is epoch seconds."""

    message: Annotated[str, msgspec.Meta(max_length=256 * 1024)]
    timestamp: float | None = None
    severity: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"


class Entitlement(msgspec.Struct, frozen=True, kw_only=True):
    """The last status. `refresh` asks the service again, `history` brings the last 64."""

    refresh: bool = False
    history: bool = False


class RunMonitor(msgspec.Struct, frozen=True, kw_only=True):
    """Run a monitor now."""

    id: Name


class RoleShown(msgspec.Struct, frozen=True, kw_only=True):
    """A role in `status`. `overdue` is for how many seconds it hangs."""

    state: str
    restarts: int
    error: str | None
    overdue: float = 0.0


class RunShown(msgspec.Struct, frozen=True, kw_only=True):
    """A run in `status`. `test` is one that runs now, `since` the epoch time of its start, or of the run's state."""

    run: str
    suite: str
    state: str
    test: str | None
    since: float
    counts: dict[str, int]


class SinkShown(msgspec.Struct, frozen=True, kw_only=True):
    """An outbox in `status`: `oldest` is the epoch time of the oldest event, `held` how many the peer refused."""

    waiting: int
    oldest: float | None
    held: int


class LinkShown(msgspec.Struct, frozen=True, kw_only=True):
    """An outgoing link in `status`; `since` is epoch seconds."""

    state: str
    since: float
    error: str | None


class AlertShown(msgspec.Struct, frozen=True, kw_only=True):
    """What a person must look at; `since` is epoch seconds."""

    code: str
    text: str
    remedy: str
    since: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All at one look. `uptime` is seconds; `reservation` the offers that are not returned; `seq` the journal's."""

    ident: str
    version: str
    uptime: float
    roles: dict[str, RoleShown]
    runs: tuple[RunShown, ...]
    outbox: dict[str, SinkShown]
    links: dict[str, LinkShown]
    seq: int
    entitlement: dict[str, Any] | None
    reservation: tuple[dict[str, Any], ...]
    draining: bool
    alerts: tuple[AlertShown, ...]
    full: bool


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A value and where it comes from."""

    value: Any
    origin: str


class SelftestAsked(msgspec.Struct, frozen=True, kw_only=True):
    """`only`: globs of names of checks; none: all."""

    only: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One check of the selftest: what it found, in how many ms, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    ms: float
    detail: str
    remedy: str
    data: dict[str, Any]


class Selftest(msgspec.Struct, frozen=True, kw_only=True):
    """What `agent --selftest --json` prints. `ok`: no check failed."""

    ok: bool
    version: str
    checks: tuple[Checked, ...]


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that changed, and those of them that wait for the next start.

    `rules` is how many rules for logs hold now, `slow` those of them that run on every line.
    """

    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]
    rules: int | None = None
    slow: tuple[str, ...] = ()


class Action(msgspec.Struct, frozen=True):
    """Who may ask, what with, and what comes back; None: any object."""

    scope: Scope
    takes: Any = None
    answers: Any = None


ACTIONS: dict[str, Action] = {
    "auth": Action("open", Auth, Nothing),
    "status": Action("read", Nothing, Status),
    "subscribe": Action("read", Subscribe, Subscribed),
    "unsubscribe": Action("read", Unsubscribe, Nothing),
    "run_suite": Action("control", RunSuite, RunAnswer),
    "cancel": Action("control", Cancel, Nothing),
    "stop": Action("control", Nothing, Nothing),
    "drain": Action("control", Nothing, Nothing),
    "undrain": Action("control", Nothing, Nothing),
    "log": Action("control", Log, Nothing),
    "watch_log": Action("control"),
    "unwatch_log": Action("control"),
    "label_log": Action("control"),
    "search_log": Action("read"),
    "list_logs": Action("read"),
    "watch_file": Action("control"),
    "unwatch_file": Action("control"),
    "entitlement": Action("read", Entitlement),
    "run_monitor": Action("control", RunMonitor, RunAnswer),
    "monitors": Action("read"),
    "coverage": Action("read"),
    "children": Action("read"),
    "get_tree": Action("read"),
    "config": Action("read", Nothing, dict[str, Setting]),
    "profile": Action("read", Nothing, Report),
    "selftest": Action("read", SelftestAsked, Selftest),
    "metrics": Action("read", Nothing, dict[str, float]),
    "reload": Action("control", Nothing, Reloaded),
}
