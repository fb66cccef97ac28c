"""What can be covered: the classes of the product, their methods and probes, as they are announced to the admin.

Pure. The sources read the product's files and make units of them (agent/coverage/sources); here they are held together.
Source: drill sheet, "The wire", "Messages out" (INIT_DATA_PART).
"""

import hashlib
from collections.abc import Iterable
from operator import attrgetter

import msgspec


class Method(msgspec.Struct, frozen=True):
    """One method of a class. `probes` are its numbers in the class; `checksum` changes when its text does."""

    name: str
    params: tuple[str, ...]
    return_type: str
    probes: tuple[int, ...]
    checksum: str


class Unit(msgspec.Struct, frozen=True):
    """One class of the announcement, which is one file where files are the language's modules.

    `path` is the folder below the root, "." for the root itself. The methods' probes, one after the other, are
    0..n-1. `lines[n]` is the source line of probe n, from 1; 0 where it is not known. `file` is absolute.
    """

    path: str
    name: str
    methods: tuple[Method, ...]
    lines: tuple[int, ...]
    file: str | None = None

    @property
    def class_id(self) -> str:
        """The `className` of a report."""
        return f"{self.path}/{self.name}"

    @property
    def probe_count(self) -> int:
        return len(self.lines)


class Delta(msgspec.Struct, frozen=True):
    """What a source has seen of one class: bit n of `probes` is probe n. `test` is the test file; "" is: not known."""

    class_id: str
    probes: int
    test: str = ""


class Catalog:
    """All units, by class id and by file. Probe numbers never change while an agent is attached with this catalog."""

    def __init__(self) -> None:
        self.units: dict[str, Unit] = {}
        self._of_file: dict[str, Unit] = {}

    def add(self, units: Iterable[Unit]) -> list[Unit]:
        """Take units in; one that is read again takes the place of its former self.

        Returns those that are left out, because another file (of another root) has the same class id.
        """
        refused = []
        for unit in units:
            former = self.units.get(unit.class_id)
            if former is not None and former.file != unit.file:
                refused.append(unit)
                continue
            self.units[unit.class_id] = unit
            if unit.file is not None:
                self._of_file[unit.file] = unit
        return refused

    def of_file(self, file: str) -> Unit | None:
        """The unit of an absolute path."""
        return self._of_file.get(file)

    def digest(self) -> str:
        """12 hex digits that change when any class, method or probe does; `cat-` + these is a build's version."""
        digest = hashlib.blake2b(digest_size=6)
        for unit in sorted(self.units.values(), key=attrgetter("class_id")):
            digest.update(msgspec.json.encode((unit.class_id, unit.methods)) + b"\n")
        return digest.hexdigest()
