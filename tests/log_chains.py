"""Logs with chains before failures, for the tests of what learns and forecasts them."""

import random

from agent.logs.chains import Seen

NOISE, STEPS, END = range(1, 6), (11, 12, 13), 20
HEAD = "2026-01-05T08:00:00"


def line(at: float, template: int, unit: str, log: str = "a.log", failure: str | None = None) -> Seen:
    """A line of one of the templates; the unit is its second word, and a number that means nothing its last."""
    text = f"{HEAD} step {unit}: t{template} is {int(at * 7919) % 977}"
    return Seen(at, log, template, text.encode(), failure)


def log(seed: int = 1, chains: int = 60, *, units: int = 40, shared: bool = True, log: str = "a.log") -> list[Seen]:
    """Chains of three steps 10 s apart, of which two in three end in a failure 20 s later; noise each second.

    `shared`: the lines of a chain name their unit; else each line names any.
    """
    rng = random.Random(seed)
    lines = []

    def unit() -> str:
        return f"unit{rng.randrange(units)}"

    for number in range(chains):
        at, name = 100.0 + 100 * number + rng.random(), unit()
        steps = STEPS if rng.random() < 2 / 3 else rng.choice([STEPS[:1], STEPS[:2], STEPS[::-1]])
        for place, template in enumerate(steps):
            lines.append(line(at + 10 * place, template, name if shared else unit(), log))
        if steps == STEPS:
            lines.append(line(at + 40, END, name if shared else unit(), log, "broken"))
    lines += [line(float(at), rng.choice(NOISE), unit(), log) for at in range(100 * chains + 200)]
    return sorted(lines, key=lambda seen: seen.at)
