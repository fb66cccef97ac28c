"""Hardware profiles: which of hw-profiles/*.toml fits this machine, and what it lays below the settings.

    AgentError
    └── ProfileMissing      no profile is called so

A profile with an error is left out, as is one whose parent has an error: the next that fits is taken, in the end the
generic one.

Source: protocols/packaging.md 5.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import inspect

import agent
from agent.core import toml, typed
from agent.core.config import Overlay
from agent.core.errors import AgentError, ConfigError
from agent.core.facts import NAMES, NUMBERS, Fact, Facts
from agent.core.typed import Place, Source

BUNDLED = Path(agent.__file__).parent.parent / "hw-profiles"  # beside the code: in a checkout, and in what is frozen
FOLDERS = (BUNDLED, Path("/etc/agent/hw-profiles"))  # a later one wins, by name

WEIGHTS = {
    **dict.fromkeys(("dmi.product_name", "dmi.board_name", "dt.model", "dt.compatible"), 8),
    **dict.fromkeys(("dmi.sys_vendor", "dmi.board_vendor", "cpu.model", "pci"), 4),
    **dict.fromkeys(("nic.drivers", "devices", "usb", "hypervisor"), 2),
}

Block = Mapping[str, tuple[str, ...]]
"""A `[match]`: fact to what it may be, as globs, or ">=4096" for a number."""
Check = Callable[[Sequence[Overlay]], list[ConfigError]]

_BOUND = re.compile(r"(>=|<=|>|<)?\s*(\d+)")
_COMPARED: Mapping[str | None, Callable[[int, int], bool]] = {
    **{">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt},
    None: operator.eq,
}


class ProfileMissing(AgentError):
    """The profile that was asked for does not exist, or cannot be used; `errors` say why then."""

    def __init__(self, name: str, errors: Sequence[ConfigError], known: Sequence[str]) -> None:
        what = f"the hardware profile {name!r} has errors" if errors else f"no hardware profile is called {name!r}"
        remedy = f'Use "auto"{"".join(f", {each}" for each in known)}.'
        super().__init__(what, remedy=remedy)
        self.errors = tuple(errors)


class _When(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    match: dict[str, Any]
    settings: dict[str, Any]


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    extends: str = ""
    about: Annotated[str, msgspec.Meta(max_length=200)] = ""
    match: dict[str, Any] | list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    when: list[_When] = []


_FILE = inspect.type_info(_File)


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile's file. `blocks` are its `[[match]]`; without one it is only extended, or asked for by name.

    `shares` are its settings: the first always holds, the others, `[[when]]`, where their block does.
    """

    name: str
    about: str
    extends: str
    path: Path
    blocks: tuple[Block, ...]
    shares: tuple[tuple[Block, Overlay], ...]
    line: int = 1  # of `extends`


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How a profile fits: its best block's `score` and literal characters, or the first key that `failed`."""

    name: str
    about: str
    file: str
    score: int = 0
    literal: int = 0
    failed: str | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A profile that is not used, and all that is wrong with it."""

    name: str
    errors: tuple[str, ...]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: `fits` best first, then those that do not. `name` is None when none fits."""

    name: str | None
    forced: bool
    fits: tuple[Fit, ...]
    refused: tuple[Refused, ...]
    warnings: tuple[str, ...]
    overlays: tuple[Overlay, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `agent profile --json` and the action `profile` say. `settings` are those that the profile decides."""

    profile: str | None
    forced: bool
    facts: dict[str, str | int | list[str]]
    fits: tuple[Fit, ...]
    refused: tuple[Refused, ...]
    warnings: tuple[str, ...]
    settings: dict[str, Any]

    def show(self) -> list[str]:
        """For people: facts, each profile with its score or why it does not fit, and what the winner decides."""
        width = max(map(len, self.facts), default=0)
        lines = [f"{name:<{width}}  {_clipped(fact)}" for name, fact in self.facts.items()]
        width = max((len(fit.name) for fit in self.fits), default=0)
        lines += ["", *(f"{fit.name:<{width}}  {fit.failed or f'fits, score {fit.score}'}" for fit in self.fits)]
        lines += [line for refused in self.refused for line in (f"{refused.name}: refused", *refused.errors)]
        lines += ["", f"profile  {self.profile or 'none'}{', as asked for' if self.forced else ''}"]
        lines += [f"  {key} = {_clipped(value)}" for key, value in self.settings.items()]
        return [*lines, *(f"warning: {text}" for text in self.warnings)]


def forbidden(overlays: Sequence[Overlay], patterns: Sequence[str]) -> list[ConfigError]:
    """An error for each key that a profile may not set: globs of dotted keys."""
    errors: list[ConfigError] = []

    def walk(value: object, place: Place, key: str) -> None:
        if key and any(fnmatchcase(key, pattern) for pattern in patterns):
            place.no("a hardware profile may not set it", "Set it in /etc/agent/agent.toml.")
        elif isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, place.inner(name), f"{key}.{name}" if key else name)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(inner, place.inner(i), key)

    for overlay in overlays:
        source = Source(str(overlay.path), overlay.document)
        walk(overlay.data, Place(source, overlay.at), "")
        errors += source.errors
    return errors


def is_profile(path: Path) -> bool:
    """Is it a profile's file, and none of settings? What cannot be read is told by whoever reads it as these."""
    try:
        return not toml.read(path).data.keys().isdisjoint(("extends", "match", "settings", "when"))
    except toml.TomlError:
        return False


class Profiles:
    """All profiles of some folders, and the `files` beside. `check` says what is wrong with a profile's settings, its
    parents' included.
    """

    def __init__(self, folders: Sequence[Path], check: Check, files: Sequence[Path] = ()) -> None:
        self._check = check
        self._good: dict[str, Profile] = {}
        self._errors: dict[str, list[ConfigError]] = {}
        self._checked: set[str] = set()
        found = {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}
        for name, path in sorted((found | {path.stem: path for path in files}).items()):
            profile, errors = _read(path)
            if profile and not errors:
                self._good[name] = profile
            else:
                self._errors[name] = errors

    def choose(self, facts: Facts, forced: str | None = None) -> Choice:
        """The profile that fits best, or the one that is `forced`. Raises ProfileMissing."""
        if forced is not None and not self._is_good(forced):
            raise ProfileMissing(forced, self._errors.get(forced, ()), sorted(self._good))
        fits = sorted((_fit(profile, facts) for profile in self._good.values()), key=_rank)
        fitting = [fit for fit in fits if fit.failed is None]
        while forced is None and fitting and not self._is_good(fitting[0].name):
            fits.remove(fitting.pop(0))
        name = forced or (fitting[0].name if fitting else None)
        tied = [fit.name for fit in fitting[1:] if fit.score == fitting[0].score] if forced is None else []
        return Choice(
            name=name,
            forced=forced is not None,
            fits=tuple(fits),
            refused=tuple(Refused(name=name, errors=tuple(map(str, err))) for name, err in self._errors.items()),
            warnings=(f"hardware profile {name} fits no better than {', '.join(tied)}.",) if tied else (),
            overlays=tuple(self._overlays(name, facts)) if name else (),
        )

    def overlays_of(self, name: str) -> tuple[list[Overlay], list[ConfigError]]:
        """All that a profile might say on any machine, its parents' share first, and all that is wrong with it."""
        is_good = self._is_good(name)
        return list(self._overlays(name, None)) if is_good else [], self._errors.get(name, [])

    def check_all(self) -> None:
        """Check the settings of all profiles, and not only of those that fit."""
        for name in list(self._good):
            self._is_good(name)

    def _is_good(self, name: str) -> bool:
        """Checked at the first question: of most profiles only the match is ever needed."""
        if name in self._good and name not in self._checked:
            self._checked.add(name)
            if errors := self._chain_errors(name) or self._check(list(self._overlays(name, None))):
                del self._good[name]
                self._errors[name] = errors
        return name in self._good

    def _chain_errors(self, name: str) -> list[ConfigError]:
        seen, profile = [name], self._good[name]
        while parent := profile.extends:
            seen.append(parent)
            if parent in seen[:-1]:
                what, remedy = f"goes in a circle: {' -> '.join(seen)}", "Let one of them extend none."
            elif parent in self._errors:
                what, remedy = f"{parent} has errors itself", "Correct them."
            elif parent not in self._good:
                what, remedy = f"there is no profile {parent}", "Name another, or leave it out."
            else:
                profile = self._good[parent]
                continue
            return [ConfigError(profile.path, profile.line, "extends", what, remedy=remedy)]
        return []

    def _overlays(self, name: str, facts: Facts | None) -> Iterator[Overlay]:
        """What a profile says, its parents' share first; without `facts` all that it might say."""
        profile = self._good[name]
        if profile.extends:
            yield from self._overlays(profile.extends, facts)
        for block, overlay in profile.shares:
            if facts is None or _held(block, facts)[2] is None:
                yield overlay


def _read(path: Path) -> tuple[Profile | None, list[ConfigError]]:
    try:
        document = toml.read(path)
    except toml.TomlError as err:
        return None, [ConfigError(path, err.line, err.key, err.what, remedy=err.remedy)]
    source = Source(str(path), document)
    place = Place(source)
    file = typed.convert(_FILE, document.data, place)
    if file is None or source.errors:
        return None, source.errors
    if file.name != path.stem:
        place.inner("name").no(f"{file.name!r} is not the file's", f'Write name = "{path.stem}", or rename the file.')
    match = place.inner("match")
    blocks = (
        [_block(file.match, match)]
        if isinstance(file.match, dict)
        else [_block(block, match.inner(i)) for i, block in enumerate(file.match)]
    )
    shares: list[tuple[Block, Overlay]] = [({}, Overlay(file.name, file.settings, path, document, ("settings",)))]
    for i, when in enumerate(file.when):
        block = _block(when.match, place.inner("when").inner(i).inner("match"))
        shares.append((block, Overlay(file.name, when.settings, path, document, ("when", i, "settings"))))
    profile = Profile(
        name=file.name,
        about=file.about,
        extends=file.extends,
        path=path,
        blocks=tuple(blocks),
        shares=tuple(shares),
        line=place.inner("extends").line,
    )
    return profile, source.errors


def _block(table: Mapping[str, Any], place: Place) -> dict[str, tuple[str, ...]]:
    """A `[match]`, flat; what is wrong with it goes to the place's errors."""
    block: dict[str, tuple[str, ...]] = {}

    def take(table: Mapping[str, Any], place: Place, outer: str) -> None:
        for key, value in table.items():
            name, here = f"{outer}{key}", place.inner(key)
            if isinstance(value, dict):
                take(value, here, f"{name}.")
            elif name not in NAMES:
                near = typed.nearest(name, NAMES, place.source)
                here.no("is no fact", f"Did you mean {near}?" if near else f"There are: {', '.join(NAMES)}.")
            elif wanted := _wanted(name, value, here):
                block[name] = wanted

    take(table, place, "")
    if not block and not place.source.errors:
        place.no("says nothing", "Name a fact, as arch, and what it must be.")
    return block


def _wanted(name: str, value: object, place: Place) -> tuple[str, ...]:
    wanted = value if isinstance(value, list) else [value]
    if not wanted or not all(isinstance(each, str | int) and not isinstance(each, bool) for each in wanted):
        place.no("expected text, a number or a list of these", 'Write it in quotes, as "Dell*".')
        return ()
    texts = tuple(map(str, wanted))
    for text in texts:
        if name in NUMBERS and not _BOUND.fullmatch(text):
            place.no(f"{text!r} is no number and no bound", 'Write a number, or ">=4096".')
    return texts


def _rank(fit: Fit) -> tuple[bool, int, int, str]:
    return fit.failed is not None, -fit.score, -fit.literal, fit.name


def _fit(profile: Profile, facts: Facts) -> Fit:
    """The best of its blocks; where none holds, the one of which most holds says why not."""
    held = [_held(block, facts) for block in profile.blocks]
    best = min(held, key=lambda held: (held[2] is not None, -held[0], -held[1]), default=(0, 0, "it has no match"))
    score, literal, failed = best
    about, file = profile.about, str(profile.path)
    return Fit(name=profile.name, about=about, file=file, score=score, literal=literal, failed=failed)


def _held(block: Block, facts: Facts) -> tuple[int, int, str | None]:
    """Score and literal characters of a block, and the first key that fails: both are counted up to there."""
    score = literal = 0
    for name, wanted in block.items():
        fact = facts.get(name)
        held = [_literal(text) for text in wanted if fact is not None and _is(fact, text)]
        if not held:
            failed = f"{name} is {_shown(fact)}, not {' or '.join(wanted)}"
            return score, literal, failed
        score += WEIGHTS.get(name, 1)
        literal += max(held)
    return score, literal, None


def _is(fact: Fact, wanted: str) -> bool:
    match fact:
        case int():
            bound = _BOUND.fullmatch(wanted)
            return bound is not None and _COMPARED[bound[1]](fact, int(bound[2]))
        case str():
            return fnmatchcase(fact.lower(), wanted.lower())
        case _:
            return any(fnmatchcase(each.lower(), wanted.lower()) for each in fact)


def _literal(text: str) -> int:
    return len(re.sub(r"[*?\[\]<>= ]", "", text))


def _clipped(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _shown(fact: Fact | None) -> str:
    match fact:
        case None:
            return "not known"
        case tuple():
            return ", ".join(fact[:4]) + (", ..." if len(fact) > 4 else "")
        case _:
            return str(fact)
