"""Whatever TOML says, it is read or each error is a ConfigError; and every key of a document has its line."""

import datetime
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import config, toml
from agent.core.config import ConfigErrors, Size
from agent.core.errors import ConfigError
from agent.settings import Settings


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    b: list[str | int] = []
    token: str = ""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    a: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    b: Annotated[Size, msgspec.Meta(lt=99)] | None = None
    c: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    d: tuple[Entry | str, ...] = ()


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    a: Table = Table()
    b: Table | None = None
    c: tuple[Entry, ...] = ()
    d: dict[str, Any] = {}
    name: Annotated[str, msgspec.Meta(min_length=1, pattern="^[a-z]")] = "a"
    enabled: bool | Literal["auto", 1] = "auto"
    path: Path = Path()


# Names and texts that fit are frequent, so that what is below them is reached.
NAMES = st.sampled_from(["a", "b", "c", "d", "name", "enabled", "token", "path"]) | st.text(max_size=5)
SCALARS = (
    st.sampled_from(["a", "auto", "16MiB", "8", 1, True, False, 8])
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.datetimes(min_value=datetime.datetime(1000, 1, 1))
    | st.dates(min_value=datetime.date(1000, 1, 1))
    | st.times()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)
TABLES = st.dictionaries(NAMES, VALUES, max_size=6)


def written(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return toml.quoted(value)
        case list():
            return f"[{', '.join(map(written, value))}]"
        case dict():
            return f"{{{', '.join(f'{toml.quoted(k)} = {written(v)}' for k, v in value.items())}}}"
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return repr(value)


def lines_of(value: dict[str, Any], at: tuple[str, ...], data: st.DataObject) -> Iterator[str]:
    """A document that says the table at `at`, in one of TOML's many ways."""
    below: list[tuple[str, Any, bool]] = []
    for key, inner in value.items():
        name = data.draw(st.sampled_from([toml.quoted(key), toml.name(key)]))
        is_array = isinstance(inner, list) and inner and all(isinstance(entry, dict) for entry in inner)
        if (isinstance(inner, dict) or is_array) and data.draw(st.booleans()):
            below.append((key, inner, bool(is_array)))
        else:
            yield f"{name}={written(inner)}" + data.draw(st.sampled_from(["", " # [x]", "\n\n", " # y = 'z'\n"]))
    for key, inner, is_array in below:
        path = ".".join(toml.quoted(step) for step in (*at, key))
        for entry in inner if is_array else [inner]:
            yield f"[[ {path} ]]" if is_array else f"\t[{path}]"
            yield from lines_of(entry, (*at, key), data)


def paths(value: Any, at: toml.At = ()) -> Iterator[toml.At]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*at, step)
        yield from paths(inner, (*at, step))


@given(st.lists(TABLES, max_size=3), st.dictionaries(NAMES.map(str.upper), SCALARS.map(str), max_size=3), TABLES)
def test_values_are_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, tables: list[dict[str, Any]], env: dict[str, str], flags: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = [folder / f"{i}.toml" for i in range(len(tables))]
    for file, table in zip(files, tables, strict=True):
        file.write_text("\n".join(f"{toml.quoted(key)} = {written(value)}" for key, value in table.items()))
    variables = {f"AGENT_{name}": value for name, value in env.items()}
    errors: tuple[ConfigError, ...] = ()
    try:
        effective = config.load(Schema, files, env=variables, flags=flags)
    except ConfigErrors as err:
        errors = err.errors
    else:
        json = msgspec.json.decode(msgspec.json.encode(effective.as_dict()))
        assert json.keys() == effective.values.keys() == effective.origins.keys()
        assert len(effective.show()) == len(json)
        # What was made is what msgspec itself makes of it.
        plain = msgspec.to_builtins(effective.settings, enc_hook=str)
        again = msgspec.convert(plain, Schema, dec_hook=lambda kind, value: kind(value))
        assert msgspec.to_builtins(again, enc_hook=str) == plain
    for error in errors:
        assert error.remedy.endswith((".", "?"))
        assert (error.line > 0) == (str(error.file) in map(str, files))


KEYS = list(config._keys(msgspec.inspect.type_info(Settings)))
MEANT = st.sampled_from(
    ["ws://lab/x", "http://[", "stomp://x:1", "/a", "*", "[", "127.0.0.1:0", "\0", "x" * 300, ">=1"]
) | st.sampled_from([0, -1, 1e9, 2**40, float("nan"), "1GiB", "auto", True, [], {}, [{}], [{"name": "a"}]])


@given(st.dictionaries(st.sampled_from(KEYS), MEANT | VALUES, min_size=1, max_size=4))
def test_the_agents_own_settings_are_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any]
) -> None:
    file = tmp_path_factory.getbasetemp() / "own.toml"
    file.write_text("\n".join(f"{key} = {written(value)}" for key, value in said.items()))
    try:
        effective = config.load(Settings, [file], env={})
    except ConfigErrors as err:
        for error in err.errors:
            assert error.line > 0
            assert error.remedy.endswith((".", "?"))
            assert error.what
    else:
        assert effective.settings.name
        assert len(effective.show()) == len(effective.as_dict())


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(data)
    lines: set[int] = set()
    try:
        config.load(Schema, [file], env={})
    except ConfigErrors as err:
        lines = {error.line for error in err.errors}
    assert lines <= set(range(1, data.count(b"\n") + 2))


@given(st.text(alphabet="ab.=[]{},\"'\\#\n \t1-:", max_size=60))
def test_whatever_tomllib_takes_has_lines(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        with pytest.raises(toml.TomlError):
            toml.parse(text)
        return
    document = toml.parse(text)
    assert document.data == data
    for at in paths(data):
        if isinstance(at[-1], str):
            assert at in document.lines
            line = text.split("\n")[document.line(at) - 1]
            assert at[-1] in line or "\\" in line


@given(TABLES, st.data())
def test_every_key_is_found_at_its_line(table: dict[str, Any], data: st.DataObject) -> None:
    text = "\n".join(lines_of(table, (), data))
    document = toml.parse(text)
    assert repr(document.data) == repr(tomllib.loads(text))  # repr: nan differs from itself
    lines = text.split("\n")
    for at in paths(document.data):
        line = lines[document.line(at) - 1]
        step = next(step for step in reversed(at) if isinstance(step, str))
        assert toml.quoted(step) in line or toml.name(step) in line
