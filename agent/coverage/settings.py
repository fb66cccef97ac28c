"""The `[coverage]` table of the configuration. Source: protocols/drill.md, "Settings"."""

import re
from typing import Annotated, Literal

import msgspec

from agent.core.url import fault, shown

SourceName = Literal["v8", "python", "jacoco"]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Name = Annotated[str, msgspec.Meta(max_length=200)]
# It stands in the paths of the admin's requests.
AgentId = Annotated[str, msgspec.Meta(pattern=r"^[^/\x00-\x1f]{0,128}$", description="up to 128 characters, no slash")]
# HOST:PORT of a JaCoCo agent's tcpserver
Address = Annotated[str, msgspec.Meta(pattern=r"^[^/?#]+:[0-9]{1,5}$", description="HOST:PORT")]

_HEADER, _VALUE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"), re.compile(r"([!-~]([\t -~]*[!-~])?)?")  # RFC 9110, 5
# What an attach has of its own; Content-Encoding would mean frames in Zstandard.
_OWN = re.compile(
    r"agentconfig|needsync|host|connection|upgrade|sec-websocket-.*|content-.*|transfer-encoding", re.IGNORECASE
)


class CoverageSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The Drill agent and its probe sources. Times are seconds.

    `enabled` is for the link to the `admin`; suites that ask for coverage get it without. `headers` are added to the
    attach's own; their values are secrets. Empty names have defaults:
    `agent_id` the machine's ident, `instance_id` that and "-1", `build_version` "cat-" and a digest of the classes.
    `roots` are folders of the product, relative to the suite's; `include` and `exclude` patterns are of files below
    them, without `include` all are meant.
    """

    enabled: bool = False
    admin: str = "ws://127.0.0.1:8090"
    headers: dict[str, str] = {}
    agent_id: AgentId = ""
    instance_id: Name = ""
    build_version: Name = ""
    service_group: Name = ""
    roots: Annotated[tuple[Pattern, ...], msgspec.Meta(min_length=1, max_length=64)] = (".",)
    include: Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=64)] = ()
    exclude: Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=64)] = ("**/node_modules/**",)
    sources: Annotated[tuple[SourceName, ...], msgspec.Meta(max_length=3)] = ("v8", "python")
    jacoco: Annotated[tuple[Address, ...], msgspec.Meta(max_length=64)] = ("127.0.0.1:6300",)
    arm: Literal["session", "always"] = "session"
    flush_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 2.0
    hook_s: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 1.0
    stop_reply: Literal["finished", "sessions-finished", "both"] = "finished"
    max_pending_mib: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64

    def __post_init__(self) -> None:
        if why := fault(self.admin, ("ws", "wss")):
            raise ValueError(f"admin: {shown(self.admin)} cannot be reached: {why}. Write ws(s)://HOST[:PORT].")
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(name) or _OWN.fullmatch(name):
                raise ValueError(f"headers: {name!r} is no header that can be added. Use one that a proxy asks for.")
            if not _VALUE.fullmatch(value):  # which may be a secret
                raise ValueError(
                    f"headers: the value of {name} cannot be sent. Use ASCII, in one line, without a margin."
                )
        for address in self.jacoco:
            if why := fault(f"tcp://{address}", ("tcp",)):
                raise ValueError(f"jacoco: {address!r} cannot be reached: {why}. Write HOST:PORT.")
