"""label_log: the line of an event or a text is learned; what cannot be is refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.errors import ActionError
from agent.core.events import LogMatched
from agent.core.payload import read
from agent.core.store import Store, open_store
from agent.logs import labelling
from agent.logs.analysis import Analysis
from agent.logs.messages import LabelLog


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(opened.run)
        yield opened
        nursery.cancel_scope.cancel()
    opened.close()


def matched(id: str, text: str) -> LogMatched:
    return LogMatched(id=id, path="/l", generation=1, offset=0, length=len(text), rule="r", severity="error", text=text)


class House:
    """One process after another on a store; the last one is killed by begin()."""

    def __init__(self, store: Store) -> None:
        self.store, self.labelling, self.analysis = store, labelling.Labelling(store), Analysis(print, lambda: 0.0, 0.0)
        self.classifier = self.analysis.classifier

    async def label(self, **payload: Any) -> None:
        await self.labelling.learn(read(payload, LabelLog), self.analysis)

    async def begin(self) -> "House":
        again = House(self.store)
        await again.labelling.resume(again.analysis)
        return again

    def guess(self, line: bytes) -> str | None:
        guess = self.classifier.guess(self.analysis.miner.mine_line(line), line)
        return guess.class_ if guess else None


async def test_the_line_of_an_event_is_learned(store: Store) -> None:
    here = House(store)
    store.append(matched("lm-1", "disk sda failed"), 1.0)
    store.append(matched("lm-2", 'said "id":"lm-3" over the wire'), 2.0)
    for n in range(2 * labelling.PAGE):
        store.append(matched(f"lm-x{n}", "other"), 3.0)
    store.append(matched("lm-3", "link eth0 lost"), 4.0)
    for _ in range(3):
        await here.label(event="lm-1", **{"class": "disk"})
        await here.label(event="lm-3", **{"class": "net"})
        await here.label(text="all is well\n", **{"class": None})
    assert here.classifier.classes == ["disk", "net"]
    assert [here.guess(line) for line in (b"disk sdb failed", b"link eth1 lost", b"all is well")] == [
        "disk",
        "net",
        None,
    ]


async def test_a_label_that_was_taken_outlives_a_kill(store: Store) -> None:
    here = House(store)
    for _ in range(6):
        await here.label(text="disk sda failed", **{"class": "disk"})
    again = await here.begin()
    assert (again.guess(b"disk sdb failed"), again.analysis.labels) == ("disk", 6)
    again.labelling.written(4)  # a model file has them
    await again.label(text="all is well", **{"class": None})
    assert (await again.begin()).analysis.labels == 3
    again.labelling.written(again.labelling.next)
    await store.commit()
    assert (await again.begin()).analysis.labels == 0
    assert await store._query("SELECT key FROM checkpoint WHERE key LIKE 'logs.label:%'") == []


async def test_only_so_many_labels_wait_for_a_model(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "MOST", 3)
    here = House(store)
    for n in range(5):
        await here.label(text="x", **{"class": f"c{n}"})
    assert (await here.begin()).classifier.classes == ["c2", "c3", "c4"]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"class": "a"}, "bad_payload: expected one of event and text"),
        ({"event": "lm-1", "text": "x", "class": "a"}, "bad_payload: expected one of event and text"),
        ({"text": "x"}, "bad_payload: key class is missing"),
        ({"text": "x", "class": ""}, "bad_payload: key class: Expected `str` of length >= 1"),
        ({"text": "x", "class": "a" * 200}, "bad_payload: key class: Expected `str` of length <= 128"),
        ({"text": "x\ny", "class": "a"}, "bad_payload: key text: expected one line"),
        ({"event": "lm-0", "class": "a"}, "not_found: the journal has no LogMatched event 'lm-0', or no more"),
    ],
)
async def test_what_cannot_be_learned_is_refused(store: Store, payload: dict[str, Any], reason: str) -> None:
    here = House(store)
    with pytest.raises(ActionError) as refused:
        await here.label(**payload)
    assert refused.value.reason == reason
    assert here.classifier.classes == []


async def test_a_class_too_many_is_refused(store: Store) -> None:
    here = House(store)
    for n in range(63):
        await here.label(text="x", **{"class": f"c{n}"})
    with pytest.raises(ActionError, match="63 classes already") as refused:
        await here.label(text="x", **{"class": "one more"})
    assert refused.value.code == "too_big"
