"""The merged probes of one session, an entry for each class and test, and which of them the admin may not have. Pure.

The admin never confirms data. Each flush therefore ends with a ping that carries its number: the pong proves that all
before it was read. Until then an entry that was sent is under way, and when the link breaks it is dirty again. An entry
carries all its probes whenever it is sent: a repeat is harmless, and a later one heals a lost one.

Source: protocols/drill.md, "State machine", "Delivery"; "Failure behaviour" (store full).
"""

from collections.abc import Callable, Iterable

Key = tuple[str, str]  # class id, test
Entry = tuple[str, str, int]  # class id, test, probes: bit n is probe n

UNSPECIFIED = "unspecified"  # the test where neither the runner nor the session names one
ENTRY_BYTES = 300  # what an entry takes beside its names and probes: tuple, dict and set slots


def cost(key: Key, probes: int) -> int:
    """About how many bytes an entry takes in memory."""
    return ENTRY_BYTES + len(key[1]) + probes.bit_length() // 8


class Budget:
    """The bytes that all sessions together may hold. `make_room(bytes)` is asked when they are at the limit."""

    def __init__(self, limit: int, make_room: Callable[[int], bool]) -> None:
        self.limit, self.used, self.make_room = limit, 0, make_room


class Merged:
    """The entries of a session. `size` is what they take in bytes, about; `folded`: tests are no longer told apart."""

    def __init__(self, budget: Budget) -> None:
        self.size = 0
        self.folded = False
        self._budget = budget
        self._entries: dict[Key, int] = {}
        self._dirty: dict[Key, None] = {}
        self._under_way: dict[int, list[Key]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[Entry]) -> set[str]:
        """OR probes into their entries; the classes for which there was no room."""
        refused = set()
        for class_id, test, probes in entries:
            key = (class_id, UNSPECIFIED if self.folded else test)
            known = self._entries.get(key, 0)
            merged = known | probes
            if merged == known:
                continue
            if not known:
                budget, need = self._budget, cost(key, merged)
                if budget.used + need > budget.limit:
                    if not budget.make_room(need):
                        refused.add(class_id)
                        continue
                    if self.folded:  # to make the room
                        key = (class_id, UNSPECIFIED)
                        known = self._entries.get(key, 0)
                        merged = known | probes
                        if merged == known:
                            continue
            self._grow(cost(key, merged) - (cost(key, known) if known else 0))
            self._entries[key] = merged
            self._dirty[key] = None
        return refused

    def _grow(self, size: int) -> None:
        self.size += size
        self._budget.used += size

    def fold(self) -> None:
        """Give up the names of tests: one entry for each class."""
        self.folded = True
        merged: dict[Key, int] = {}
        for (class_id, _), probes in self._entries.items():
            key = (class_id, UNSPECIFIED)
            merged[key] = merged.get(key, 0) | probes
        self._entries = merged
        self._dirty = dict.fromkeys(merged)
        self._under_way.clear()
        self._grow(sum(cost(key, probes) for key, probes in merged.items()) - self.size)

    def clear(self) -> None:
        """The session is over."""
        self._grow(-self.size)
        self._entries, self._dirty = {}, {}
        self._under_way.clear()

    def forget(self, classes: Iterable[str]) -> set[str]:
        """Drop the entries of these classes, whose probes are no longer those of the product; which there were."""
        gone = set(classes)
        keys = [key for key in self._entries if key[0] in gone]
        for key in keys:
            self._grow(-cost(key, self._entries.pop(key)))
            self._dirty.pop(key, None)
        return {class_id for class_id, _ in keys}

    def take(self, is_known: Callable[[str], bool]) -> list[Entry]:
        """The dirty entries of the classes that the admin knows; they are under way from now on, see `sent`."""
        keys = [key for key in self._dirty if is_known(key[0])]
        if not keys:
            return []
        for key in keys:
            del self._dirty[key]
        entries = self._entries
        return [(class_id, test, entries[class_id, test]) for class_id, test in keys]

    def sent(self, entries: Iterable[Entry], number: int) -> None:
        """These were sent before the ping of that number."""
        self._under_way.setdefault(number, []).extend((class_id, test) for class_id, test, _ in entries)

    def pong(self, number: int) -> None:
        """All that was sent before that ping has been read."""
        for earlier in [each for each in self._under_way if each <= number]:
            del self._under_way[earlier]

    def lost(self) -> None:
        """The link broke: what was under way is dirty again."""
        for keys in self._under_way.values():
            self._dirty.update((key, None) for key in keys if key in self._entries)
        self._under_way.clear()

    def soil(self) -> None:
        """All entries are dirty: the admin has begun anew."""
        self._under_way.clear()
        self._dirty = dict.fromkeys(self._entries)

    @property
    def told(self) -> bool:
        """Has the admin read it all?"""
        return not self._dirty and not self._under_way

    def entries(self) -> list[Entry]:
        """All of them."""
        return [(class_id, test, probes) for (class_id, test), probes in self._entries.items()]
