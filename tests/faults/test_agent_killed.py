"""kill -9 of the agent at random moments of a run: after its restart every side holds each test once.

Source: protocols/suites.md, "A run" (restart and power loss), acceptance 3; protocols/emissary.md, acceptance 4.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from agent.lab import queue
from tests.faults.station import Bench, Station, bench

KILLS = 10  # of each machine
ENOUGH_S = 120.0  # a slow machine makes fewer of them: pytest ends a test after 300 s
TESTS = 20
RUN_S = 0.9  # about what the suites take

STATES = ("passed", "failed", "skipped", "todo")  # of test n: STATES[n % 4]

# Beside its tests it leaves a daemon that ignores everything, in a session of its own.
TAP = f"""
(trap '' HUP INT TERM; exec setsid sleep 1000) >/dev/null 2>&1 &
echo 1..{TESTS}; n=0
while [ $n -lt {TESTS} ]; do
  case $((n % 4)) in
    0) echo "ok - test $n" ;;
    1) echo "not ok - test $n" ;;
    2) echo "ok - test $n # SKIP not here" ;;
    3) echo "not ok - test $n # TODO" ;;
  esac
  n=$((n + 1)); sleep 0.03
done; exit 1
"""

PYTEST = f"""
import pytest, time
@pytest.mark.parametrize("n", range({TESTS}))
def test_each(n, request):
    time.sleep(0.03)
    if n % 4 == 3:
        pytest.xfail("later")
    if n % 4 == 2:
        pytest.skip("not here")
    assert n % 4 != 1
"""


def tap_suite(machine: Station) -> dict[str, Any]:
    return machine.write_suite(TAP)


def pytest_suite(machine: Station) -> dict[str, Any]:
    source = machine.source()
    (Path(source["dir"]) / "test_it.py").write_text(PYTEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return {"id": "s", "runner": "pytest", "command": command, "source": source, "resumable": True}


def number(name: str) -> int:
    """Which test it is: `test 7`, `test_each[7]`."""
    return int("".join(char for char in name if char.isdigit()))


async def kill_in_mid_run(lab: Bench, machine: Station, suite: dict[str, Any], random: Random) -> None:
    """Order a run, kill the agent at some moment of it, perhaps again in its recovery, and look at all that is told."""
    ordered = lab.lab.seneschal.enqueue(suite)
    await trio.sleep(random.uniform(0, RUN_S))
    before = await lab.outcomes(ordered)
    await machine.end()
    machine.start()
    if random.random() < 0.3:
        await trio.sleep(random.uniform(0, 1))
        await machine.end()
        machine.start()
    row = await lab.told(ordered)
    if row.run != ordered:  # the kill had swallowed the order; it came again for an offer that is void, or to nobody
        is_refused = lab.lab.seneschal._queue.runs[ordered].state == "refused"
        assert lab.heard.count(ordered).keys() == ({"Refused"} if is_refused else set())
    told = lab.heard.count(row.run)  # once, and at most once more for each time that it was ordered again
    assert told.keys() == {"Accepted", "Complete"}
    assert max(told.values()) <= row.sends
    assert row.complete is not None
    result = await lab.agree(machine, row.run, completes=range(1, row.sends + 1))
    assert (row.complete.verdict, row.complete.reason) == (result["verdict"], result["reason"])
    after = await lab.outcomes(row.run)
    assert {case: known for case, known in before.items() if known != "PENDING"}.items() <= after.items()

    tests = [record for record in result["tests"] if record["message"] != "aborted: interrupted"]
    numbers = sorted(number(record["name"]) for record in tests if record["kind"] == "test")
    for record in tests:
        assert record["kind"] == "rest" or record["state"] == STATES[number(record["name"]) % 4]
    if result["reason"] is None:
        assert result["verdict"] == "failed"
        assert numbers == list(range(TESTS))
    else:
        assert not suite.get("resumable")
        assert (result["verdict"], result["reason"]) == ("aborted", "interrupted")
        assert numbers == list(range(len(numbers))), "the first ones, without a hole"
        rests = [record["message"] for record in result["tests"] if record["kind"] == "rest"]
        assert rests == ["aborted: interrupted"]


async def test_killed_at_up_to_fifty_random_moments(
    tmp_path: Path, soak_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An order that the kill has swallowed comes again after 30 s, three times; here sooner, and as often as needed.
    monkeypatch.setattr(queue, "RESEND_S", 5.0)
    monkeypatch.setattr(queue, "RESENDS", 1000)

    async def be_killed(n: int, make: Callable[[Station], dict[str, Any]]) -> None:
        random = Random(n)
        machine = Station(f"lab-{n}-{os.getpid()}", tmp_path / f"machine-{n}")
        began, kills = trio.current_time(), 0
        async with bench(tmp_path / f"lab-{n}") as lab:
            machine.configure(lab.lab.address, lab.lab.token_file)
            machine.start()
            try:
                while (lasted := trio.current_time() - began) < soak_s or (kills < KILLS and lasted < ENOUGH_S):
                    await kill_in_mid_run(lab, machine, make(machine), random)
                    kills += 1
            finally:
                machine.kill()

    async with trio.open_nursery() as nursery:
        for n, make in enumerate([tap_suite] * 4 + [pytest_suite]):
            nursery.start_soon(be_killed, n, make)
