"""Addresses of peers: which texts can be one, so that a wrong one is told with its line and not by a role that fails.

Source: protocols/packaging.md 6 (errors); protocols/settings.md (each `url`).
"""

import re
from collections.abc import Collection
from urllib.parse import urlsplit

# Labels of 1 to 63 characters: the resolver's IDNA would fail on others.
_HOST = re.compile(r"[0-9a-f:.]*:[0-9a-f:.]*|[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")


def fault(url: str, schemes: Collection[str]) -> str:
    """Why nobody can be reached there, in words; "" when it is SCHEME://HOST[:PORT][/PATH] with one of the schemes."""
    if not (url.isascii() and url.isprintable()) or " " in url:
        return "it holds what no URL may hold"
    try:
        parts = urlsplit(url)
    except ValueError:
        return "its host is neither a name nor an address"
    if parts.scheme not in schemes:
        return f"it does not begin with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    if parts.username is not None:
        return "it has a user name, and secrets stand in files"
    if parts.fragment:
        return "it has a fragment"
    try:
        is_number = parts.port != 0
    except ValueError:
        is_number = False
    if not is_number:
        return "its port is no number from 1 to 65535"
    return "" if _HOST.fullmatch(parts.hostname or "") else "its host is neither a name nor an address"


def shown(url: str) -> str:
    """The URL in quotes, without a password that was written into it."""
    return repr(re.sub(r"//[^/@]*@", "//***@", url))
