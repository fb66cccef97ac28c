"""Secrets: put in by reference, and taken out of everything that is said."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.monitors.secrets import MASK, SHORTEST, Redactor, SecretUnresolved, resolve

FILES = {
    "web-token": "t0ken-1234",
    "web": '{"api": {"key": "k-5678", "port": 8080}, "flag": true}',
    "bad": "{",
    "deep": "[" * 10**5,
}


def read(name: str) -> str:
    if name not in FILES:
        raise FileNotFoundError(2, "No such file or directory")
    return FILES[name]


def test_references_are_resolved_wherever_they_stand() -> None:
    config = {
        "Token": "@secret@:web-token",
        "Nested": [{"Key": "@secret@:web#api.key"}, "plain", 3, None],
        "Port": "@secret@:web#api.port",
        "Header": "@env@:Bearer ${TOKEN} ${TOKEN}",
    }
    resolved, values = resolve(config, read, {"TOKEN": "e-9999"})
    assert resolved == {
        "Token": "t0ken-1234",
        "Nested": [{"Key": "k-5678"}, "plain", 3, None],
        "Port": "8080",
        "Header": "Bearer e-9999 e-9999",
    }
    assert values == {"t0ken-1234", "k-5678", "8080", "e-9999"}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"A": {"B": "@secret@:none"}}, r"config\.A\.B: the secret 'none' cannot be read: No such file"),
        ({"A": ["@secret@:../etc/shadow"]}, r"config\.A\[0\]: '../etc/shadow' is not a file's name"),
        ({"A": "@secret@:web#api.none"}, r"config\.A: the secret 'web' has no field 'api.none'"),
        ({"A": "@secret@:web#api"}, "has no field"),
        ({"A": "@secret@:web#flag"}, "has no field"),
        ({"A": "@secret@:bad#x"}, "has no field"),
        ({"A": "@secret@:deep#x"}, "has no field"),
        ({"A": "@env@:${NO_SUCH}"}, r"config\.A: the agent's environment has no NO_SUCH"),
    ],
)
def test_what_cannot_be_resolved_names_the_key_and_no_value(config: Any, text: str) -> None:
    with pytest.raises(SecretUnresolved, match=text) as caught:
        resolve(config, read, {})
    assert not any(value in str(caught.value) for value in FILES.values())


def test_secrets_are_masked_as_they_are_as_json_and_line_by_line() -> None:
    redactor = Redactor(['pa"ss', "line one\nline two", "gehéim", "abc"])
    assert redactor.clean('x pa"ss y') == f"x {MASK} y"
    assert redactor.clean('{"p":"pa\\"ss"}') == f'{{"p":"{MASK}"}}'
    assert redactor.clean("see line two") == f"see {MASK}"
    assert redactor.clean("geh\\u00e9im gehéim") == f"{MASK} {MASK}"
    assert redactor.clean("abc") == "abc"  # too short to be told from a word


def test_a_secret_is_masked_where_its_outer_white_space_is_lost() -> None:
    assert Redactor(["\tt0ken \n s3cr3t "]).clean("t0ken, s3cr3t") == f"{MASK}, {MASK}"


def test_half_a_secret_at_a_cut_goes_too() -> None:
    redactor = Redactor(["s3cr3t-token"])
    assert redactor.clean("say s3cr3t-t", cut=True) == f"say {MASK}"
    assert redactor.clean("say s3cr3t-t") == "say s3cr3t-t"
    assert redactor.clean_end("t-token was said", cut=True) == f"{MASK} was said"


@given(st.lists(st.text(min_size=SHORTEST, max_size=20), min_size=1, max_size=3), st.text(), st.text())
def test_no_secret_is_left(secrets: list[str], before: str, behind: str) -> None:
    redactor = Redactor(secrets)
    for secret in secrets:
        left = redactor.clean(before + secret + behind)
        assert secret not in left.replace(MASK, "\0") or secret in MASK
