"""What was learned of logs, on the disk: the model file, and beside it in the store the templates of this machine, and
the forecasts that wait (forecasts.py), labels of people (labelling.py), and each minute what is usual in logs, and how
far chains have come.

A model file from elsewhere (`agent logs learn`) brings its own templates, for its weights and chains know them by their
ids. From then on the store has what became of these here; it is used as long as the file is the one it belongs to. One
that is put there while the agent runs is taken up when LOOK_S have not changed it, and never written over.

No id is told twice, for two templates, by one machine. The store has how far they were given, and RESERVE of them are
skipped where nobody knows. The ids of a model from elsewhere begin at 1, as those here did: they are told with `base`
added, the last one that was told before. A model that cannot be used is set aside, which is told; one that cannot be
read is left where it is, and nothing is kept over it.

Source: protocols/logs.md 4, "Model file".
"""

import hashlib
import logging
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
import trio
from msgspec.structs import replace

from agent.core.bus import Bus
from agent.core.events import Alert, AlertCleared
from agent.core.metrics import Metrics
from agent.core.store import Store
from agent.logs import modelfile
from agent.logs.analysis import Analysis
from agent.logs.anomalies import KeptRates, Warmth
from agent.logs.chains import Chains, KeptTrack
from agent.logs.classify import Classifier
from agent.logs.forecasts import Forecasts
from agent.logs.labelling import Labelling
from agent.logs.model import Model, ModelDamaged, encode, room
from agent.logs.templates import Miner

log = logging.getLogger(__name__)

KEY, USUAL = "logs.learned", "logs.usual"
ALERT = "logs.model"
TICK_S = 5.0  # forecasts last 10 s at least, and windows a minute
LOOK_S = 30.0  # s between two looks at the model file
KEEP_S = 10.0  # s between two checkpoints at least, which take KEEP_SHARE of the time at most
KEEP_SHARE = 0.01
WRITE_S = 60.0  # s between two writes of the model file at least
COMMIT_S = 1.0  # a full disk may take for ever
RESERVE = 4096  # ids that may be given between two checkpoints

_OWNER = "Give it to the user who runs the agent (chown); until then nothing is written over it."
_DISK = "Look at the disk; until then nothing is written over it."
_BESIDE = "It is kept beside as .bad, and what was known before goes on."


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
    """What is usual in logs, by the templates of Kept; and how far chains had come that may go on."""

    rates: KeptRates
    warmths: dict[str, Warmth]
    tracks: list[KeptTrack] = []


