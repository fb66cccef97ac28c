"""Settings in layers: any frozen msgspec struct, filled from TOML, where each value knows its origin.

Lowest first: the struct's defaults, the hardware profile, the files in order, `AGENT_<TABLE>__<KEY>`, the command line.
Tables merge key by key; scalars and lists replace; arrays of tables with a `name` (else an `id`) merge by it, and an
entry that says `enabled = false` is removed. Keys of an entry of which one excludes the others (`ONE_OF` of its struct)
replace one another.

A settings struct is frozen, has `forbid_unknown_fields=True` and gives bounds with `msgspec.Meta`; the description of a
Meta, where there is one, says in words what fits ("1 to 128 letters"). `Size` is a number of bytes that may be written
"16MiB". What no type can say is checked in `__post_init__`: its `ValueError("What is wrong. What to do.")` is reported
at the table, or with "KEY: " before it at that key. Fields are scalars, Literals, Enums, Paths, lists, tuples of one
type, dicts, structs, unions of these, and Any.

    AgentError
    └── ConfigErrors        all that is wrong with the files, the environment and the flags, in one go

Source: protocols/packaging.md 6; the names of the settings are in protocols/settings.md.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from agent.core import toml, typed
from agent.core.errors import AgentError, ConfigError
from agent.core.typed import Place, Source

MIB, GIB = 1 << 20, 1 << 30
_WRITTEN = {"pattern": "^[0-9]+ ?[KMG]iB$"}  # in agent/schema.py, which makes it "integer or text"
Size = Annotated[int, msgspec.Meta(extra=typed.BYTES, extra_json_schema=_WRITTEN)]
"""Bytes, in a file also "16MiB" (KiB, MiB, GiB). Bounds: `Annotated[Size, msgspec.Meta(ge=MIB)]`."""

MAIN_FILE = Path("/etc/agent/agent.toml")

_ENV = "AGENT_"
_NO_SETTINGS = {"AGENT_SIMD"}  # read by the native engine (protocols/logs.md)
_NO_FLAGS: Mapping[str, Any] = MappingProxyType({})
_NOTHING: Any = object()
_TYPES: dict[Any, inspect.Type] = {}
T = TypeVar("T")


class ConfigErrors(AgentError):
    """All that is wrong with the settings, by layer and line."""

    exit_code = 2

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(f"{len(errors)} settings cannot be used", remedy="Correct them; nothing was changed.")
        self.errors = tuple(errors)
        self.args = ("\n".join(map(str, errors)),)


class Overlay(msgspec.Struct, frozen=True):
    """Settings of a hardware profile, and where they stand: at `at` in a document."""

    profile: str
    data: Mapping[str, Any]
    path: Path
    document: toml.Document
    at: toml.At


class Origin(msgspec.Struct, frozen=True):
    """Where a value comes from: "default", "hw-profile NAME", "FILE:LINE", "AGENT_TABLE__KEY" or "--flag".

    `over` is what it replaced, nearest first: (origin, value). Defaults are not listed; a secret's value is "***".
    """

    text: str
    over: tuple[tuple[str, object], ...] = ()

    @property
    def is_profile(self) -> bool:
        """Does a hardware profile decide it?"""
        return self.text.startswith("hw-profile ")


class Effective(Generic[T]):
    """What holds after all layers.

    All three mappings have the same dotted keys (`suites.slots`, `labels.gpu`, `logs.watch[kernel].path`). `values` are
    plain data; `shown` is the same for people and peers, secrets as "***". `profile` is the hardware profile that was
    laid below, "" if none.
    """

    # No dataclass: what that imports takes longer than to read a file and say what is wrong with it.
    def __init__(
        self,
        settings: T,
        values: Mapping[str, object],
        shown: Mapping[str, object],
        origins: Mapping[str, Origin],
        warnings: list[str],
        profile: str,
    ) -> None:
        self.settings, self.values, self.shown, self.origins = settings, values, shown, origins
        self.warnings, self.profile = warnings, profile

    def show(self, *, origin: bool = True) -> list[str]:
        """A line a key, as TOML writes it; with `origin`, where the value comes from and what it replaced."""
        pairs = [f"{key} = {_written(value)}" for key, value in self.shown.items()]
        if not origin:
            return pairs
        width = min(max(map(len, pairs), default=0), 48)
        return [
            f"{pair:<{width}}     # {_whence(self.origins[key])}" for pair, key in zip(pairs, self.shown, strict=True)
        ]

    def as_dict(self) -> dict[str, dict[str, object]]:
        """What the `config` action answers: key to `{"value", "origin"}`; sizes are in bytes."""
        return {
            key: {"value": int(value) if isinstance(value, _Bytes) else value, "origin": self.origins[key].text}
            for key, value in self.shown.items()
        }


def folders_of(config: Sequence[Path] = ()) -> list[Path]:
    """The folder of each `config`, else of the main file, be that there or not."""
    return [path.parent for path in config or (MAIN_FILE,)]


def default_files(config: Sequence[Path] = ()) -> list[Path]:
    """The files to load: `config` (each `--config`), else the main file if there is one, and the conf.d/*.toml beside.

    A folder's conf.d follows the last file named in it. What cannot be listed is in the result, for load() to say why.
    """
    main, folders = list(config) or ([MAIN_FILE] if is_there(MAIN_FILE) else []), folders_of(config)
    files: list[Path] = []
    for i, folder in enumerate(folders):
        files += main[i : i + 1]
        if folder not in folders[i + 1 :]:
            files += _drop_ins(folder / "conf.d")
    return files


def load(
    schema: type[T],
    files: Sequence[Path],
    *,
    env: Mapping[str, str],
    flags: Mapping[str, Any] = _NO_FLAGS,
    profile: Sequence[Overlay] = (),
) -> Effective[T]:
    """Merge all layers over the defaults of `schema`, and check every one of them, also where a higher one wins.

    `env` is the process's environment; AGENT_* names that are no setting become warnings. `flags` maps dotted keys to
    values (None: not given). `profile` is what a hardware profile says, its parents' share first. Raises ConfigErrors.
    """
    root = _type(schema)
    tree = _Tree(root)
    for overlay in profile:
        tree.lay(Source(f"hw-profile {overlay.profile}"), overlay.data)
    for path in files:
        tree.lay_file(path)
    for name in sorted(name for name in env if name.startswith(_ENV) and name not in _NO_SETTINGS):
        tree.lay_variable(name, env[name])
    for key, value in flags.items():
        if value is not None:
            tree.lay(Source("--" + key.rpartition(".")[2].replace("_", "-")), _nested(key.split("."), value))
    settings = tree.build(root, tree.root, _NOTHING, ())
    if errors := tree.errors():
        raise ConfigErrors(errors)
    name = profile[-1].profile if profile else ""
    return Effective(settings, tree.values, tree.shown, tree.origins, tree.warnings, name)


def check(schema: type[T], overlays: Sequence[Overlay]) -> list[ConfigError]:
    """All that is wrong with the settings of a hardware profile, each at its line."""
    root = _type(schema)
    tree = _Tree(root)
    for overlay in overlays:
        tree.lay(Source(str(overlay.path), overlay.document), overlay.data, overlay.at)
    tree.build(root, tree.root, _NOTHING, ())
    return tree.errors()


def diff(old: Effective[T], new: Effective[T]) -> list[str]:
    """The dotted keys whose value changed, came or went."""
    changed = [key for key, value in new.values.items() if old.values.get(key, _NOTHING) != value]
    return changed + [key for key in old.values if key not in new.values]


def _type(schema: type[T]) -> inspect.Type:
    """What msgspec knows of it; asked for once, since that takes milliseconds."""
    if schema not in _TYPES:
        _TYPES[schema] = inspect.type_info(schema)
    return _TYPES[schema]


def is_there(path: Path) -> bool:
    """Is there a file? One that is not to be seen counts: who reads it says why, rather than go on without it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _drop_ins(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return [folder]
    return [folder / name for name in names if name.endswith(".toml") and not name.startswith(".")]


class _Node:
    """A key in the merged tree: a leaf has a value, a table has children, and both where they were last said."""

    def __init__(self) -> None:
        self.place = Place(Source("default"))
        self.value: Any = _NOTHING
        self.over: tuple[tuple[str, object], ...] = ()
        self.children: dict[str | tuple[int, int], _Node] = {}


class _Tree:
    """Lays layer on layer, then builds the settings, and records each leaf and its origin on the way."""

    def __init__(self, schema: inspect.Type) -> None:
        self.schema, self.root = schema, _Node()
        self.layers = [self.root.place.source]
        self.values: dict[str, object] = {}
        self.shown: dict[str, object] = {}
        self.origins: dict[str, Origin] = {}
        self.warnings: list[str] = []
        self.is_partial = False  # a file could not be read

    def errors(self) -> list[ConfigError]:
        return [err for layer in self.layers for err in sorted(layer.errors, key=lambda err: err.line)]

    def lay(self, layer: Source, data: Mapping[str, Any], at: toml.At = ()) -> None:
        self.layers.append(layer)
        self._merge(self.schema, dict(data), self.root, Place(layer, at))

    def lay_file(self, path: Path) -> None:
        try:
            # In conf.d packages link to their own files; a `--config` that is a link is a mistake or a trap.
            document = toml.read(path, follow_links=path.parent.name == "conf.d")
        except toml.TomlError as err:
            self.is_partial = True
            self.layers.append(Source(str(path)))
            self.layers[-1].errors.append(ConfigError(path, err.line, err.key, err.what, remedy=err.remedy))
        else:
            self.lay(Source(str(path), document), document.data)

    def lay_variable(self, name: str, text: str) -> None:
        layer, keys = Source(name), name.removeprefix(_ENV).lower().split("__")
        kind = self.schema
        for key in keys:
            inner = _below(kind, key)
            if not inner:
                known = [key.replace(".", "__") for key in _keys(self.schema)]
                near = typed.nearest("__".join(keys), known, layer)
                warning = f"{layer.name} is not a setting and changes nothing."
                self.warnings.append(f"{warning} Did you mean {_ENV}{near.upper()}?" if near else warning)
                return
            kind = inner
        self.lay(layer, _nested(keys, _variable(kind, text)))

    def _merge(self, kind: inspect.Type, value: Any, node: _Node, place: Place) -> None:
        core = _core(kind)
        match core:
            case inspect.StructType() if isinstance(value, dict):
                self._merge_fields({field.encode_name: field.type for field in core.fields}, value, node, place)
            case inspect.DictType() if isinstance(value, dict):
                for name in value:
                    typed.convert(core.key_type, name, place.inner(name))
                self._merge_fields(dict.fromkeys(value, core.value_type), value, node, place)
            case inspect.ListType() | inspect.VarTupleType() if isinstance(value, list) and (by := _named_by(core)):
                self._merge_entries(core.item_type, by, value, node, place)
            case _:
                if node.value is not _NOTHING:
                    node.over = ((node.place.origin, node.value), *node.over)
                node.value = typed.convert(kind, value, place)
        node.place = place

    def _merge_fields(
        self, kinds: Mapping[str, inspect.Type], table: Mapping[str, Any], node: _Node, place: Place
    ) -> None:
        for name, value in table.items():
            if name in kinds:
                self._merge(kinds[name], value, node.children.setdefault(name, _Node()), place.inner(name))
            else:
                typed.unknown(name, list(kinds), place, _keys(self.schema))

    def _merge_entries(self, kind: inspect.Type, by: str, entries: list[Any], node: _Node, place: Place) -> None:
        item = _core(kind)
        assert isinstance(item, inspect.StructType)
        kinds = {field.encode_name: field.type for field in item.fields}
        kinds.setdefault("enabled", inspect.BoolType())
        seen: dict[str, int] = {}
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                typed.convert(item, entry, place.inner(i))
                continue
            name = entry.get(by)
            if not isinstance(name, str):  # it is one of its own, and may be wrong: _merge_fields or build() says so
                child, here = node.children.setdefault((len(self.layers), i), _Node()), place.inner(i)
            else:
                child, here = node.children.setdefault(name, _Node()), place.inner(i, _entry(name))
                if name in seen:
                    here.no(f"is there already, in line {seen[name]}", f"Give each entry a {by} of its own.")
                seen[name] = here.line
            _drop_others(item, entry, child)
            self._merge_fields(kinds, entry, child, here)
            child.place = here

    def build(self, kind: inspect.Type, node: _Node | None, base: Any, names: tuple[str, ...]) -> Any:
        """The value at `names`: what the layers said (`node`) over the default (`base`). Of no use after an error."""
        core = _core(kind)
        match core:
            case inspect.StructType() if node or base is not None:
                return self._build_struct(core, node, base, names)
            case inspect.DictType() if node or base:
                table = self._build_each(core.value_type, node, base if isinstance(base, dict) else {}, names)
                return table or self._leaf(kind, node, table, names)
            case inspect.ListType() | inspect.VarTupleType() if (node or base) and (by := _named_by(core)):
                defaults = base if isinstance(base, list | tuple) else ()
                entries = {getattr(entry, by) or (0, i): entry for i, entry in enumerate(defaults)}
                values = self._build_each(core.item_type, node, entries, names, by).values()
                return typed.row(core, values) if values else self._leaf(kind, node, typed.row(core, ()), names)
            case _:
                return self._leaf(kind, node, base if node is None or node.value is _NOTHING else node.value, names)

    def _build_struct(self, kind: inspect.StructType, node: _Node | None, base: Any, names: tuple[str, ...]) -> Any:
        values = {}
        for field in kind.fields:
            child = node.children.get(field.encode_name) if node else None
            default = getattr(base, field.name) if isinstance(base, kind.cls) else _default(field)
            if child or default is not _NOTHING:
                inner = (*names, toml.name(field.encode_name))
                values[field.name] = self.build(field.type, child, default, inner)
            elif node:
                typed.missing(field, node.place)
        if node is None:
            return base
        if self._is_broken(toml.joined(node.place.names)[: toml.MAX_SHOWN]):
            return None
        keys = {name: child.place for name, child in node.children.items() if isinstance(name, str)}
        return typed.made(kind, values, node.place, keys)

    def _is_broken(self, table: str) -> bool:
        """Is something wrong at or below that key, or did a file with perhaps a part of it say nothing at all?"""
        errors = (err for layer in self.layers for err in layer.errors)
        return self.is_partial or any(
            err.key.startswith(table) and (not table or err.key[len(table) :][:1] in ("", ".", "[")) for err in errors
        )

    def _build_each(
        self, kind: inspect.Type, node: _Node | None, base: Mapping[Any, Any], names: tuple[str, ...], by: str = ""
    ) -> dict[Any, Any]:
        """A dict's values, or with `by` the entries of an array of tables, less those that are removed."""
        children = node.children if node else {}
        built: dict[Any, Any] = {}
        for key in dict.fromkeys([*base, *children]):
            child, default = children.get(key), base.get(key, _NOTHING)
            if by and child and "enabled" in child.children and child.children["enabled"].value is False:
                alone = child.children.keys() <= {by, "enabled"} and not child.children[by].over
                if default is _NOTHING and alone:
                    self.warnings.append(
                        f"{child.place.origin}: {toml.joined(child.place.names)}: there is none to remove."
                    )
                continue
            step = key if isinstance(key, str) else len(built)
            name = _entry(key) if by and isinstance(key, str) else toml.name(step)
            built[key] = self.build(kind, child, default, (*names, name))
        return built

    def _leaf(self, kind: inspect.Type, node: _Node | None, value: Any, names: tuple[str, ...]) -> Any:
        def plain(value: Any) -> object:
            value = msgspec.to_builtins(value, enc_hook=str)
            return _Bytes(value) if isinstance(value, int) and typed.is_size(kind) else value

        key = toml.joined(names)
        self.values[key] = plain(value)
        self.shown[key] = typed.masked(names, plain(value))
        if node:
            over = tuple((origin, typed.masked(names, plain(old))) for origin, old in node.over)
            self.origins[key] = Origin(node.place.origin, over)
        else:
            self.origins[key] = Origin("default")
        return value


def _drop_others(kind: inspect.StructType, table: Mapping[str, Any], node: _Node) -> None:
    """Of keys that exclude one another, what a layer says takes the place of what the layers below it said."""
    one_of: tuple[str, ...] = getattr(kind.cls, "ONE_OF", ())
    if any(table.get(name) for name in one_of):
        for name in set(one_of) - table.keys():
            node.children.pop(name, None)


def _core(kind: inspect.Type) -> inspect.Type:
    """The type without its Meta, and without None where nothing else is meant: layers merge into `Table | None` too."""
    kind = typed.unwrapped(kind)[1]
    if isinstance(kind, inspect.UnionType) and len(members := typed.without_none(kind)) == 1:
        return _core(members[0])
    return kind


def _below(kind: inspect.Type, key: str) -> inspect.Type | None:
    """What a table holds at a key, if it can hold one there."""
    match _core(kind):
        case inspect.StructType(fields=fields):
            return next((field.type for field in fields if field.encode_name == key), None)
        case inspect.DictType(value_type=value_type) if key:
            return value_type
        case _:
            return None


def _named_by(kind: inspect.ListType | inspect.VarTupleType) -> str:
    """The field by which the entries of an array of tables merge; "" where the whole array is replaced."""
    item = _core(kind.item_type)
    fields = (
        {field.encode_name: field.required for field in item.fields} if isinstance(item, inspect.StructType) else {}
    )
    by = [name for name in ("name", "id") if name in fields]
    return next((name for name in by if fields[name]), by[0] if by else "")


def _default(field: inspect.Field) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return _NOTHING if field.default is msgspec.NODEFAULT else field.default


def _keys(kind: inspect.Type, outer: str = "") -> Iterator[str]:
    """The dotted keys that every machine has, tables and leaves."""
    core = _core(kind)
    if isinstance(core, inspect.StructType):
        for field in core.fields:
            key = f"{outer}.{field.encode_name}" if outer else field.encode_name
            yield key
            yield from _keys(field.type, key)


def _variable(kind: inspect.Type, text: str) -> object:
    """An environment variable's value: read as TOML, else as text; also as text where only that fits (ident = 7)."""
    try:
        data = toml.parse(f"v = {text}").data
    except toml.TomlError:
        return text
    if data.keys() != {"v"} or (typed.fits(kind, text) and not typed.fits(kind, data["v"])):
        return text
    return data["v"]


class _Bytes(int):
    """A number that is shown as a size."""


def _entry(name: str) -> str:
    """The step to an entry of an array of tables, by its name."""
    return f"[{name if re.fullmatch(r'[A-Za-z0-9_./:@-]+', name) else toml.quoted(name)}]"


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys[1:]):
        value = {key: value}
    return {keys[0]: value}


def _whence(origin: Origin) -> str:
    if not origin.over:
        return origin.text
    replaced, value = origin.over[0]
    return f"{origin.text}, over {replaced} ({_written(value)})"


def _written(value: object) -> str:
    """As TOML writes it on one line. TOML has no word for what is not set."""
    match value:
        case None:
            return "(unset)"
        case bool():
            return "true" if value else "false"
        case _Bytes():
            return toml.quoted(typed.size_text(value))
        case str():
            return toml.quoted(value)
        case list() | tuple():
            return f"[{', '.join(map(_written, value))}]"
        case dict():
            pairs = ", ".join(f"{toml.name(key)} = {_written(inner)}" for key, inner in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case _:
            return str(value)
