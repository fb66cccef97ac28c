"""The log monitor learns, on real files: templates and classes of matches, labels, ids over restarts, failures to come.

Its parts have tests of their own; here they stand together. Source: protocols/logs.md 2.2, 2.3 and 4.
"""

from pathlib import Path

import pytest

from agent.core.errors import ActionError
from agent.core.events import LogMatched
from agent.core.learned import LogForecast
from agent.logs import modelfile
from agent.logs.chains import Seen
from agent.logs.learnchains import learn
from agent.logs.model import Model
from agent.logs.templates import Miner
from tests.test_logs_role import first, house

RULES = r"""
version = 1
[[rule]]
id = "broken"
regex = 'broken'
severity = "error"
rate = { burst = 1000000, per_s = 0 }
[[rule]]
id = "fan"
regex = 'fan \w+ stopped'
severity = "critical"
class = "cooling"
rate = { burst = 1000000, per_s = 0 }
"""


async def test_labels_teach_classes_that_outlive_a_restart(tmp_path: Path) -> None:
    async with house(tmp_path, RULES) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            with here.log.open("a") as file:
                file.write("starting\ndisk 1 is broken\n")
            event = await first(events)
            assert (event.template, event.class_, event.class_by) == (2, None, None)
            for _ in range(10):
                assert await here.bus.ask("label_log", {"event": event.id, "class": "disk"}) == {"updated": True}
            with here.log.open("a") as file:
                file.write("disk 2 is broken\n")
            event = await first(events)
            assert (event.template, event.class_, event.class_by) == (2, "disk", "template")
            assert event.confidence is not None
            assert event.confidence > 0.5
            await here.stop()
            assert (tmp_path / "logs.model").exists()  # it is written at the end
            await here.start()
            with here.log.open("a") as file:
                file.write("disk 3 is broken\nfan 7 stopped\n")
            after, fan = await first(events), await first(events)
        assert (after.template, after.class_) == (2, "disk")
        assert (fan.class_, fan.class_by, fan.confidence) == ("cooling", "rule", 1.0)
        learned = (await here.bus.ask("list_logs", {}))["learned"]
        assert (learned["templates"], learned["classes"]) == (3, ["disk", "cooling"])
        asked = {"path": str(here.log), "regex": "broken", "limit": 1, "budget_s": 60}
        found = await here.bus.ask("search_log", asked)
        assert found["matches"][0]["template"] == 2


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"event": "lm-none", "class": "x"}, "not_found"),
        ({"class": "x"}, "bad_payload"),
        ({"event": "lm-1", "text": "y", "class": "x"}, "bad_payload"),
        ({"text": "y"}, "bad_payload"),
    ],
)
async def test_a_label_that_says_nothing_is_refused(tmp_path: Path, payload: dict[str, str], reason: str) -> None:
    async with house(tmp_path, RULES) as here:
        await here.start()
        with pytest.raises(ActionError) as refused:
            await here.bus.ask("label_log", payload)
        assert refused.value.code == reason


STEPS = ("unit {} is warm", "unit {} is hot", "fan {} stopped")


def of_elsewhere(path: Path) -> None:
    """A model that knows: a unit that is warm, and then hot, has its fan stopped."""
    miner = Miner()
    lines = [
        (10.0 * n + step, text.format(f"u{n}").encode())
        for n in range(200)
        for step, text in enumerate(STEPS if n % 4 else ("idle {}",) * 2)
    ]
    seen = [
        Seen(at, "log", miner.mine_line(line), line, "cooling" if b"stopped" in line else None) for at, line in lines
    ]
    chains, calibration = learn(lambda: iter(seen), horizon_s=3600.0).encode()
    modelfile.write(path, Model(templates=miner.dump()[0], chains=chains, calibration=calibration))


async def test_a_forecast_comes_true(tmp_path: Path) -> None:
    of_elsewhere(tmp_path / "logs.model")
    async with house(tmp_path, RULES) as here:
        await here.start()
        with here.bus.subscribe(LogForecast) as events:
            for step in STEPS[:2]:
                with here.log.open("a") as file:
                    file.write(step.format("u77") + "\n")
            forecast = await first(events)
            assert (forecast.state, forecast.class_, forecast.key) == ("open", "cooling", "u77")
            assert forecast.evidence[0].text == "unit u77 is warm"
            with here.log.open("a") as file:
                file.write("fan u77 stopped\nfan 7 stopped\n")
            closed = await first(events)
        assert (closed.id, closed.state) == (forecast.id, "hit")
        learned = (await here.bus.ask("list_logs", {}))["learned"]
        assert (learned["open"], learned["hits"], learned["expired"]) == (0, 1, 0)
