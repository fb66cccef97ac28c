"""A full disk under the state directory: a file system of 24 MiB of the agent's own, in a mount namespace.

Source: protocols/settings.md, "Ends" (disk full), "[state]" (`reserve`).
"""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from agent.core.channel import Refused
from agent.core.link import Dial
from agent.core.processtree import tree
from tests.control_house import Client, client
from tests.drill_house import CALC
from tests.faults.station import Bench, Station, bench, until

# `agent run` where a small disk is no reason to refuse, and running ones get so many seconds to end instead of 60.
AGENT = """
import sys
from agent.suites import requirements, role
requirements.FREE_DISK, role.FULL_DISK_GRACE_S = 0, {grace_s}
from agent.__main__ import main
sys.exit(main())
"""
MOUNTED = 'mount -t tmpfs -o size=24m tmpfs "$0" && exec "$@"'

# Ten tests; ten more when the file `go` is in its folder; and the last one when `end` is.
SCRIPT = """
echo 1..21; n=0
while [ $n -lt 20 ]; do
  while [ $n -ge 10 ] && [ ! -e go ]; do sleep 0.02; done
  echo "ok - test $n"; n=$((n + 1))
done
while [ ! -e end ]; do sleep 0.02; done
echo "ok - test 20"
"""


# What is matched in a log; so many lines are written to it while no event can be written.
LOGS = """
[logs]
rules = ["{folder}/rules.toml"]
[[logs.watch]]
name = "device"
path = "{folder}/device.log"
"""
RULES = """
version = 1
[[rule]]
id = "line"
regex = '^line (?<n>\\d+)$'
rate = { burst = 20, per_s = 0 }
"""
LINES = 300


# Reaches `add` at once, `sub` when the file `full` is in its folder, says so in `ran` a second later, and ends when
# `end` is there. It waits for `full` without a turn of its loop: the hook writes nothing while the disk is filled.
COVERED = """
const {existsSync, writeFileSync} = require('node:fs');
const {add, sub} = require('./calc.js');
const cell = new Int32Array(new SharedArrayBuffer(4));
console.log('1..1');
add(1, 2);
writeFileSync('began', '');
while (!existsSync('full')) Atomics.wait(cell, 0, 0, 20);
sub(3, 2);
setTimeout(() => writeFileSync('ran', ''), 1000);
const end = () => existsSync('end') ? console.log('ok - test') : setTimeout(end, 20);
end();
"""


@pytest.fixture
def grace_s() -> float:
    return 2.0


@pytest.fixture
def machine(tmp_path: Path, grace_s: float) -> Iterator[Station]:
    tried = ["unshare", "-Urm", "sh", "-c", MOUNTED, str(tmp_path), "true"]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode != 0:
        pytest.skip("an unprivileged mount namespace is refused here")
    mounted = ["unshare", "-Urm", "sh", "-c", MOUNTED, str(tmp_path / "machine/state")]
    argv = [*mounted, sys.executable, "-c", AGENT.format(grace_s=grace_s)]
    made = Station(f"lab-{os.getpid()}", tmp_path / "machine", argv)
    made.state.mkdir()
    yield made
    made.kill()


def inside(machine: Station) -> Path:
    """The state directory, as the agent sees it."""
    return Path(f"/proc/{machine.pid}/root{machine.state}")


def fill(machine: Station) -> None:
    """Leave no byte."""
    with open(inside(machine) / "filler", "ab", buffering=0) as file:
        for size in (65_536, 4096, 1):
            while True:
                try:
                    if file.write(bytes(size)) < size:
                        break
                except OSError:  # no space left
                    break


def fitted(machine: Station, lab: Bench, *, more: str = "") -> None:
    machine.configure(lab.lab.address, lab.lab.token_file, reserve="1MiB", more=more)
    machine.start()


async def half_told(machine: Station, lab: Bench) -> str:
    """A run whose first ten tests are in Mimir."""
    run = lab.lab.seneschal.enqueue(machine.write_suite(SCRIPT))
    await until(lambda: are_told(lab, run, 10))
    return run


