"""Specs of work: YAML to a checked tree of jobs, groups and arrays, and back.

    !JobGroup                              idents are unique among siblings; an unnamed child is T<index>
    ident: nightly
    env: { MODE: fast }                    inherited by what is below, as `cwd` is
    jobs:
      - !Job { ident: build, command: make, args: [all], resources: [!Cores [2], !Memory [4, GB]] }
      - !JobArray { ident: tests, repeats: 8, on_pass: [build], jobs: [!Job { ident: t, command: ./test }] }

The text is composed by a safe loader, which makes nodes and no objects; what a node means is decided here, so that
every error has its line, its column and the idents above it. Errors are DocumentError.

Source: protocols/gator.md, "YAML", "Limits and security"; seeds/gator-websocket-api.md, "Spec".
"""

from __future__ import annotations  # those of PyYAML's nodes: it is loaded when a spec is read

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import msgspec
import yaml

from agent.core.errors import DocumentError

MAX_SPEC: Final = 4 * 1024 * 1024  # bytes
MAX_DEPTH: Final = 64
MAX_NODES: Final = 500_000  # aliases counted as often as they are used
MAX_JOBS: Final = 1_000_000  # of tiers too, after the expansion of arrays
MAX_IDENT: Final = 128  # bytes
FILES: Final = ("db.sqlite", "spec.yaml", "messages.log", "layer.log")  # of a layer, beside the folders of its children
MAX_NUMBER: Final = 1_000_000_000

