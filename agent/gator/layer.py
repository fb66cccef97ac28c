"""What the layers of a tree ask of each other, and what all layers of one process share.

    Above    the layer above: a tier in this process, a websocket, or nobody (the root prints)
    Below    a layer below, for the tier that started it

Source: protocols/gator.md, "State machine", "Command line".
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import msgspec

from agent.core.metrics import Metrics
from agent.gator import messages
from agent.gator.messages import SEVERITIES, ApiJob, Number, Result, Severity
from agent.gator.pool import Pool
from agent.gator.settings import GatorSettings
from agent.gator.summary import Summary

States: TypeAlias = dict[str, Any]  # get_tree: ident to a state, or to the same of a tier


class Limits(msgspec.Struct, frozen=True):
    """How many messages of a severity a job may have and pass; None: any number."""

    warning: int | None = None
    error: int | None = 0
    critical: int | None = 0

    def broken_by(self, counts: Mapping[str, Number]) -> str | None:
        """Which limit is exceeded, in words."""
        for severity, most in (("critical", self.critical), ("error", self.error), ("warning", self.warning)):
            if most is not None and counts[f"msg_{severity}"] > most:
                return f"{counts[f'msg_{severity}']} {severity} messages; {most} are allowed"
        return None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says, for every layer. `all_messages`: those of children are told upward too. `config` are
    the files of the settings, by absolute paths: processes of children read the same.
    """

    interval_s: float = 5.0
    quiet: bool = False
    all_messages: bool = False
    least: Severity = "INFO"  # what is told upward or printed
    limits: Limits = Limits()
    isolate: bool = False
    scheduler: str = "local"
    sched_args: tuple[tuple[str, str], ...] = ()
    hub: str = ""
    config: tuple[str, ...] = ()


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What all layers of one process have in common.

    `env` is what tasks inherit. `tell` takes what happens to jobs, for `--events-fd`. `clock` gives epoch seconds.
    `leaves` is the delegated cgroup (core/cgroup.py), where there is one.
    """

    options: Options
    settings: GatorSettings
    pool: Pool
    env: Mapping[str, str]
    metrics: Metrics
    clock: Callable[[], float]
    tell: Callable[[dict[str, Any]], None]
    host: str
    leaves: Any = None


class Place(msgspec.Struct, frozen=True):
    """Where a layer is: the idents above it, and its number at its parent."""

    path: tuple[str, ...] = ()
    uidx: int = 0


class Above(Protocol):
    """The layer above."""

    async def register(self, server: str) -> Place:
        """We have started, and listen there."""

    def update(self, summary: Summary, result: Result) -> None:
        """How it stands; the newest counts."""

    async def complete(self, summary: Summary, result: Result, code: int) -> None:
        """The end; returns when it was taken, or cannot be told any more."""

    def log(self, severity: Severity, message: str, at: float) -> None:
        """A message, with its time in epoch seconds."""


class Below(Protocol):
    """A layer below."""

    ident: str

    async def stop(self) -> None:
        """End it; returns when that is passed on."""

    async def states(self) -> States | str:
        """What `get_tree` tells of it, without its own ident."""

    async def resolve(self, request: messages.Resolve) -> ApiJob:
        """It, or what is below it by that path. Raises ActionError."""

    async def options(self, given: messages.Options) -> dict[str, Any]:
        """`update_scheduler_opts`: what of it a tier takes. Raises ActionError."""


def severity_of(given: object) -> Severity:
    """A severity as it came; what is unknown is INFO."""
    return next((name for name in SEVERITIES if isinstance(given, str) and name == given.strip().upper()), "INFO")


def no_messages() -> dict[str, Number]:
    """The counts of messages, all 0."""
    return {f"msg_{name.lower()}": 0 for name in SEVERITIES}
