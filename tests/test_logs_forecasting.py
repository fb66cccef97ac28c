"""Forecasts of the service: a model learned from a log's past, lines that are written now, and what is told of them."""

import random
from pathlib import Path

from msgspec.structs import replace

from agent import loglearn
from agent.core.events import LogMatched
from agent.core.learned import LogForecast
from agent.logs import modelfile
from agent.logs.chains import Chains
from agent.logs.learning import USUAL, Usual
from tests.test_logs_role import first, house

RULES = """
version = 1
[[rule]]
id = "failed"
regex = 'write to \\S+ failed'
severity = "error"
"""


def story(unit: str) -> list[str]:
    return [f"disk {unit}: latency is up", f"disk {unit}: retries a write", f"disk {unit}: remaps a sector"]


def learned(folder: Path) -> None:
    """What the past of the log teaches: nine of ten stories end in a failure. There is an hour for that here."""
    chance, lines = random.Random(1), list[str]()
    for _ in range(150):
        unit = f"sd{chance.choice('abcdefghijklmnopq')}"
        lines += [*story(unit), *(f"node {chance.randrange(9)} answers" for _ in range(chance.randrange(4, 9)))]
        lines.append(f"write to {unit} failed" if chance.random() < 0.9 else f"disk {unit}: is well again")
    past = folder / "past.log"
    past.write_text("".join(f"{line}\n" for line in lines))
    path = folder / "logs.model"
    loglearn.learn(path, [str(past)], None, ["write to (?<unit>\\S+) failed"])
    model = modelfile.named(path)
    known = Chains.decode(model.chains, model.calibration)
    known.classes[0].horizon_s = 3600.0
    modelfile.write(path, replace(model, chains=known.encode()[0]))


async def test_a_failure_is_forecast_and_comes_true(tmp_path: Path) -> None:
    learned(tmp_path)
    async with house(tmp_path, RULES) as here:
        here.log.touch()
        await here.start()
        with here.bus.subscribe(LogForecast) as events:
            with here.log.open("a") as file:
                file.writelines(f"{line}\n" for line in story("sdz"))
            opened = await first(events)
            assert (opened.state, opened.key, opened.path) == ("open", "sdz", str(here.log))
            assert opened.probability >= 0.7
            assert story("sdz")[: len(opened.evidence)] == [line.text for line in opened.evidence]
            with here.log.open("a") as file:
                file.write("write to sdy failed\nwrite to sdz failed\n")
            hit = await first(events)
            assert (hit.state, hit.id) == ("hit", opened.id)
            assert hit.evidence[-1].text == "write to sdz failed"
        told = (await here.bus.ask("list_logs", {}))["learned"]
        assert (told["hits"], told["expired"], told["misses"], told["open"]) == (1, 0, 1, 0)
        numbers = {(name, *dict(labels).values()): value for name, labels, value in here.metrics}
        assert numbers["logs_forecasts_total", "hit"] == 1
        assert numbers["logs_forecasts_total", "expired"] == numbers["logs_forecasts_open",] == 0
        assert (numbers["logs_forecast_precision",], numbers["logs_forecast_recall",]) == (1.0, 0.5)
        assert [event.state for event in await here.journal(LogForecast)] == ["open", "hit"]


async def test_a_failure_that_was_learned_needs_no_rule(tmp_path: Path) -> None:
    learned(tmp_path)
    async with house(tmp_path, "version = 1\n") as here:
        here.log.touch()
        await here.start()
        with here.bus.subscribe(LogForecast) as events:
            with here.log.open("a") as file:
                file.writelines(f"{line}\n" for line in [*story("sdz"), "write to sdy failed", "write to sdz failed"])
            told = [await first(events), await first(events)]
        assert [(event.state, event.key) for event in told] == [("open", "sdz"), ("hit", "sdz")]
        assert (await here.bus.ask("list_logs", {}))["learned"]["misses"] == 1


async def test_a_failure_may_be_the_last_words_of_a_log(tmp_path: Path) -> None:
    """A line without an end is matched after the sheet's 2 s."""
    learned(tmp_path)
    async with house(tmp_path, RULES) as here:
        here.log.touch()
        await here.start()
        with here.bus.subscribe(LogForecast) as events:
            with here.log.open("a") as file:
                file.write("\n".join([*story("sdz"), "write to sdz failed"]))
            told = [await first(events), await first(events)]
        assert [(event.state, event.key) for event in told] == [("open", "sdz"), ("hit", "sdz")]


async def test_forecasts_and_their_numbers_outlive_a_restart(tmp_path: Path) -> None:
    learned(tmp_path)
    async with house(tmp_path, RULES) as here:
        here.log.touch()
        await here.start()
        with here.bus.subscribe(LogForecast) as events:
            with here.log.open("a") as file:
                file.writelines(f"{line}\n" for line in [*story("sdz"), "write to sdz failed", *story("sdy")])
            told = [await first(events) for _ in range(3)]
        assert [(event.state, event.key) for event in told] == [("open", "sdz"), ("hit", "sdz"), ("open", "sdy")]
    with here.log.open("a") as file:
        file.write("write to sdy failed\n")
    async with house(tmp_path, RULES) as here:
        with here.bus.subscribe(LogForecast) as events:
            await here.start()
            hit = await first(events)
        assert (hit.state, hit.id) == ("hit", told[-1].id)
        counted = (await here.bus.ask("list_logs", {}))["learned"]
        assert (counted["hits"], counted["expired"], counted["misses"], counted["open"]) == (2, 0, 0, 0)


async def test_a_chain_that_was_half_seen_goes_on_after_a_restart(tmp_path: Path) -> None:
    learned(tmp_path)
    path = tmp_path / "logs.model"
    model = modelfile.named(path)
    known = Chains.decode(model.chains, model.calibration)
    (class_,) = known.classes
    (chain,) = class_.chains
    chain.gap_s = 3600.0
    # Only who saw all three steps, in order and nothing else, is sure.
    known.weights, class_.suffixes, class_.rate = (0.0, 1.0, 0.0, 0.0), {}, 0.1
    chain.counts = {level: [1000, 100] for rank in range(3) for level in (rank << 4 | 15, rank << 4 | 3)}
    chain.counts[2 << 4] = [1000, 990]
    modelfile.write(path, replace(model, chains=known.encode()[0], calibration=known.encode()[1]))
    steps = story("sdz")
    async with house(tmp_path, RULES) as here:
        here.log.touch()
        with here.bus.subscribe(LogForecast, LogMatched) as events:
            for number, step in enumerate(steps[:-1], 1):
                await here.start()
                with here.log.open("a") as file:
                    file.write(f"{step}\nwrite to sdy failed\n")  # another line, so that the first was looked at
                assert isinstance(await first(events), LogMatched)
                await here.stop()
                await here.store.commit()
                assert [len(one.track.templates) for one in (await here.store.get(USUAL, Usual)).tracks] == [number]
            await here.start()
            with here.log.open("a") as file:
                file.write(f"{steps[-1]}\n")
            told = await first(events)
        assert isinstance(told, LogForecast)
        assert (told.state, told.key) == ("open", "sdz")
        assert [line.text for line in told.evidence] == steps