Unit: TypeAlias = Literal["KB", "MB", "GB", "TB"]
Ident: TypeAlias = tuple[str, ...]
UNITS: Final[Mapping[str, int]] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
INDEX: Final = "GATOR_ARRAY_INDEX"
_CONDITIONS: Final = ("on_done", "on_fail", "on_pass")
_COMMON: Final = ("env", "cwd", *_CONDITIONS)
_PREFIX: Final = "tag:yaml.org,2002:"
_PLAIN: Final = {_PREFIX + kind for kind in ("str", "int", "float", "bool", "timestamp")}  # taken as they are written
_TAGS: Final = ("!Job", "!JobGroup", "!JobArray")
_RESOURCES: Final = ("!Cores", "!Memory", "!License")
# What YAML 1.1 does not print as it is, and what ends a double-quoted text.
_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]')
_VARIABLE = re.compile(r"\\\$|\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


class Cores(msgspec.Struct, frozen=True):
    """That many slots of the scheduler; 0: none."""

    count: int = 1


class Memory(msgspec.Struct, frozen=True):
    """Main memory, in decimal units."""

    size: float
    unit: Unit = "MB"

    @property
    def bytes(self) -> int:
        return round(self.size * UNITS[self.unit])


class License(msgspec.Struct, frozen=True):
    """That many licences of a name."""

    name: str
    count: int = 1


Resource: TypeAlias = Cores | Memory | License


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One command. `timeout` (s) and `retries` are ours; None leaves it to the settings."""

    ident: str
    env: dict[str, str] = {}
    cwd: str | None = None
    command: str
    args: tuple[str, ...] = ()
    resources: tuple[Resource, ...] = ()
    on_done: tuple[str, ...] = ()
    on_fail: tuple[str, ...] = ()
    on_pass: tuple[str, ...] = ()
    timeout: float | None = None
    retries: int | None = None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Several, in any order but for what `on_*` says. `repeats` makes it an array: that many of each, by number."""

    ident: str
    jobs: tuple[Job | Group, ...] = ()
    repeats: int | None = None
    env: dict[str, str] = {}
    cwd: str | None = None
    on_done: tuple[str, ...] = ()
    on_fail: tuple[str, ...] = ()
    on_pass: tuple[str, ...] = ()

    @property
    def copies(self) -> int:
        return 1 if self.repeats is None else self.repeats


Node: TypeAlias = Job | Group


class Size(msgspec.Struct, frozen=True):
    """How much is in a tree: jobs, and tiers, itself among them."""

    jobs: int
    tiers: int


class Spec(msgspec.Struct, frozen=True):
    """A checked spec: its root, and where each node stands, by the idents from the root down (arrays not expanded)."""

    root: Node
    file: str
    lines: dict[Ident, int]

    def error(self, at: Ident, what: str, *, remedy: str) -> DocumentError:
        """An error about a node."""
        return DocumentError(self.file, self.lines.get(at, 0), "/".join(at), what, remedy=remedy)


def size(node: Node) -> Size:
    """The jobs and tiers at and below a node, arrays expanded."""
    if isinstance(node, Job):
        return Size(1, 0)
    inner = [size(job) for job in node.jobs]
    return Size(node.copies * sum(each.jobs for each in inner), 1 + node.copies * sum(each.tiers for each in inner))


def cores(job: Job) -> int | None:
    """What `!Cores` asks for; None where it is not said."""
    return next((each.count for each in job.resources if isinstance(each, Cores)), None)


def memory(job: Job) -> int | None:
    """What `!Memory` asks for, in bytes."""
    return next((each.bytes for each in job.resources if isinstance(each, Memory)), None)


def licenses(job: Job) -> dict[str, int]:
    """What each `!License` asks for."""
    return {each.name: each.count for each in job.resources if isinstance(each, License)}


class Child(msgspec.Struct, frozen=True):
    """A child of a tier: its ident and folder, the job it is a copy of (by place in `jobs`), its number in an array."""

    ident: str
    folder: str
    place: int
    index: int | None


def children(tier: Group) -> Iterator[Child]:
    """The children of a group or array, in order. An array's are `<ident>_<i>` in the folder `<ident>/<i>`."""
    for place, job in enumerate(tier.jobs):
        if tier.repeats is None:
            yield Child(job.ident, job.ident, place, None)
        else:
            for index in range(tier.repeats):
                yield Child(f"{job.ident}_{index}", f"{job.ident}/{index}", place, index)


def child_spec(tier: Group, child: Child) -> Node:
    """What a child is to run: its job with the tier's env and cwd, and in an array with its number."""
    job = tier.jobs[child.place]
    env = {**tier.env, **job.env}
    if child.index is not None:
        env[INDEX] = str(child.index)
    return msgspec.structs.replace(job, ident=child.ident, env=env, cwd=job.cwd or tier.cwd)


def expand(text: str, env: Mapping[str, str]) -> str:
    r"""`$V`, `${V}` and `${V:-x}` by `env`; unset is empty, `\$` stays a dollar."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name is None:
            return "$"
        default = found[3]
        return env.get(name, "") if default is None else env.get(name) or default

    return _VARIABLE.sub(value, text) if "$" in text else text


def load(text: str | bytes, file: str = "spec", *, from_parent: bool = False) -> Spec:
    """Read a spec. `file` is its name in errors.

    From a parent, keys that are not known are ignored, and the oldest dialect's `id` is taken for `ident` in any case.
    Raises DocumentError.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_SPEC:
        raise DocumentError(
            file, 0, "", f"{len(data)} bytes; at most {MAX_SPEC} are read", remedy="Use !JobArray, or several specs."
        )
    node = _composed(data, file)
    reader = _Reader(file, from_parent)
    root = reader.node(node, ())
    total = size(root)
    if max(total.jobs, total.tiers) > MAX_JOBS:
        what = f"{total.jobs} jobs and {total.tiers} tiers; at most {MAX_JOBS} of each are run"
        raise reader.wrong(node, (root.ident,), what, "Lower `repeats`.")
    return Spec(root, file, reader.lines)


def _composed(data: bytes, file: str) -> yaml.Node:
    """The text as nodes. Depth is counted first, event by event: composing is recursive."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(data, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                mark = event.start_mark
                line = mark.line + 1 if mark else 0
                raise DocumentError(file, line, "", f"nested deeper than {MAX_DEPTH}", remedy="Use flatter groups.")
        node: yaml.Node | None = yaml.compose(data, Loader=loader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        line = mark.line + 1 if mark else 0
        raise DocumentError(
            file, line, "", f"no YAML: {err.problem or err.context}", remedy="Correct the text there."
        ) from err
    except yaml.reader.ReaderError as err:
        line = data[: err.position].count(b"\n") + 1
        raise DocumentError(file, line, "", f"no YAML: {err.reason}", remedy="Write it as UTF-8 text.") from err
    except (yaml.YAMLError, UnicodeError) as err:
        raise DocumentError(file, 0, "", f"no YAML: {err}", remedy="Write it as UTF-8 text.") from err
    if node is None:
        raise DocumentError(file, 0, "", "nothing in it", remedy="Begin with !Job, !JobGroup or !JobArray.")
    return node


class _Reader:
    """Nodes of YAML to nodes of work. `lines` tells where each of these stands."""

    def __init__(self, file: str, from_parent: bool) -> None:
        self.file, self.from_parent = file, from_parent
        self.lines: dict[Ident, int] = {}
        self._nodes = 0

    def wrong(self, node: yaml.Node, at: Ident, what: str, remedy: str) -> DocumentError:
        line = node.start_mark.line + 1
        return DocumentError(
            self.file, line, "/".join(at), f"column {node.start_mark.column + 1}: {what}", remedy=remedy
        )

    def node(self, node: yaml.Node, above: Ident, index: int = 0) -> Node:
        self._count(node, above)
        if node.tag not in _TAGS:
            raise self.wrong(node, above, f"expected a job or a group, got {_kind(node)}", f"Use {_or(_TAGS)}.")
        fields = self._mapping(node, above)
        named = "ident" if "ident" in fields else "id"
        ident = self._ident(fields.pop(named), above) if named in fields else f"T{index}"
        at = (*above, ident)
        self.lines[at] = node.start_mark.line + 1
        if node.tag == "!Job":
            return self._job(node, fields, ident, at)
        return self._group(node, fields, ident, at)

    def _job(self, node: yaml.Node, fields: dict[str, yaml.Node], ident: str, at: Ident) -> Job:
        self._known(fields, at, ("command", "args", "resources", *_COMMON, "timeout", "retries"))
        if "command" not in fields:
            raise self.wrong(node, at, "command is missing", "Name the program to run.")
        command = self._text(fields["command"], at, "command")
        args = [self._text(arg, at, "args") for arg in self._sequence(fields.get("args"), at, "args")]
        wanted = self._sequence(fields.get("resources"), at, "resources")
        resources = tuple(self._resource(each, at) for each in wanted)
        seen: set[object] = set()
        for each, where in zip(resources, wanted, strict=True):
            what = each.name if isinstance(each, License) else type(each)
            if what in seen:
                raise self.wrong(where, at, "the same resource twice", "Add the two up.")
            seen.add(what)
        timeout, retries = fields.get("timeout"), fields.get("retries")
        common = self._common(fields, at)
        if not command:
            raise self.wrong(node, at, "command is empty", "Name the program to run.")
        return Job(
            ident=ident,
            command=command,
            args=tuple(args),
            resources=resources,
            timeout=None if timeout is None else self._number(timeout, at, "timeout", least=0.001),
            retries=None if retries is None else self._whole(retries, at, "retries", least=0, most=1000),
            **common,
        )

    def _group(self, node: yaml.Node, fields: dict[str, yaml.Node], ident: str, at: Ident) -> Group:
        is_array = node.tag == "!JobArray"
        self._known(fields, at, ("jobs", *(("repeats",) if is_array else ()), *_COMMON))
        repeats = 1 if is_array else None
        if is_array and "repeats" in fields:
            repeats = self._whole(fields["repeats"], at, "repeats", least=0, most=MAX_JOBS)
        nodes = self._sequence(fields.get("jobs"), at, "jobs")
        common = self._common(fields, at)
        jobs = tuple(self.node(job, at, index) for index, job in enumerate(nodes))
        self._check_siblings(jobs, nodes, at)
        for job, each in zip(jobs, nodes, strict=True):
            if repeats is not None and (why := bad_ident(f"{job.ident}_{max(repeats - 1, 0)}")):
                raise self.wrong(each, at, f"ident {_shown(job.ident)} and a number: {why}", "Give it a shorter name.")
        return Group(ident=ident, jobs=jobs, repeats=repeats, **common)

    def _common(self, fields: dict[str, yaml.Node], at: Ident) -> dict[str, Any]:
        env = {}
        if "env" in fields:
            node = fields["env"]
            for name, value in ({} if _is_null(node) else self._mapping(node, at)).items():
                if not name or "=" in name or "\0" in name:
                    raise self.wrong(value, at, f"env: {name!r} is no name of a variable", "Take = and NUL out of it.")
                env[name] = self._text(value, at, f"env.{name}")
        cwd = fields.get("cwd")
        return {
            "env": env,
            "cwd": None if cwd is None or _is_null(cwd) else self._text(cwd, at, "cwd"),
            **{
                key: tuple(self._text(each, at, key) for each in self._sequence(fields.get(key), at, key))
                for key in _CONDITIONS
            },
        }

    def _known(self, fields: Mapping[str, yaml.Node], at: Ident, known: Sequence[str]) -> None:
        """No key is there but those, and the ident, which was taken out."""
        for key, node in fields.items():
            if key not in known and not self.from_parent:
                words = _or(("ident", *known))
                raise self.wrong(node, at, f"the key {_shown(key)} is not known here", f"Use {words}.")

    def _check_siblings(self, jobs: Sequence[Node], nodes: Sequence[yaml.Node], at: Ident) -> None:
        """Idents are unique, dependencies are siblings, and none depends on itself."""
        where = dict[str, yaml.Node]()
        for job, node in zip(jobs, nodes, strict=True):
            if job.ident in where:
                line = where[job.ident].start_mark.line + 1
                raise self.wrong(node, (*at, job.ident), f"the ident is taken in line {line}", "Give it another.")
            where[job.ident] = node
        for job in jobs:
            for key in _CONDITIONS:
                for name in getattr(job, key):
                    if name not in where:
                        known = _or(sorted(where)[:10])
                        raise self.wrong(
                            where[job.ident], (*at, job.ident), f"{key}: {_shown(name)} is no sibling", f"Use {known}."
                        )
        if cycle := _cycle({job.ident: (*job.on_done, *job.on_fail, *job.on_pass) for job in jobs}):
            shown = cycle if len(cycle) < 12 else [*cycle[:5], f"({len(cycle) - 7} others)", *cycle[-2:]]
            raise self.wrong(
                where[cycle[0]],
                (*at, cycle[0]),
                f"waits for itself: {' -> '.join(shown)}",
                "Take one of these dependencies out.",
            )

    # ---- values -----------------------------------------------------------------------------------------------------

    def _resource(self, node: yaml.Node, at: Ident) -> Resource:
        self._count(node, at)
        keys = {"!Cores": ("count",), "!Memory": ("size", "unit"), "!License": ("name", "count")}.get(node.tag)
        if keys is None:
            raise self.wrong(node, at, f"resources: expected one, got {_kind(node)}", f"Use {_or(_RESOURCES)}.")
        if isinstance(node, yaml.SequenceNode):
            if len(node.value) > len(keys):
                raise self.wrong(node, at, f"{node.tag} takes at most {len(keys)} values", f"Give {', '.join(keys)}.")
            given = dict(zip(keys, node.value, strict=False))
        elif isinstance(node, yaml.MappingNode):
            given = self._mapping(node, at)
            if unknown := given.keys() - {*keys}:
                raise self.wrong(node, at, f"{node.tag}: {_or(sorted(unknown))} is not known", f"Use {_or(keys)}.")
        elif node.value == "":
            given = {}
        else:
            given = {keys[0]: yaml.ScalarNode(_PREFIX + "str", node.value, node.start_mark, node.end_mark)}
        if node.tag == "!Cores":
            return Cores(self._whole(given["count"], at, "!Cores", least=0) if "count" in given else 1)
        if keys[0] not in given:
            raise self.wrong(node, at, f"{node.tag}: {keys[0]} is missing", f"Write {node.tag} [{', '.join(keys)}].")
        if node.tag == "!Memory":
            amount = self._number(given["size"], at, "!Memory", least=0)
            unit = self._text(given["unit"], at, "!Memory").upper() if "unit" in given else "MB"
            for known in ("KB", "MB", "GB", "TB"):
                if unit == known:
                    return Memory(amount, known)
            raise self.wrong(given["unit"], at, f"!Memory: {_shown(unit)} is no unit", f"Use {_or(tuple(UNITS))}.")
        name = self._text(given["name"], at, "!License")
        if not name or "," in name or "=" in name:
            raise self.wrong(given["name"], at, f"!License: {_shown(name)} is no name", "Take , and = out of it.")
        return License(name, self._whole(given["count"], at, "!License", least=1) if "count" in given else 1)

    def _ident(self, node: yaml.Node, above: Ident) -> str:
        ident = self._text(node, above, "ident")
        if why := bad_ident(ident):
            raise self.wrong(node, above, f"ident {_shown(ident)}: {why}", "Give it another name.")
        return ident

    def _text(self, node: yaml.Node, at: Ident, key: str) -> str:
        self._count(node, at)
        if not isinstance(node, yaml.ScalarNode):
            raise self.wrong(node, at, f"{key}: expected text, got {_kind(node)}", "Write it as text.")
        if node.tag not in _PLAIN:
            raise self.wrong(node, at, f"{key}: expected text, got {_kind(node)}", "Put it into quotes.")
        if "\0" in node.value:
            raise self.wrong(node, at, f"{key}: a NUL character", "Take it out.")
        text: str = node.value
        return text

    def _number(self, node: yaml.Node, at: Ident, key: str, *, least: float) -> float:
        text = self._text(node, at, key)
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not least <= number <= MAX_NUMBER:
            raise self.wrong(node, at, f"{key}: {_shown(text)} is no number from {least:g} on", "Write it as 1.5.")
        return number

    def _whole(self, node: yaml.Node, at: Ident, key: str, *, least: int, most: int = MAX_NUMBER) -> int:
        text = self._text(node, at, key)
        if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
            raise self.wrong(
                node,
                at,
                f"{key}: {_shown(text)} is no whole number from {least} to {most}",
                f"Write it as {max(1, least)}.",
            )
        return int(text)

    def _sequence(self, node: yaml.Node | None, at: Ident, key: str) -> list[yaml.Node]:
        if node is None or _is_null(node):
            return []
        self._count(node, at)
        if not isinstance(node, yaml.SequenceNode) or node.tag != _PREFIX + "seq":
            raise self.wrong(node, at, f"{key}: expected a list, got {_kind(node)}", "Write it as [a, b].")
        items: list[yaml.Node] = node.value
        return items

    def _mapping(self, node: yaml.Node, at: Ident) -> dict[str, yaml.Node]:
        """Keys and values; `<<` gives those of other mappings that this one does not have itself."""
        if not isinstance(node, yaml.MappingNode) or not node.tag.startswith(("!", _PREFIX + "map")):
            raise self.wrong(node, at, f"expected keys and values, got {_kind(node)}", "Write it as { key: value }.")
        merged: dict[str, yaml.Node] = {}
        own: dict[str, yaml.Node] = {}
        for key, value in node.value:
            self._count(value, at)
            if not isinstance(key, yaml.ScalarNode):
                raise self.wrong(key, at, f"a key is {_kind(key)}", "Use text for keys.")
            if key.tag == _PREFIX + "merge":
                for each in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                    self._count(each, at)
                    merged = {**self._mapping(each, at), **merged}
            elif key.value in own:
                raise self.wrong(key, at, f"the key {_shown(key.value)} is there twice", "Take one out.")
            else:
                own[key.value] = value
        return {**merged, **own}

    def _count(self, node: yaml.Node, at: Ident) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self.wrong(node, at, f"more than {MAX_NODES} values, aliases counted", "Use !JobArray.")
        if len(at) > MAX_DEPTH:  # an alias to what it stands in
            raise self.wrong(node, at[:4], f"nested deeper than {MAX_DEPTH}", "Take the alias to itself out.")


def bad_ident(ident: str) -> str | None:
    """Why a text cannot be an ident; None if it can."""
    if not ident or ident.startswith("."):
        return "it is empty, or begins with a dot"
    if "/" in ident or not ident.isprintable():
        return "it has a / or a character that is not printed"
    if len(ident.encode("utf-8", "surrogatepass")) > MAX_IDENT:
        return f"it has more than {MAX_IDENT} bytes"
    if ident in FILES:
        return "each layer has a file of that name"
    return None


def _cycle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The idents of one cycle, the first again at the end; [] where there is none."""
    done: set[str] = set()
    for start in needs:
        if start in done:
            continue
        way = {start: iter(needs[start])}  # in order: each waits for the next
        while way:
            last = next(reversed(way))
            following = next(way[last], None)
            if following is None:
                done.add(last)
                del way[last]
            elif following in way:
                names = [*way]
                return [*names[names.index(following) :], following]
            elif following not in done:
                way[following] = iter(needs[following])
    return []


# ---- back to YAML ---------------------------------------------------------------------------------------------------


def dump(node: Node, *, named: Literal["ident", "id"] = "ident", ours: bool = True) -> str:
    """A spec as YAML. The oldest dialect calls its ident `id`; keys that only we know are left out unless `ours`."""
    return "".join(_lines(node, "", "", named, ours))


def _lines(node: Node, first: str, indent: str, named: str, ours: bool) -> Iterator[str]:
    tag = "!Job" if isinstance(node, Job) else "!JobGroup" if node.repeats is None else "!JobArray"
    yield f"{first}{tag}\n{indent}{named}: {_quoted(node.ident)}\n"
    if isinstance(node, Group) and node.repeats is not None:
        yield f"{indent}repeats: {node.repeats}\n"
    if node.env:
        yield f"{indent}env: {{{', '.join(f'{_quoted(k)}: {_quoted(v)}' for k, v in node.env.items())}}}\n"
    if node.cwd is not None:
        yield f"{indent}cwd: {_quoted(node.cwd)}\n"
    for key in _CONDITIONS:
        if names := getattr(node, key):
            yield f"{indent}{key}: [{', '.join(map(_quoted, names))}]\n"
    if isinstance(node, Job):
        yield f"{indent}command: {_quoted(node.command)}\n"
        if node.args:
            yield f"{indent}args: [{', '.join(map(_quoted, node.args))}]\n"
        if node.resources:
            yield f"{indent}resources: [{', '.join(map(_resource_text, node.resources))}]\n"
        if ours and node.timeout is not None:
            yield f"{indent}timeout: {node.timeout!r}\n"
        if ours and node.retries is not None:
            yield f"{indent}retries: {node.retries}\n"
    elif node.jobs:
        yield f"{indent}jobs:\n"
        for job in node.jobs:
            yield from _lines(job, f"{indent}- ", f"{indent}  ", named, ours)


def _resource_text(resource: Resource) -> str:
    match resource:
        case Cores():
            return f"!Cores [{resource.count}]"
        case Memory():
            whole = float(resource.size).is_integer()
            return f"!Memory [{int(resource.size) if whole else repr(resource.size)}, {resource.unit}]"
        case License():
            return f"!License [{_quoted(resource.name)}, {resource.count}]"


def _quoted(text: str) -> str:
    def escape(found: re.Match[str]) -> str:
        char = found[0]
        return f"\\{char}" if char in '"\\' else f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"

    return f'"{_ESCAPED.sub(escape, text)}"'


# ---- words of errors ------------------------------------------------------------------------------------------------


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == _PREFIX + "null")


def _kind(node: yaml.Node) -> str:
    if not node.tag.startswith(_PREFIX) or node.tag.startswith(_PREFIX + "python/"):
        return f"the tag {_shown(node.tag)}"
    match node:
        case yaml.SequenceNode():
            return "a list"
        case yaml.MappingNode():
            return "keys and values"
        case _:
            return f"{_shown(node.value)} ({node.tag.removeprefix(_PREFIX)})"


def _shown(text: str) -> str:
    text = text.removeprefix(_PREFIX) if not text.startswith(_PREFIX + "python/") else "!!" + text[len(_PREFIX) :]
    return repr(text[:80])


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0] if words else "nothing"
