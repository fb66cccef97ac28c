"""Rule files to a set of compiled rules, or every reason why not, each with its file, line and rule.

    AgentError
    └── RuleErrors          all that is wrong with the rules, in one go

Source: protocols/logs.md 2.1, 3 and 7.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from msgspec import inspect

import agent
from agent.core import toml, typed
from agent.core.errors import AgentError, ConfigError
from agent.core.toml import Document
from agent.core.typed import Place, Source
from agent.logs.literals import Clause, clauses
from agent.logs.messages import Rule
from agent.logs.regex import Regex, RegexError

BUNDLED = Path(agent.__file__).parent.parent / "hw-profiles/rules"  # the rule sets that hardware profiles name
MAX_RULES = 10_000
VERSION = 1

_RULE = inspect.type_info(Rule)


class RuleErrors(AgentError):
    """All that is wrong with the rules, by file and line. Nothing of a set with an error is used."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(f"{len(errors)} errors in the rules", remedy="Correct them; the rules before stay in force.")
        self.errors = tuple(errors)
        self.args = ("\n".join(map(str, errors)),)


class CompiledRule(NamedTuple):
    """A rule ready to run. `until`, `start` and `continuation` are those of its context and its multi-line records.

    `origin` is where it is written: FILE:LINE, or the name of what came over a link.
    """

    spec: Rule
    regex: Regex
    clauses: list[Clause]
    until: tuple[Regex, ...]
    start: Regex | None
    continuation: Regex | None
    origin: str

    def applies_to(self, path: str) -> bool:
        """Is the file one of its `files`? A relative pattern fits from the right: "*.log". "**" stands for folders."""
        parts = PurePosixPath(path).parts
        return not self.spec.files or any(_fits(PurePosixPath(pattern), parts) for pattern in self.spec.files)


def _fits(pattern: PurePosixPath, parts: Sequence[str]) -> bool:
    """Is a path of these parts one that the pattern means?"""
    wanted = pattern.parts if pattern.is_absolute() else ("**", *pattern.parts)
    fits = [True]  # have the parts so far the first n of what is wanted?
    for one in wanted:
        fits.append(fits[-1] and one == "**")
    for part in parts:
        before, fits = fits, [False]
        for n, one in enumerate(wanted):
            fits.append(before[n + 1] or fits[n] if one == "**" else before[n] and fnmatchcase(part, one))
    return fits[-1]


class RuleSet:
    """The rules of all files, in order."""

    def __init__(self, rules: Sequence[CompiledRule]) -> None:
        self.rules = tuple(rules)

    @property
    def slow(self) -> list[str]:
        """The rules whose regex has no literal, and so runs on every line."""
        return [rule.spec.id for rule in self.rules if not rule.clauses]

    def mask(self, path: str) -> bytearray:
        """What a Worker is to leave out on a file: a byte for each rule, 1 where it does not apply."""
        return bytearray(not rule.applies_to(path) for rule in self.rules)


def find_set(name: str, files: Sequence[Path]) -> list[Path]:
    """The files of a rule set: those of `files` that are called so, else the bundle's; empty when there is none."""
    own = [path for path in files if path.stem == name]
    return own or [path for path in BUNDLED.glob("*.toml") if path.stem == name]


def from_documents(documents: Sequence[tuple[str, Document]]) -> RuleSet:
    """The rules of rule files, given by name and content. Raises RuleErrors."""
    reading = _Reading()
    for name, document in documents:
        reading.read_file(Source(name, document), document.data)
    return reading.done()


def read_files(paths: Sequence[Path]) -> RuleSet:
    """The rules of the files at these paths. Raises RuleErrors, for what cannot be read too."""
    documents: list[tuple[str, Document]] = []
    errors: list[ConfigError] = []
    for path in paths:
        try:
            documents.append((str(path), toml.read(path)))
        except toml.TomlError as err:
            errors.append(ConfigError(path, err.line, err.key, err.what, remedy=err.remedy))
    try:
        rules = from_documents(documents)
    except RuleErrors as err:
        raise RuleErrors([*errors, *err.errors]) from None
    if errors:
        raise RuleErrors(errors)
    return rules


def from_tables(name: str, tables: Sequence[Mapping[str, Any]]) -> RuleSet:
    """The rules that came over a link, as tables; `name` stands for the file. Raises RuleErrors."""
    reading = _Reading()
    reading.read_rules(Place(Source(name)), list(tables))
    return reading.done()


