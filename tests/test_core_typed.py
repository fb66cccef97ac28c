"""A value fits its type, or what is wrong is said in words with what would be right."""

import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, inspect

from agent.core.typed import BYTES, Place, Source, convert, masked, size_text

Size = Annotated[int, Meta(extra=BYTES)]


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(msgspec.Struct, frozen=True):
    x: int
    y: int = msgspec.field(default=0, name="why")

    def __post_init__(self) -> None:
        if self.x == self.y:
            raise ValueError("the point is on the diagonal.")


def converted(kind: Any, value: object) -> object:
    source = Source("here")
    result = convert(inspect.type_info(kind), value, Place(source, ("k",), ("k",)))
    assert not source.errors, source.errors
    return result


def said(kind: Any, value: object, key: str = "k") -> list[str]:
    source = Source("here")
    convert(inspect.type_info(kind), value, Place(source, (key,), (key,)))
    return [str(error).removeprefix(f"here: {key}: ") for error in source.errors]


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (bool, False, False),
        (str, "", ""),
        (Path, "a/b", Path("a/b")),
        (Level, 2, Level.HIGH),
        (Literal[1, "a"], 1, 1),
        (Size, "3 KiB", 3072),
        (Size, "12", 12),
        (Size | None, "1GiB", 1 << 30),
        (bool | Literal["auto"], True, True),
        (Literal["auto"] | Annotated[int, Meta(ge=0)], 0, 0),
        (float | str, 2, 2.0),
        (list[int], [1], [1]),
        (tuple[Path, ...], ["a"], (Path("a"),)),
        (dict[str, Point], {"p": {"x": 1, "why": 2}}, {"p": Point(1, 2)}),
        (dict[str, int] | list[int], [], []),
        (list[str | Point], ["a", {"x": 1}], ["a", Point(1)]),
        (Any, {"a": [1, {"b": "c"}]}, {"a": [1, {"b": "c"}]}),
    ],
)
def test_what_fits_is_what_a_struct_holds(kind: Any, value: object, result: object) -> None:
    assert converted(kind, value) == result
    assert type(converted(kind, value)) is type(result)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Annotated[int, Meta(ge=1, le=64)], 65, ["65 is more than 64. Use a number from 1 to 64."]),
        (Annotated[float, Meta(gt=0)], 0, ["0 is not above 0. Use a number that is above 0."]),
        (Annotated[float, Meta(ge=0.5, lt=1)], 1, ["1 is not below 1. Use a number that is at least 0.5 and below 1."]),
        (Annotated[int, Meta(le=3, description="1, 2 or 3")], 4, ["4 is more than 3. Use 1, 2 or 3."]),
        (
            Annotated[Size, Meta(le=1 << 20)],
            "1GiB",
            ["1GiB is more than 1MiB. Use a size that is at most 1MiB."],
        ),
        (Size, "9" * 10, ['expected a size, got text "9999999999". Use a size, such as 16MiB in quotes.']),
        (int, "3", ['expected a number, got text "3". Use a number.']),
        (int, True, ["expected a number, got true. Use a number."]),
        (int, 2**63, ["the number does not fit 64 bits. Use a number."]),
        (int, 1.0, ["expected a whole number, got the number 1.0. Use a number."]),
        (float, float("inf"), ["inf is not a finite number. Use a number."]),
        (bool, 1, ["expected true or false, got the number 1. Write true or false without quotes."]),
        (str, "\udc80", ["the text is not UTF-8. Write it in quotes."]),
        (str, ["a"], ["expected text, got a list. Write it in quotes."]),
        (Path, "a\0b", ['expected a path, got text "a\\u0000b". Write it in quotes.']),
        (Literal["a", 1], True, ['expected 1 or "a", got true. Use 1 or "a".']),
        (Level, 3, ["expected 1 or 2, got the number 3. Use 1 or 2."]),
        (Literal["a"] | Annotated[int, Meta(ge=1)], 0, ["0 is less than 1. Use a number that is at least 1."]),
        (Literal["a"] | int, "b", ['expected "a" or a number, got text "b". Use "a" or a number.']),
        (str, "a" * 99, []),
        (
            Annotated[str, Meta(pattern="^b")],
            "a" * 99,
            [f'text "{"a" * 60}..." does not fit. Use text that matches ^b.'],
        ),
        (Annotated[list[int], Meta(max_length=1)], [1, 2], ["has 2 entries, more than 1. Use at most 1."]),
        (dict[str, int], [], ["expected a table, got a list. Write it as { key = value } or below a [table] header."]),
        (Point, {"x": 0}, ["the point is on the diagonal. Correct one of its keys."]),
    ],
)
def test_what_does_not_fit_is_said(kind: Any, value: object, words: list[str]) -> None:
    assert said(kind, value) == words


def test_every_error_below_is_said_by_its_own_key() -> None:
    assert said(list[Point | str], [{"why": "1", "z": 1}, "a", 5]) == [
        "here: k[0].z: unknown key. Known here: x, why.",
        "here: k[0].x: is missing. Add it: a number.",
        'here: k[0].why: expected a number, got text "1". Use a number.',
        "here: k[2]: expected a table or text, got the number 5. Use a table or text.",
    ]


def test_what_was_written_as_a_secret_is_not_said() -> None:
    assert said(int, "hunter2", "password") == ["expected a number, got text. Use a number."]
    assert said(str, 12345, "api_token") == ["expected text, got a number. Write it in quotes."]
    assert said(int, "http://a:hunter2@b") == ["expected a number, got text. Use a number."]
    assert "hunter2" in said(int, "hunter2", "password_file")[0]


def test_a_source_of_nonsense_gets_no_suggestions_in_the_end() -> None:
    lines = said(Point, {f"xx{i}": 1 for i in range(200)} | {"wy": 1})
    assert len(lines) == 202
    assert lines[-2] == "here: k.wy: unknown key. Known here: x, why."


def test_a_type_that_no_file_can_say_is_a_bug() -> None:
    with pytest.raises(TypeError, match="cannot be of type BytesType"):
        said(bytes, "a")


@pytest.mark.parametrize(
    ("names", "value", "shown"),
    [
        (["a", "password"], "x", "***"),
        (["a", "Web_Token"], "x", "***"),
        (["a", "password"], "", ""),
        (["a", "password_file"], "x", "x"),
        (
            ["a", "tokens"],
            ["x", {"file": "f", "token": "t", "key_file": "k", "value": 5}],
            ["***", {"file": "f", "token": "***", "key_file": "k", "value": "***"}],
        ),
        (["tokens", "lab"], "x", "***"),
        (["a", "token", "[0]"], "x", "***"),
        (
            ["coverage", "headers"],
            {"Authorization": "Bearer x", "X-Lab": "x"},
            {"Authorization": "***", "X-Lab": "***"},
        ),
        (
            ["env"],
            {"PROXY": "https://me:x@proxy:80/", "SECRET": "x", "N": 1},
            {"PROXY": "https://me:***@proxy:80/", "SECRET": "***", "N": 1},
        ),
        ([], {"password": None}, {"password": None}),
    ],
)
def test_secrets_are_masked_by_their_names(names: list[str], value: object, shown: object) -> None:
    assert masked(names, value) == shown


def test_a_size_is_shown_with_the_unit_that_fits() -> None:
    assert [size_text(size) for size in (0, 1, 1024, 1536, 3 << 20, 1 << 30)] == [
        "0",
        "1",
        "1KiB",
        "1536",
        "3MiB",
        "1GiB",
    ]
