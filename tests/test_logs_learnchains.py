"""Chains learned from a log: order, times, counts; and probabilities that hold on what was not learned from."""

import random
from collections import defaultdict
from collections.abc import Iterator

import pytest

from agent.logs.calibrate import calibration_error
from agent.logs.chains import BY_SOURCE, Chains, Key, Seen, Tracks
from agent.logs.learnchains import learn
from tests.log_chains import END, STEPS, line, log

UNIT = 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_and_the_times_of_a_chain(seed: int) -> None:
    lines = log(seed)
    (class_,) = learn(lambda: lines).classes
    (chain,) = class_.chains
    assert (class_.name, chain.ends) == ("broken", {END: UNIT})
    assert chain.steps == {step: (rank, UNIT) for rank, step in enumerate(STEPS)}
    assert chain.leads == [pytest.approx((40, 40)), pytest.approx((30, 30)), pytest.approx((20, 20))]
    assert 20 <= chain.gap_s <= 40
    assert class_.horizon_s == pytest.approx(40)


def test_a_line_is_a_failure_for_sure_where_only_failures_had_its_template() -> None:
    lines = log()
    ((chain,),) = (class_.chains for class_ in learn(lambda: lines).classes)
    assert chain.sure == [END]
    lines.insert(7, line(9.5, END, "unit1"))
    ((chain,),) = (class_.chains for class_ in learn(lambda: lines).classes)
    assert (chain.ends, chain.sure) == ({END: UNIT}, [])


def test_a_horizon_that_is_told_is_kept() -> None:
    lines = log()
    assert learn(lambda: lines, horizon_s=25.0).classes[0].horizon_s == 25.0


def test_the_lines_may_come_from_anywhere_three_times() -> None:
    lines, calls = log(), []

    def again() -> Iterator[Seen]:
        calls.append(1)
        return iter(lines)

    assert learn(again) == learn(lambda: lines)
    assert len(calls) == 3


def test_learning_twice_gives_the_same_bytes() -> None:
    lines = log(4)
    assert learn(lambda: lines).encode() == learn(lambda: lines).encode()


def test_a_log_without_failures_teaches_nothing() -> None:
    assert learn(lambda: []) == Chains()
    lines = [seen for seen in log() if not seen.failure]
    assert learn(lambda: lines) == Chains()


def test_each_class_has_its_own_chains() -> None:
    lines = log(1)
    second = [
        seen._replace(template=seen.template + 100, failure=seen.failure and "burnt", at=seen.at + 0.5)
        for seen in log(2)
    ]
    both = sorted(lines + second, key=lambda seen: seen.at)
    classes = {class_.name: class_ for class_ in learn(lambda: both).classes}
    assert {name: set(class_.chains[0].steps) for name, class_ in classes.items()} == {
        "broken": set(STEPS),
        "burnt": {step + 100 for step in STEPS},
    }


def test_chains_of_a_log_without_keys() -> None:
    lines = log(3, units=4000, shared=False)
    (class_,) = learn(lambda: lines).classes
    assert class_.chains[0].steps == {step: (rank, BY_SOURCE) for rank, step in enumerate(STEPS)}


def test_probabilities_hold_on_what_was_not_learned_from() -> None:
    lines = log(6, 400)
    half = lines[len(lines) // 2].at
    chains = learn(lambda: (seen for seen in lines if seen.at < half))
    tracks = Tracks(chains)
    waiting: dict[Key | None, list[tuple[float, float]]] = defaultdict(list)
    told: list[tuple[float, bool]] = []
    for seen in lines:
        if seen.failure:
            for at, probability in waiting.pop(tracks.failed(0, seen), ()):
                told.append((probability, seen.at - at <= chains.classes[0].horizon_s))
        for number, key, _, reading in tracks.see(seen):
            if seen.at >= half:
                waiting[key].append((seen.at, chains.probability(chains.classes[number].judge(reading))))
    told += [(probability, False) for rest in waiting.values() for _, probability in rest]
    assert len(told) > 400
    assert calibration_error(told) < 0.08
    assert sum(probability > 0.9 for probability, _ in told) > 50


def test_ten_thousands_of_templates_are_bounded() -> None:
    """Every line of a template of its own, every other one a failure."""
    rng = random.Random(1)
    lines = [
        line(float(n), 1000 + n, f"unit{rng.randrange(9)}", failure="broken" if n % 2 else None) for n in range(20_000)
    ]
    assert len(learn(lambda: lines).encode()[0]) < 1 << 20


def test_a_key_cut_off_from_a_short_line_is_passed_over() -> None:
    lines = [seen._replace(line=b"cut") if n % 7 == 0 else seen for n, seen in enumerate(log(1, 120))]
    (class_,) = learn(lambda: lines).classes
    assert set(class_.chains[0].steps) == set(STEPS)
