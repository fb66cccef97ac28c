"""The `[polarize]` and `[cibus]` tables of the configuration. Source: protocols/settings.md."""

import re
from typing import Annotated, Literal

import msgspec

from agent.core.url import fault, shown

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
        if self.url and (why := fault(self.url, schemes)):
            remedy = f"Write {' or '.join(f'{scheme}://HOST[:PORT]' for scheme in schemes)}."
            raise ValueError(f"url: {shown(self.url)} is no address for mode {self.mode}: {why}. {remedy}")
        if bool(self.user) != bool(self.password_file):
            key = "user" if self.user else "password_file"
            raise ValueError(f"{key}: user and password_file go together. Set both or neither.")


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
        if self.url:
            why = fault(self.url, ("stomp", "stomp+ssl"))
            if not why and not re.fullmatch(r"[^/]*//[^/?]*:[0-9]+/?", self.url):
                why = "host and port are expected, and nothing else"
            if why:
                remedy = "Write stomp://HOST:PORT or stomp+ssl://HOST:PORT."
                raise ValueError(f"url: {shown(self.url)} is no address of a broker: {why}. {remedy}")
        if bool(self.login) != bool(self.password_file):
            key = "login" if self.login else "password_file"
            raise ValueError(f"{key}: login and password_file go together. Set both or neither.")
        if self.destination and not self.destination.startswith(("/topic/", "/queue/")):
            raise ValueError(f"destination: {self.destination!r} is no destination. It begins with /topic/ or /queue/.")
