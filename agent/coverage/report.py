"""Coverage as files that other tools read: LCOV's tracefile and Cobertura's XML, and the totals of both.

A line is covered when any of its probes is. Where no line of a unit is known (a class of a JVM, classes that an agent
only announced), probe n stands for line n + 1. There are no counts: a line that was reached has one hit.

Source: protocols/drill.md, "Purpose and place"; geninfo(1), "FILES" (the tracefile); Cobertura's coverage-04.dtd.
"""

import os.path
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import msgspec

from agent.core import xmltext
from agent.coverage.catalog import Method, Unit

Covered = Mapping[str, Mapping[str, int]]  # class id to test to probes; bit n is probe n; the test "" is not known


class Totals(msgspec.Struct, frozen=True):
    """How many files, lines with code in them, and lines of these that were reached."""

    files: int
    lines: int
    covered: int


def totals(units: Iterable[Unit], covered: Covered) -> Totals:
    """Count what the reports list."""
    found = [_hits(unit, _of_all_tests(covered, unit)) for unit in units]
    return Totals(len(found), sum(map(len, found)), sum(sum(hits.values()) for hits in found))


def lcov(units: Iterable[Unit], covered: Covered) -> bytes:
    """A tracefile, with a record for each file and each test that reached it; one without a name where none did.

    File names stand as the bytes they are on the disk. genhtml takes letters, digits and _ in a test's name.
    """
    names: dict[str, str] = {}
    out: list[str] = []
    for unit in _sorted(units):
        for test, probes in sorted(covered.get(unit.class_id, {}).items()) or [("", 0)]:
            out += _record(unit, _test_name(test, names), probes)
    return "".join(f"{line}\n" for line in out).encode("utf-8", "surrogateescape")


def cobertura(units: Iterable[Unit], covered: Covered, *, at: float, version: str) -> bytes:
    """Cobertura's document: a package for each folder, a class for each file. `at` is seconds since 1970.

    `version` is of who made it. File names are below the one source folder, which is the deepest that has all of them;
    characters that no XML can hold are `\\xNN` or `\\uNNNN`.
    """
    units = _sorted(units)
    source = _common_folder([unit.file for unit in units if unit.file is not None])
    of_class = {unit.class_id: _hits(unit, _of_all_tests(covered, unit)) for unit in units}
    out = ["<packages>"]
    for path, members in groupby(units, lambda unit: unit.path):
        classes = list(members)
        lines = [hit for unit in classes for hit in of_class[unit.class_id].values()]
        out.append(f"<package{_attributes(name=path)}{_rates(lines)}>\n<classes>")
        for unit in classes:
            out += _class(unit, _file_below(unit, source), of_class[unit.class_id], _of_all_tests(covered, unit))
        out.append("</classes>\n</package>")
    out.append("</packages>\n</coverage>\n")
    all_lines = [hit for hits in of_class.values() for hit in hits.values()]
    counts = {"lines-covered": sum(all_lines), "lines-valid": len(all_lines)}
    counts |= {"branches-covered": 0, "branches-valid": 0}
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<!DOCTYPE coverage SYSTEM "http://cobertura.sourceforge.net/xml/coverage-04.dtd">',
        f"<coverage{_rates(all_lines)}{_attributes(**counts, timestamp=int(at * 1000), version=version)}>",
        f"<sources>\n<source>{xmltext.content(source)}</source>\n</sources>",
    ]
    return "\n".join(head + out).encode()


