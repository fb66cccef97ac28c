"""What leads to failures, and by which word they belong together."""

from dataclasses import dataclass
from random import Random

import pytest

from agent.logs.chains import BY_SOURCE, Seen
from agent.logs.precursors import find
from tests.log_chains import END, NOISE, STEPS, line, log

UNIT = 1  # the word's number: "step unit7 t11 is 52"


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_and_the_word_they_share_are_found(seed: int) -> None:
    lines = log(seed)
    (found,) = find(lambda: lines)
    assert (found.failure, found.ends, found.steps) == ("broken", {END: UNIT}, dict.fromkeys(STEPS, UNIT))


def test_steps_that_share_no_word_belong_to_their_log() -> None:
    lines = log(3, units=4000, shared=False)
    (found,) = find(lambda: lines)
    assert (found.ends, found.steps) == ({END: BY_SOURCE}, dict.fromkeys(STEPS, BY_SOURCE))


def test_a_log_whose_failures_nothing_leads_to_has_no_precursors() -> None:
    rng = Random(1)
    lines = [line(float(at), rng.choice(NOISE), f"unit{rng.randrange(40)}") for at in range(6000)]
    for at in range(100, 6000, 137):
        lines[at] = line(float(at), END, f"unit{rng.randrange(40)}", failure="broken")
    assert find(lambda: lines) == []
    assert find(lambda: [seen for seen in lines if seen.failure is None]) == []


def test_the_minute_that_all_lines_share_is_no_key() -> None:
    """As a second time in the lines, that is not cut off with the first."""

    def with_minute(seen: Seen) -> Seen:
        return seen._replace(line=seen.line + f" m{int(seen.at) // 60}".encode())

    lines = [with_minute(seen) for seen in log(5)]
    (found,) = find(lambda: lines)
    assert found.steps == dict.fromkeys(STEPS, UNIT)


def test_a_key_may_have_most_of_a_quiet_log() -> None:
    lines = [seen for seen in log(5, 120) if seen.template not in NOISE or seen.at % 15 == 0]
    (found,) = find(lambda: lines)
    assert (found.ends, found.steps) == ({END: UNIT}, dict.fromkeys(STEPS, UNIT))


def test_a_burst_of_failure_lines_counts_once() -> None:
    """Sixty lines of one failure do not make what stood before it a precursor."""
    lines = [line(float(at), NOISE[at % 5], f"unit{at % 40}") for at in range(1000)]
    lines.append(line(1000.0, STEPS[0], "unit1"))
    lines += [line(1001 + at / 100, END, "unit1", failure="broken") for at in range(60)]
    assert find(lambda: lines) == []


def test_failures_too_rare_for_a_kind_of_their_own_are_looked_at_together() -> None:
    lines = log(2)
    ends = iter(range(100, 1000))
    lines = [seen._replace(template=next(ends)) if seen.failure else seen for seen in lines]
    (found,) = find(lambda: lines)
    assert (found.ends, found.steps) == ({}, dict.fromkeys(STEPS, UNIT))


@dataclass
class Counted:
    """Pairs of template and slot that a brute force finds before failures: near, and the window before."""

    near: int = 0
    far: int = 0


@pytest.mark.parametrize("seed", range(3))
def test_the_counts_are_those_of_a_brute_force(seed: int) -> None:
    """What is found has the excess that is asked for, by counting every pair of lines."""
    lines = log(seed, 40)
    (found,) = find(lambda: lines)
    failures = [seen for seen in lines if seen.failure and seen.at - 2 * found.window_s >= lines[0].at]
    for template in {seen.template for seen in lines if not seen.failure}:
        counted = Counted()
        for failure in failures:
            unit = failure.key(UNIT)
            ages = [
                failure.at - seen.at
                for seen in lines
                if seen.template == template and seen.at < failure.at and seen.key(UNIT) == unit
            ]
            counted.near += any(age <= found.window_s for age in ages)
            counted.far += any(found.window_s < age <= 2 * found.window_s for age in ages)
        excess = counted.near - counted.far
        is_clear = excess >= 2.5 * (counted.near + counted.far) ** 0.5 and excess >= 0.2 * len(failures)
        assert (template in found.steps) == is_clear, (template, counted)


def test_the_beginning_of_a_log_is_no_reason() -> None:
    """Before it nothing stood anywhere, so that what is always there seems to have come."""
    lines = [line(float(at), NOISE[0], f"unit{at % 2}") for at in range(1500)]
    lines += [line(at + 0.5, END, f"unit{at % 2}", failure="broken") for at in range(70, 1500, 101)]
    assert find(lambda: sorted(lines, key=lambda seen: seen.at)) == []
