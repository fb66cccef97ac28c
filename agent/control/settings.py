"""The `[control]` table of the configuration. Source: protocols/settings.md; protocols/emissary.md, "Auth, limits"."""

from typing import Annotated, Literal

import msgspec

Right = Literal["read", "control"]
_PORT = r"[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
Address = Annotated[
    str, msgspec.Meta(pattern=rf"^([^\s:\[\]]+|\[[^\s\[\]]+\]):({_PORT})$", description="HOST:PORT, or [IPV6]:PORT")
]
Origin = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z][a-z0-9+.-]*://[^/\s]+$", description="http(s)://HOST[:PORT], without a path")
]


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file with a token, and what it allows."""

    file: Annotated[str, msgspec.Meta(min_length=1)]
    scope: Right = "control"


class ControlTls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS when `cert` is set; `client_ca` makes it mutual. `names` maps names of client certificates to a scope."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""
    names: dict[str, Right] = {}

    def __post_init__(self) -> None:
        if (self.key or self.client_ca or self.names) and not self.cert:
            raise ValueError("key, client_ca and names mean nothing without cert. Set cert.")
        if self.names and not self.client_ca:
            raise ValueError("names: names of client certificates are not checked without client_ca. Set client_ca.")


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the control server listens, and who may come in. `compat`: the older services' endpoints too."""

    listen: Annotated[tuple[Address, ...], msgspec.Meta(min_length=1, max_length=16)] = ("127.0.0.1:13172",)
    tokens: tuple[Token, ...] = (Token(file="token"),)
    insecure_loopback: bool = False
    compat: bool = True
    origins: tuple[Origin, ...] = ()
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 64
    tls: ControlTls = ControlTls()

    def __post_init__(self) -> None:
        given = [address for address in self.listen if not address.endswith(":0")]
        if twice := next((address for address in given if given.count(address) > 1), None):
            raise ValueError(f"listen: {twice} stands there twice. Take one of them away.")
        has_key = bool(self.tokens or self.tls.client_ca)
        if has_key and not self.insecure_loopback:
            return
        from agent.core.guard import is_loopback  # with it comes HTTP; who made a mistake elsewhere need not wait

        outside = [address for address in self.listen if not is_loopback(address.rpartition(":")[0].strip("[]"))]
        if outside and self.insecure_loopback:
            raise ValueError(f"insecure_loopback: is for loopback alone, not for {outside[0]}. Take one of them away.")
        if outside and not has_key:
            raise ValueError(
                f"listen: {outside[0]} is open to anybody. Set tokens or tls.client_ca, or listen on 127.0.0.1."
            )
