"""Labels of lines: a file of them, the first word of each line, and what is wrong with either."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ConfigError
from agent.logs.labels import NONE, NORMAL, Labels, without_token
from agent.logs.model import MAX_CLASSES
from tests import no_json


def label(line: int, class_: str | None) -> bytes:
    return json.dumps({"line": line, "class": class_}).encode()


def test_a_file_labels_the_lines_that_it_names() -> None:
    labels = Labels()
    labels.read("l", [label(2, "disk"), b"", label(4, None), label(1, "net"), label(5, "disk")], 5)
    assert list(labels.numbers) == [2, 1, NONE, NORMAL, 1]
    assert labels.classes == ["disk", "net"]
    assert [labels.class_of(number) for number in (0, 1, 2)] == [None, "disk", "net"]


def test_contradictions_are_told_and_the_later_label_holds() -> None:
    labels = Labels()
    labels.read("l", [label(1, "a"), label(1, "a"), label(1, None), *(label(2, "ab"[n % 2]) for n in range(30))], 2)
    assert (labels.class_of(labels.numbers[0]), labels.class_of(labels.numbers[1])) == (None, "b")
    assert labels.contradictions[0] == "l:3: line 1 is 'normal', and 'a' before"
    assert len(labels.contradictions) == 10


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "l:2: Input data was truncated"),
        (b"[1]", "l:2: Expected `object`, got `array`"),
        (b'{"line": 0, "class": null}', "l:2: Expected `int` >= 1 - at `$.line`"),
        (b'{"line": 1}', "l:2: Object missing required field `class`"),
        (b'{"line": 1, "class": ""}', "l:2: Expected `str` of length >= 1"),
        (b'{"line": 1, "class": 7}', "l:2: Expected `str | null`, got `int`"),
        (b'{"line": 1, "clas": "a"}', "l:2: Object contains unknown field `clas`"),
        (b'{"line": 1, "class": "\xff"}', "l:2: "),
        (label(9, None), "l:2: line 9 is labelled, and the logs have 3"),
    ],
)
def test_it_is_told_what_is_wrong_in_a_file(text: bytes, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Labels().read("l", [label(1, "a"), text], 3)
    assert refused.value.what in str(refused.value)
    assert str(refused.value).startswith(told)
    assert refused.value.remedy.startswith('Write {"line": 17')


def test_there_are_not_more_classes_than_a_model_can_have() -> None:
    labels = Labels()
    with pytest.raises(ConfigError, match=r"l:64: '63' is a new class, and 63 are there"):
        labels.read("l", (label(1, str(n)) for n in range(100)), 1)
    labels = Labels()
    for n in range(MAX_CLASSES):
        labels.take_token("log", n + 1, b"%d text" % n)
    with pytest.raises(ConfigError, match=r"log:64: 'one' is the first word, and 63 others were before"):
        labels.take_token("log", 64, b"one more")


def test_the_first_word_of_a_line_is_its_label() -> None:
    labels = Labels()
    lines = [b"- all is well", b"DISK sd\xc3\xa4 failed", b"", b" begins with a blank", b"-", b"DISK", b"\xff x", b"- "]
    for at, line in enumerate(lines, 1):
        labels.take_token("log", at, line)
    assert list(labels.numbers) == [NORMAL, 1, NONE, NONE, NORMAL, 1, 2, NORMAL]
    assert labels.classes == ["DISK", "\\xff"]
    assert [without_token(line) for line in lines] == [
        b"all is well",
        b"sd\xc3\xa4 failed",
        *(b"", b" begins with a blank", b"", b"", b"x", b""),
    ]


@given(
    st.lists(
        st.binary(max_size=40)
        | st.builds(label, st.integers(-1, 5), st.none() | st.text())
        | no_json.objects("line", "class"),
        max_size=6,
    )
)
def test_any_file_is_read_or_refused_at_a_line(texts: list[bytes]) -> None:
    labels, line = Labels(), 1
    try:
        labels.read("l", texts, 4)
    except ConfigError as err:
        line = err.line
    assert 1 <= line <= max(1, len(texts))
    assert len(labels.numbers) == 4
    assert all(number == NONE or number <= len(labels.classes) for number in labels.numbers)


@given(st.lists(st.binary(max_size=40), max_size=50))
def test_any_first_word_is_a_label_that_is_cut_off(lines: list[bytes]) -> None:
    labels = Labels()
    for at, line in enumerate(lines, 1):
        labels.take_token("log", at, line)
        class_ = None if labels.numbers[-1] == NONE else labels.class_of(labels.numbers[-1])
        token = "" if labels.numbers[-1] == NONE else class_ or "-"
        assert line.decode(errors="backslashreplace").startswith(token)
        assert line.endswith(without_token(line))
    assert len(labels.numbers) == len(lines)