async def are_told(lab: Bench, run: str, tests: int) -> bool:
    return len(await lab.outcomes(run)) == tests


def allow(machine: Station, *names: str) -> None:
    for name in names:
        (Path(machine.source()["dir"]) / name).touch()


def on_disk(machine: Station, folder: Path, kind: str) -> list[Any]:
    """What the journal would hold if the machine lost its power now."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.kill(machine.pid, signal.SIGSTOP)  # both files are of one moment
    try:
        os.waitid(os.P_PID, machine.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        for name in ("store.db", "store.db-wal"):
            shutil.copy(inside(machine) / name, folder / name)
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    with closing(sqlite3.connect(folder / "store.db")) as db:
        rows = db.execute("SELECT data FROM journal WHERE kind = ? ORDER BY seq", (kind,)).fetchall()
    return [msgspec.json.decode(data) for (data,) in rows]


def dial(machine: Station) -> Dial:
    """How a control client reaches the agent."""
    (address,) = re.findall(r"control listens addresses=(\S+)", machine.log.read_text())
    token = (inside(machine) / "token").read_text().strip()
    return Dial(f"ws://{address}/", headers=(("authorization", f"Bearer {token}"),))


async def health(machine: Station) -> tuple[int, str]:
    """What the agent's own page of health says."""
    (address,) = re.findall(r"control listens addresses=(\S+)", machine.log.read_text())
    token = (inside(machine) / "token").read_text().strip()
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        answer = await client.get(f"http://{address}/healthz")
    return answer.status_code, answer.text


@pytest.mark.parametrize("grace_s", [600.0])  # the run ends by itself
async def test_the_reserve_lets_a_run_end_and_no_other_begins_until_there_is_room(
    machine: Station, tmp_path: Path
) -> None:
    async with bench(tmp_path / "lab") as lab:
        fitted(machine, lab)
        run = await half_told(machine, lab)
        assert (inside(machine) / "reserve").stat().st_size == 2**20
        fill(machine)
        allow(machine, "go", "end")
        row = await lab.told(run)
        assert (row.run, row.reason) == (run, None)
        assert not (inside(machine) / "reserve").exists()
        assert [alert["code"] for alert in on_disk(machine, tmp_path / "copy", "Alert")].count("disk.full") == 1
        status, text = await health(machine)
        assert (status, "disk" in text) == (503, True)

        # The next one waits at the Seneschal: no slot is offered.
        other = lab.lab.seneschal.enqueue(machine.write_suite(SCRIPT))
        offered = trio.current_time()
        await until(lambda: later(offered + 3))
        assert lab.lab.seneschal._queue.runs[other].state == "queued"
        (inside(machine) / "filler").unlink()
        assert (await lab.told(other)).run == other
        assert (inside(machine) / "reserve").stat().st_size == 2**20
        assert [alert["code"] for alert in on_disk(machine, tmp_path / "copy", "AlertCleared")].count("disk.full") == 1
        assert (await health(machine))[0] == 200
        assert lab.heard.count(other) == {"Accepted": 1, "Complete": 1}
        await check(machine, lab, run, "passed")
        await check(machine, lab, other, "passed")


async def test_without_any_room_the_run_is_aborted_and_nothing_is_told_that_is_not_on_disk(
    machine: Station, tmp_path: Path
) -> None:
    async with bench(tmp_path / "lab") as lab:
        fitted(machine, lab)
        run = await half_told(machine, lab)
        fill(machine)
        allow(machine, "go")
        await until(lambda: has_ended(machine, run))
        told = await lab.outcomes(run)
        assert told.keys() <= {record["case"] for record in on_disk(machine, tmp_path / "copy", "TestFinished")}
        assert lab.heard.count(run) == {"Accepted": 1}
        assert not (inside(machine) / "runs" / run / "result.json").exists()
        (inside(machine) / "filler").unlink()
        assert (await lab.told(run)).reason == "space: the disk is full"
        await check(machine, lab, run, "aborted")
        files = {path.name for path in (inside(machine) / "runs" / run).iterdir() if path.is_file()}
        assert files == {"result.json", "setup.log", "stderr.log", "stdout.log", "xunit.xml"}


