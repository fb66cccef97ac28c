"""The `[monitors]` table of the configuration. Source: protocols/monitors.md, "Settings and schedule"."""

import re
from collections.abc import Iterator
from datetime import date, time
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from agent.monitors.messages import Dialect

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
STEP = re.compile(r"[A-Za-z0-9_]+")

Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step by name; `timeout` in seconds, the monitor's own by default."""

    name: str
    timeout: Annotated[float, msgspec.Meta(gt=0, le=86_400)] | None = None


class MonitorLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each process of a monitor may use: `as` bytes of address space, `cpu` seconds, `nofile` descriptors."""

    nofile: Annotated[int, msgspec.Meta(ge=16)] | None = None
    as_: Annotated[int, msgspec.Meta(ge=2**20)] | None = msgspec.field(default=None, name="as")
    cpu: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Monitor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stand-alone program: `command` is an argv, `steps` names or tables, times are seconds.

    `config` is sent to it after its secrets are put in. The three graces fall back on those of `[monitors]`.
    """

    id: str
    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    steps: Annotated[tuple[str | Step, ...], msgspec.Meta(min_length=1, max_length=1000)]
    interval: Annotated[float, msgspec.Meta(ge=1, le=7 * 86_400)] = 60.0
    timeout: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 60.0
    group: str = ""
    dialect: Literal["metrist", "seed", "auto"] = "metrist"
    time_unit: Literal["ms", "s"] | None = None
    on_error: Literal["stop", "continue"] = "stop"
    cleanup: bool = False
    config: dict[str, Any] = {}
    env: dict[str, str] = {}
    handshake_timeout: Seconds | None = None
    exit_grace: Seconds | None = None
    eof_grace: Seconds | None = None
    user: str | None = None
    limits: MonitorLimits = MonitorLimits()
    webhook_url: str = ""

    def __post_init__(self) -> None:
        if not ID.fullmatch(self.id):
            raise ValueError(f"id: {self.id!r} cannot be an id. Use 1 to 64 of A-Z a-z 0-9 . _ -")
        for name, _ in self.plan():
            if not STEP.fullmatch(name):
                raise ValueError(f"steps: {name!r} cannot be a step's name. Use A-Z a-z 0-9 _")
        if any("\0" in text for text in (*self.command, *self.env.values())):
            raise ValueError("command or env has a NUL character. Take it out.")
        for name in self.env:
            if not name or "=" in name or "\0" in name:
                raise ValueError(f"env: {name!r} is no name of a variable. Take = and NUL out of it.")
        if when := next(_times(self.config), None):
            raise ValueError(f"config: JSON has no {type(when).__name__} like {when}. Write it in quotes.")
        if self.webhook_url and not _is_http(self.webhook_url):
            raise ValueError(f"webhook_url: {self.webhook_url!r} is not an http URL. Write it whole.")

    def plan(self) -> list[tuple[str, float]]:
        """Every step with its timeout in seconds, in order."""
        return [
            (step, self.timeout) if isinstance(step, str) else (step.name, step.timeout or self.timeout)
            for step in self.steps
        ]

    def unit(self, spoken: Dialect) -> Literal["ms", "s"]:
        """The unit of a Step Time where that dialect is spoken."""
        return self.time_unit or ("ms" if spoken == "metrist" else "s")


def _times(value: object) -> Iterator[date | time]:
    """Dates and times of TOML, in all that a value holds."""
    match value:
        case date() | time():
            yield value
        case dict():
            for inner in value.values():
                yield from _times(inner)
        case list():
            for inner in value:
                yield from _times(inner)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class MonitorsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which monitors run, how many at a time, and how long they may take to come up and to leave (seconds)."""

    max_concurrent: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    groups: dict[str, Annotated[int, msgspec.Meta(ge=1, le=1000)]] = {}
    secrets_dir: str = "/etc/agent/secrets"
    handshake_timeout: Seconds = 60.0
    exit_grace: Seconds = 30.0
    eof_grace: Seconds = 2.0
    monitor: tuple[Monitor, ...] = ()

    def filled(self) -> dict[str, Monitor]:
        """The monitors by id, with their graces filled in."""
        return {
            each.id: msgspec.structs.replace(
                each,
                **{
                    name: getattr(self, name)
                    for name in ("handshake_timeout", "exit_grace", "eof_grace")
                    if getattr(each, name) is None
                },
            )
            for each in self.monitor
        }