class _Known(NamedTuple):
    """What a model teaches, and the checkpoint that belongs to it; `is_here`: there is one."""

    miner: Miner
    classifier: Classifier | None
    chains: Chains | None
    base: int
    is_here: bool


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
        self._mark: modelfile.Mark | None = None  # of the model file as it was read or written; None: it was not
        self._found: modelfile.Mark | None = None  # of what is there
        self._damage = ""  # that is told

    def measure(self, metrics: Metrics) -> None:
        """Have what is learned shown in /metrics."""
        analysis = self.analysis
        metrics.gauge("logs_templates", lambda: len(analysis.miner))
        metrics.gauge("logs_forecasts_open", lambda: analysis.forecaster.open)
        metrics.gauge("logs_forecasts_total", lambda: analysis.forecaster.total.hits, state="hit")
        metrics.gauge("logs_forecasts_total", lambda: analysis.forecaster.total.expired, state="expired")
        metrics.gauge("logs_forecasts_missed_total", lambda: analysis.forecaster.total.misses)
        metrics.gauge("logs_forecasts_suppressed_total", lambda: analysis.forecaster.suppressed)
        metrics.gauge("logs_forecast_precision", lambda: analysis.forecaster.total.precision)
        metrics.gauge("logs_forecast_recall", lambda: analysis.forecaster.total.recall)

    async def load(self) -> Analysis:
        """What was learned before; what cannot be used is told, and learned anew."""
        await self._store.commit()
        kept, usual = await self._store.get(KEY, Kept), await self._store.get(USUAL, Usual)
        waiting, ended = await self._forecasts.read()
        model, damage = await self._read()
        try:
            known = await trio.to_thread.run_sync(_known, model, kept, _behind(kept))
        except ModelDamaged as err:
            model, damage = None, err
            await self._set_aside()
            known = await trio.to_thread.run_sync(_known, None, kept, _behind(kept))
        if model:
            self._model, self._digest = model, _digest(model)
        usual = usual if known.is_here else None  # else it is by other templates
        self.analysis = Analysis(
            self._bus.publish,
            self._clock,
            trio.current_time(),
            miner=known.miner,
            classifier=known.classifier,
            chains=known.chains,
            warmths=usual.warmths if usual else None,
            base=known.base,
            keep=self._forecasts.keep,
        )
        if usual:
            self.analysis.rates.resume(usual.rates, lambda id: known.miner.resolve(id) == id)
            self.analysis.forecaster.tracks.resume(usual.tracks)
        self._tell(damage)
        self.analysis.forecaster.resume(waiting, ended, self._clock())
        self._written = self.analysis.learned
        await self.labelling.resume(self.analysis)
        await self._keep(RESERVE)
        return self.analysis

    async def run(self) -> NoReturn:
        """Keep it from time to time, and at the end; take up what others put there."""
        look_at = trio.current_time() + LOOK_S
        try:
            while True:
                await trio.sleep(TICK_S)
                now = trio.current_time()
                self.analysis.tick(now)
                if now >= look_at:
                    await self.take_up()
                    look_at = now + LOOK_S
                await self.keep_due()
        finally:
            with trio.CancelScope(shield=True):
                if self.analysis.learned != self._written:
                    await self._write()
                await self._keep(0)
                self._keep_usual()

    async def keep_due(self) -> None:
        """Keep what has been learned, if that was long enough ago."""
        now, next = trio.current_time(), self.analysis.miner.next
        if self.analysis.learned != self._written and now >= self._write_at:
            await self._write()
        if next >= self._kept_next - RESERVE // 2 or (next != self._kept_next - RESERVE and now >= self._keep_at):
            await self._keep(RESERVE)
        if (windows := self.analysis.rates.windows) != self._kept_windows:
            self._kept_windows = windows
            self._keep_usual()

    async def take_up(self) -> None:
        """Go on with the model file, if somebody put another one there, which is no longer written to.

        Labels that no file knew are learned again.
        """
        before, self._found = self._found, await trio.to_thread.run_sync(modelfile.mark, self._path)
        if self._found in (None, self._mark) or self._found != before:
            return
        model, damage = await self._read()
        if model and _digest(model) != self._digest:
            try:
                known = await trio.to_thread.run_sync(_known, model, None, 0)
            except ModelDamaged as err:
                damage = err
                await self._set_aside()
            else:
                await self._go_on(model, known)
        self._tell(damage and ModelDamaged(damage.what, remedy=_BESIDE if self._mark else damage.remedy))

    async def _go_on(self, model: Model, known: _Known) -> None:
        analysis = self.analysis
        self._model, self._digest = model, _digest(model)
        base = analysis.base + analysis.miner.next - 1
        analysis.take_up(known.miner, known.classifier, known.chains, base, trio.current_time())
        self._written = analysis.learned
        self._keep_usual()
        await self._keep(RESERVE)
        await self.labelling.replay(analysis)
        log.info("model taken up path=%s classes=%d templates=%d", self._path, len(model.classes), len(known.miner))

    async def _read(self) -> tuple[Model | None, ModelDamaged | None]:
        self._mark = await trio.to_thread.run_sync(modelfile.mark, self._path)
        try:
            return await trio.to_thread.run_sync(modelfile.read_or_set_aside, self._path)
        except OSError as err:
            self._mark = None  # it may be readable the next time
            remedy = _OWNER if isinstance(err, PermissionError) else _DISK
            return None, ModelDamaged(f"the model cannot be read: {err.strerror or err}", remedy=remedy)

    async def _set_aside(self) -> None:
        with suppress(OSError):  # then it is told again at the next start
            await trio.to_thread.run_sync(modelfile.set_aside, self._path)

    def _tell(self, damage: ModelDamaged | None) -> None:
        """Tell what is wrong with the model file, once, or that nothing is."""
        before, self._damage = self._damage, damage.what if damage else ""
        if damage is None:
            self._bus.publish(AlertCleared(code=ALERT))
        elif damage.what != before:
            log.error("model cannot be used path=%s error=%s", self._path, damage)
            text = f"{self._path}: {damage.what}"
            self._bus.publish(Alert(code=ALERT, text=text, remedy=damage.remedy, since=self._clock()))

    async def _write(self) -> None:
        """Write the model file, but for one that others put there. What does not work is told, and tried again."""
        if await trio.to_thread.run_sync(modelfile.mark, self._path) not in (None, self._mark):
            return
        analysis = self.analysis
        learned, labelled = analysis.learned, self.labelling.next
        analysis.forecaster.chains.trim()
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
        self._mark = await trio.to_thread.run_sync(modelfile.mark, self._path)
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
        analysis = self.analysis
        tracks = analysis.forecaster.tracks.kept(self._clock())
        self._store.put(USUAL, Usual(analysis.rates.kept(), analysis.warmths, tracks))


def _known(model: Model | None, kept: Kept | None, behind: int) -> _Known:
    """For a thread. `behind`: the last id that may have been told. Raises ModelDamaged."""
    miner, base = None, behind
    if kept and (not model or _digest(model) in (kept.model, kept.before)):
        try:
            miner = Miner.load(zlib.decompress(kept.templates))
            miner.skip_ids(kept.next)
            base = kept.base
        except (zlib.error, ModelDamaged) as err:
            log.warning("templates of the checkpoint cannot be used error=%s", err)
    is_here = miner is not None
    if miner is None:
        miner = Miner.load(model.templates) if model and model.templates else Miner()
    return _Known(
        miner,
        Classifier.load(model.weights, model.classes) if model and model.weights else None,
        Chains.decode(model.chains, model.calibration) if model and model.chains else None,
        base,
        is_here,
    )


def _behind(kept: Kept | None) -> int:
    """The last id that may have been told."""
    return kept.base + kept.next - 1 if kept else 0


def _digest(model: Model) -> str:
    return hashlib.blake2b(encode(model), digest_size=16).hexdigest()
