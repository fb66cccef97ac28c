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


class Rhsm1Status(msgspec.Struct, frozen=True, kw_only=True):
    """What GetStatus of com.redhat.RHSM1.Entitlement answers. `reasons` is kept by nobody."""

    status: str
    valid: bool | None = None
    reasons: Any = None
    status_id: str | None = None
