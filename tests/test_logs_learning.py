"""What was learned, on the disk: ids that stay, models that come from elsewhere, models that are damaged."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import trio
from trio.testing import MockClock

from agent.core.bus import Bus, E, Subscription
from agent.core.events import Alert, AlertCleared
from agent.core.store import Store, open_store
from agent.logs import modelfile
from agent.logs.analysis import Analysis
from agent.logs.anomalies import WINDOW_S
from agent.logs.classify import Classifier
from agent.logs.learning import KEEP_S, KEY, RESERVE, WRITE_S, Kept, Learning
from agent.logs.messages import LabelLog, Rule
from agent.logs.model import Model, encode
from agent.logs.templates import Miner

LINES = [b"user ada logged in", b"user bob logged in", b"user eve logged in", b"disk 3 is broken"]


class House:
    """A store that outlives analyses; `path` is that of the model file."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.path, self.store, self.bus = folder / "logs.model", store, Bus(store)

    async def load(self) -> Learning:
        """As after a kill: of the one before only what was kept is known."""
        learning = Learning(self.path, self.bus, self.store, lambda: 7.0)
        await learning.load()
        return learning


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    store = open_store(folder / "state", reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield House(folder, store)
            nursery.cancel_scope.cancel()
    finally:
        store.close()


def learn(analysis: Analysis, class_: str) -> None:
    """Labels for the last of LINES."""
    template = analysis.miner.mine_line(LINES[-1])
    for _ in range(10):
        analysis.classifier.learn(template, LINES[-1], class_)
        analysis.labels += 1


async def first(alerts: Subscription[E]) -> E:
    with trio.fail_after(1):
        return await anext(alerts)


async def take_up(learning: Learning) -> None:
    await learning.take_up()  # it might be written still
    await learning.take_up()


async def run(learning: Learning, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await learning.run()


async def test_ids_are_the_same_after_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        ids = [first.analysis.miner.mine_line(line) for line in LINES]
        await run(first, KEEP_S * 3)
        again = (await here.load()).analysis.miner
        assert [again.resolve(id) for id in ids] == [first.analysis.miner.resolve(id) for id in ids]
        assert again.text(ids[0]) == "user <*> logged in"
        assert again.mine_line(b"something else") == max(ids) + 1
        assert not here.path.exists()  # nothing was learned that it would hold


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_what_is_usual_comes_back_unless_templates_are_others(
    tmp_path: Path, autojump_clock: MockClock, is_replaced: bool
) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        stream = first.analysis.stream("/log", lambda: (None, None), trio.current_time())

        async def beat() -> None:
            while True:
                block = memoryview(b"beat 1\n" * 30)
                first.analysis.read(stream, block, 1, int, trio.current_time(), is_live=True).end()
                await trio.sleep(WINDOW_S)

        with trio.move_on_after(5 * WINDOW_S + 1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat)
                nursery.start_soon(first.run)
        if is_replaced:
            modelfile.write(here.path, Model(templates=Miner().dump()[0]))
        (known,) = first.analysis.rates.kept().rates
        again = (await here.load()).analysis
        assert again.rates.kept().rates == ([] if is_replaced else [known])
        assert again.warmths == ({} if is_replaced else {"/log": stream.warmth})


async def test_no_id_is_given_twice_after_a_kill(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        killed = (await here.load()).analysis.miner
        ids = {killed.mine_line(line) for line in LINES}  # no checkpoint has them
        again = (await here.load()).analysis.miner
        assert again.mine_line(b"something else") not in ids
        assert again.mine_line(b"something else") > RESERVE


async def test_a_checkpoint_comes_before_the_reserve_is_used_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        learning = await here.load()
        for n in range(RESERVE * 3 // 4):
            learning.analysis.miner.mine_line("".join(chr(103 + n // 20**k % 20) for k in range(4)).encode())
        await learning.keep_due()
        await here.store.commit()
        kept = await here.store.get(KEY, Kept)
        assert kept.next == learning.analysis.miner.next + RESERVE


async def test_labels_come_back_from_the_model_file(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        learn(first.analysis, "disk")
        await run(first, WRITE_S * 2)
        again = (await here.load()).analysis
        guess = again.classifier.guess(again.miner.mine_line(b"disk 4 is broken"), b"disk 4 is broken")
        assert guess is not None
        assert guess.class_ == "disk"
        assert (tmp_path / "logs.model").stat().st_mode & 0o777 == 0o600


async def test_labels_of_people_outlive_a_kill_and_are_in_the_file_then(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        for _ in range(6):
            await first.labelling.learn(LabelLog(text=LINES[-1].decode(), class_="disk"), first.analysis)
        again = await here.load()
        assert (again.analysis.labels, again.analysis.classifier.classes) == (6, ["disk"])
        await run(again, 0.1)
        last = (await here.load()).analysis
        assert (last.labels, last.classifier.classes) == (0, ["disk"])


async def test_the_model_is_written_at_the_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        learn(first.analysis, "disk")
        first.analysis.use([Rule(id="a", regex="x", class_="disk")])
        await run(first, 0.1)
        model = modelfile.read(here.path)
        assert model is not None
        assert (model.classes, model.rules) == (("disk",), first.analysis.rules)
        first.analysis.use([Rule(id="a", regex="x")])
        assert first.analysis.rules == ""


async def test_a_model_from_elsewhere_brings_its_templates(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        first.analysis.miner.mine_line(b"of this machine")
        told = first.analysis.find(b"of this machine")
        assert told == 1
        await run(first, 0.1)
        miner, classifier = Miner(), Classifier()
        for _ in range(10):
            classifier.learn(miner.mine_line(LINES[-1]), LINES[-1], "disk")
        modelfile.write(here.path, Model(classes=("disk",), weights=classifier.dump(), templates=miner.dump()[0]))
        again = (await here.load()).analysis
        assert again.miner.text(1) == "disk <*> is broken"
        assert again.find(LINES[-1]) == again.base + 1 > told  # not the id that another template had here
        assert again.classifier.classes == ["disk"]
        # From then on the store has what became of it.
        later = await here.load()
        id = later.analysis.miner.mine_line(b"a new one")
        await run(later, 0.1)
        last = (await here.load()).analysis
        assert last.miner.text(id) == "a new one"
        assert (last.base, last.find(b"a new one")) == (again.base, again.base + id)


async def test_ids_stay_when_it_ends_before_the_model_is_written(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path) as here:
        first = await here.load()
        learn(first.analysis, "disk")
        await run(first, 0.1)
        second = await here.load()
        id = second.analysis.miner.mine_line(b"a new one")
        learn(second.analysis, "disk")

        def fail(path: Path, model: Model) -> NoReturn:
            raise OSError("killed")

        with monkeypatch.context() as patched:
            patched.setattr(modelfile, "write", fail)
            await second.keep_due()
        again = (await here.load()).analysis
        assert (again.base, again.find(b"a new one")) == (0, id)


@pytest.mark.parametrize(
    "damage",
    [
        Model(classes=("disk",), weights=b"nonsense"),
        Model(templates=b"nonsense"),
        Model(chains=b"nonsense"),
        None,
    ],
)
async def test_a_damaged_model_is_set_aside_and_told(
    tmp_path: Path, autojump_clock: MockClock, damage: Model | None
) -> None:
    async with house(tmp_path) as here:
        if damage:
            modelfile.write(here.path, damage)
        else:
            here.path.write_bytes(b"EMLM nonsense")
        with here.bus.subscribe(Alert, AlertCleared) as alerts:
            learning = await here.load()
            await here.load()  # by then it is gone
            alert, cleared = await first(alerts), await first(alerts)
        assert isinstance(alert, Alert)
        assert isinstance(cleared, AlertCleared)
        assert alert.code == cleared.code == "logs.model"
        assert not here.path.exists()
        assert (tmp_path / "logs.model.bad").exists()
        assert learning.analysis.miner.mine_line(b"goes on") == 1


async def test_a_model_that_cannot_be_read_is_told_and_left(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        here.path.mkdir()
        with here.bus.subscribe(Alert) as alerts:
            learning = await here.load()
            alert = await first(alerts)
        assert "Is a directory" in alert.text
        assert "nothing is written over it" in alert.remedy
        learn(learning.analysis, "disk")
        await run(learning, WRITE_S * 2)
        assert here.path.is_dir()


async def test_a_damaged_checkpoint_is_left_alone(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        here.store.put(KEY, Kept(model="", next=70, base=1000, templates=b"nonsense"))
        analysis = (await here.load()).analysis
        assert analysis.miner.mine_line(b"goes on") == 1
        assert analysis.find(b"goes on") == 1070


async def test_a_model_that_is_put_there_meanwhile_is_taken_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    """And never written over: labels that no file knew are learned again on top of it."""
    async with house(tmp_path) as here:
        learning = await here.load()
        stream = learning.analysis.stream("/log", lambda: (None, None), 0.0)
        for line in LINES:
            learning.analysis.mined(line)
        told = learning.analysis.find(LINES[-1])
        learn(learning.analysis, "disk")
        await run(learning, WRITE_S)
        block = memoryview(LINES[-1] + b"\n")
        held = learning.analysis.read(stream, block, 1, int, 0.0, is_live=True)  # while a line is looked at
        await learning.labelling.learn(LabelLog(text="a fan stopped", class_="fan"), learning.analysis)
        miner, classifier = Miner(), Classifier()
        for _ in range(10):
            classifier.learn(miner.mine_line(b"cpu 3 is hot"), b"cpu 3 is hot", "cpu")
        modelfile.write(here.path, Model(classes=("cpu",), weights=classifier.dump(), templates=miner.dump()[0]))
        await learning.keep_due()
        assert modelfile.named(here.path).classes == ("cpu",)
        await take_up(learning)
        analysis = learning.analysis
        assert analysis.classifier.classes == ["cpu", "fan"]
        found = analysis.find(b"cpu 7 is hot")
        assert found is not None
        assert told is not None
        assert found > told
        id = held._template(0, LINES[-1])
        assert analysis.miner.text(id) == "disk <*> is broken"
        await run(learning, WRITE_S)
        assert modelfile.named(here.path).classes == ("cpu", "fan")
        again = (await here.load()).analysis
        assert again.find(b"cpu 7 is hot") == found
        assert again.classifier.classes == ["cpu", "fan"]


async def test_a_damaged_model_that_is_put_there_changes_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        learning = await here.load()
        learn(learning.analysis, "disk")
        for damage in (encode(Model(chains=b"nonsense")), b"EMLM nonsense"):
            with here.bus.subscribe(Alert) as alerts:
                here.path.write_bytes(damage)
                await take_up(learning)
                alert = await first(alerts)
            assert "what was known before goes on" in alert.remedy
            assert learning.analysis.classifier.classes == ["disk"]
            assert here.path.with_name("logs.model.bad").read_bytes() == damage
        await learning.keep_due()
        assert modelfile.named(here.path).classes == ("disk",)


async def test_a_model_that_is_still_written_is_waited_for(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        learning = await here.load()
        data = encode(Model(classes=("cpu",), weights=Classifier().dump(), templates=Miner().dump()[0]))
        for size in (1, 50, len(data)):
            here.path.write_bytes(data[:size])
            await learning.take_up()
            assert learning.analysis.classifier.classes == []
        await learning.take_up()
        assert learning.analysis.classifier.classes == ["cpu"]


async def test_a_model_that_can_be_read_at_last_is_taken_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        here.path.mkdir()
        learning = await here.load()
        learn(learning.analysis, "disk")
        with here.bus.subscribe(Alert, AlertCleared) as alerts:
            await take_up(learning)  # is told once
            here.path.rmdir()
            modelfile.write(here.path, Model(templates=Miner().dump()[0]))
            await take_up(learning)
            assert isinstance(await first(alerts), AlertCleared)
        assert learning.analysis.classifier.classes == []


async def test_a_folder_that_cannot_be_written_to_is_tried_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        here.path = tmp_path / "later/logs.model"
        learning = await here.load()
        learn(learning.analysis, "disk")
        await learning.keep_due()
        here.path.parent.mkdir()
        await trio.sleep(WRITE_S)
        await learning.keep_due()
        assert here.path.exists()
