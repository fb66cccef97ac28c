"""Real monitors: npm's @metrist/protocol, and the JavaScript example."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.monitors_house import SDK, house, monitor

pytestmark = pytest.mark.interop

METRIST = "@metrist/protocol@0.0.5"
# What each does: ok and self-timed steps, logs at every level, an error, words on stderr and stdout.
MONITOR = """
const {Protocol} = require('@metrist/protocol')
const protocol = new Protocol()
const steps = {
  Ok: async () => protocol.sendOK(),
  Timed: async () => protocol.sendTime(12.5),
  Logs: async () => {
    for (const level of ['Debug', 'Info', 'Warning', 'Error']) protocol[`log${level}`]?.(`a ${level} line`)
    console.log('a plain print')
    console.error('a line on stderr')
    protocol.sendOK()
  },
  Fails: async () => { throw new Error('it is down') },
}
protocol.run?.(steps) ?? require('@metrist/protocol').run(protocol, steps, async () => {}, async () => {})
"""


async def test_the_node_library_under_default_settings(
    npm_project: Callable[..., Path], node: Path, tmp_path: Path
) -> None:
    folder = npm_project(METRIST)
    script = tmp_path / "monitor.js"
    script.write_text(MONITOR)
    given = monitor(
        (str(node), str(script)),
        steps=("Ok", "Timed", "Logs", "Fails"),
        env={"NODE_PATH": str(folder / "node_modules")},
    )
    async with house(tmp_path, given) as here:
        ok, timed, logs, fails = await here.run_once()
        assert [step.state for step in (ok, timed, logs)] == ["ok"] * 3, here.logs()
        assert (timed.ms, timed.timed_by) == (12.5, "monitor")
        assert (fails.state, "it is down" in str(fails.text)) == ("error", True)
        said = {(line.source, line.text) for line in here.logs()}
        assert ("noise", "a plain print") in said
        assert ("stderr", "a line on stderr") in said
        assert ("log", "a Info line") in said


async def test_the_example_in_javascript(node: Path, tmp_path: Path) -> None:
    argv = (str(node), str(SDK / "examples/hello.mjs"))
    async with house(tmp_path, monitor(argv, steps=("Greet", "Wait", "Nope"), config={"Name": "Ann é"})) as here:
        greet, wait, nope = await here.run_once()
        assert (greet.state, wait.state, wait.timed_by) == ("ok", "ok", "monitor")
        assert wait.ms is not None
        assert wait.ms >= 15
        assert (nope.state, nope.text) == ("error", "there is no step Nope")
        assert [line.text for line in here.logs()] == ["Hello, Ann é"]
        assert (here.runs()[0].ended_by, here.runs()[0].rc) == ("exit", 0)
