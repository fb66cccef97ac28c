"""A suite document is read, or refused with a DocumentError, whatever it is; what is read can be sent."""

import contextlib
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import DocumentError
from agent.suites.document import from_tree, load
from agent.suites.messages import Suite
from agent.suites.runners.command import expanded
from agent.suites.runners.driver import CannotLaunch
from tests import no_json

KEYS = st.sampled_from([*Suite.__struct_fields__, "dir", "git", "run", "polarion", "runners", "stall", "x"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["ava", "pytest", "tap", "command", "gator", "..", "/", "-", "1KiB", ">=6", "https://h/x", "\0"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
TREES = st.dictionaries(KEYS, VALUES, max_size=8).map(lambda tree: {"id": "a", "runner": "ava"} | tree)
LINES = st.lists(
    st.sampled_from(
        [
            "id = 'a'",
            "runner = 'ava'",
            "[limits]",
            "[[setup]]",
            "run = -1",
            "run = inf",
            "x.y.z = 1",
            "files = [",
            "]",
            "source = { git = '",
            "' }",
            '"""',
            "[report.polarion.cases]",
            "# \u2028",
            "a = 2026-01-01",
            "\ufeff",
            "\r",
        ]
    ),
    max_size=12,
).map("\n".join)


@given(st.one_of(TREES, VALUES))
def test_any_tree(tree: object) -> None:
    with contextlib.suppress(DocumentError):
        suite = from_tree(tree)
        assert from_tree(msgspec.json.decode(msgspec.json.encode(suite))) == suite


@given(st.text(st.sampled_from("ab*?[!-]{}./\\\n\u2028\ud800"), min_size=1, max_size=20))
def test_any_pattern_of_files(pattern: str) -> None:
    with contextlib.suppress(DocumentError, CannotLaunch):
        suite = from_tree({"id": "a", "runner": "pytest", "files": [pattern]})
        assert not any(name.startswith("-") for name in expanded(suite.files, Path(__file__).parent))


@given(st.one_of(st.binary(max_size=100), LINES.map(str.encode), no_json.objects("id", "source", "limits")))
def test_any_file(data: bytes) -> None:
    with contextlib.suppress(DocumentError):
        suite = load(data, "suite.toml")
        assert from_tree(msgspec.to_builtins(suite)) == suite
