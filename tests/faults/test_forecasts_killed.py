"""The agent is killed when it has told forecasts: each is marked later all the same.

Source: protocols/logs.md 4, "Forecast"; protocols/settings.md, "durability".
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.logs import modelfile
from agent.logs.chains import Seen
from agent.logs.learnchains import learn
from agent.logs.model import Model
from agent.logs.templates import Miner
from tests.faults.station import Station, until

SETTINGS = """\
ident = "forecasts"
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
[logs]
rules = ["{folder}/rules.toml"]
roots = ["{folder}"]
[[logs.watch]]
name = "device"
path = "{folder}/device.log"
"""
RULES = """\
version = 1
[[rule]]
id = "failed"
regex = '^(?:fan|volume) (?<unit>\\S+) (?:stopped|is gone)'
severity = "error"
"""
STEPS = {
    "cooling": ("unit {} is warm", "unit {} is hot", "fan {} stopped"),
    "disk": ("sector {} was moved", "head {} is slow", "volume {} is gone"),
}
HORIZONS_S = {"cooling": 3600.0, "disk": 0.1}  # one lives on, one is over before the agent is back


def write_model(path: Path) -> None:
    """A model that knows both stories, in a log that has others too."""
    miner, seen = Miner(), list[Seen]()

    def write(at: float, text: str, failure: str | None = None) -> None:
        seen.append(Seen(at, "log", miner.mine_line(text.encode()), text.encode(), failure))

    for n in range(200):
        class_, steps = list(STEPS.items())[n % 2]
        for step, text in enumerate(steps if n % 10 < 8 else ()):
            write(20.0 * n + step, text.format(f"u{n}"), class_ if text == steps[-1] else None)
        for second in range(3, 20):
            write(20.0 * n + second, f"node {second} answers")
    known = learn(lambda: iter(seen))
    for kind in known.classes:
        kind.horizon_s = HORIZONS_S[kind.name]
    chains, calibration = known.encode()
    modelfile.write(path, Model(templates=miner.dump()[0], chains=chains, calibration=calibration))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Station]:
    station = Station("forecasts", tmp_path)
    (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path))
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "device.log").touch()
    station.state.mkdir(mode=0o700)
    write_model(station.state / "logs.model")
    yield station
    station.kill()


async def test_each_forecast_is_marked_after_a_kill(tmp_path: Path, machine: Station) -> None:
    def events(kind: str) -> list[dict[str, str]]:
        store = machine.state / "store.db"
        if not store.exists():
            return []
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'journal'").fetchone():
                return []
            rows = db.execute("SELECT data FROM journal WHERE kind = ? ORDER BY seq", (kind,)).fetchall()
        return [json.loads(data) for (data,) in rows]

    async def is_followed() -> bool:
        return bool(events("LogSource"))

    async def forecasts(number: int) -> bool:
        assert machine.is_alive(), machine.log.read_text()
        return len(events("LogForecast")) >= number

    async def are_open() -> bool:
        return await forecasts(2)

    async def are_marked() -> bool:
        return await forecasts(4)

    def write(*lines: str) -> None:
        with (tmp_path / "device.log").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    machine.start()
    await until(is_followed)
    write(*(text.format("u7") for text in STEPS["cooling"][:-1]), *(text.format("d7") for text in STEPS["disk"][:-1]))
    await until(are_open)
    await machine.end()  # right after they were told
    write("fan u7 stopped")
    machine.start()
    await until(are_marked)
    await machine.end()
    states: dict[str, list[str]] = defaultdict(list)
    for event in events("LogForecast"):
        states[event["class"]].append(event["state"])
    assert states == {"cooling": ["open", "hit"], "disk": ["open", "expired"]}
    assert len({event["id"] for event in events("LogForecast")}) == 2
