"""`label_log`: a person says of which class a line is, and the model learns it at once.

Source: protocols/logs.md 2.2.
"""

import msgspec

from agent.core.errors import ActionError
from agent.core.events import LogMatched
from agent.core.store import Store
from agent.logs.classify import Classifier, Drift, TooManyClasses
from agent.logs.messages import LabelLog
from agent.logs.templates import Miner

PAGE = 1000  # events of the journal that are looked at together


async def learn(asked: LabelLog, classifier: Classifier, miner: Miner, store: Store) -> Drift | None:
    """Learn the label of an event's line, or of a text. The guesses before it may turn out to have drifted.

    Raises ActionError: `bad_payload`; `not_found`: the journal has no such event, or no more; `too_big`: there are too
    many classes.
    """
    if (asked.event is None) == (asked.text is None):
        raise ActionError("bad_payload", "expected one of event and text")
    text = asked.text if asked.event is None else (await _find(asked.event, store)).text
    line = (text or "").rstrip("\r\n").encode()
    if b"\n" in line:
        raise ActionError("bad_payload", "key text: expected one line")
    try:
        return classifier.learn(miner.mine_line(line), line, asked.class_)
    except TooManyClasses as err:
        raise ActionError("too_big", err.what, remedy=err.remedy) from err


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
