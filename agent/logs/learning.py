"""What was learned of logs, on the disk: the model file, and beside it in the store the templates of this machine, and
the forecasts that wait (forecasts.py), and how often templates come, each minute.

A model file from elsewhere (`agent logs learn`) brings its own templates, for its weights and chains know them by their
ids. From then on the store has what became of these here; it is used as long as the file is the one it belongs to.

No id is given twice, for two templates, by one machine: the store has how far they were given, and RESERVE of them are
skipped where nobody knows. A model that cannot be used is set aside, which is told.

Source: protocols/logs.md 4, "Model file".
"""

import hashlib
import logging
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import trio
from msgspec.structs import replace

from agent.core.bus import Bus
from agent.core.events import Alert, AlertCleared
from agent.core.store import Store
from agent.logs import modelfile
from agent.logs.analysis import Analysis
from agent.logs.anomalies import KeptRates, Warmth
from agent.logs.chains import Chains
from agent.logs.classify import Classifier
from agent.logs.forecasts import Forecasts
from agent.logs.model import Model, ModelDamaged, encode, room
from agent.logs.templates import Miner

log = logging.getLogger(__name__)

KEY, RATES = "logs.learned", "logs.rates"
ALERT = "logs.model"
TICK_S = 5.0  # forecasts last 10 s at least, and windows a minute
KEEP_S = 10.0  # s between two checkpoints at least, which take KEEP_SHARE of the time at most
KEEP_SHARE = 0.01
WRITE_S = 60.0  # s between two writes of the model file at least
RESERVE = 4096  # ids that may be given between two checkpoints


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint. `model`: the digest of the model file it belongs to, empty: of none.

    No id from `next` on was given. `templates` is a miner's dump, compressed.
    """

    model: str
    next: int
    templates: bytes
    warmths: dict[str, Warmth] = {}


class Learning:
    """Keeps what is learned on the disk. `path` is that of the model file. load() comes first."""

    analysis: Analysis

    def __init__(self, path: Path, bus: Bus, store: Store, clock: Callable[[], float]) -> None:
        self._path, self._bus, self._store, self._clock = path, bus, store, clock
        self._forecasts = Forecasts(store)
        self._model = Model()
        self._digest = ""
        self._kept_next = self._written = self._kept_windows = 0
        self._keep_at = self._write_at = 0.0

    async def load(self) -> Analysis:
        """What was learned before; what cannot be used is told, and learned anew."""
        await self._store.commit()
        kept, rates = await self._store.get(KEY, Kept), await self._store.get(RATES, KeptRates)
        waiting, ended = await self._forecasts.read()
        model = await self._read()
        now = trio.current_time()
        try:
            self.analysis = await trio.to_thread.run_sync(self._taken_up, model, kept, rates, now)
            self._bus.publish(AlertCleared(code=ALERT))
        except ModelDamaged as err:
            with suppress(OSError):  # then it is told again at the next start
                await trio.to_thread.run_sync(modelfile.set_aside, self._path)
            self._blame(err)
            self._model, self._digest = Model(), ""
            self.analysis = Analysis(self._bus.publish, self._clock, now, keep=self._forecasts.keep)
        self.analysis.forecaster.resume(waiting, ended, self._clock())
        if kept:
            self.analysis.miner.skip_ids(kept.next)
        self._written = self.analysis.learned
        await self._keep(RESERVE)
        return self.analysis

    async def run(self) -> NoReturn:
        """Keep it from time to time, and at the end."""
        try:
            while True:
                await trio.sleep(TICK_S)
                self.analysis.tick(trio.current_time())
                await self.keep_due()
        finally:
            with trio.CancelScope(shield=True):
                if self.analysis.learned != self._written:
                    await self._write()
                await self._keep(0)
                self._store.put(RATES, self.analysis.rates.kept())

    async def keep_due(self) -> None:
        """Keep what has been learned, if that was long enough ago."""
        now, next = trio.current_time(), self.analysis.miner.next
        if self.analysis.learned != self._written and now >= self._write_at:
            await self._write()
        if next >= self._kept_next - RESERVE // 2 or (next != self._kept_next - RESERVE and now >= self._keep_at):
            await self._keep(RESERVE)
        if (windows := self.analysis.rates.windows) != self._kept_windows:
            self._kept_windows = windows
            self._store.put(RATES, self.analysis.rates.kept())

    async def _read(self) -> Model | None:
        try:
            model, damage = await trio.to_thread.run_sync(modelfile.read_or_set_aside, self._path)
        except OSError as err:
            damage = ModelDamaged(f"{self._path} cannot be read: {err.strerror or err}", remedy="Look at the disk.")
            model = None
        if damage:
            self._blame(damage)
        return model

    def _blame(self, damage: ModelDamaged) -> None:
        log.error("model cannot be used path=%s error=%s", self._path, damage)
        text = f"the model of logs cannot be used: {damage.what}"
        self._bus.publish(Alert(code=ALERT, text=text, remedy=damage.remedy, since=self._clock()))

    def _taken_up(self, model: Model | None, kept: Kept | None, rates: KeptRates | None, now: float) -> Analysis:
        """Raises ModelDamaged."""
        miner = None
        if model:
            self._model, self._digest = model, _digest(model)
        if kept and (not model or kept.model == self._digest):
            try:
                miner = Miner.load(zlib.decompress(kept.templates))
            except (zlib.error, ModelDamaged) as err:
                log.warning("templates of the checkpoint cannot be used error=%s", err)
        if miner is None:
            rates = None  # of other templates
        if model and model.templates and miner is None:
            miner = Miner.load(model.templates)
        analysis = Analysis(
            self._bus.publish,
            self._clock,
            now,
            miner=miner,
            classifier=Classifier.load(model.weights, model.classes) if model and model.weights else None,
            chains=Chains.decode(model.chains, model.calibration) if model and model.chains else None,
            warmths=kept.warmths if kept else None,
            keep=self._forecasts.keep,
        )
        if rates:
            analysis.rates.resume(rates, lambda id: analysis.miner.resolve(id) == id)
        return analysis

    async def _write(self) -> None:
        """Write the model file. What does not work is told, and tried again."""
        analysis = self.analysis
        learned = analysis.learned
        chains, calibration = analysis.forecaster.chains.encode()
        classifier = analysis.classifier
        model = replace(
            self._model,
            classes=tuple(classifier.classes),
            rules=analysis.rules or self._model.rules,
            weights=classifier.dump(),
            chains=chains,
            calibration=calibration,
            templates=b"",
        )
        templates, left_out = analysis.miner.dump(room(model))
        model = replace(model, templates=templates, left_out=left_out)
        self._write_at = trio.current_time() + WRITE_S
        try:
            await trio.to_thread.run_sync(modelfile.write, self._path, model)
        except OSError as err:
            log.warning("model is not kept path=%s error=%s", self._path, err)
            return
        self._model, self._digest, self._written = model, _digest(model), learned
        await self._keep(RESERVE)

    async def _keep(self, reserved: int) -> None:
        """Put a checkpoint; ids below `reserved` more may be given until the next."""
        began, miner = trio.current_time(), self.analysis.miner
        next, warmths = miner.next + reserved, dict(self.analysis.warmths)
        data, _ = miner.dump()
        packed = await trio.to_thread.run_sync(partial(zlib.compress, data, level=1))
        self._store.put(KEY, Kept(model=self._digest, next=next, templates=packed, warmths=warmths))
        now = trio.current_time()
        self._kept_next, self._keep_at = next, now + max(KEEP_S, (now - began) / KEEP_SHARE)


def _digest(model: Model) -> str:
    return hashlib.blake2b(encode(model), digest_size=16).hexdigest()
