"""agent/suites/runners/ava_lines.py: AVA's standard output cut into items."""

import pytest

from agent.suites.runners import diagnostics
from agent.suites.runners.ava_lines import (
    AvaLines,
    Failed,
    Item,
    Logged,
    Noise,
    Passed,
    Plan,
    Remaining,
    Todo,
    Total,
)


def read(wire: bytes) -> list[Item]:
    lines = AvaLines()
    return lines.feed(wire) + lines.eof()


@pytest.mark.parametrize(
    ("wire", "items"),
    [
        (b"TAP version 13\n", []),
        (b"ok 1 - a\n", [Passed(b"a")]),
        (b"ok 1 - a - b # SKIP\n", [Passed(b"a - b # SKIP")]),
        (b"ok 1 -\n", [Passed(b"")]),
        (b"not ok 1 -\n", [Failed(b"", (), None)]),
        (b"not ok 2 - a\n", [Failed(b"a", (), None)]),
        (b"not ok 2 - a # TODO\n", [Todo(b"a")]),
        (b"not ok 2 - a # TODO\n#   said\n", [Failed(b"a # TODO", (b"said",), None)]),
        (b"not ok 2 - a # TODO\n  ---\n    m: 1\n  ...\n", [Failed(b"a # TODO", (), b"m: 1")]),
        (b"not ok 2 - a\n#   l\n\n#     m\n  ---\n    a: |-\n      b\n\n      c\n  ...\n",
         [Failed(b"a", (b"l", b"", b"  m"), b"a: |-\n  b\n\n  c")]),
        (b"ok 1 - a\n#   l\nok 2 - b\n", [Passed(b"a"), Logged((b"l",)), Passed(b"b")]),
        (b"ok 1 - a\n# hook for a\n#   of the hook\n", [Passed(b"a")]),
        (b"# 1 test remaining in a b.js\n# 20 tests remaining in c.js\n",
         [Remaining(1, b"a b.js"), Remaining(20, b"c.js")]),
        (b"\n1..3\n# tests 3\n# pass 2\n# skip 1\n# fail 0\n\n",
         [Plan(3), Total("tests", 3), Total("pass", 2), Total("skip", 1), Total("fail", 0)]),
        (b"# tests 3\n# fail 1\n", []),  # titles of hooks
        (b"1..3\n1..4\n", [Plan(3), Noise(b"1..4")]),
        (b"  ---\n", [Noise(b"  ---")]),
        (b"ok 1 - a\n  ---\n", [Passed(b"a"), Noise(b"  ---")]),
        (b"ok one - a\nok 1 a\nnot ok 99999999999 - a\n    ok 1 - sub\n",
         [Noise(b"ok one - a"), Noise(b"ok 1 a"), Noise(b"not ok 99999999999 - a"), Noise(b"    ok 1 - sub")]),
        (b"Bail out!\n", [Noise(b"Bail out!")]),
        (b"ok 1 - a\nok 2 - cut", [Passed(b"a"), Noise(b"ok 2 - cut")]),
        (b"not ok 1 - a\n  ---\n    m: 1\n", [Failed(b"a", (), b"m: 1")]),
        (b"not ok 1 - a\n  ---\n    m: 1\nok 2 - b\n", [Failed(b"a", (), b"m: 1"), Passed(b"b")]),
        (b"not ok 1 - \xff\xfe\n", [Failed(b"\xff\xfe", (), None)]),
    ],
)  # fmt: skip
def test_items(wire: bytes, items: list[Item]) -> None:
    assert read(wire) == items


def test_a_long_block_keeps_its_keys() -> None:
    block = b"".join(b"      line %d\n" % number for number in range(50_000))
    (failed,) = read(
        b"not ok 1 - a\n  ---\n    long: |-\n" + block + b"    message: >-\n      said\n    at: here\n  ...\n"
    )
    assert isinstance(failed, Failed)
    assert failed.yaml is not None
    assert failed.yaml.endswith(b"message: >-\n  said\nat: here")
    assert len(failed.yaml) <= 256 * 1024


@pytest.mark.parametrize("rest", [b"", b"o", b"oo", b"oooooooo"])
@pytest.mark.parametrize(
    "value",
    [
        rb'"' + rb"\U0001F600" * 10_000 + rb'"',
        rb'"' + rb"\\\"" * 30_000 + rb'"',
        b"'" + b"''" * 50_000 + b"'",
    ],
)
def test_a_quoted_value_that_is_cut_ends_with_its_quote(value: bytes, rest: bytes) -> None:
    """js-yaml writes what is not printable, an emoji say, in quotes: a difference of many lines is one line then."""
    key = b"key" + rest + b": "
    (failed,) = read(b"not ok 1 - a\n  ---\n    " + key + value + b"\n    message: said\n  ...\n")
    assert isinstance(failed, Failed)
    assert failed.yaml is not None
    assert len(failed.yaml) > 65_000
    assert diagnostics.read(failed.yaml.decode()).get("message") == "said"


def test_a_block_of_nothing_but_keys_is_bounded() -> None:
    (failed,) = read(b"not ok 1 - a\n  ---\n" + b"    key: value\n" * 100_000 + b"  ...\n")
    assert isinstance(failed, Failed)
    assert len(failed.yaml or b"") <= 256 * 1024


def test_a_log_is_bounded_for_each_test() -> None:
    lines = AvaLines()
    wire = b"ok 1 - a\n" + b"#   0123456789\n" * 10_000
    for _ in range(2):
        items = lines.feed(wire)
    items = items + lines.eof()
    logs = [item.log for item in items if isinstance(item, Logged)]
    assert len(logs) == 2
    assert all(60_000 < sum(map(len, log)) + len(log) <= 65_536 + 16 for log in logs)
