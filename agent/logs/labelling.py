"""`label_log`: a person says of which class a line is, and the model learns it at once.

A label that was answered is not lost: it has a row in the store until the model file that knows it is written. After a
kill right then it is learned twice. Beyond MOST rows, where no model can be written, the oldest go.

Source: protocols/logs.md 2.2; ARCHITECTURE.md, rule 4.
"""

import logging

import msgspec

from agent.core.errors import ActionError
from agent.core.events import LogMatched
from agent.core.store import Store
from agent.logs.analysis import Analysis
from agent.logs.classify import TooManyClasses
from agent.logs.messages import LabelLog

log = logging.getLogger(__name__)

KEY = "logs.labels"
PAGE = 1000  # events of the journal that are looked at together
MOST = 10_000


class Label(msgspec.Struct, frozen=True):
    """A line and its class; None: it is normal."""

    line: bytes
    class_: str | None


class Labelling:
    """Learns labels of people, and has those of the last process that no model file knew."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._first = self.next = 0  # rows

    async def resume(self, analysis: Analysis) -> None:
        """Learn what the last process had learned, and no model file knows. After the store's commit()."""
        self._first, self.next = await self._store.get(KEY, tuple[int, int]) or (0, 0)
        await self.replay(analysis)

    async def replay(self, analysis: Analysis) -> None:
        """Learn again what no model file knows: `analysis` goes on with another one."""
        rows = range(self._first, self.next)
        await self._store.commit()
        for number in rows:
            label = await self._store.get(_key(number), Label)
            try:
                if label is not None:
                    analysis.label(label.line, label.class_)
            except TooManyClasses as err:  # of a model that was put in place of the old one
                log.warning("a label is not learned any more class=%s why=%s", label.class_, err)

    async def learn(self, asked: LabelLog, analysis: Analysis) -> None:
        """Learn the label of an event's line, or of a text; on the disk when this returns.

        Raises ActionError: `bad_payload`; `not_found`: the journal has no such event, or no more; `too_big`: there are
        too many classes.
        """
        if (asked.event is None) == (asked.text is None):
            raise ActionError("bad_payload", "expected one of event and text")
        text = asked.text if asked.event is None else (await _find(asked.event, self._store)).text
        line = (text or "").rstrip("\r\n").encode()
        if b"\n" in line:
            raise ActionError("bad_payload", "key text: expected one line")
        try:
            analysis.label(line, asked.class_)
        except TooManyClasses as err:
            raise ActionError("too_big", err.what, remedy=err.remedy) from err
        self._store.put(_key(self.next), Label(line, asked.class_))
        self.next += 1
        self.written(max(self._first, self.next - MOST))
        await self._store.commit()

    def written(self, number: int) -> None:
        """A model file has the labels before that number."""
        for gone in range(self._first, number):
            self._store.forget(_key(gone))
        self._first = number
        self._store.put(KEY, (self._first, self.next))


def _key(number: int) -> str:
    return f"logs.label:{number}"


async def _find(id: str, store: Store) -> LogMatched:
    """The event in the journal; what was published just now is in it too."""
    await store.commit()
    sought, since = f'"id":"{id}"'.encode(), 0
    while rows := await store.read(since, kinds=("LogMatched",), limit=PAGE):
        for row in rows:
            if sought in bytes(row.data):
                event = msgspec.json.decode(row.data, type=LogMatched)
                if event.id == id:  # not only a text that reads like it
                    return event
        since = rows[-1].seq
    raise ActionError("not_found", f"the journal has no LogMatched event {id!r:.80}, or no more")
