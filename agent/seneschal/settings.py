"""The `[seneschal]` table of the configuration. Source: protocols/settings.md."""

from typing import Annotated, Literal

import msgspec

from agent.core.url import fault, shown


class SeneschalSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`url` is ws(s)://HOST/seneschal; empty: no Seneschal.

    `heartbeat` in seconds; the Seneschal may ask for a faster one. `on_lease_lost`: what becomes of a run whose lease
    lapsed. Each link may have its own `ca_file`, `cert_file` and
    `key_file` in place of `[tls]`.
    """

    url: Annotated[str, msgspec.Meta(pattern=r"^(wss?://\S+)?$", description="ws://HOST/seneschal or wss://...")] = ""
    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    heartbeat: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5
    on_lease_lost: Literal["finish", "abort"] = "finish"

    def __post_init__(self) -> None:
        if self.url and (why := fault(self.url, ("ws", "wss"))):
            raise ValueError(f"url: {shown(self.url)} cannot be reached: {why}. Write ws(s)://HOST[:PORT]/seneschal.")
