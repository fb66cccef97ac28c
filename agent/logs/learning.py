"""What was learned of logs, on the disk: the model file, and beside it in the store the templates of this machine, and
the forecasts that wait (forecasts.py), labels of people (labelling.py), and each minute what is usual in logs.

A model file from elsewhere (`agent logs learn`) brings its own templates, for its weights and chains know them by their
ids. From then on the store has what became of these here; it is used as long as the file is the one it belongs to.

No id is told twice, for two templates, by one machine. The store has how far they were given, and RESERVE of them are
skipped where nobody knows. The ids of a model from elsewhere begin at 1, as those here did: they are told with `base`
added, the last one that was told before. A model that cannot be used is set aside, which is told.

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
from agent.logs.labelling import Labelling
from agent.logs.model import Model, ModelDamaged, encode, room
from agent.logs.templates import Miner

log = logging.getLogger(__name__)

KEY, USUAL = "logs.learned", "logs.usual"
ALERT = "logs.model"
TICK_S = 5.0  # forecasts last 10 s at least, and windows a minute
KEEP_S = 10.0  # s between two checkpoints at least, which take KEEP_SHARE of the time at most
KEEP_SHARE = 0.01
WRITE_S = 60.0  # s between two writes of the model file at least
COMMIT_S = 1.0  # a full disk may take for ever
RESERVE = 4096  # ids that may be given between two checkpoints

_OWNER = "Give it to the user who runs the agent (chown), and restart; until then nothing is written over it."
_DISK = "Look at the disk, and restart; until then nothing is written over it."


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint. `model`: the digest of the model file it belongs to, empty: of none; `before`: that of the file
    which is there until then.

    No id from `next` on was given. `templates` is a miner's dump, compressed. What is told are ids `base` above these.
    """

    model: str
    before: str = ""
    next: int
    base: int = 0
    templates: bytes


class Usual(msgspec.Struct, frozen=True):
    """What is usual in logs, by the templates of Kept."""

    rates: KeptRates
    warmths: dict[str, Warmth]


