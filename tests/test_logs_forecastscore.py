"""Scores of forecasts, by hand and on a log with chains."""

import pytest

from agent.logs.chains import Chains
from agent.logs.forecastscore import score
from agent.logs.learnchains import learn
from tests.log_chains import END, STEPS, line, log
from tests.test_logs_predict import chains

STEP, HALF = 11, 12


def test_scores_by_hand() -> None:
    """Two right, the leads 10 and 30 s; one wrong, one failure missed, one forecast still open at the end."""
    lines = [
        line(0.0, STEP, "z"),
        line(100.0, STEP, "a"),
        line(110.0, END, "a", failure="disk"),
        line(200.0, STEP, "b"),
        line(230.0, END, "b", failure="disk"),
        line(300.0, STEP, "c"),
        line(400.0, HALF, "d"),
        line(410.0, END, "d", failure="disk"),
        line(500.0, STEP, "e"),
        line(510.0, END, "x", failure="disk"),
    ]
    told = score(chains(), lines, since=50.0, threshold=0.8)
    del told["seconds"]
    sure, half = 0.997, 0.4
    assert told == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 4),
        "f1": pytest.approx(4 / 7),
        "hits": 2,
        "expired": 1,
        "misses": 2,
        "ece": pytest.approx((abs(3 * sure - 2) + abs(half - 1)) / 4, abs=0.01),
        "brier": pytest.approx((2 * (1 - sure) ** 2 + sure**2 + (1 - half) ** 2) / 4, abs=0.01),
        "lead_median_s": 30.0,
        "lead_p10_s": 10.0,
        "forecasts": 4,
        "open": 1,
        "predictions": 4,
        "classes": {
            "disk": {
                "precision": pytest.approx(2 / 3),
                "recall": 0.5,
                "f1": pytest.approx(4 / 7),
                "hits": 2,
                "expired": 1,
                "misses": 2,
            }
        },
    }


def test_nothing_to_score_is_none() -> None:
    told = score(Chains(), [], since=0.0, threshold=0.8)
    assert {told[name] for name in ("precision", "recall", "f1", "ece", "brier", "lead_median_s")} == {None}


def test_learned_chains_forecast_most_failures_and_repeat_to_the_digit() -> None:
    lines = log(9, 400)
    half = lines[len(lines) // 2].at
    known = learn(lambda: (seen for seen in lines if seen.at < half), horizon_s=60.0)
    wanted = [seen for seen in lines if seen.failure or seen.template in known.wanted]
    told = [score(known, seen, since=half, threshold=0.8) for seen in (wanted, lines)]
    for each in told:
        assert each.pop("seconds") >= 0
    assert told[0] == told[1]
    assert told[0]["precision"] > 0.85
    assert told[0]["recall"] > 0.95
    assert told[0]["ece"] < 0.08
    assert told[0]["lead_median_s"] >= 20
    assert set(STEPS) == known.wanted


def test_learning_while_scoring_changes_what_is_known() -> None:
    known = chains()
    before = known.encode()
    lines = [line(100.0, STEP, "a"), line(110.0, END, "a", failure="disk")]
    score(known, lines, since=0.0, threshold=0.8)
    assert known.encode() == before
    score(known, lines, since=0.0, threshold=0.8, learning=True)
    assert known.encode() != before
