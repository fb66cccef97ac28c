"""The `[eman]` and `[eman.hub]` tables. Source: protocols/eman.md, "How the agent uses it", "Differences", "Limits"."""

from typing import Annotated, Literal

import msgspec


class ServiceKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file with the key of one service."""

    key_file: str


class HubTls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hub's certificate and key files; without `cert` no TLS."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""


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
    origins: tuple[str, ...] = ()
    services_page: Literal["loopback", "open", "off"] = "loopback"
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    rate: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)] = 20_000
    tls: HubTls = HubTls()


class EmanSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent as a service. `allow` names the actions that others may ask for and that change something."""

    url: str = ""
    name: str = ""
    key_file: str = ""
    salt_file: str = ""
    eio: Literal[3, 4] = 3
    allow: tuple[Literal["run_suite", "cancel"], ...] = ()
    emit: tuple[str, ...] = ("TestFinished", "SuiteFinished")
    acked: bool = False
    hub: HubSettings = HubSettings()
