"""Probabilities that mean what they say: fitting a logistic model, and how far off probabilities are.

Source: protocols/logs.md 4, "Forecast", and 2.4 (`evaluate`: ECE of ten bins, Brier).
"""

import math
from collections.abc import Sequence
from operator import mul

BINS = 10

_ROUNDS = 25
_RIDGE = 0.1  # keeps weights finite where all outcomes are alike, or the inputs part them without a mistake
_CLOSE = 1e-6
_HALVES = 30


def logistic(rows: Sequence[tuple[tuple[float, float, float], bool]]) -> tuple[float, float, float, float]:
    """The weights of 1 and of three inputs that make the outcomes most probable: Newton's method with a ridge.

    Without rows each input weighs a third.
    """
    if not rows:
        return 0.0, 1 / 3, 1 / 3, 1 / 3
    weights = [0.0] * 4
    cost = _cost(weights, rows)
    for _ in range(_ROUNDS):
        slope = [-_RIDGE * w for w in weights]
        curve = [[_RIDGE if i == j else 0.0 for j in range(4)] for i in range(4)]
        for inputs, outcome in rows:
            x = (1.0, *inputs)
            p = sigmoid(sum(map(mul, weights, x)))
            spread, off = p * (1 - p), outcome - p
            for i in range(4):
                slope[i] += off * x[i]
                for j in range(i + 1):
                    curve[i][j] += spread * x[i] * x[j]
        for i in range(4):
            for j in range(i):
                curve[j][i] = curve[i][j]
        step, before = _solve(curve, slope), cost
        # A whole step may go too far where the curve is flat; a shorter one in its direction does not.
        for _ in range(_HALVES):
            nearer = [w + s for w, s in zip(weights, step, strict=True)]
            if (cost := _cost(nearer, rows)) <= before:
                weights = nearer
                break
            step = [s / 2 for s in step]
        else:
            break
        if max(map(abs, step)) < _CLOSE:
            break
    a, b, c, d = weights
    return a, b, c, d


def _cost(weights: Sequence[float], rows: Sequence[tuple[tuple[float, float, float], bool]]) -> float:
    """How improbable the outcomes are, with the ridge."""
    cost: float = _RIDGE / 2 * sum(map(mul, weights, weights))
    for inputs, outcome in rows:
        z = sum(map(mul, weights, (1.0, *inputs)))
        cost += math.log1p(math.exp(-abs(z))) + max(0.0, -z if outcome else z)
    return cost


def sigmoid(x: float) -> float:
    """From log odds to a probability, never quite 0 or 1."""
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, x))))


def calibration_error(predictions: Sequence[tuple[float, bool]]) -> float:
    """ECE: how far the probabilities of ten equally wide bins are from what came true, weighted by their numbers."""
    bins = [[0.0, 0.0] for _ in range(BINS)]
    for probability, outcome in predictions:
        bin = bins[min(BINS - 1, int(probability * BINS))]
        bin[0] += probability
        bin[1] += outcome
    return sum(abs(said - came) for said, came in bins) / max(1, len(predictions))


def brier(predictions: Sequence[tuple[float, bool]]) -> float:
    """The mean square of probability less outcome."""
    return sum((probability - outcome) ** 2 for probability, outcome in predictions) / max(1, len(predictions))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with the largest pivot; the matrix is small and positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, size):
            factor = rows[r][i] / rows[i][i]
            for c in range(i, size + 1):
                rows[r][c] -= factor * rows[i][c]
    out = [0.0] * size
    for i in reversed(range(size)):
        out[i] = (rows[i][size] - sum(rows[i][c] * out[c] for c in range(i + 1, size))) / rows[i][i]
    return out
