"""The `[eman]` and `[eman.hub]` tables. Source: protocols/eman.md, "How the agent uses it", "Differences", "Limits"."""

from typing import Annotated, Literal

import msgspec

from agent.core.url import fault, shown
from agent.eman.messages import name_fault

Origin = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z][a-z0-9+.-]*://[^/\s]+$", description="http(s)://HOST[:PORT], without a path")
]
Url = Annotated[
    str, msgspec.Meta(pattern=r"^((https?|wss?)://[^/\s]+(/\S*)?)?$", description="http(s)://HOST:9001/communication")
]

EMITTED = ("TestFinished", "SuiteFinished")


class ServiceKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file with the key of one service."""

    key_file: str


class HubTls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hub's certificate and key files; without `cert` no TLS."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""

    def __post_init__(self) -> None:
        if (self.key or self.client_ca) and not self.cert:
            raise ValueError("key and client_ca mean nothing without cert. Set cert.")


class HubSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hub. `auth` "md5" computes keys with the salt in `salt_file`, "keys" has one for each service in `services`.

    "any" takes every key, on loopback only. Times are seconds. Who says more than `rate` events a second, and has said
    as many at once, is read more slowly; nothing of it is lost.
    """

    auth: Literal["md5", "keys", "any"] = "md5"
    salt_file: str = ""
    services: dict[str, ServiceKey] = {}
    handshake_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 2.0
    broadcast: bool = False
    origins: tuple[Origin, ...] = ()
    services_page: Literal["loopback", "open", "off"] = "loopback"
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    rate: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)] = 20_000
    tls: HubTls = HubTls()


class EmanSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent as a service. `allow` names the actions that others may ask for and that change something, `emit` the
    kinds of events that are told. The key stands in `key_file`, or is made with the salt in `salt_file`.
    """

    url: Url = ""
    name: str = ""
    key_file: str = ""
    salt_file: str = ""
    eio: Literal[3, 4] = 3
    allow: tuple[Literal["run_suite", "cancel"], ...] = ()
    emit: tuple[str, ...] = EMITTED
    acked: bool = False
    hub: HubSettings = HubSettings()

    def __post_init__(self) -> None:
        if self.url and (why := fault(self.url, ("http", "https", "ws", "wss"))):
            raise ValueError(
                f"url: {shown(self.url)} cannot be reached: {why}. Write http(s)://HOST:9001/communication."
            )
        if self.name and (fault_of_name := name_fault(f"{self.name}.run_suite")):
            raise ValueError(f"name: {self.name!r} cannot be a service's name: {fault_of_name}. Choose another.")
        if self.key_file and self.salt_file:
            raise ValueError("key_file and salt_file are two ways to the one key. Set one of them.")
        if self.emit != EMITTED:
            from agent.core.events import KINDS  # a vocabulary of a hundred structs: not for who keeps the default

            if unknown := [kind for kind in self.emit if kind not in KINDS]:
                raise ValueError(f"emit: {unknown[0]!r} is no kind of event. Take those of `agent schema`.")
