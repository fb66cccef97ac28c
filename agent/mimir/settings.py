"""The `[mimir]` table of the configuration. Source: protocols/settings.md."""

from typing import Annotated

import msgspec

from agent.core.url import fault, shown


class MimirSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`url` is ws(s)://HOST/mimir; empty: no Mimir.

    The link may have its own `ca_file`, `cert_file` and `key_file` in place of `[tls]`.
    """

    url: Annotated[str, msgspec.Meta(pattern=r"^(wss?://\S+)?$", description="ws://HOST/mimir or wss://...")] = ""
    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        if self.url and (why := fault(self.url, ("ws", "wss"))):
            raise ValueError(f"url: {shown(self.url)} cannot be reached: {why}. Write ws(s)://HOST[:PORT]/mimir.")
