"""The rules that the settings name: all that is wrong with them in one go, and what they cost.

Source: protocols/logs.md 2.2 (`reload`, `list_logs`) and 3, "Rules without literal"; protocols/settings.md, `[logs]`.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from agent.core import toml
from agent.core.errors import ConfigError
from agent.logs.rules import CompiledRule, RuleErrors, find_set, read_files
from agent.logs.scanner import TYPICAL, Scanner, Worker
from agent.logs.settings import LogsSettings

BUDGET_S = 1.0  # for measuring all rules; those that are left then are not measured
SAMPLE = TYPICAL * 8
RUNS = 3  # the first warms the caches

_NO_ORIGINS: Mapping[str, str] = MappingProxyType({})


def files_of(patterns: Sequence[str], base: str = "") -> list[Path]:
    """The rule files of patterns, as `logs.rules` has them; what is no pattern is a file, there or not."""
    found: list[Path] = []
    for pattern in patterns:
        path = os.path.join(base, pattern)
        found += map(Path, sorted(glob.glob(path)) if glob.has_magic(path) else [path])
    return found


def files_named(name: str, own: Sequence[Path], base: str = "") -> list[Path]:
    """The files of one entry of a watch's `rules`: a path, a pattern, or the name of a set. Empty: there is none.

    `own` are the files of `logs.rules`.
    """
    return files_of([name], base) if "/" in name or name.endswith(".toml") else find_set(name, own)


def holds_rules(path: Path) -> bool:
    """Is it a rule file, and none of settings? What cannot be read is told by whoever reads it as these."""
    try:
        return "rule" in toml.read(path).data
    except toml.TomlError:
        return False


def check(settings: LogsSettings, origins: Mapping[str, str] = _NO_ORIGINS) -> list[CompiledRule]:
    """Every rule that the settings name, once. Raises RuleErrors with all that is wrong in any of their files.

    `origins` tells where a key of the settings stands ("logs.watch[kernel].rules").
    """
    own = files_of(settings.rules)
    sets, errors = [tuple(own)], list[ConfigError]()
    for watch in settings.watch:
        files: list[Path] = []
        for name in watch.rules:
            named = files_named(name, own)
            if not named:
                key = f"logs.watch[{watch.name}].rules"
                remedy = "Name a file, or the set of one that logs.rules or the agent has."
                errors.append(
                    ConfigError(origins.get(key, "settings"), 0, key, f"no rule set is called {name!r}", remedy=remedy)
                )
            files += named
        sets.append(tuple(files))
    rules: dict[tuple[str, str], CompiledRule] = {}
    for each in dict.fromkeys(sets):
        try:
            found = read_files(each)
        except RuleErrors as err:
            errors += err.errors
        else:
            rules |= {(rule.origin, rule.spec.id): rule for rule in found.rules}
    if errors:
        raise RuleErrors(list({str(error): error for error in errors}.values()))
    return list(rules.values())


def slow(rules: Iterable[CompiledRule]) -> list[CompiledRule]:
    """Those without a literal: their regexes run on every line."""
    return [rule for rule in rules if not rule.clauses]


def told(slow: Sequence[CompiledRule], clock: Callable[[], float]) -> Iterator[str]:
    """A sentence for each slow rule, with what it costs, as far as that was measured in time. `clock` as measure()."""
    took = measure(slow, clock)
    for rule in slow:
        cost = f" ({took[rule.spec.id]:.0f} ns each)" if rule.spec.id in took else ""
        yield f"{rule.origin}: rule[{rule.spec.id}].regex: no literal, so it runs on every line{cost}"


def measure(rules: Iterable[CompiledRule], clock: Callable[[], float], budget_s: float = BUDGET_S) -> dict[str, float]:
    """Nanoseconds that each rule alone takes for a line of usual text, by id; those without a literal first.

    What was not measured when `budget_s` had passed is not in it. `clock` gives seconds.
    """
    measured: dict[str, float] = {}
    until = clock() + budget_s
    for rule in sorted(rules, key=lambda rule: bool(rule.clauses)):
        worker = Worker(Scanner([rule.regex], [rule.clauses]))
        took: list[float] = []
        for _ in range(RUNS):
            began = clock()
            worker.scan(SAMPLE)
            took.append(clock() - began)
        measured[rule.spec.id] = round(min(took) * 1e9 / SAMPLE.count(b"\n"), 1)
        if clock() > until:
            break
    return measured
