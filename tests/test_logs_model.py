"""The bytes of a model file: what goes in comes out, and nothing else is taken for one."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.logs.model import MAX_CLASSES, MAX_SIZE, Model, ModelDamaged, decode, encode, room

MODEL = Model(
    classes=("disk", "a.b"), rules="abc", left_out=3, templates=b"TT", weights=b"W", chains=b"", calibration=b"CCC"
)


def test_the_file_is_as_the_sheet_has_it() -> None:
    data = encode(MODEL)
    magic, version, size = struct.unpack_from("<4sHI", data)
    assert (magic, version) == (b"EMLM", 1)
    assert data[10 : 10 + size] == (
        b'{"classes":["disk","a.b"],"rules":"abc","left_out":3,'
        b'"sizes":{"templates":2,"weights":1,"chains":0,"calibration":3}}'
    )
    assert data[10 + size : -32] == b"TTWCCC"
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


@given(
    st.builds(
        Model,
        classes=st.lists(st.text(min_size=1, max_size=9), unique=True, max_size=5).map(tuple),
        rules=st.text(max_size=9),
        left_out=st.integers(0, 1 << 40),
        templates=st.binary(),
        weights=st.binary(),
        chains=st.binary(),
        calibration=st.binary(),
    )
)
def test_what_goes_in_comes_out(model: Model) -> None:
    assert decode(encode(model)) == model


@given(st.data())
def test_a_changed_byte_is_seen(data: st.DataObject) -> None:
    good = bytearray(encode(MODEL))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ModelDamaged):
        decode(bytes(good))


@given(st.integers(0, len(encode(MODEL)) - 1))
def test_a_file_that_was_cut_off_is_seen(size: int) -> None:
    with pytest.raises(ModelDamaged, match="empty" if not size else "does not"):
        decode(encode(MODEL)[:size])


@given(st.one_of(st.binary(max_size=100), st.binary(max_size=100).map(lambda body: summed(b"EMLM\1\0" + body))))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModelDamaged):
        decode(data)


def summed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def with_header(header: bytes, sections: bytes = b"") -> bytes:
    return summed(struct.pack("<4sHI", b"EMLM", 1, len(header)) + header + sections)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "it is empty"),
        (b"\x7fELF" + bytes(100), "does not begin as a model does"),
        (summed(b"EMLM\2\0" + bytes(60)), "it is of version 2, and this release knows version 1"),
        (encode(MODEL)[:-1] + b"?", "its checksum does not fit: it was cut off or changed"),
        (with_header(b"[]"), "its header: Expected `object`, got `array`"),
        (with_header(b'{"sizes":{"templates":-1}}'), "its header: Expected `int` >= 0"),
        (with_header(b"\xff"), "its header"),
        (with_header(b'{"sizes":{"templates":5}}', b"1234"), "not of the sizes"),
        (with_header(b'{"sizes":{}}', b"1"), "not of the sizes"),
        (with_header(b'{"sizes":{"other":1}}'), "not of the sizes"),
        (with_header(b'{"sizes":{},"classes":["a","a"]}'), "a class twice"),
        (with_header(b'{"sizes":{},"classes":[%s]}' % b",".join([b'"a"'] * (MAX_CLASSES + 1))), "its header"),
        (bytes(MAX_SIZE + 1), f"it has more than {MAX_SIZE} bytes"),
    ],
)
def test_it_is_told_what_is_wrong(data: bytes, told: str) -> None:
    with pytest.raises(ModelDamaged, match="the model cannot be used") as refused:
        decode(data)
    assert told in refused.value.what


def test_templates_have_the_room_that_is_left() -> None:
    full = replace(MODEL, templates=b"T" * room(MODEL))
    assert MAX_SIZE - 8 < len(encode(full)) <= MAX_SIZE
    with pytest.raises(ValueError, match="longer than 4194304"):
        encode(replace(full, weights=b"W" * 10))