class _Reading:
    """Takes file after file, and keeps what is right and what is wrong."""

    def __init__(self) -> None:
        self.rules: list[CompiledRule] = []
        self.sources: list[Source] = []
        self.seen: dict[str, Place] = {}

    def done(self) -> RuleSet:
        errors = [error for source in self.sources for error in sorted(source.errors, key=lambda err: err.line)]
        if errors:
            raise RuleErrors(errors)
        return RuleSet(self.rules)

    def read_file(self, source: Source, data: dict[str, Any]) -> None:
        place = Place(source)
        for key in data:
            if key not in ("version", "rule"):
                typed.unknown(key, ["version", "rule"], place)
        if "version" not in data:
            place.inner("version").no("is missing", f"Add version = {VERSION}.")
        elif data["version"] != VERSION or isinstance(data["version"], bool):
            place.inner("version").no("is not one that this agent reads", f"Write version = {VERSION}.")
        self.read_rules(place.inner("rule"), data.get("rule", []))

    def read_rules(self, place: Place, tables: Any) -> None:
        self.sources.append(place.source)
        if not isinstance(tables, list):
            place.no("is not an array of tables", "Begin each rule with [[rule]].")
            return
        for i, table in enumerate(tables):
            if len(self.rules) == MAX_RULES:
                place.inner(i).no(f"is one more than {MAX_RULES} rules", "Leave some out.")
                return
            name = table.get("id") if isinstance(table, dict) else None
            # By its id, where it has one that can be shown.
            self._read_rule(place.inner(i, f"[{name}]" if isinstance(name, str) and len(name) <= 64 else ""), table)

    def _read_rule(self, place: Place, table: Any) -> None:
        before = len(place.source.errors)
        spec = typed.convert(_RULE, table, place)
        if len(place.source.errors) > before:
            return
        assert isinstance(spec, Rule)
        if spec.id in self.seen:
            place.inner("id").no(f"is that of the rule at {self.seen[spec.id].origin} too", "Give each its own.")
        self.seen.setdefault(spec.id, place)
        for i, pattern in enumerate(spec.files):
            if not PurePosixPath(pattern).name:
                place.inner("files").inner(i).no(
                    "names no file", 'Write "/var/log/app/*.log", or "*.log" for any folder.'
                )
        regex = _compiled(spec.regex, spec.utf, place.inner("regex"))
        inner = place.inner("context")
        until = _chain(spec, inner)
        multiline = place.inner("multiline")
        start = spec.multiline and _compiled(spec.multiline.start, spec.utf, multiline.inner("start"))
        more = spec.multiline and _compiled(spec.multiline.continuation, spec.utf, multiline.inner("continuation"))
        if regex and None not in until:
            _check_context(spec, [regex, *filter(None, until)], inner)
        if regex and len(place.source.errors) == before:
            found = clauses(spec.regex, utf=spec.utf)
            chain = tuple(filter(None, until))
            self.rules.append(CompiledRule(spec, regex, found, chain, start or None, more or None, place.origin))


def _chain(spec: Rule, place: Place) -> list[Regex | None]:
    until = place.inner("until")
    indices = range(len(spec.context.chain))
    places = [until] if isinstance(spec.context.until, str) else [until.inner(i) for i in indices]
    return [_compiled(text, spec.utf, where) for text, where in zip(spec.context.chain, places, strict=True)]


def _compiled(pattern: str, utf: bool, place: Place) -> Regex | None:
    try:
        regex = Regex(pattern, utf=utf)
    except RegexError as err:
        place.no(err.what, err.remedy)
        return None
    if twice := sorted({name for name in regex.groups if regex.groups.count(name) > 1}):
        place.no(f"names two groups {twice[0]}", "Give each its own name.")
        return None
    return regex


def _check_context(spec: Rule, regexes: list[Regex], place: Place) -> None:
    for i, name in enumerate(spec.context.same):
        having = [regex for regex in regexes if name in regex.groups]
        if len(having) < 2:
            where = "regex" if having and having[0] is regexes[0] else "until" if having else "neither regex nor until"
            place.inner("same").inner(i).no(
                f"{name} is a group of {where}{' alone' if having else ''}",
                f"Write (?<{name}>...) into both regex and until.",
            )
    if spec.context.lines == "same" and not spec.context.same:
        place.inner("lines").no('"same" needs captures to compare', "Name them in same.")
