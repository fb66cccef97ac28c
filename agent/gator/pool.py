"""What a scheduler has to give: slots, CPUs, memory, licences. Pure.

Source: protocols/gator.md, "Schedulers" (local).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from agent.gator import spec as specs
from agent.gator.spec import Job, Node


class Demand(msgspec.Struct, frozen=True):
    """What a job or tier takes: slots, bytes of memory, licences by name. `pinned`: cores were asked for by number."""

    slots: int
    memory: int = 0
    licenses: tuple[tuple[str, int], ...] = ()
    pinned: bool = False


def demand(job: Job) -> Demand:
    """A job costs a slot for each core, one when it names none; `!Cores [0]` costs none."""
    wanted = specs.cores(job)
    return Demand(
        slots=1 if wanted is None else wanted,
        memory=specs.memory(job) or 0,
        licenses=tuple(specs.licenses(job).items()),
        pinned=bool(wanted),
    )


def _wanted(node: Node) -> Iterator[tuple[Demand, int]]:
    """What the jobs of a tree want, each with how many there are of it."""
    if isinstance(node, Job):
        yield demand(node), 1
    else:
        for job in node.jobs if node.copies else ():
            for each, count in _wanted(job):
                yield each, node.copies * count


class Grant(msgspec.Struct, frozen=True):
    """What was given for a demand; `cpus` are the numbers of CPUs that are its own, where cores were asked for."""

    demand: Demand
    cpus: tuple[int, ...] = ()


class Held:
    """A grant that is given back once, by whoever is first."""

    def __init__(self, pool: "Pool", grant: Grant) -> None:
        self.grant, self._pool = grant, pool
        self._is_held = True

    def give(self) -> None:
        if self._is_held:
            self._is_held = False
            self._pool.give(self.grant)


class Pool:
    """Shared by all tiers of the process. `licenses` are those that are counted; others are unlimited.

    `cpus` are those that it hands out, by number; once they are gone, jobs run on any. `freed` are called whenever
    something was given back, or added.
    """

    def __init__(self, slots: int, memory: int, licenses: Mapping[str, int], cpus: Sequence[int] = ()) -> None:
        self.slots, self.memory, self.licenses = slots, memory, dict(licenses)
        self.free_slots, self._free_memory, self._free_licenses = slots, memory, dict(licenses)
        self._free_cpus = list(cpus)
        self.freed: list[Callable[[], None]] = []

    def why_never(self, demand: Demand) -> str | None:
        """Why this can never be given; None if it can."""
        if demand.slots > self.slots:
            return f"it wants {demand.slots} slots; there are {self.slots}"
        if demand.memory > self.memory:
            return f"it wants {demand.memory} bytes of memory; there are {self.memory}"
        for name, count in demand.licenses:
            if count > self.licenses.get(name, count):
                return f"it wants {count} licences of {name!r}; there are {self.licenses[name]}"
        return None

    def unlisted(self, demand: Demand) -> list[str]:
        """Licences that nobody counts."""
        return [name for name, _ in demand.licenses if name not in self.licenses]

    def share(self, tier: Node) -> Demand:
        """What a tier takes that counts for itself: all that its jobs want, as far as it is free; at least what the
        greediest of them wants of each, since it would wait for ever for what its tier does not have.
        """
        wanted = list(_wanted(tier))
        if not wanted:
            return Demand(1)

        def part(each: list[int], free: int) -> int:
            return max(*each, min(free, sum(one * n for one, (_, n) in zip(each, wanted, strict=True))))

        licenses = [dict(each.licenses) for each, _ in wanted]
        counted = sorted({name for each in licenses for name in each if name in self.licenses})
        return Demand(
            max(1, part([each.slots for each, _ in wanted], self.free_slots)),
            part([each.memory for each, _ in wanted], self._free_memory),
            tuple(
                (name, part([each.get(name, 0) for each in licenses], self._free_licenses[name])) for name in counted
            ),
            pinned=any(each.pinned for each, _ in wanted),
        )

    def take(self, demand: Demand) -> Grant | None:
        """Take it, or nothing."""
        if demand.slots > self.free_slots or demand.memory > self._free_memory:
            return None
        if any(count > self._free_licenses.get(name, count) for name, count in demand.licenses):
            return None
        self.free_slots -= demand.slots
        self._free_memory -= demand.memory
        for name, count in demand.licenses:
            if name in self._free_licenses:
                self._free_licenses[name] -= count
        cpus: tuple[int, ...] = ()
        if demand.pinned and demand.slots <= len(self._free_cpus):
            cpus = tuple(self._free_cpus[: demand.slots])
            del self._free_cpus[: demand.slots]
        return Grant(demand, cpus)

    def give(self, grant: Grant) -> None:
        """Give it back."""
        self.free_slots += grant.demand.slots
        self._free_memory += grant.demand.memory
        for name, count in grant.demand.licenses:
            if name in self._free_licenses:
                self._free_licenses[name] += count
        self._free_cpus += grant.cpus
        for call in self.freed:
            call()

    def add(self, slots: int) -> None:
        """More slots, from the parent's scheduler."""
        self.slots += slots
        self.free_slots += slots
        for call in self.freed:
            call()