async def test_no_line_of_a_log_is_lost_or_told_twice_when_there_was_no_room_for_it(
    machine: Station, tmp_path: Path
) -> None:
    device = machine.folder / "device.log"

    def events(kind: str) -> list[Any]:
        return [event for event in on_disk(machine, tmp_path / "copy", kind) if event["path"] == str(device)]

    async def told(kind: str, times: int) -> bool:
        return len(events(kind)) >= times

    async def is_up() -> bool:
        assert machine.is_alive(), machine.log.read_text()
        said = machine.log.read_text()
        return "control listens" in said and "role=logs state=running" in said

    async def is_noticed() -> bool:
        fill(machine)
        return (await health(machine))[0] == 503

    (machine.folder / "rules.toml").write_text(RULES)
    device.touch()
    async with bench(tmp_path / "lab") as lab:
        fitted(machine, lab, more=LOGS.format(folder=machine.folder))
        await until(is_up)
        await until(lambda: told("LogSource", 1))
        fill(machine)
        with device.open("a") as file:
            for n in range(LINES):
                file.write(f"line {n}\n")
                file.flush()
        await until(is_noticed)
        assert machine.is_alive()
        (inside(machine) / "filler").unlink()
        await until(lambda: told("LogMatched", LINES))
        with device.open("a") as file:
            file.write(f"line {LINES}\n")
        await until(lambda: told("LogMatched", LINES + 1))
        matched = events("LogMatched")
        assert events("LogGap") == []
    assert [event["captures"]["n"] for event in matched] == [str(n) for n in range(LINES + 1)]
    assert len({event["id"] for event in matched}) == LINES + 1


async def test_a_client_hears_nothing_that_is_not_on_disk_and_all_of_it_once_there_is_room(
    machine: Station, tmp_path: Path
) -> None:
    said: list[str] = []

    def heard() -> list[str]:
        return [event["data"]["message"] for event in listener.events if event["kind"] == "Logged"]

    def kept() -> list[str]:
        return [event["message"] for event in on_disk(machine, tmp_path / "copy", "Logged")]

    async def is_up() -> bool:
        assert machine.is_alive(), machine.log.read_text()
        return "role=suites state=running" in machine.log.read_text()

    async def is_behind() -> bool:
        """Say something more when there is no room; does some of it wait for the disk?"""
        fill(machine)
        said.append(f"message {len(said)}")
        await asker.post("log", {"message": said[-1]})
        return bool((await asker.ask("status", {}))["full"]) and len(kept()) < len(said)

    async with bench(tmp_path / "lab") as lab:
        fitted(machine, lab)
        await until(is_up)
        async with client(dial(machine)) as listener, client(dial(machine)) as asker:
            await listener.ask("subscribe", {"since": 0})
            await until(is_behind)
            with pytest.raises(Refused, match=r"^\S+ refused drain: busy: the disk is full: drain was carried out"):
                await asker.ask("drain", {})
            assert (await asker.ask("status", {}))["draining"] is True
            await listener.ask("status", {})  # what was told before its answer has come
            on_the_disk = kept()
            assert on_the_disk == said[: len(on_the_disk)]
            assert heard() == said[: len(heard())]
            assert len(heard()) <= len(on_the_disk)
            (inside(machine) / "filler").unlink()
            await until(lambda: is_well(asker))
            await asker.ask("undrain", {})
            with trio.fail_after(60):
                while len(heard()) < len(said):
                    await listener.came.wait()
            assert heard() == said
            numbers = [event["seq"] for event in listener.events]
            assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("grace_s", [600.0])  # what is covered is not to be ended meanwhile
