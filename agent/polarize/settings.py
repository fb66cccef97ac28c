"""The `[polarize]` and `[cibus]` tables of the configuration. Source: protocols/settings.md."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

Mode = Literal["polarize-http", "polarize-ws", "polarion"]
# A selector on a name with a hyphen silently never matches on ActiveMQ (protocols/emissary.md, "CI Bus").
ResponseName = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="letters, digits and _, no hyphen")
]


class PolarizeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the final report of a run goes. Without `url` nothing is submitted."""

    mode: Mode = "polarize-http"
    url: str = ""
    project: str = ""
    user: str = ""
    password_file: str = ""
    response_name: ResponseName = "emissary"
    ws_data: Literal["string", "object"] = "string"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        schemes = ("http", "https", "ws", "wss") if self.mode == "polarize-ws" else ("http", "https")
        if self.url and (urlsplit(self.url).scheme not in schemes or not urlsplit(self.url).hostname):
            raise ValueError(
                f"{self.url!r} is no address for mode {self.mode}. Write {' or '.join(schemes)}://HOST[:PORT]."
            )
        if bool(self.user) != bool(self.password_file):
            raise ValueError("user and password_file go together. Set both or neither.")


class CibusSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The CI Bus: where completions of imports are heard, and with `publish` where ended runs are told.

    `destination` may be a queue, which must be this agent's own: all that is in it is taken from it.
    """

    url: str = ""
    login: str = ""
    password_file: str = ""
    vhost: str = ""
    destination: str = ""
    publish: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        if self.url and not re.fullmatch(r"stomp(\+ssl)?://(\[[0-9A-Fa-f:.]+\]|[^/:@\s]+):[0-9]{1,5}/?", self.url):
            raise ValueError(
                f"{self.url!r} is no address of a broker. Write stomp://HOST:PORT or stomp+ssl://HOST:PORT."
            )
        if bool(self.login) != bool(self.password_file):
            raise ValueError("login and password_file go together. Set both or neither.")
        if self.destination and not self.destination.startswith(("/topic/", "/queue/")):
            raise ValueError(f"{self.destination!r} is no destination. It begins with /topic/ or /queue/.")
