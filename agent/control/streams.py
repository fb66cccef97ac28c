"""Event streams: which events a client wants, what waits for it, and what it was not told. Pure.

Every committed event is encoded once, as the journal has it but for the values in a suite's `env`. Subscriptions that
want the same (a `Topic`) share the same pieces of a message; each has a queue of its own, bounded, so that a slow
client costs nobody else anything.

    Feed.publish(events) -> Topic.wants -> pieces -> Subscription.put ... take -> frames of `events`

Source: protocols/emissary.md, "Control server" (`subscribe`, `events`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from agent.control.messages import Gap, Policy, Subscribe
from agent.core.envelope import MAX_MESSAGE
from agent.core.events import Recorded, RunReceived

MAX_EVENTS, MAX_BYTES = 500, 256 * 1024  # of one message
QUEUE_EVENTS, QUEUE_BYTES = 10_000, 8 * 1024 * 1024  # of one subscription
MASKED = "***"  # as the action `config` has it
MAX_EVENT = MAX_MESSAGE - 1024  # bytes; more does not fit a message, and is told as a gap

_encode = msgspec.json.Encoder().encode


class _Located(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    path: str | None = None
    from_: Any = None  # of a file that was moved; of a gap in a log it is a number


_read_path = msgspec.json.Decoder(_Located).decode


class Topic(msgspec.Struct, frozen=True):
    """What a subscription wants; equal topics share their work."""

    kinds: tuple[str, ...] = ()
    run: str | None = None
    test: str | None = None
    path: str | None = None

    def wants(self, event: Recorded) -> bool:
        """Does the event belong to it?"""
        if self.run is not None and event.run != self.run:
            return False
        if self.test is not None and event.test != self.test:
            return False
        if self.kinds and not any(fnmatchcase(event.kind, pattern) for pattern in self.kinds):
            return False
        return self.path is None or _is_at(event, self.path)


class Piece:
    """Some events, joined as they stand in a message; the numbers of the first and the last. `size` is in bytes."""

    __slots__ = ("_messages", "count", "first", "last", "size", "text")

    def __init__(self, first: int, last: int, count: int, text: bytes) -> None:
        self.first, self.last, self.count = first, last, count
        self.size, self.text = len(text), text.decode()
        self._messages: dict[int, str] = {}

    def alone(self, number: int) -> str:
        """A frame with it alone, for subscriptions of that number: most clients have one, and share it."""
        found = self._messages.get(number)
        if found is None:
            found = self._messages[number] = message(number, (self.text,))
        return found


class Subscription:
    """What waits for one client. `wake` is called whenever there is something to take.

    With the policy `disconnect` an overflow sets `overflowed`, and nothing more is taken.
    """

    def __init__(self, number: int, topic: Topic, policy: Policy, wake: Callable[[], None]) -> None:
        self.number, self.topic = number, topic
        self.overflowed = self._is_closed = False
        self.dropped = 0
        self._policy, self._wake = policy, wake
        self._pieces: deque[Piece] = deque()
        self._events = self._bytes = 0
        self._gap: Gap | None = None

    def put(self, piece: Piece) -> None:
        """Add to the queue; what it cannot hold is dropped, oldest first."""
        if self.overflowed:
            return
        self._pieces.append(piece)
        self._events += piece.count
        self._bytes += piece.size
        while self._events > QUEUE_EVENTS or self._bytes > QUEUE_BYTES:
            if self._policy == "disconnect":
                self.overflowed = True
                self._pieces.clear()
                break
            oldest = self._pop()
            self.dropped += oldest.count
            self._gap = Gap(from_=self._gap.from_ if self._gap else oldest.first, to=oldest.last)
        self._wake()

    def close(self) -> None:
        """Nothing more is taken."""
        self._is_closed = True

    @property
    def has_more(self) -> bool:
        """Does anything wait?"""
        return bool(self._pieces) and not self._is_closed

    def take(self) -> str | None:
        """The next message: what waits, as much as one may hold; None when nothing does."""
        if not self.has_more:
            return None
        if len(self._pieces) == 1 and self._gap is None:
            return self._pop().alone(self.number)
        texts: list[str] = []
        if self._gap is not None:
            texts.append(_gap_text(self._gap).decode())
            self._gap = None
        count = size = 0
        while self._pieces:
            piece = self._pieces[0]
            if count and (count + piece.count > MAX_EVENTS or size + piece.size > MAX_BYTES):
                break
            self._pop()
            texts.append(piece.text)
            count, size = count + piece.count, size + piece.size
        return message(self.number, texts)

    def _pop(self) -> Piece:
        piece = self._pieces.popleft()
        self._events -= piece.count
        self._bytes -= piece.size
        return piece


class Feed:
    """The one reader of what is committed, for all subscriptions. `seq` is the last number that was published."""

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self._topics: dict[Topic, list[Subscription]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._topics.values()))

    def attach(self, subscription: Subscription) -> None:
        """From now on it gets what is published: the first event has a number above `seq`."""
        self._topics.setdefault(subscription.topic, []).append(subscription)

    def detach(self, subscription: Subscription) -> None:
        """It gets nothing more; one that is not attached is detached already."""
        attached = self._topics.get(subscription.topic, [])
        if subscription in attached:
            attached.remove(subscription)
            if not attached:
                del self._topics[subscription.topic]

    def publish(self, events: Sequence[Recorded]) -> None:
        """Give committed events, in order, to whoever wants them."""
        texts: dict[int, bytes] = {}
        for topic, subscriptions in list(self._topics.items()):  # an overflow detaches
            wanted = [event for event in events if topic.wants(event)]
            for event in wanted:
                if event.seq not in texts:
                    texts[event.seq] = _text(event)
            for piece in _cut((event.seq, texts[event.seq]) for event in wanted):
                for subscription in tuple(subscriptions):
                    subscription.put(piece)
        self.seq = events[-1].seq


def topic_of(request: Subscribe) -> Topic:
    """What a request asks for."""
    wanted = request.filter
    return Topic(tuple(sorted(set(request.kinds))), wanted.run, wanted.test, wanted.path)


def replayed(topic: Topic, events: Sequence[Recorded], after: int, upto: int) -> list[Piece]:
    """Events read again, all that the journal has of the numbers above `after` up to `upto`.

    Numbers that it no longer has become gaps, for a topic with a filter too: whatever they were.
    """
    shown: list[tuple[int, bytes]] = []
    for event in events:
        if event.seq > after + 1:
            shown.append((event.seq - 1, _gap_text(Gap(from_=after + 1, to=event.seq - 1))))
        after = event.seq
        if topic.wants(event):
            shown.append((event.seq, _text(event)))
    if after < upto:
        shown.append((upto, _gap_text(Gap(from_=after + 1, to=upto))))
    return list(_cut(shown))


def message(number: int, texts: Iterable[str]) -> str:
    """A frame with events of a subscription."""
    events = ",".join(texts)
    return f'{{"action":"events","posted":true,"payload":{{"sub":{number},"events":[{events}]}}}}'


def _cut(shown: Iterable[tuple[int, bytes]]) -> Iterable[Piece]:
    """Pieces of at most a message each."""
    numbers: list[int] = []
    texts: list[bytes] = []
    size = 0
    for seq, text in shown:
        if texts and (len(texts) == MAX_EVENTS or size + len(text) > MAX_BYTES):
            yield _piece(numbers, texts)
            numbers, texts, size = [], [], 0
        numbers.append(seq)
        texts.append(text)
        size += len(text) + 1
    if texts:
        yield _piece(numbers, texts)


def _piece(numbers: list[int], texts: list[bytes]) -> Piece:
    return Piece(numbers[0], numbers[-1], len(texts), b",".join(texts))


def _text(event: Recorded) -> bytes:
    text = _encode(_without_env(event) if event.kind == RunReceived.__name__ else event)
    return text if len(text) <= MAX_EVENT else _gap_text(Gap(from_=event.seq, to=event.seq))


def _without_env(event: Recorded) -> Recorded:
    """What a suite's tests get in their environment is theirs: who may read events need not know its passwords."""
    data = msgspec.json.decode(event.data)
    env = data["suite"].get("env")
    if env:
        data["suite"]["env"] = dict.fromkeys(env, MASKED) if isinstance(env, dict) else MASKED
    return msgspec.structs.replace(event, data=msgspec.Raw(_encode(data)))


def _gap_text(gap: Gap) -> bytes:
    return _encode({"kind": "Gap", "data": gap})


def _is_at(event: Recorded, path: str) -> bool:
    try:
        found = _read_path(event.data)
    except msgspec.ValidationError:  # a `path` that is no text
        return False
    below = path.rstrip("/") + "/"
    return any(isinstance(at, str) and (at == path or at.startswith(below)) for at in (found.path, found.from_))