async def test_what_ran_while_there_was_no_room_is_in_the_report(machine: Station, tmp_path: Path) -> None:
    async with bench(tmp_path / "lab") as lab:
        run = await covered(machine, lab)
        fill(machine)
        allow(machine, "full")
        await until(lambda: is_there(machine, "ran"), 60)  # its hook has looked a few times
        (inside(machine) / "filler").unlink()
        allow(machine, "end")
        await lab.told(run)
        result, lines = reported(machine, run)
        assert (result["verdict"], result["warnings"]) == ("passed", [])
        assert {number for number, hits in lines.items() if hits} >= {2, 6}
        assert lines[10] == 0


@pytest.mark.parametrize("grace_s", [600.0])
async def test_what_a_process_could_not_tell_at_its_end_is_told_and_the_report_is_whole(
    machine: Station, tmp_path: Path
) -> None:
    async with bench(tmp_path / "lab") as lab:
        run = await covered(machine, lab)
        allow(machine, "full")
        await until(lambda: has_given_up_all(machine, run), 60)
        allow(machine, "end")
        await until(lambda: has_ended(machine, run), 60)
        await until(lambda: is_told_of_reports(machine), 60)
        (inside(machine) / "filler").unlink()
        await lab.told(run)
        result, lines = reported(machine, run)
        texts = [warning["text"] for warning in result["warnings"] if warning["code"] == "coverage"]
        assert any("of Node w" in text for text in texts), result["warnings"]
        assert lines[10] == 0


async def covered(machine: Station, lab: Bench) -> str:
    """A run that is covered, of a product that runs."""
    if shutil.which("node") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("peer node: packaging/deps peers installs it")
    folder = Path(machine.source()["dir"])
    (folder / "calc.js").write_text(CALC)
    (folder / "main.js").write_text(COVERED)
    fitted(machine, lab, more="[coverage]\nhook_s = 0.1\n")
    suite = {"id": "calc", "runner": "tap", "command": ["node", "main.js"], "source": machine.source()}
    run = lab.lab.seneschal.enqueue(suite | {"coverage": True})
    await until(lambda: is_there(machine, "began"))
    return run


def reported(machine: Station, run: str) -> tuple[dict[str, Any], dict[int, int]]:
    """The result of a run, and by its coverage the hits of each line of calc.js."""
    folder = inside(machine) / "runs" / run
    result: dict[str, Any] = msgspec.json.decode((folder / "result.json").read_bytes())
    assert {"lcov.info", "cobertura.xml"} <= result["artifacts"].keys()
    assert ET.parse(folder / "cobertura.xml").getroot().tag == "coverage"
    lines: dict[int, int] = {}
    for record in (folder / "lcov.info").read_text().split("end_of_record\n")[:-1]:
        if "/calc.js\n" in record:
            for number, hits in re.findall(r"^DA:(\d+),(\d+)", record, re.MULTILINE):
                lines[int(number)] = max(int(hits), lines.get(int(number), 0))
    return result, lines


async def is_there(machine: Station, name: str) -> bool:
    return (Path(machine.source()["dir"]) / name).exists()


async def is_well(asker: Client) -> bool:
    return not (await asker.ask("status", {}))["full"]


async def has_given_up_all(machine: Station, run: str) -> bool:
    """Take all there is, until neither the reserve nor a report of Node can become room once more."""
    fill(machine)
    reports = (inside(machine) / "coverage/runs" / run / "v8").glob("coverage-*")
    given_up = "reserve=given_up" in machine.log.read_text() and not any(reports)
    fill(machine)
    return given_up


async def is_told_of_reports(machine: Station) -> bool:
    """Did the agent say that what Node wrote is no report?"""
    fill(machine)
    return "of Node w" in machine.log.read_text()


async def later(than: float) -> bool:
    return trio.current_time() > than


async def has_ended(machine: Station, run: str) -> bool:
    """Take what the reserve gives, until the run's processes are ended for want of room."""
    fill(machine)
    return not tree(run)


async def check(machine: Station, lab: Bench, run: str, verdict: str) -> None:
    outside, machine.state = machine.state, inside(machine)
    result = await lab.agree(machine, run)
    machine.state = outside
    assert result["verdict"] == verdict
    assert len(result["tests"]) == 21
