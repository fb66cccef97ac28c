"""Learning chains from a log in which failures are marked, and fitting what turns them into probabilities.

Three times over the lines: for the words that failures have, for what comes before failures, for what came after each
state of that. The logistic model is fitted on rows that were not counted: of the time in quarters, each is judged by
what the others taught.

Source: protocols/logs.md 4, "Forecast".
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise

from agent.logs import precursors
from agent.logs.calibrate import logistic
from agent.logs.chains import (
    CHAINS,
    HORIZON_S,
    MAX_CHAINS,
    MAX_CLASSES,
    Chain,
    Chains,
    FailureClass,
    Key,
    Reading,
    Seen,
    Tracks,
)
from agent.logs.precursors import Precursors

_EVENTS = 500_000  # lines of a chain's templates that are learned from, the last ones
_FOLDS = 4
_FITTED = 20_000  # rows that the logistic model is fitted on

_Steps = list[tuple[float, int]]  # their ages in s and templates, the oldest first


class _Row:
    """A line of a chain: its class, where its key stood, whether a failure followed, and of which chain."""

    __slots__ = ("at", "chain", "failed", "number", "reading")

    def __init__(self, at: float, number: int, reading: Reading) -> None:
        self.at, self.number, self.reading = at, number, reading
        self.failed = False
        self.chain: int | None = None


def learn(lines: Callable[[], Iterable[Seen]], *, horizon_s: float | None = None) -> Chains:
    """What leads to failures, learned from all lines in order of time; `lines` is called three times for them.

    `horizon_s`: what a forecast says, it says of so many seconds; None: of what 95 % of the failures took.
    """
    classes: dict[str, list[Precursors]] = {}
    for found in precursors.find(lines)[:CHAINS]:
        if found.failure in classes or len(classes) < MAX_CLASSES:
            classes.setdefault(found.failure, []).append(found)
    wanted = {template for kinds in classes.values() for found in kinds for template in found.steps}
    ends = {template: name for name, kinds in classes.items() for found in kinds for template in found.ends}
    sure, events = set(ends), deque[Seen](maxlen=_EVENTS)
    for seen in lines():
        if seen.template in sure and seen.failure != ends[seen.template]:
            sure.discard(seen.template)
        if seen.template in wanted or seen.failure in classes:
            events.append(seen)
    chains = Chains([_class(name, kinds[:MAX_CHAINS], events, horizon_s) for name, kinds in classes.items()])
    for class_ in chains.classes:
        for chain in class_.chains:
            chain.sure = [template for template in chain.ends if template in sure]
    _fit(chains, _rows(chains, events))
    return chains


def _class(name: str, kinds: Sequence[Precursors], events: Iterable[Seen], horizon_s: float | None) -> FailureClass:
    chains, latest = zip(*map(_chain, kinds, _before(kinds, events)), strict=True)
    return FailureClass(name, list(chains), horizon_s or min(HORIZON_S[1], max(HORIZON_S[0], *latest)))


def _before(kinds: Sequence[Precursors], events: Iterable[Seen]) -> list[list[_Steps]]:
    """For each kind of failure of a class what came before each of its failures."""
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for kind, found in enumerate(kinds):
        for template, slot in found.steps.items():
            places[template].append((kind, slot))
    ends = {template: (kind, slot) for kind, found in enumerate(kinds) for template, slot in found.ends.items()}
    pool = next((kind for kind, found in enumerate(kinds) if not found.ends), None)
    seen: dict[tuple[int, Key], dict[int, float]] = {}
    before: list[list[_Steps]] = [[] for _ in kinds]
    keys: Sequence[Key | None]
    for event in events:
        if event.failure is None:
            if (its := places.get(event.template)) is None:
                continue
            for kind, slot in its:
                if (key := event.key(slot)) is not None:
                    seen.setdefault((kind, key), {})[event.template] = event.at
        elif event.failure == kinds[0].failure:
            if event.template in ends:
                kind, slot = ends[event.template]
                keys = [event.key(slot)]
            elif pool is not None:
                kind, keys = pool, [key for _, key in event.places()]
            else:
                continue
            last = next((seen.pop((kind, key)) for key in keys if key is not None and (kind, key) in seen), {})
            steps = [(event.at - at, template) for template, at in last.items()]
            before[kind].append(sorted((s for s in steps if s[0] <= 2 * kinds[kind].window_s), reverse=True))
    return before


def _chain(found: Precursors, before: Sequence[_Steps]) -> tuple[Chain, float]:
    """A chain from what came before its failures: the order of its steps, their times; 95 % of its longest lead."""
    first: dict[int, float] = dict.fromkeys(found.steps, 0.0)  # how often each comes before the others
    for a, b in combinations(found.steps, 2):
        places = [[step for _, step in steps if step in (a, b)] for steps in before]
        both = [place[0] == a for place in places if len(place) == 2]
        share = sum(both) / len(both) if both else 0.5
        first[a] += share
        first[b] += 1 - share
    order = sorted(found.steps, key=first.__getitem__, reverse=True)
    whole = [steps for steps in before if [template for _, template in steps] == order]
    used, share = (whole, 0.99) if len(whole) >= precursors.LEAST else (before, 0.9)
    gaps = [early - late for steps in used for (early, _), (late, _) in pairwise([*steps, (0.0, 0)])]
    leads = [[age for steps in used for age, step in steps if step == template] for template in order]
    chain = Chain(
        found.ends,
        {template: (n, found.steps[template]) for n, template in enumerate(order)},
        _quantile(gaps, share),
        [(_quantile(times, 0.1), _quantile(times, 0.9)) for times in leads],
    )
    return chain, max(_quantile(times, 0.95) for times in leads)


def _rows(chains: Chains, events: Iterable[Seen]) -> list[_Row]:
    """Every line that changed a track, with what followed; those too late to know are left out."""
    numbers = {class_.name: n for n, class_ in enumerate(chains.classes)}
    tracks, rows = Tracks(chains), []
    waiting: dict[tuple[int, Key], list[_Row]] = defaultdict(list)
    end = 0.0
    for event in events:
        end = event.at
        if event.failure is None:
            for number, key, _, reading in tracks.see(event):
                row = _Row(event.at, number, reading)
                rows.append(row)
                waiting[number, key].append(row)
        elif event.failure in numbers:
            number = numbers[event.failure]
            class_ = chains.classes[number]
            failed = tracks.failed(number, event)
            chain = class_.led_by(event.template)
            for row in waiting.pop((number, failed), ()) if failed is not None else ():
                if event.at - row.at <= class_.horizon_s:
                    row.failed, row.chain = True, chain
    return [row for row in rows if row.failed or row.at + chains.classes[row.number].horizon_s <= end]


def _fit(chains: Chains, rows: Sequence[_Row]) -> None:
    """Count all rows; fit the logistic model on rows that others' counts judge."""
    if not rows:
        return
    begin, length = rows[0].at, max(rows[-1].at - rows[0].at, 1e-9)
    folds = [min(_FOLDS - 1, int((row.at - begin) / length * _FOLDS)) for row in rows]
    judged: list[tuple[tuple[float, float, float], bool]] = []
    stride = -(-len(rows) // _FITTED)
    for fold in range(_FOLDS):
        part = _blank(chains)
        _count(part, (row for row, its in zip(rows, folds, strict=True) if its != fold))
        own = [row for row, its in zip(rows, folds, strict=True) if its == fold]
        judged += [(part.classes[row.number].judge(row.reading).inputs, row.failed) for row in own[::stride]]
    chains.weights = logistic(judged)
    _count(chains, rows)
    chains.trim()


def _blank(chains: Chains) -> Chains:
    return Chains(
        [
            FailureClass(
                class_.name,
                [Chain(chain.ends, chain.steps, chain.gap_s, chain.leads) for chain in class_.chains],
                class_.horizon_s,
            )
            for class_ in chains.classes
        ]
    )


def _count(chains: Chains, rows: Iterable[_Row]) -> None:
    totals = [[0, 0] for _ in chains.classes]
    for row in rows:
        chains.classes[row.number].count(row.reading, row.failed, row.chain)
        totals[row.number][0] += 1
        totals[row.number][1] += row.failed
    for class_, (total, failed) in zip(chains.classes, totals, strict=True):
        class_.rate = (failed + 1) / (total + 2)


def _quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
