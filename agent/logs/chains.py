"""Chains of templates before failures: what was learned of them, and how far one has come for a key.

A failure has a class, and a key that its chain's lines share: a value of theirs (a unit, a volume, a connection), else
the log they are in. Per class and key a Track remembers the steps that were seen, and says at each new one how far
each chain has come, in order, and what came last. Two experts judge that:

* each chain, by how many of its steps came in order, how many were left out, and how many came out of order;
* the class, by the longest suffix of the key's templates that was seen before, with back-off.

A logistic model joins them. It is fitted on probabilities given to rows that the experts had not counted, so that it
calibrates them too.

Source: protocols/logs.md 4, "Forecast".
"""

import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated, NamedTuple

import msgspec

from agent.logs import stamps
from agent.logs.calibrate import sigmoid
from agent.logs.model import ModelDamaged

# Where a key stands is a slot: the number of a word in its line; WORDS and more: of a capture.
BY_SOURCE = -1  # the log itself: the chain's lines share no word
MAX_STEPS = 12  # of a chain
MAX_CLASSES = 64
MAX_CHAINS = 16  # of a class
CHAINS, SUFFIXES = 128, 16_384  # of all classes: with all weights there may be, they fit into a model file
SUFFIX = 4  # templates
WORDS = 64  # of a line that are looked at, and of captures
KEY_MAX = 256  # bytes of a word: a log may have one as long as a line, and thousands of keys are remembered
HORIZON_S = (10.0, 3600.0)
TRACKS = 16_384
KEPT = 256  # of them, over a restart: the last ones
LINES = 8  # remembered of a track

_MEMORY = MAX_STEPS  # steps of one chain and key: no run in order is longer
_BACK_OFF = 2.0  # what is known of more lines weighs as much as so many of this kind
_CONTEXT_BACK_OFF = 3.0
_CERTAIN = 0.003  # no expert is surer than this
_STEP = 0.02  # of the weights, for one forecast
_VERSION = 1

Key = bytes | str  # a word, or the name of the log

_word = re.compile(rb"[\w\x80-\xff](?:[\w./@#%+\x80-\xff-]*[\w\x80-\xff])?")


class Seen(NamedTuple):
    """A line of the log `source`, at `at` in seconds on any one clock. `failure` is the class of failure that it is,
    and `captures` what the named groups took of the expression that said so: they name its key.
    """

    at: float
    source: str
    template: int
    line: bytes
    failure: str | None = None
    captures: Sequence[bytes] = ()

    def key(self, slot: int) -> Key | None:
        """What stands in a slot. None: the line is shorter than those that the slot was learned from."""
        if slot == BY_SOURCE:
            return self.source
        found, slot = (self.captures, slot - WORDS) if slot >= WORDS else (words(self.line), slot)
        return found[slot][:KEY_MAX] if slot < len(found) else None

    def places(self) -> list[tuple[int, Key]]:
        """All slots where the key of a failure may stand, and what stands there."""
        found, first = (self.captures, WORDS) if self.captures else (words(self.line), 0)
        return [*((slot, word[:KEY_MAX]) for slot, word in enumerate(found[:WORDS], first)), (BY_SOURCE, self.source)]


class Reading(NamedTuple):
    """Where a key stands. `states`: (number of the chain in its class, state, weight), the weight less than 1 when the
    chain's last step is a while ago. `suffix`: the key's last templates, oldest first.
    """

    states: list[tuple[int, int, float]]
    suffix: tuple[int, ...]


class Judgement(NamedTuple):
    """What the experts say, as the logistic model wants it, and of how many rows the longest known suffix was."""

    inputs: tuple[float, float, float]
    rows: int


Slot = Annotated[int, msgspec.Meta(ge=BY_SOURCE, lt=2 * WORDS)]
Template = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_WordSlot = Annotated[int, msgspec.Meta(ge=BY_SOURCE, lt=WORDS)]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_STEPS)]
_Count = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=2, max_length=2)]
_Positive = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Weight = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class Chain(msgspec.Struct, forbid_unknown_fields=True):
    """Steps that lead to failures: template -> (rank in their order, number of the word that is the key).

    `ends`: the templates of these failures' lines, and the key's word there; none: any other line of their class. Those
    in `sure` only failures had. A step later than `gap_s` after the one before begins anew. `leads` are per rank the
    times to the failure: their 10 % and 90 % quantiles. `counts` are per state.
    """

    ends: dict[Template, Slot]
    steps: Annotated[dict[Template, tuple[_Rank, _WordSlot]], msgspec.Meta(min_length=1, max_length=MAX_STEPS)]
    gap_s: _Positive
    leads: Annotated[list[tuple[_Positive, _Positive]], msgspec.Meta(min_length=1, max_length=MAX_STEPS)]
    counts: dict[int, _Count] = {}
    sure: list[Template] = []

    def chance(self, state: int, prior: float) -> float:
        """How probable its failure is: from what is known of the step's rank to what is known of the whole state."""
        for level in (state | 15, state | 3, state):
            rows, failed = self.counts.get(level, (0, 0))
            prior = (failed + _BACK_OFF * prior) / (rows + _BACK_OFF)
        return prior

    def count(self, state: int, failed: bool) -> None:
        """Learn one row."""
        for level in (state | 15, state | 3, state):
            count = self.counts.setdefault(level, [0, 0])
            count[0] += 1
            count[1] += failed


