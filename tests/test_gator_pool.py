"""Slots, memory and licences: taken and given back."""

from agent.gator.pool import Demand, Grant, Held, Pool, demand
from agent.gator.spec import Cores, Group, Job, License, Memory


def test_a_job_costs_its_cores_or_one_slot() -> None:
    assert demand(Job(ident="a", command="x")) == Demand(1)
    assert demand(Job(ident="a", command="x", resources=(Cores(0),))) == Demand(0)
    wanted = demand(Job(ident="a", command="x", resources=(Cores(2), Memory(1, "KB"), License("l", 3))))
    assert wanted == Demand(2, 1000, (("l", 3),), pinned=True)


def test_what_is_not_there_whole_is_not_taken_in_part() -> None:
    pool = Pool(4, 100, {"l": 1})
    first = pool.take(Demand(2, 60, (("l", 1),)))
    assert first is not None
    assert pool.take(Demand(1, 50)) is None
    assert pool.take(Demand(1, 0, (("l", 1),))) is None
    assert pool.take(Demand(3)) is None
    assert pool.free_slots == 2
    pool.give(first)
    assert pool.take(Demand(4, 100, (("l", 1),))) is not None


def test_licences_that_nobody_counts_are_unlimited_and_told() -> None:
    pool = Pool(1, 0, {"l": 1})
    assert pool.unlisted(Demand(1, 0, (("l", 1), ("m", 9)))) == ["m"]
    assert pool.take(Demand(1, 0, (("m", 9),))) is not None


def test_what_can_never_fit_is_told() -> None:
    pool = Pool(2, 100, {"l": 1})
    assert pool.why_never(Demand(2, 100, (("l", 1),))) is None
    assert pool.why_never(Demand(3)) == "it wants 3 slots; there are 2"
    assert pool.why_never(Demand(1, 101)) == "it wants 101 bytes of memory; there are 100"
    assert pool.why_never(Demand(1, 0, (("l", 2),))) == "it wants 2 licences of 'l'; there are 1"


def test_cores_that_were_asked_for_are_cpus_of_ones_own() -> None:
    pool = Pool(4, 0, {}, [0, 1, 2, 3])
    one, two = pool.take(Demand(1, pinned=True)), pool.take(Demand(2, pinned=True))
    assert one is not None
    assert two is not None
    assert (one.cpus, two.cpus) == ((0,), (1, 2))
    assert pool.take(Demand(1)) == Grant(Demand(1))
    pool.give(one)
    pool.give(two)
    all_left = Demand(3, pinned=True)
    assert pool.take(all_left) == Grant(all_left, (3, 0, 1))


def test_a_tier_gets_cpus_for_its_jobs_that_ask_for_some() -> None:
    job = Job(ident="a", command="x", resources=(Cores(1),))
    pool = Pool(5, 0, {}, [0, 1, 2])
    tiers = [
        Group(ident="g", jobs=(Group(ident="t", repeats=2, jobs=(each,)),))
        for each in (job, job, Job(ident="b", command="x"))
    ]
    grants = [pool.take(pool.share(tier)) for tier in tiers]
    assert [grant and grant.cpus for grant in grants] == [(0, 1), (), ()]  # two are not left for the second


def test_a_tier_takes_what_is_free_of_all_that_its_jobs_want_and_never_less_than_one_needs() -> None:
    small = Job(ident="a", command="x", resources=(Memory(40, "KB"), License("l"), License("free")))
    wide = Job(ident="b", command="x", resources=(Cores(3),))
    tier = Group(ident="g", jobs=(Group(ident="t", repeats=5, jobs=(small,)), wide))
    pool = Pool(4, 90_000, {"l": 2, "other": 1})
    whole = pool.share(tier)
    assert whole == Demand(4, 90_000, (("l", 2),), pinned=True)
    assert Pool(100, 10**6, {"l": 9}).share(tier) == Demand(8, 200_000, (("l", 5),), pinned=True)
    assert pool.take(whole) is not None
    assert pool.share(tier) == Demand(3, 40_000, (("l", 1),), pinned=True)  # it waits for these
    assert pool.share(Group(ident="e", jobs=(Group(ident="t", repeats=0, jobs=(wide,)),))) == Demand(1)


def test_a_grant_is_given_back_once() -> None:
    told: list[str] = []
    pool = Pool(1, 0, {})
    pool.freed.append(lambda: told.append("freed"))
    grant = pool.take(Demand(1))
    assert grant is not None
    held = Held(pool, grant)
    held.give()
    held.give()
    assert (pool.free_slots, told) == (1, ["freed"])
    pool.add(2)
    assert (pool.slots, pool.free_slots) == (3, 3)
