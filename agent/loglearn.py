"""`agent logs learn` and `agent logs evaluate`: train the classifier and the predictor from logs, and score them.

Always in the order of time: nothing is ever scored with what came after it. Scores repeat to the digit; `us_per_line`
is a measurement.

Source: protocols/logs.md 2.4, 4 and 9.
"""

import math
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.core.errors import AgentError, ConfigError
from agent.logs import modelfile
from agent.logs.chains import Chains, Seen
from agent.logs.classify import THRESHOLD, Classifier, Guess
from agent.logs.corpus import Corpus, Line
from agent.logs.failures import Failure, Failures
from agent.logs.forecastscore import score
from agent.logs.labels import NONE
from agent.logs.learnchains import learn as chains_of
from agent.logs.model import Model, room
from agent.logs.templates import Mined, Miner

FORECAST_THRESHOLD = 0.7  # from here on the service publishes them
ENOUGH, CLEAR = 5, 0.95  # labels of a template, and the share of one class in them: else they contradict each other


def learn(out: Path, paths: Sequence[str], labels: str | None, failures: Sequence[str]) -> dict[str, Any]:
    """Learn classes from labels and chains before failures, write the model file `out` anew, and say what is in it.

    Raises ConfigError and AgentError for what cannot be read or used; then nothing is written.
    """
    if not labels and not failures:
        raise ConfigError("agent logs learn", 0, "", "there is nothing to learn", remedy="Give --labels or --failure.")
    corpus = Corpus(paths, labels, wants_times=bool(failures))
    lines = _Lines(corpus, failures)
    miner, classifier = Miner(), Classifier()
    counted: defaultdict[int, Counter[str | None]] = defaultdict(Counter)
    for chunk in corpus.chunks(0):
        block = _block(chunk)
        mined = miner.mine(block)
        lines.take(block, mined)
        for line, template in zip(chunk, mined.ids, strict=True):
            if (label := corpus.label(line)) != NONE:
                class_ = corpus.labels.class_of(label)
                classifier.learn(template, line.text, class_)
                counted[template][class_] += 1
        classifier.join(mined.joined)
    model = Model(classes=tuple(classifier.classes), weights=classifier.dump())
    chains = Chains()
    if failures:
        lines.resolve(miner)
        chains = chains_of(lambda: lines.seen(corpus.lines))
        sections = chains.encode()
        model = replace(model, chains=sections[0], calibration=sections[1])
    templates, left_out = miner.dump(room(model))
    model = replace(model, templates=templates, left_out=left_out)
    try:
        modelfile.write(out, model)
    except OSError as err:
        raise AgentError(f"{out}: {err.strerror or err}", remedy="Name a file that can be written.") from err
    total = sum(counted.values(), Counter())
    return {
        "model": str(out),
        "bytes": out.stat().st_size,
        "lines": corpus.lines,
        "labelled": total.total(),
        "normal": total[None],
        "classes": {class_: total[class_] for class_ in classifier.classes},
        "templates": len(miner) - left_out,
        "left_out": left_out,
        "failures": len(lines.failures),
        "chains": {class_.name: len(class_.chains) for class_ in chains.classes},
        "contradictory": sum(map(_is_mixed, counted.values())),
        "contradictions": corpus.labels.contradictions,
    }