class FailureClass(msgspec.Struct, forbid_unknown_fields=True):
    """A class of failures: its chains, and how often a failure came within `horizon_s` after each suffix of a key's
    templates. `rate` is the share of all rows that one followed.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    chains: Annotated[list[Chain], msgspec.Meta(min_length=1, max_length=MAX_CHAINS)]
    horizon_s: _Positive
    rate: _Share = 0.0
    suffixes: dict[tuple[Template, ...], _Count] = {}

    @property
    def gap_s(self) -> float:
        """After a pause longer than this, what was seen of a key counts no more."""
        return max(chain.gap_s for chain in self.chains)

    @property
    def ends(self) -> dict[int, int]:
        """The key's word by template of the failure's line."""
        return {template: slot for chain in self.chains for template, slot in chain.ends.items()}

    def led_by(self, template: int) -> int | None:
        """The number of the chain to a failure whose line is of `template`."""
        other = None
        for number, chain in enumerate(self.chains):
            if template in chain.ends:
                return number
            if not chain.ends:
                other = number
        return other

    def judge(self, reading: Reading) -> Judgement:
        """Ask both experts."""
        most, none = 0.0, 1.0
        for number, state, weight in reading.states:
            chance = weight * self.chains[number].chance(state, self.rate)
            none *= 1 - chance
            most = max(most, chance)
        after, known = self.rate, 0
        for size in range(1, len(reading.suffix) + 1):
            rows, failed = self.suffixes.get(reading.suffix[-size:], (0, 0))
            if not rows:
                break
            after, known = (failed + _CONTEXT_BACK_OFF * after) / (rows + _CONTEXT_BACK_OFF), rows
        return Judgement((logit(most), logit(1 - none), logit(after)), known)

    def expected(self, reading: Reading) -> tuple[float, float]:
        """When the failure of the most probable chain is due, in s from the step: 10 % come earlier, 10 % later."""
        chain, state = max(
            ((self.chains[number], state) for number, state, _ in reading.states),
            key=lambda it: it[0].chance(it[1], self.rate),
        )
        return chain.leads[state >> 4]

    def count(self, reading: Reading, failed: bool, chain: int | None) -> None:
        """Learn a row: whether a failure of the class followed, and the number of its chain."""
        for number, state, weight in reading.states:
            if weight == 1.0:
                self.chains[number].count(state, number == chain)
        for size in range(1, len(reading.suffix) + 1):
            count = self.suffixes.setdefault(reading.suffix[-size:], [0, 0])
            count[0] += 1
            count[1] += failed


class Chains(msgspec.Struct, forbid_unknown_fields=True):
    """All that forecasts need. `weights` are the logistic model's: of 1, and of the inputs of a Judgement."""

    classes: list[FailureClass] = []
    weights: tuple[_Weight, _Weight, _Weight, _Weight] = (0.0, 1 / 3, 1 / 3, 1 / 3)

    @property
    def wanted(self) -> set[int]:
        """The templates that are steps: a forecaster must see every line of them, and failures beside them."""
        return {template for class_ in self.classes for chain in class_.chains for template in chain.steps}

    @property
    def sure(self) -> set[int]:
        """The templates whose lines are failures, whatever else says so."""
        return {template for class_ in self.classes for chain in class_.chains for template in chain.sure}

    def probability(self, judgement: Judgement) -> float:
        """Of the class's failure within its horizon."""
        w, (a, b, c) = self.weights, judgement.inputs
        return sigmoid(w[0] + w[1] * a + w[2] * b + w[3] * c)

    def correct(self, judgement: Judgement, failed: bool) -> None:
        """Learn from a forecast that came true, or did not: a small step of the weights."""
        off = _STEP * (failed - self.probability(judgement))
        x = (1.0, *judgement.inputs)
        a, b, c, d = (w + off * v for w, v in zip(self.weights, x, strict=True))
        self.weights = (a, b, c, d)

    def trim(self) -> None:
        """Forget the suffixes of fewest rows, beyond SUFFIXES of all classes."""
        if sum(len(class_.suffixes) for class_ in self.classes) > SUFFIXES:
            rows = ((rows, class_, key) for class_ in self.classes for key, (rows, _) in class_.suffixes.items())
            for _, class_, key in sorted(rows, key=lambda row: row[0], reverse=True)[SUFFIXES:]:
                del class_.suffixes[key]

    def encode(self) -> tuple[bytes, bytes]:
        """The sections `chains` and `calibration` of a model file."""
        return _encoder.encode(_Sections(_VERSION, self.classes)), _encoder.encode(self.weights)

    @classmethod
    def decode(cls, chains: bytes, calibration: bytes) -> "Chains":
        """What encode() gave; empty sections: nothing is known. Raises ModelDamaged."""
        if not chains and not calibration:
            return cls()
        try:
            sections = _sections.decode(chains)
            weights = _weights.decode(calibration)
        except (msgspec.DecodeError, UnicodeDecodeError) as err:
            raise _damaged(str(err)) from err
        if sections.version != _VERSION:
            raise _damaged(f"version {sections.version} is not known")
        if len({class_.name for class_ in sections.classes}) < len(sections.classes):
            raise _damaged("a class is there twice")
        for class_ in sections.classes:
            counts = [*class_.suffixes.values()]
            for chain in class_.chains:
                counts += chain.counts.values()
                if any(rank >= len(chain.leads) for rank, _ in chain.steps.values()):
                    raise _damaged(f"a step of {class_.name} has no lead")
                if not chain.ends.keys() >= set(chain.sure):
                    raise _damaged(f"a failure of {class_.name} has no key")
            if any(failed > rows for rows, failed in counts):
                raise _damaged(f"more lines of {class_.name} failed than there were")
        return cls(sections.classes, weights)


