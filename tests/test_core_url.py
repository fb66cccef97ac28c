"""Addresses of peers: every one that the settings take can be dialled."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.link import Dial
from agent.core.url import fault, shown


@pytest.mark.parametrize(
    "url", ["ws://lab", "wss://lab.example.:443/x?y=1", "ws://[::1]:13180/mimir", "ws://10.0.0.7", "ws://a_b-c"]
)
def test_an_address(url: str) -> None:
    assert fault(url, ("ws", "wss")) == ""


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "it does not begin with ws:// or wss://"),
        ("lab:13180", "it does not begin with ws:// or wss://"),
        ("http://lab", "it does not begin with ws:// or wss://"),
        ("ws://", "its host is neither a name nor an address"),
        ("ws://a..b", "its host is neither a name nor an address"),
        (f"ws://{'a' * 64}", "its host is neither a name nor an address"),
        ("ws://[::1", "its host is neither a name nor an address"),
        ("ws://lab:0", "its port is no number from 1 to 65535"),
        ("ws://lab:65536", "its port is no number from 1 to 65535"),
        ("ws://lab:ssh", "its port is no number from 1 to 65535"),
        ("ws://ann:pw@lab", "it has a user name, and secrets stand in files"),
        ("ws://lab/#top", "it has a fragment"),
        ("ws://lab/a b", "it holds what no URL may hold"),
        ("ws://l\u00e4b", "it holds what no URL may hold"),
    ],
)
def test_what_is_none(url: str, why: str) -> None:
    assert fault(url, ("ws", "wss")) == why
    with pytest.raises(ValueError, match="is no ws://HOST") as refused:
        Dial(url)
    assert "pw" not in str(refused.value)


@given(st.from_regex(r"wss?://[\[\]0-9a-fA-F:.@#/?x-]{0,20}", fullmatch=True))
def test_what_is_taken_can_be_dialled(url: str) -> None:
    if not fault(url, ("ws", "wss")):
        parts = urlsplit(Dial(url).url)
        assert parts.hostname
        assert parts.port is None or 0 < parts.port < 65536


def test_a_password_is_not_shown() -> None:
    assert shown("http://ann:pw@lab:1/x@y") == "'http://***@lab:1/x@y'"
