"""Reads a suite document: TOML or JSON in, a checked Suite out, or all that is wrong with it.

    DocumentError
    └── SuiteErrors         one DocumentError for each thing that is wrong; its text has a line for each

Shapes and bounds of single keys stand in messages.py; here is what one key cannot know. What the machine must be asked
(is the folder there, does it lie below `suites.roots`) is the role's.

Source: protocols/suites.md, "The suite document", "Limits and security".
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

import msgspec

from agent.core import toml, typed
from agent.core.errors import AgentError, ConfigError, DocumentError
from agent.core.payload import UNREADABLE
from agent.suites import requirements
from agent.suites.messages import Source, Suite
from agent.suites.runners import ava

MAX_DOCUMENT: Final = 16 * 1024 * 1024  # bytes

# Test run properties of Polarion's importer that are not keys of `report.polarion`; protocols/suites.md, "xUnit".
PROPERTIES: Final = (
    *("testrun-type-id", "testrun-status-id", "set-testrun-finished", "include-skipped", "dry-run", "user-id"),
    *("group-id", "project-span-ids"),
)
_FREE_PROPERTIES: Final = ("custom-", "parameter-")
_TO_INSTEAD: Final = {"testrun-title": "title", "testrun-template-id": "template", "project-id": "project"}
_DEPTH_MAX: Final = 100  # parts of a path
_TYPE: Final = msgspec.inspect.type_info(Suite)

_SCP = re.compile(r"[A-Za-z0-9._-]+@(?!-)[A-Za-z0-9.-]+:(?![-/]?-).+")  # git's short form of an ssh address
_REF = re.compile(r"(?!-)[^\x00-\x20\x7f~^:?*\[\\]+")


class SuiteErrors(DocumentError):
    """All that is wrong with a document. `errors` has each; file, line and key are those of the first."""

    def __init__(self, errors: Sequence[DocumentError | ConfigError]) -> None:
        *others, last = errors
        AgentError.__init__(self, "\n".join([*map(str, others), last.what]), remedy=last.remedy)
        self.errors = tuple(errors)
        self.file, self.line, self.key = errors[0].file, errors[0].line, errors[0].key


def load(data: bytes, name: str) -> Suite:
    """Read what a file called `name` holds, TOML, or JSON (which begins with a brace). Raises DocumentError."""
    if len(data) > MAX_DOCUMENT:
        raise DocumentError(
            name, 0, "", f"is larger than {MAX_DOCUMENT >> 20} MiB", remedy="Put large content into files beside it."
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        what = f"byte 0x{data[err.start]:02x} is not UTF-8"
        raise DocumentError(name, line, "", what, remedy="Save the file as UTF-8.") from None
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        try:
            tree = msgspec.json.decode(text.removeprefix("\ufeff"))
        except UNREADABLE as err:
            raise DocumentError(name, 0, "", f"is no JSON: {err}", remedy="Correct it, or write TOML.") from None
        return _checked(tree, typed.Source(name))
    try:
        document = toml.parse(text)
    except toml.TomlError as err:
        raise DocumentError(name, err.line, err.key, err.what, remedy=err.remedy) from None
    return _checked(document.data, typed.Source(name, document))


def from_tree(tree: object, name: str = "suite") -> Suite:
    """Read the tree that a link carries, or `msgspec.to_builtins(suite)`. Raises DocumentError, without lines."""
    return _checked(tree, typed.Source(name))


def detect(folder: str, names: Iterable[str], package: bytes | None = None) -> Suite:
    """A suite for a folder without a document.

    `folder` is its name, which becomes the id; `names` are its files, relative and with `/`, at least those at its top
    and in `tests`; `package` is its package.json. Raises DocumentError when there is neither AVA nor pytest in it.
    """
    title = folder[:1024] or "suite"
    ident = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-")[:128] or "suite"
    if package is not None and _names_ava(package, folder):
        return Suite(id=ident, title=title, runner="ava")
    if any(re.fullmatch(r"(?:.*/)?test_[^/]*\.py", name) for name in names):
        return Suite(id=ident, title=title, runner="pytest")
    raise DocumentError(
        folder,
        0,
        "",
        "holds no suite.toml, no package.json that names ava, and no test_*.py",
        remedy='Write a suite.toml with at least id and runner, such as runner = "tap" with a command.',
    )


def _names_ava(package: bytes, folder: str) -> bool:
    try:
        content = msgspec.json.decode(package)
    except UNREADABLE as err:
        raise DocumentError(
            f"{folder}/package.json", 0, "", f"is no JSON: {err}", remedy="Correct it, or write a suite.toml."
        ) from None
    if not isinstance(content, dict):
        return False
    tables = [content.get(key) for key in ("dependencies", "devDependencies", "peerDependencies")]
    return "ava" in content or any(isinstance(table, dict) and "ava" in table for table in tables)


def _checked(tree: object, source: typed.Source) -> Suite:
    place = typed.Place(source)
    suite: Suite | None = typed.convert(_TYPE, tree, place)
    if suite is not None and not source.errors:
        for keys, what, remedy in _faults(suite):
            at = place
            for key in keys:
                at = at.inner(key)
            at.no(what, remedy)
    if source.errors or suite is None:
        raise SuiteErrors(sorted(source.errors, key=lambda error: error.line))
    return suite


_Fault = tuple[tuple[str | int, ...], str, str]  # the keys that lead there, what is wrong, what would be right


def _faults(suite: Suite) -> Iterator[_Fault]:
    yield from _path_faults(suite)
    yield from _runner_faults(suite)
    if suite.source is not None:
        yield from _source_faults(suite.source)
    for name, bounds in suite.requires.runners.items():
        try:
            requirements.satisfies("0", bounds)
        except ValueError as err:
            yield ("requires", "runners", name), str(err), 'Write bounds such as ">=6" or ">=20.19, <23".'
    if suite.report.polarion is not None:
        for name in suite.report.polarion.properties:
            yield from _property_faults(name)


def _path_faults(suite: Suite) -> Iterator[_Fault]:
    for keys, path in ((("cwd",), suite.cwd), *((("files", i), file) for i, file in enumerate(suite.files))):
        if not path:
            yield keys, "is empty", 'Write a path relative to the source, "." for the source itself.'
        elif path.startswith("/"):
            yield keys, f"{path[:200]!r} is absolute", "Write it relative to the source."
        elif ".." in path.split("/"):
            yield (
                keys,
                f"{path[:200]!r} leaves the work directory",
                "Leave .. out; what is needed belongs to the source.",
            )
        elif path.startswith("-"):
            yield keys, f"{path[:200]!r} would be read as an option", "Put options into args, or write ./ before it."
        elif path.count("/") >= _DEPTH_MAX:
            yield keys, f"{path[:200]!r} has more than {_DEPTH_MAX} parts", "Shorten it, or use cwd."
        elif suite.runner != "ava" and any("**" in part and part != "**" for part in path.split("/")):
            yield keys, f"{path[:200]!r}: ** stands for whole folders", "Write it as a part of its own: **/*.py"


def _runner_faults(suite: Suite) -> Iterator[_Fault]:
    runner = suite.runner
    if runner in ("tap", "command") and not suite.command:
        yield ("command",), f"is missing, and runner {runner} runs it", 'Add it as a list, such as ["make", "check"].'
    if runner == "gator" and suite.command:
        yield ("command",), "runner gator is the agent itself", "Leave it out; files names the spec."
    if runner == "gator" and (len(suite.files) != 1 or re.search(r"[*?\[]", suite.files[0])):
        yield ("files",), "runner gator needs one file, its spec", 'Name it, such as ["spec.yaml"].'
    if suite.command and not suite.command[0]:
        yield ("command", 0), "is empty", "Name a program."
    if runner == "ava":
        for i, what in ava.refused(suite.args):
            yield ("args", i), what, "Take it out."
    if suite.driver == "events" and runner != "ava":
        yield ("driver",), f'"events" is for runner ava, not for {runner}', "Leave it out."
    if suite.retries and not (runner == "pytest" or (runner == "ava" and suite.driver == "events")):
        yield ("retries",), "failed tests cannot be run again here", 'Use runner pytest, or ava with driver = "events".'
    if suite.resumable and runner not in ("ava", "pytest"):
        yield ("resumable",), f"runner {runner} cannot go on where it was", "Leave it out, or use runner ava or pytest."
    if suite.match and runner not in ("ava", "pytest"):
        yield ("match",), f"runner {runner} has no selection by title", "Leave it out; say it in args."
    if suite.codes and runner != "command":
        yield ("codes",), f"runner {runner} is not judged by its exit code", "Leave it out, or use runner command."
    for key in ("setup", "teardown"):
        for i, argv in enumerate(getattr(suite, key)):
            if not argv[0]:
                yield (key, i), "names no program", "Put the program's name first."


def _source_faults(source: Source) -> Iterator[_Fault]:
    given = [key for key in ("dir", "archive", "git") if getattr(source, key) is not None]
    if len(given) != 1:
        what = f"{' and '.join(given)} exclude each other" if given else "says neither dir nor archive nor git"
        yield ("source",), what, "Give one of dir, archive and git."
    for key in given:
        if not getattr(source, key):
            yield ("source", key), "is empty", "Write where the files are."
    if source.archive is None and source.sha256 is not None:
        yield ("source", "sha256"), "is that of an archive, and there is none", "Leave it out."
    if source.archive:
        if source.sha256 is None:
            yield ("source", "sha256"), "is missing", "Give the digest of the archive, as sha256sum prints it."
        if "://" in source.archive:
            yield from _address_faults("archive", source.archive, ("https", "http"))
    for key in ("ref", "depth"):
        if source.git is None and getattr(source, key) != getattr(Source(), key):
            yield ("source", key), "goes with git, and there is none", "Leave it out."
    if source.git and not _SCP.fullmatch(source.git):
        yield from _address_faults("git", source.git, ("https", "ssh"))
    if source.ref is not None and (not _REF.fullmatch(source.ref) or ".." in source.ref):
        yield ("source", "ref"), f"{source.ref[:200]!r} names no branch, tag or commit", "It must not begin with -."


def _address_faults(key: str, address: str, schemes: Sequence[str]) -> Iterator[_Fault]:
    wanted = f"Use {' or '.join(f'{scheme}://' for scheme in schemes)}, without a password."
    try:
        parts = urlsplit(address)
        host, secret = parts.hostname or "", parts.password
    except ValueError as err:
        yield ("source", key), f"is no address: {err}", wanted
        return
    if parts.scheme not in schemes:
        yield ("source", key), f"{address[:200]!r} is not fetched by {' or '.join(schemes)}", wanted
    elif not host or host.startswith("-") or re.search(r"[\x00-\x20\x7f]", address):
        yield ("source", key), "is no address of a host", wanted
    elif secret is not None or (parts.scheme != "ssh" and parts.username is not None):
        yield ("source", key), "has a user's secret in it, and documents are kept and shown", wanted


def _property_faults(name: str) -> Iterator[_Fault]:
    keys = ("report", "polarion", "properties", name)
    if name in PROPERTIES or any(name.startswith(prefix) and name != prefix for prefix in _FREE_PROPERTIES):
        return
    plain = name.removeprefix("polarion-")
    if plain in _TO_INSTEAD:
        yield keys, "has a key of its own", f"Use report.polarion.{_TO_INSTEAD[plain]}."
    elif near := difflib.get_close_matches(plain, PROPERTIES, 1):
        yield keys, "unknown property", f"Did you mean {near[0]}?"
    else:
        yield keys, "unknown property", f"Known: {', '.join(PROPERTIES)}, custom-<field>, parameter-<name>."
