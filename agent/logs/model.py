"""The model file: what was learned from logs, in one file that is whole or refused.

    "EMLM"   u16 version   u32 size of the header   header   sections   SHA-256 of all before

Integers are little-endian. The header is JSON: the classes, what the rules were, the size of each section. Sections
stand in the order of SECTIONS; whose they are knows what is in them.

    ModelDamaged    it is no model, or not one of this version: it is set aside, and learning begins anew

Source: protocols/logs.md 4, "Model file".
"""

import hashlib
import struct
from typing import Annotated

import msgspec

from agent.core.errors import AgentError
from agent.logs.messages import ClassName

VERSION = 1
MAX_SIZE = 4 << 20
MAX_CLASSES = 63  # beside "normal"; native/native.h
SECTIONS = ("templates", "weights", "chains", "calibration")

_MAGIC = b"EMLM"
_HEAD = struct.Struct("<4sHI")
_SUM = 32  # bytes of SHA-256


class ModelDamaged(AgentError):
    """A model, or a section of one, that cannot be used. Whoever finds it keeps it beside, and starts with nothing."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What a model file holds.

    `classes` in the order of their numbers in `weights`; `rules` is the digest of the rules that gave labels, or empty.
    `left_out` templates were there when it was written, and had no room.
    """

    classes: tuple[str, ...] = ()
    rules: str = ""
    left_out: int = 0
    templates: bytes = b""
    weights: bytes = b""
    chains: bytes = b""
    calibration: bytes = b""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    classes: Annotated[tuple[ClassName, ...], msgspec.Meta(max_length=MAX_CLASSES)] = ()
    rules: Annotated[str, msgspec.Meta(max_length=128)] = ""
    left_out: Annotated[int, msgspec.Meta(ge=0)] = 0
    sizes: dict[str, Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]]


_header = msgspec.json.Decoder(_Header)


def encode(model: Model) -> bytes:
    """The file of a model. Raises ValueError when it would be longer than MAX_SIZE."""
    sections = [getattr(model, name) for name in SECTIONS]
    header = msgspec.json.encode(
        _Header(
            classes=model.classes,
            rules=model.rules,
            left_out=model.left_out,
            sizes={name: len(data) for name, data in zip(SECTIONS, sections, strict=True)},
        )
    )
    data = b"".join([_HEAD.pack(_MAGIC, VERSION, len(header)), header, *sections])
    if len(data) + _SUM > MAX_SIZE:
        raise ValueError(f"a model of {len(data) + _SUM} bytes is longer than {MAX_SIZE}")
    return data + hashlib.sha256(data).digest()


def room(model: Model) -> int:
    """How many bytes its templates may have, beside all that it has otherwise."""
    return MAX_SIZE - len(encode(msgspec.structs.replace(model, templates=b""))) - len(str(MAX_SIZE))


def decode(data: bytes) -> Model:
    """The model of a file. Raises ModelDamaged."""
    if len(data) > MAX_SIZE:
        raise _damaged(f"it has more than {MAX_SIZE} bytes, which no model has")
    if len(data) < _HEAD.size + _SUM or not data.startswith(_MAGIC):
        raise _damaged("it does not begin as a model does" if data else "it is empty")
    _, version, size = _HEAD.unpack_from(data)
    if version != VERSION:
        raise _damaged(f"it is of version {version}, and this release knows version {VERSION}")
    body, digest = data[:-_SUM], data[-_SUM:]
    if hashlib.sha256(body).digest() != digest:
        raise _damaged("its checksum does not fit: it was cut off or changed")
    try:
        header = _header.decode(body[_HEAD.size : _HEAD.size + size])
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise _damaged(f"its header: {err}") from None
    at, sections = _HEAD.size + size, {}
    for name in SECTIONS:
        sections[name] = body[at : at + header.sizes.get(name, 0)]
        at += header.sizes.get(name, 0)
    if at != len(body) or header.sizes.keys() - set(SECTIONS):
        raise _damaged("its sections are not of the sizes that its header says")
    if len(set(header.classes)) < len(header.classes):
        raise _damaged("it has a class twice")
    return Model(classes=header.classes, rules=header.rules, left_out=header.left_out, **sections)


def _damaged(what: str) -> ModelDamaged:
    return ModelDamaged(
        f"the model cannot be used: {what}", remedy="It is kept beside as .bad, and learning begins anew."
    )
