"""How good are forecasts? They are made from lines that nothing was learned of, and compared with what came.

Source: protocols/logs.md 2.4 (`evaluate`) and 9.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from agent.logs.calibrate import brier, calibration_error
from agent.logs.chains import Chains, Key, Seen
from agent.logs.predict import Forecaster, Tally


def score(
    chains: Chains, lines: Iterable[Seen], *, since: float, threshold: float, learning: bool = False
) -> dict[str, Any]:
    """Forecast from the lines after `since`; those before only tell where chains stood then.

    `lines` are in order of time, and need be no others than those of the wanted templates and failures. A forecast
    whose time has not gone by at the last line counts neither as right nor as wrong. `precision`, `recall` and `f1` are
    of forecasts and failures, also per class; `ece` and `brier` of the probabilities that were given, one for each step
    of a chain; leads are in seconds. None: there was nothing to count. `seconds`: what the scored lines took.
    """
    truth = _Truth(chains)
    forecaster = Forecaster(chains, threshold=threshold, learning=learning, heard=truth.hear)
    opened: dict[str, float] = {}
    leads: list[float] = []
    spent, at = 0.0, since
    for seen in lines:
        if seen.at < since:
            forecaster.warm(seen)
            continue
        at = truth.now = seen.at
        begin = time.thread_time()
        changed = forecaster.see(seen, seen.source, 0)
        spent += time.thread_time() - begin
        for event in changed:
            if event.state == "open":
                opened[event.id] = at
            elif event.state == "hit":
                leads.append(max(0.0, at - opened[event.id]))  # stamps may go back
    forecaster.due(at)
    predictions, total = truth.told(at), forecaster.total
    leads.sort()
    return {
        **_rates(total),
        "ece": calibration_error(predictions) if predictions else None,
        "brier": brier(predictions) if predictions else None,
        "lead_median_s": leads[len(leads) // 2] if leads else None,
        "lead_p10_s": leads[len(leads) // 10] if leads else None,
        "forecasts": total.hits + total.expired + forecaster.open,
        "open": forecaster.open,
        "predictions": len(predictions),
        "classes": {name: _rates(tally) for name, tally in sorted(forecaster.tallies.items())},
        "seconds": spent,
    }


class _Truth:
    """What came after each probability that was given."""

    def __init__(self, chains: Chains) -> None:
        self.now = 0.0
        self._horizons = [class_.horizon_s for class_ in chains.classes]
        self._waiting: dict[tuple[int, Key], list[tuple[float, float]]] = defaultdict(list)  # time, probability
        self._told: list[tuple[float, bool]] = []

    def hear(self, number: int, key: Key | None, probability: float | None) -> None:
        if key is None:
            return
        if probability is not None:
            self._waiting[number, key].append((self.now, probability))
            return
        for at, said in self._waiting.pop((number, key), ()):
            self._told.append((said, self.now - at <= self._horizons[number]))

    def told(self, end: float) -> list[tuple[float, bool]]:
        """Each with whether the failure came within the horizon; less those of which nobody knows at `end`."""
        for (number, _), waiting in self._waiting.items():
            self._told += [(said, False) for at, said in waiting if at + self._horizons[number] < end]
        self._waiting.clear()
        return self._told


def _rates(tally: Tally) -> dict[str, Any]:
    precision, recall = tally.precision, tally.recall
    f1 = None
    if precision is not None and recall is not None:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "hits": tally.hits,
        "expired": tally.expired,
        "misses": tally.misses,
    }
