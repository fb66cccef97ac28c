"""Forecasts that wait for their failure, and the numbers of the others, in the store: what a restart must not lose.

They are put in one stretch with the events that tell of them, and so are of the same transaction: what the journal says
is open is open after a kill too, and is marked later.

Source: protocols/logs.md 4, "Forecast"; ARCHITECTURE.md, rule 4.
"""

import logging
from typing import Annotated

import msgspec

from agent.core.store import Store
from agent.logs.predict import Forecaster, Open, Tally

log = logging.getLogger(__name__)

KEY = "logs.forecasts"

_Number = Annotated[int, msgspec.Meta(ge=0)]


class Ended(msgspec.Struct, frozen=True):
    """What became of forecasts, as in Tally; `open` are the ids of those that wait, each of which has its own row."""

    hits: _Number = 0
    expired: _Number = 0
    misses: _Number = 0
    open: tuple[str, ...] = ()


class Forecasts:
    """The rows of a store. read() comes first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept = Ended()

    async def read(self) -> tuple[list[Open], Tally]:
        """The forecasts that wait, and what became of others. After the store's commit()."""
        try:
            self._kept = await self._store.get(KEY, Ended) or Ended()
            found = [await self._store.get(_key(id), Open) for id in self._kept.open]
        except msgspec.DecodeError as err:
            log.error("forecasts of the checkpoint cannot be used, and stay open error=%s", err)  # noqa: TRY400
            return [], Tally()
        open = [forecast for forecast in found if forecast is not None]
        return open, Tally(self._kept.hits, self._kept.expired, self._kept.misses)

    def keep(self, forecaster: Forecaster) -> None:
        """Have it all on the disk as it is now. Only what changed is put."""
        open, total = {forecast.event.id: forecast for forecast in forecaster.waiting}, forecaster.total
        now = Ended(total.hits, total.expired, total.misses, tuple(open))
        if now == self._kept:
            return
        for id in open.keys() - set(self._kept.open):
            self._store.put(_key(id), open[id])
        for id in set(self._kept.open) - open.keys():
            self._store.forget(_key(id))
        self._store.put(KEY, now)
        self._kept = now


def _key(id: str) -> str:
    return f"logs.forecast:{id}"
