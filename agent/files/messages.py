"""The payloads of the actions about files and the entitlement status, and the JSON of com.redhat.RHSM1.

Source: protocols/emissary.md, "Control server" (actions), "Entitlement and file monitor".
"""

from typing import Annotated, Any

import msgspec

PATH_PATTERN = r"^/(?!(?:[^\x00]*/)?\.\.(?:/|$))[^\x00]*$"
MAX_PATH = 4096
PATH_DESCRIBED = f"an absolute path without .. of at most {MAX_PATH} characters"
Path = Annotated[str, msgspec.Meta(pattern=PATH_PATTERN, max_length=MAX_PATH, description=PATH_DESCRIBED)]


class WatchFile(msgspec.Struct, frozen=True, kw_only=True):
    """`watch_file`: a file, a directory, or a glob. `path` as
    PATH_DESCRIBED says. `passing`: not taken up again after a restart of the agent."""

    path: str
    recursive: bool = False
    content: bool = False
    passing: bool = False


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer: the id that ends the watch."""

    watch: str


class UnwatchFile(msgspec.Struct, frozen=True, kw_only=True):
    """`unwatch_file`: the id that `watch_file` gave."""

    watch: str


class LookFile(msgspec.Struct, frozen=True, kw_only=True):
    """`look_file`: how a file is now, with its content where the settings allow it."""

    path: str


class AskEntitlement(msgspec.Struct, frozen=True, kw_only=True):
    """`entitlement`: the last status; with `refresh` the services are asked again, with `history` the last 64 come."""

    refresh: bool = False
    history: bool = False


class Was(msgspec.Struct, frozen=True, kw_only=True):
    """A status in the history; `at` is epoch seconds."""

    at: float
    status: int
    name: str
    raw: str
    source: str


class EntitlementNow(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer. `since` is epoch seconds; `registered`: there is a consumer certificate.

    `entitlements` maps a product to its name, state and message, where the service tells them.
    """

    status: int
    name: str
    raw: str
    source: str
    entitlements: dict[str, tuple[str, str, str]]
    since: float | None
    registered: bool
    history: tuple[Was, ...] | msgspec.UnsetType = msgspec.UNSET


class Rhsm1Status(msgspec.Struct, frozen=True, kw_only=True):
    """What GetStatus of com.redhat.RHSM1.Entitlement answers. `reasons` is kept by nobody."""

    status: str
    valid: bool | None = None
    reasons: Any = None
    status_id: str | None = None
