"""The merged probes of one session, an entry for each class and test, and which of them the admin may not have. Pure.

The admin never confirms data. Each flush therefore ends with a ping that carries its number: the pong proves that all
before it was read. Until then an entry that was sent is under way, and when the link breaks it is dirty again. An entry
carries all its probes whenever it is sent: a repeat is harmless, and a later one heals a lost one.

Source: protocols/drill.md, "State machine", "Delivery"; "Failure behaviour" (store full).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from agent.coverage.catalog import Delta

Key = tuple[str, str]  # class id, test
Entry = tuple[str, str, int]  # class id, test, probes: bit n is probe n

UNSPECIFIED = "unspecified"  # the test where neither the runner nor the session names one
ENTRY_BYTES = 300  # what an entry takes beside its names and probes: tuple, dict and set slots


def cost(key: Key, probes: int) -> int:
    """About how many bytes an entry takes in memory."""
    return ENTRY_BYTES + len(key[1]) + probes.bit_length() // 8


class Batch(NamedTuple):
    """Entries of one test, by columns: a tuple for each of 65,535 would take a fifth of a flush."""

    test: str
    classes: Sequence[str]
    probes: Sequence[int]

    def entries(self) -> Iterator[Entry]:
        """One by one."""
        for class_id, probes in zip(self.classes, self.probes, strict=True):
            yield class_id, self.test, probes


class Budget:
    """The bytes that all sessions together may hold. `make_room(bytes)` is asked when they are at the limit."""

    def __init__(self, limit: int, make_room: Callable[[int], bool]) -> None:
        self.limit, self.used, self.make_room = limit, 0, make_room


class Merged:
    """The entries of a session. `size` is what they take in bytes, about; `folded`: tests are no longer told apart.

    They are kept by test and then by class: a pair as a key would cost as much as all the rest.
    """

    def __init__(self, budget: Budget) -> None:
        self.size = 0
        self.folded = False
        self._budget = budget
        self._entries: dict[str, dict[str, int]] = {}
        self._dirty: dict[str, dict[str, None]] = {}
        self._under_way: dict[int, list[Batch]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def add(self, deltas: Iterable[Delta], unnamed: str = "") -> set[str]:
        """OR probes into their entries, for the test `unnamed` where none is known; the classes that had no room."""
        refused: set[str] = set()
        budget = self._budget
        used, grown, limit = budget.used, 0, budget.limit  # `grown` is in `used`, and is put into the budget at the end
        named, test, least = None, "", 0
        known_of: dict[str, int] = {}
        dirty: dict[str, None] = {}
        for delta in deltas:
            class_id, probes, name = delta.class_id, delta.probes, delta.test
            if name != named:
                named, test = name, UNSPECIFIED if self.folded else name or unnamed
                known_of, dirty = self._entries.setdefault(test, {}), self._dirty.setdefault(test, {})
                least = cost(("", test), 0)
            known = known_of.get(class_id, 0)
            merged = known | probes
            if merged == known:
                continue
            need = merged.bit_length() // 8 - known.bit_length() // 8 if known else least + merged.bit_length() // 8
            if not known and used + need > limit:
                self._grow(grown)
                grown, has_room = 0, budget.make_room(need)
                used, named = budget.used, None  # room is made by folding, also of this one
                if not has_room:
                    refused.add(class_id)
                    continue
                if self.folded and test != UNSPECIFIED:
                    refused |= self.add([delta])
                    used = budget.used
                    continue
            known_of[class_id] = merged
            dirty[class_id] = None
            grown += need
            used += need
        self._grow(grown)
        return refused

    def fold(self) -> None:
        """Give up the names of tests: one entry for each class."""
        self.folded = True
        merged: dict[str, int] = {}
        for class_id, _, probes in self.entries():
            merged[class_id] = merged.get(class_id, 0) | probes
        self._entries = {UNSPECIFIED: merged}
        self.soil()
        self._grow(sum(cost((class_id, UNSPECIFIED), probes) for class_id, probes in merged.items()) - self.size)

    def _grow(self, size: int) -> None:
        self.size += size
        self._budget.used += size

    def clear(self) -> None:
        """The session is over."""
        self._grow(-self.size)
        self._entries, self._dirty = {}, {}
        self._under_way.clear()

    def forget(self, classes: Iterable[str]) -> set[str]:
        """Drop the entries of these classes, whose probes are no longer those of the product; which there were."""
        gone = set(classes)
        found = set()
        for test, known_of in self._entries.items():
            for class_id in gone & known_of.keys():
                self._grow(-cost((class_id, test), known_of.pop(class_id)))
                self._dirty[test].pop(class_id, None)
                found.add(class_id)
        return found

    def take(self, known: Set[str]) -> list[Batch]:
        """The dirty entries of the classes that the admin knows; they are under way from now on, see `sent`."""
        taken = []
        for test, dirty in self._dirty.items():
            if dirty.keys() <= known:
                classes = list(dirty)
                dirty.clear()
            else:
                classes = [class_id for class_id in dirty if class_id in known]
                for class_id in classes:
                    del dirty[class_id]
            if classes:
                taken.append(Batch(test, classes, list(map(self._entries[test].__getitem__, classes))))
        return taken

    def sent(self, batches: Iterable[Batch], number: int) -> None:
        """These were sent before the ping of that number."""
        self._under_way.setdefault(number, []).extend(batches)

    def pong(self, number: int) -> None:
        """All that was sent before that ping has been read."""
        for earlier in [each for each in self._under_way if each <= number]:
            del self._under_way[earlier]

    def lost(self) -> None:
        """The link broke: what was under way is dirty again."""
        for batches in self._under_way.values():
            for test, classes, _ in batches:
                known_of = self._entries[test]
                self._dirty[test].update((class_id, None) for class_id in classes if class_id in known_of)
        self._under_way.clear()

    def soil(self) -> None:
        """All entries are dirty: the admin has begun anew."""
        self._under_way.clear()
        self._dirty = {test: dict.fromkeys(known_of) for test, known_of in self._entries.items()}

    @property
    def told(self) -> bool:
        """Has the admin read it all?"""
        return not self._under_way and not any(self._dirty.values())

    def entries(self) -> list[Entry]:
        """All of them."""
        return [
            (class_id, test, probes)
            for test, known_of in self._entries.items()
            for class_id, probes in known_of.items()
        ]