def evaluate(
    paths: Sequence[str],
    labels: str | None,
    failures: Sequence[str] = (),
    *,
    model: Path | None = None,
    online: bool = False,
    split: float = 0,
    horizon_s: float | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Learn on the first share `split` of the lines, in the order of time, and score the rest; the object to print.

    `model`: begin with what that file knows; its chains are learned anew where `split` is above 0. `online`: guess each
    scored line, then learn its label. `horizon_s` holds for chains that are learned. `threshold` None: that of each of
    the two, classes and forecasts. Raises ConfigError and AgentError for what cannot be read or used.
    """
    if wrong := _nonsense(labels, failures, model, online, split):
        raise ConfigError("agent logs evaluate", 0, "", wrong[0], remedy=wrong[1])
    known = modelfile.named(model) if model else Model()
    corpus = Corpus(paths, labels, wants_times=bool(failures))
    lines = _Lines(corpus, failures)
    cut = int(corpus.lines * split)
    least = THRESHOLD if threshold is None else threshold
    miner = Miner.load(known.templates) if known.templates else Miner()
    classifier = Classifier.load(known.weights, known.classes, least) if known.weights else Classifier(least)
    tally, place, since, spent_s = _Tally(), 0, math.inf, 0.0
    for chunk in corpus.chunks(cut):
        is_scored = place >= cut
        if place == cut:
            lines.resolve(miner)
            since = corpus.times[chunk[0].number] if failures else since
        place += len(chunk)
        block = _block(chunk)
        mined = miner.mine(block)
        lines.take(block, mined)
        began = time.thread_time()
        guesses = classifier.guess_all(block, mined.starts, mined.ids) if is_scored else None
        spent_s += time.thread_time() - began
        for n, (line, template) in enumerate(zip(chunk, mined.ids, strict=True)):
            if (label := corpus.label(line)) == NONE:
                continue
            class_ = corpus.labels.class_of(label)
            if guesses:
                tally.add(class_, classifier.guess(template, line.text) if online else guesses[n])
            if online or not is_scored:
                tally.drifts += classifier.learn(template, line.text, class_) is not None
        classifier.join(mined.joined)
    told: dict[str, Any] = {"lines": corpus.lines, "scored": corpus.lines - cut}
    if labels:
        told |= tally.told()
    if failures:
        if cut:
            chains = chains_of(lambda: lines.seen(cut), horizon_s=horizon_s)
        else:
            chains = Chains.decode(known.chains, known.calibration) if known.chains else Chains()
        wanted = chains.wanted
        seen = (one for one in lines.seen(place) if one.failure or one.template in wanted)
        least = FORECAST_THRESHOLD if threshold is None else threshold
        told["forecasts"] = forecasts = score(chains, seen, since=since, threshold=least)
        spent_s += forecasts.pop("seconds")
    return told | {"us_per_line": spent_s * 1e6 / max(1, place - cut)}


def _nonsense(
    labels: str | None, failures: Sequence[str], model: Path | None, online: bool, split: float
) -> tuple[str, str] | None:
    """What makes no sense in this, and what would."""
    if not labels and not failures:
        return "there is nothing to score", "Give --labels or --failure."
    if online and not labels:
        return "there is nothing to learn online", "Give --labels, or leave --online out."
    if failures and not (split or model):
        return "what comes before failures is not known", "Give --split, to learn it first, or --model."
    if not (online or split or model):
        return "nothing is known that could be scored", "Give --online, --split or --model."
    return None


class _Lines:
    """What the forecaster is told of each line: its template and whether it is a failure, in the order of time."""

    def __init__(self, corpus: Corpus, patterns: Sequence[str]) -> None:
        self._corpus, self._finder = corpus, Failures(patterns) if patterns else None
        self._templates = array("I")
        self.failures: dict[int, Failure] = {}  # by the place in that order

    def take(self, block: bytes, mined: Mined) -> None:
        """The next lines."""
        if self._finder is None:
            return
        for number, failure in self._finder.find(block, mined.starts).items():
            self.failures[len(self._templates) + number] = failure
        self._templates.extend(mined.ids)

    def resolve(self, miner: Miner) -> None:
        """Give all lines so far the templates that theirs have become."""
        known = {template: miner.resolve(template) or template for template in set(self._templates)}
        self._templates = array("I", [known[template] for template in self._templates])

    def seen(self, count: int) -> Iterator[Seen]:
        """The first `count` lines."""
        corpus = self._corpus
        for place, line in enumerate(islice(chain.from_iterable(corpus.chunks(0)), count)):
            at, log, template = corpus.times[line.number], corpus.paths[line.log], self._templates[place]
            if failure := self.failures.get(place):
                class_ = corpus.class_of(line) or failure.pattern[:128]
                yield Seen(at, log, template, line.text, class_, failure.captures)
            else:
                yield Seen(at, log, template, line.text)


class _Tally:
    """What was guessed, by class; None stands for normal lines."""

    def __init__(self) -> None:
        self._pairs: Counter[tuple[str | None, str | None]] = Counter()  # (is, was guessed)
        self._silent = 0
        self.drifts = 0

    def add(self, class_: str | None, guess: Guess | None) -> None:
        """A line of this class got this guess."""
        self._pairs[class_, guess.class_ if guess else None] += 1
        self._silent += guess is None

    def told(self) -> dict[str, Any]:
        """An alert is a line of any class but normal; it is detected when any class but normal was guessed."""
        pairs = self._pairs
        alerts = sum(n for (is_, _), n in pairs.items() if is_)
        raised = sum(n for (_, guess), n in pairs.items() if guess)
        detected = sum(n for (is_, guess), n in pairs.items() if is_ and guess)
        right = sum(n for (is_, guess), n in pairs.items() if is_ and is_ == guess)
        names = sorted({name for pair in pairs for name in pair if name})
        return {
            "labelled": pairs.total(),
            "abstained": self._silent,
            "alerts": {
                "count": alerts,
                **_scores(detected, raised, alerts),
                "detected": detected,
                "false": raised - detected,
                "class_right": _share(right, detected),
            },
            "classes": {
                name: {
                    "count": (count := sum(n for (is_, _), n in pairs.items() if is_ == name)),
                    **_scores(pairs[name, name], sum(n for (_, guess), n in pairs.items() if guess == name), count),
                }
                for name in names
            },
            "drifts": self.drifts,
        }


def _scores(both: int, guessed: int, true: int) -> dict[str, float | None]:
    return {
        "precision": _share(both, guessed),
        "recall": _share(both, true),
        "f1": _share(2 * both, guessed + true),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _is_mixed(labels: Counter[str | None]) -> bool:
    """Do the labels of a template contradict each other?"""
    return labels.total() >= ENOUGH and max(labels.values()) < CLEAR * labels.total()


def _block(chunk: Sequence[Line]) -> bytes:
    return b"".join(line.text + b"\n" for line in chunk)
