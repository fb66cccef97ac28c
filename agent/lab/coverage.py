"""What sessions of the lab's Drill admin reached, as documents: LCOV, Cobertura, a flag for each probe.

What is taken is a copy, so that the documents can be written in a thread. On the wire classes have no lines: in the
files line n is probe n - 1.

Source: protocols/drill.md, "The lab's admin" (`data/coverage`).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from agent import __version__
from agent.coverage import report
from agent.coverage.catalog import Method, Unit
from agent.lab.drillwire import AstEntity
from agent.lab.test2code import Plugin, Session, flags_of


class Taken(NamedTuple):
    """The classes of a build and how many probes each has, by name; what each session reached, as Session.reached."""

    classes: dict[str, AstEntity]
    probes: dict[str, int]
    reached: list[dict[tuple[str, str], int]]


def take(plugin: Plugin, sessions: Iterable[Session]) -> Taken:
    """The coverage of these sessions as it is now."""
    return Taken(dict(plugin.classes), dict(plugin.probes), [dict(session.reached) for session in sessions])


def probes(taken: Taken) -> list[dict[str, Any]]:
    """For each class and test of each session {"className", "testName", "probes": a flag for each}."""
    return [
        {"className": name, "testName": test, "probes": flags_of(flags, taken.probes[name])}
        for reached in taken.reached
        for (name, test), flags in sorted(reached.items())
        if name in taken.probes
    ]


def lcov(taken: Taken) -> bytes:
    """A tracefile of all sessions together, with a record for each class and test."""
    return report.lcov(_units(taken), _covered(taken))


def cobertura(taken: Taken, at: float) -> bytes:
    """Cobertura's document of all sessions together; `at` is seconds since 1970."""
    return report.cobertura(_units(taken), _covered(taken), at=at, version=__version__)


def _units(taken: Taken) -> list[Unit]:
    return [
        Unit(
            path=entity.path,
            name=entity.name,
            methods=tuple(
                Method(one.name, one.params, one.return_type, one.probes, one.checksum) for one in entity.methods
            ),
            lines=(0,) * taken.probes[name],
        )
        for name, entity in taken.classes.items()
    ]


def _covered(taken: Taken) -> dict[str, dict[str, int]]:
    """Class to test to probes, bit n for probe n."""
    covered: dict[str, dict[str, int]] = {}
    for reached in taken.reached:
        for (name, test), flags in reached.items():
            if name in taken.probes:
                bits = int("".join("01"[flag] for flag in reversed(flags_of(flags, taken.probes[name]))) or "0", 2)
                covered.setdefault(name, {})[test] = covered.get(name, {}).get(test, 0) | bits
    return covered