class _Sections(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    classes: Annotated[list[FailureClass], msgspec.Meta(max_length=MAX_CLASSES)]


_encoder = msgspec.msgpack.Encoder()
_sections = msgspec.msgpack.Decoder(_Sections)
_weights = msgspec.msgpack.Decoder(tuple[_Weight, _Weight, _Weight, _Weight])


def _damaged(why: str) -> ModelDamaged:
    return ModelDamaged(f"the chains are damaged: {why}", remedy="They are learned anew.")


class Evidence(NamedTuple):
    """A line that was a step: where it stands, its text and template for who forecasts."""

    path: str
    offset: int
    line: bytes
    template: int


class Path(msgspec.Struct):
    """The steps of one chain that were seen: their ranks, each with the length of the longest run in order up to it."""

    at: float = 0.0
    state: int = 0
    steps: list[tuple[int, int]] = []

    def add(self, at: float, rank: int) -> None:
        """A step came."""
        self.at = at
        steps, length = self.steps, 1
        for other, run in steps:
            if other < rank and run >= length:
                length = run + 1
        steps.append((rank, length))
        if len(steps) > _MEMORY:
            del steps[0]
        # The step's rank; how many before it were left out; how many came that are not in the run: at most 2 each, so
        # that 3 stands for "whatever" when less of the state is asked for.
        self.state = rank << 4 | min(2, rank + 1 - length) << 2 | min(2, len(steps) - length)


class Track(msgspec.Struct):
    """What was seen for one class and key; `paths` by the number of their chain in the class, `at`: of the last step.

    `lines`, `armed` and `refused` are for whoever forecasts; they begin anew after a pause as the rest does.
    """

    at: float = -math.inf
    paths: dict[int, Path] = {}
    templates: tuple[int, ...] = ()
    lines: list[Evidence] = []
    armed: bool = True
    refused: bool = False

    def step(
        self, at: float, template: int, steps: Sequence[tuple[int, int]], chains: Sequence[Chain], gap_s: float
    ) -> Reading:
        """A line of `template` came: `steps` are those of the class's `chains` it is a step of, and its rank in each.

        `gap_s` is the class's.
        """
        if at - self.at > gap_s:
            self.templates, self.armed, self.refused = (), True, False
            self.lines.clear()
        self.at = max(self.at, at)
        self.templates = (*self.templates[1 - SUFFIX :], template)
        for number, rank in steps:
            path = self.paths.get(number)
            if path is None or at - path.at > chains[number].gap_s:
                path = self.paths[number] = Path()
            path.add(at, rank)
        states = []
        for number, path in list(self.paths.items()):
            age = at - path.at
            if age <= 0:
                states.append((number, path.state, 1.0))
            elif age < (gap := chains[number].gap_s):
                states.append((number, path.state, 1 - age / gap))
            else:
                del self.paths[number]
        return Reading(states, self.templates)

    def add(self, line: Evidence) -> None:
        """It may be told as evidence."""
        self.lines.append(line)
        del self.lines[:-LINES]


class KeptTrack(msgspec.Struct, frozen=True):
    """A track of the class of that number. Its key is the word; None: the log `source`."""

    number: int
    word: bytes | None
    source: str
    track: Track


class Tracks:
    """The tracks of all classes and keys; beyond TRACKS those that had no step for the longest time are forgotten."""

    def __init__(self, chains: Chains) -> None:
        self._classes = chains.classes
        self._gaps = [class_.gap_s for class_ in chains.classes]
        self._ends = [class_.ends for class_ in chains.classes]
        self._tracks: OrderedDict[tuple[int, Key], Track] = OrderedDict()
        # Per template: the classes it leads to; of each, per slot of a key, the chains and the rank in them.
        self._steps: dict[int, list[tuple[int, list[tuple[int, list[tuple[int, int]]]]]]] = {}
        for number, class_ in enumerate(chains.classes):
            steps: dict[int, dict[int, list[tuple[int, int]]]] = {}
            for place, chain in enumerate(class_.chains):
                for template, (rank, slot) in chain.steps.items():
                    steps.setdefault(template, {}).setdefault(slot, []).append((place, rank))
            for template, slots in steps.items():
                self._steps.setdefault(template, []).append((number, list(slots.items())))

    def see(self, seen: Seen) -> list[tuple[int, Key, Track, Reading]]:
        """What a line changed: per class and key its track, and where that stands now."""
        changed: list[tuple[int, Key, Track, Reading]] = []
        classes = self._steps.get(seen.template)
        if classes is None:
            return changed
        its = words(seen.line)
        for number, slots in classes:
            for slot, steps in slots:
                key: Key | None = seen.source if slot == BY_SOURCE else its[slot] if slot < len(its) else None
                if key is None:
                    continue
                track = self._tracks.get((number, key))
                if track is None:
                    track = self._tracks[number, key] = Track()
                    if len(self._tracks) > TRACKS:
                        self._tracks.popitem(last=False)
                else:
                    self._tracks.move_to_end((number, key))
                chains, gap_s = self._classes[number].chains, self._gaps[number]
                reading = track.step(seen.at, seen.template, steps, chains, gap_s)
                changed.append((number, key, track, reading))
        return changed

    def kept(self, now: float) -> list[KeptTrack]:
        """Those that had a step not long ago, at most KEPT, for resume()."""
        alive = (
            KeptTrack(number, key if isinstance(key, bytes) else None, "" if isinstance(key, bytes) else key, track)
            for (number, key), track in reversed(self._tracks.items())
            if now - track.at <= self._gaps[number]
        )
        return list(islice(alive, KEPT))[::-1]

    def resume(self, kept: Iterable[KeptTrack]) -> None:
        """Go on with these, as far as there are such chains."""
        for one in kept:
            chains = self._classes[one.number].chains if one.number < len(self._classes) else []
            if chains and all(
                n < len(chains) and path.state >> 4 < len(chains[n].leads) for n, path in one.track.paths.items()
            ):
                self._tracks[one.number, one.source if one.word is None else one.word] = one.track

    def key(self, number: int, seen: Seen) -> Key | None:
        """The key of a failure of class `number`. None: it is of no key that was heard of."""
        slot = self._ends[number].get(seen.template)
        key = None if slot is None else seen.key(slot)
        if key is None:
            key = next((key for _, key in seen.places() if (number, key) in self._tracks), None)
        return key

    def end(self, number: int, key: Key) -> None:
        """The key had a failure of class `number`."""
        self._tracks.pop((number, key), None)

    def failed(self, number: int, seen: Seen) -> Key | None:
        """Both: the key of a failure, whose track ends here."""
        key = self.key(number, seen)
        if key is not None:
            self.end(number, key)
        return key


def words(line: bytes) -> list[bytes]:
    """A line's words but for its time, and without what is around them: of `(vol-3: /dev/sdb)` vol-3 and dev/sdb.

    At most WORDS, of each at most KEY_MAX bytes.
    """
    found: list[bytes] = _word.findall(stamps.without(line))[:WORDS]
    return found if len(line) <= KEY_MAX else [word[:KEY_MAX] for word in found]


def logit(chance: float) -> float:
    """Of a probability; none is surer than experts may be."""
    chance = max(_CERTAIN, min(1 - _CERTAIN, chance))
    return math.log(chance / (1 - chance))