def _sorted(units: Iterable[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: (unit.path, unit.name))


def _of_all_tests(covered: Covered, unit: Unit) -> int:
    probes = 0
    for of_test in covered.get(unit.class_id, {}).values():
        probes |= of_test
    return probes


def _hits(unit: Unit, probes: int, only: Iterable[int] | None = None) -> dict[int, bool]:
    """Was it reached, for each line of the unit, or of the probes in `only`; in order."""
    lines = unit.lines if any(unit.lines) else range(1, unit.probe_count + 1)
    is_reached = f"{probes:b}"[::-1]
    hits: dict[int, bool] = {}
    for probe in range(len(lines)) if only is None else only:
        if line := lines[probe]:
            hits[line] = hits.get(line, False) or is_reached[probe : probe + 1] == "1"
    return dict(sorted(hits.items()))


def _methods(unit: Unit, probes: int) -> Iterator[tuple[str, Method, dict[int, bool]]]:
    """Each method that has lines, and these, by a name that is no other method's of the file."""
    seen: set[str] = set()
    for method in unit.methods:
        hits = _hits(unit, probes, method.probes)
        if hits:
            name = method.name if method.name not in seen else f"{method.name} (line {min(hits)})"
            if name not in seen:  # two of one name in one line are one to those who read it
                seen.add(name)
                yield name, method, hits


def _record(unit: Unit, test: str, probes: int) -> Iterator[str]:
    yield f"TN:{test}"
    yield f"SF:{_one_line(unit.file or unit.class_id)}"
    methods = [(_function(name), min(hits), any(hits.values())) for name, _, hits in _methods(unit, probes)]
    yield from (f"FN:{line},{name}" for name, line, _ in methods)
    yield from (f"FNDA:{reached:d},{name}" for name, _, reached in methods)
    yield f"FNF:{len(methods)}"
    yield f"FNH:{sum(reached for _, _, reached in methods)}"
    hits = _hits(unit, probes)
    yield from (f"DA:{line},{reached:d}" for line, reached in hits.items())
    yield f"LF:{len(hits)}"
    yield f"LH:{sum(hits.values())}"
    yield "end_of_record"


_NO_WORD = re.compile(r"\W", re.ASCII)
_NOT_IN_A_LINE = re.compile("[\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")  # but for bytes that were no UTF-8


def _test_name(test: str, names: dict[str, str]) -> str:
    """A name as genhtml takes it, that no other test of this file has."""
    if test not in names:
        wanted = name = _NO_WORD.sub("_", test)
        number, taken = 1, set(names.values())
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        names[test] = name
    return names[test]


def _function(name: str) -> str:
    return _one_line(name).replace(",", ";")  # a comma would end it: genhtml, read_info_file


def _one_line(text: str) -> str:
    return _NOT_IN_A_LINE.sub("?", text)


def _common_folder(files: list[str]) -> str:
    return os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files) if files else "."


def _file_below(unit: Unit, source: str) -> str:
    return unit.class_id.removeprefix("./") if unit.file is None else unit.file[len(source) :].lstrip("/")


def _class(unit: Unit, file: str, hits: dict[int, bool], probes: int) -> Iterator[str]:
    yield f"<class{_attributes(name=unit.name, filename=file)}{_rates(hits.values())}>\n<methods>"
    for name, method, lines in _methods(unit, probes):
        signature = f"({', '.join(method.params)}){method.return_type}"
        yield f"<method{_attributes(name=name, signature=signature)}{_rates(lines.values())}>"
        yield from _lines(lines)
        yield "</method>"
    yield "</methods>"
    yield from _lines(hits)
    yield "</class>"


def _lines(hits: Mapping[int, bool]) -> Iterator[str]:
    yield "<lines>"
    yield from (f'<line number="{line}" hits="{reached:d}" branch="false"/>' for line, reached in hits.items())
    yield "</lines>"


def _rates(hits: Iterable[bool]) -> str:
    """The attributes that a package, a class and a method have as the whole has them. Without lines nothing lacks."""
    reached = list(hits)
    rate = f"{sum(reached) / len(reached):.4f}" if reached else "1"
    return _attributes(**{"line-rate": rate, "branch-rate": "0", "complexity": "0"})


def _attributes(**values: object) -> str:
    return "".join(f' {name}="{xmltext.value(str(value))}"' for name, value in values.items())
