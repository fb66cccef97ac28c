"""Probabilities that mean what they say."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs.calibrate import brier, calibration_error, logistic, sigmoid

PREDICTIONS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60)
ROWS = st.lists(st.tuples(st.tuples(*[st.floats(-6, 6)] * 3), st.booleans()), max_size=40)


def test_the_weights_of_a_known_model_are_found() -> None:
    rng, true = random.Random(7), (0.5, 1.0, -0.5, 0.25)
    rows = []
    for _ in range(20_000):
        x = (rng.gauss(0, 2), rng.gauss(0, 2), rng.gauss(0, 2))
        rows.append((x, rng.random() < sigmoid(true[0] + sum(w * v for w, v in zip(true[1:], x, strict=True)))))
    assert logistic(rows) == pytest.approx(true, abs=0.06)


def test_what_is_too_sure_is_calmed() -> None:
    """Inputs say 95 %, and 70 % come true: so says the model."""
    sure = math.log(0.95 / 0.05)
    weights = logistic([((sure, sure, sure), n % 10 < 7) for n in range(1000)])
    assert sigmoid(weights[0] + sum(weights[1:]) * sure) == pytest.approx(0.7, abs=0.01)


def test_without_rows_each_input_weighs_a_third() -> None:
    assert logistic([]) == (0.0, 1 / 3, 1 / 3, 1 / 3)


@given(ROWS)
def test_the_weights_are_a_maximum(rows: list[tuple[tuple[float, float, float], bool]]) -> None:
    def penalty(weights: tuple[float, ...]) -> float:
        total = 0.05 * sum(w * w for w in weights)
        for x, y in rows:
            z = weights[0] + sum(w * v for w, v in zip(weights[1:], x, strict=True))
            total += math.log1p(math.exp(-z if y else z))
        return total

    found = logistic(rows)
    assert all(map(math.isfinite, found))
    if rows:
        best = penalty(found)
        for n in range(4):
            for off in (-0.01, 0.01):
                assert best <= penalty((*found[:n], found[n] + off, *found[n + 1 :])) + 1e-6


def test_ten_bins_by_hand() -> None:
    predictions = [(0.05, False), (0.15, True), (0.95, True), (1.0, True)]
    assert calibration_error(predictions) == pytest.approx((0.05 + 0.85 + abs(1.95 - 2)) / 4)
    assert brier(predictions) == pytest.approx((0.05**2 + 0.85**2 + 0.05**2) / 4)
    assert calibration_error([]) == brier([]) == 0.0


@given(PREDICTIONS)
def test_errors_are_shares(predictions: list[tuple[float, bool]]) -> None:
    assert 0 <= calibration_error(predictions) <= 1
    assert 0 <= brier(predictions) <= 1