class Learning:
    """Keeps what is learned on the disk. `path` is that of the model file. load() comes first."""

    analysis: Analysis

    def __init__(self, path: Path, bus: Bus, store: Store, clock: Callable[[], float]) -> None:
        self._path, self._bus, self._store, self._clock = path, bus, store, clock
        self._forecasts, self.labelling = Forecasts(store), Labelling(store)
        self._model = Model()
        self._digest = ""
        self._kept_next = self._written = self._kept_windows = 0
        self._keep_at = self._write_at = 0.0
        self._is_kept = True  # in the model file: one that could not be read is not written over

    async def load(self) -> Analysis:
        """What was learned before; what cannot be used is told, and learned anew."""
        await self._store.commit()
        kept, usual = await self._store.get(KEY, Kept), await self._store.get(USUAL, Usual)
        waiting, ended = await self._forecasts.read()
        model, damage = await self._read()
        now = trio.current_time()
        try:
            self.analysis = await trio.to_thread.run_sync(self._taken_up, model, kept, usual, now)
        except ModelDamaged as err:
            with suppress(OSError):  # then it is told again at the next start
                await trio.to_thread.run_sync(modelfile.set_aside, self._path)
            damage = err
            self._model, self._digest = Model(), ""
            base, keep = _behind(kept), self._forecasts.keep
            self.analysis = Analysis(self._bus.publish, self._clock, now, base=base, keep=keep)
        if damage:
            self._blame(damage)
        else:
            self._bus.publish(AlertCleared(code=ALERT))
        self.analysis.forecaster.resume(waiting, ended, self._clock())
        self._written = self.analysis.learned
        await self.labelling.resume(self.analysis)
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
                if self._is_kept and self.analysis.learned != self._written:
                    await self._write()
                await self._keep(0)
                self._keep_usual()

    async def keep_due(self) -> None:
        """Keep what has been learned, if that was long enough ago."""
        now, next = trio.current_time(), self.analysis.miner.next
        if self._is_kept and self.analysis.learned != self._written and now >= self._write_at:
            await self._write()
        if next >= self._kept_next - RESERVE // 2 or (next != self._kept_next - RESERVE and now >= self._keep_at):
            await self._keep(RESERVE)
        if (windows := self.analysis.rates.windows) != self._kept_windows:
            self._kept_windows = windows
            self._keep_usual()

    async def _read(self) -> tuple[Model | None, ModelDamaged | None]:
        try:
            return await trio.to_thread.run_sync(modelfile.read_or_set_aside, self._path)
        except OSError as err:
            self._is_kept = False
            remedy = _OWNER if isinstance(err, PermissionError) else _DISK
            return None, ModelDamaged(f"the model cannot be read: {err.strerror or err}", remedy=remedy)

    def _blame(self, damage: ModelDamaged) -> None:
        log.error("model cannot be used path=%s error=%s", self._path, damage)
        text = f"{self._path}: {damage.what}"
        self._bus.publish(Alert(code=ALERT, text=text, remedy=damage.remedy, since=self._clock()))

    def _taken_up(self, model: Model | None, kept: Kept | None, usual: Usual | None, now: float) -> Analysis:
        """Raises ModelDamaged."""
        miner = None
        if model:
            self._model, self._digest = model, _digest(model)
        if kept and (not model or self._digest in (kept.model, kept.before)):
            try:
                miner = Miner.load(zlib.decompress(kept.templates))
            except (zlib.error, ModelDamaged) as err:
                log.warning("templates of the checkpoint cannot be used error=%s", err)
        if kept and miner is not None:
            miner.skip_ids(kept.next)
            base = kept.base
        else:
            base, usual = _behind(kept), None  # by other templates
            miner = Miner.load(model.templates) if model and model.templates else Miner()
        analysis = Analysis(
            self._bus.publish,
            self._clock,
            now,
            miner=miner,
            classifier=Classifier.load(model.weights, model.classes) if model and model.weights else None,
            chains=Chains.decode(model.chains, model.calibration) if model and model.chains else None,
            warmths=usual.warmths if usual else None,
            base=base,
            keep=self._forecasts.keep,
        )
        if usual:
            analysis.rates.resume(usual.rates, lambda id: analysis.miner.resolve(id) == id)
        return analysis

    async def _write(self) -> None:
        """Write the model file. What does not work is told, and tried again."""
        analysis = self.analysis
        learned, labelled = analysis.learned, self.labelling.next
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
        digest = _digest(model)
        await self._keep(RESERVE, digest)
        with trio.move_on_after(COMMIT_S):  # before the file, or a kill in between would make it one from elsewhere
            await self._store.commit()
        try:
            await trio.to_thread.run_sync(modelfile.write, self._path, model)
        except OSError as err:
            log.warning("model is not kept path=%s error=%s", self._path, err)
            return
        self._model, self._digest, self._written = model, digest, learned
        self.labelling.written(labelled)

    async def _keep(self, reserved: int, digest: str | None = None) -> None:
        """Put a checkpoint; ids below `reserved` more may be given until the next. `digest`: of a model to come."""
        began, miner = trio.current_time(), self.analysis.miner
        next = miner.next + reserved
        data, _ = miner.dump()
        packed = await trio.to_thread.run_sync(partial(zlib.compress, data, level=1))
        kept = Kept(
            model=self._digest if digest is None else digest,
            before=self._digest,
            next=next,
            base=self.analysis.base,
            templates=packed,
        )
        self._store.put(KEY, kept)
        now = trio.current_time()
        self._kept_next, self._keep_at = next, now + max(KEEP_S, (now - began) / KEEP_SHARE)

    def _keep_usual(self) -> None:
        self._store.put(USUAL, Usual(self.analysis.rates.kept(), self.analysis.warmths))


def _behind(kept: Kept | None) -> int:
    """The last id that may have been told."""
    return kept.base + kept.next - 1 if kept else 0


def _digest(model: Model) -> str:
    return hashlib.blake2b(encode(model), digest_size=16).hexdigest()
