"""The flow of Drill's seed, step by step, and its exception flow: `agent lab`, an agent, and real programs.

Source: seeds/drill-coverage-event-flow.md, "Flow", "Exception (Step 8)"; protocols/drill.md, "Acceptance".
"""

import json
import re
import subprocess
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.app import Service
from agent.core.covered import CoverageWarning
from agent.lab.drill import FILES
from agent.lab.drillwire import read_action
from tests.drill_house import IDENT, PLUGIN, User, admin, agent_of, methods_reached, record, run_suite
from tests.faults.station import until
from tests.interop.conftest import PeerAbsent

pytestmark = pytest.mark.interop

AVA, PYTEST, COVERAGE_PY = "ava@7.0.0", "pytest==9.0.3", "coverage==7.11.0"
JACOCO = Path("/usr/share/java/org.jacoco.agent.jar")  # of Debian's libjacoco-java

CALC = """\
export function add(a, b) {
	return a + b;
}

export function sub(a, b) {
	return a - b;
}

export function div(a, b) {
	if (b === 0) {
		throw new RangeError('division by zero');
	}

	return a / b;
}

export function unused() {
	return 0;
}
"""
# The first file waits until the file `go` is there: what is seen before is seen while the suite runs.
TESTS = {
    "t1.test.js": """\
import {existsSync} from 'node:fs';
import {setTimeout} from 'node:timers/promises';
import test from 'ava';
import {add} from './calc.js';

test('adds', async t => {
	t.is(add(1, 2), 3);
	while (!existsSync('go')) {
		await setTimeout(20);
	}
});
""",
    "t2.test.js": """\
import test from 'ava';
import {sub} from './calc.js';

test('subtracts', t => {
	t.is(sub(3, 2), 1);
});
""",
    "t3.test.js": """\
import test from 'ava';
import {div} from './calc.js';

test('divides', t => {
	t.is(div(6, 3), 2);
});
""",
}


PY_CALC = """\
def add(a, b):
    return a + b


def sub(a, b):
    return a - b


def div(a, b):
    if b == 0:
        raise ZeroDivisionError

    return a / b


def unused():
    return 0
"""
PY_TESTS = {
    "test_t1.py": """\
import time
from pathlib import Path

from calc import add


def test_adds():
    assert add(1, 2) == 3
    while not Path("go").exists():
        time.sleep(0.02)
""",
    "test_t2.py": """\
from calc import sub


def test_subtracts():
    assert sub(3, 2) == 1
""",
    "test_t3.py": """\
from calc import div


def test_divides():
    assert div(6, 3) == 2
""",
}
# A product that the agent does not start: it does what it is told by files, and each of its classes is one file.
JAVA = """\
import java.nio.file.Files;
import java.nio.file.Path;

public class Main {
    public static void main(String[] args) throws Exception {
        await("add");
        new Calc().add(1, 2);
        await("div");
        new Calc().div(6, 3);
        await("end");
    }

    static void await(String name) throws Exception {
        while (!Files.exists(Path.of(name))) {
            Thread.sleep(20);
        }
    }
}

class Calc {
    int add(int a, int b) {
        return a + b;
    }

    int div(int a, int b) {
        return a / b;
    }

    int unused() {
        return 0;
    }
}
"""


@pytest.fixture
def ava(tmp_path: Path, npm_project: Callable[..., Path], node: Path) -> Path:
    """A small product with three test files, and AVA beside it."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "node_modules").symlink_to(npm_project(AVA) / "node_modules")
    (project / "package.json").write_text('{"type": "module"}\n')
    (project / "calc.js").write_text(CALC)
    for name, text in TESTS.items():
        (project / name).write_text(text)
    return project


def suite_of(project: Path, **document: Any) -> dict[str, Any]:
    return {"id": "calc", "runner": "ava", "source": {"dir": str(project)}, "limits": {"run": 100}} | document


async def test_the_flow_with_ava(
    ava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer_command: Callable[[str], Path]
) -> None:
    heard = record(monkeypatch)
    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", ava, hook_s=0.2) as service:
        shown = await flow(user, service, heard, suite_of(ava, coverage=True), ava)
        expected = {"t1.test.js": {"add"}, "t2.test.js": {"sub"}, "t3.test.js": {"div"}}
        assert without_top_level(methods_reached(user.lab, shown)["./calc.js"]) == expected
        lcov, xml = [(await user.client.get(f"{PLUGIN}/data/coverage/{name}")).content for name in FILES]
        (own,) = (service.store.folder / "runs").glob("*/lcov.info")
    genhtml = peer_command("genhtml")
    # The admin was told no lines, and its file names none that is there.
    rates = await page_of(lcov, tmp_path, genhtml, "--ignore-errors", "source")
    assert f"({shown['covered']} of {shown['probes']} lines)" in rates
    # The suite asked for a report of its own: with lines, whoever else is told.
    assert re.search(r"lines\.+: \d", await page_of(await trio.Path(own).read_bytes(), tmp_path, genhtml))
    assert f"\nSF:{ava}/calc.js\n" in own.read_text()
    root = ET.fromstring(xml)
    assert (root.get("lines-covered"), root.get("lines-valid")) == (str(shown["covered"]), str(shown["probes"]))


async def page_of(lcov: bytes, folder: Path, genhtml: Path, *options: str) -> str:
    """What genhtml says of a file."""
    info = folder / "lcov.info"
    info.write_bytes(lcov)
    argv = [str(genhtml), *options, str(info), "-o", str(folder / "page")]
    with trio.fail_after(60):
        return (await trio.run_process(argv, capture_stdout=True, capture_stderr=True, cwd=folder)).stdout.decode()


async def test_the_flow_with_pytest(
    tmp_path: Path, monitored_python: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, project = record(monkeypatch), tmp_path / "project"
    project.mkdir()
    for name, text in {"calc.py": PY_CALC, **PY_TESTS}.items():
        (project / name).write_text(text)
    suite = suite_of(project, runner="pytest", command=[str(monitored_python(PYTEST, COVERAGE_PY)), "-m", "pytest"])
    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", project) as service:
        shown = await flow(user, service, heard, suite, project)
        expected = {"test_t1.py": {"add"}, "test_t2.py": {"sub"}, "test_t3.py": {"div"}}
        assert without_top_level(methods_reached(user.lab, shown)["./calc.py"]) == expected


async def flow(user: User, service: Service, heard: list[str], suite: dict[str, Any], project: Path) -> dict[str, Any]:
    """Steps 1 to 12 with a realtime session; what the admin shows in the end."""
    await user.online()
    # 1 to 4
    heard.clear()
    told = await user.ask("START", sessionId="s1", testType="AUTO", isRealtime=True)
    assert told["type"] == "START_AGENT_SESSION"
    assert heard[0] == "SESSION_STARTED s1"
    assert_acknowledged(heard[1:])
    # 5 and 6, while the suite runs
    heard.clear()

    async def is_seen() -> bool:
        return user.lab.drill.agents[IDENT].plugin.sessions["s1"].totals.covered > 0

    async def let_go_when_seen() -> None:
        await until(is_seen)
        (project / "go").touch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(let_go_when_seen)
        await run_suite(service, suite)
    # 7 to 12
    await user.ask("STOP", sessionId="s1")
    last = len(heard)
    shown = await user.finished("s1")
    assert len(heard) == last
    *sent, finished, acked, acked_too = [line for line in heard if not line.startswith("INIT")]
    assert finished == "SESSION_FINISHED s1"
    assert_acknowledged([acked, acked_too])
    # Each flush and its number of objects; the last of all ends with the session instead.
    flush = r"(COVERAGE_DATA_PART s1 (\d+)\nSESSION_CHANGED s1 \2\n)"
    assert re.fullmatch(rf"{flush}+(COVERAGE_DATA_PART s1 \d+\n)?", "".join(f"{line}\n" for line in sent)), sent
    assert shown["sessions"][0]["covered"] == shown["covered"] > 0
    return shown


def assert_acknowledged(heard: list[str]) -> None:
    assert re.fullmatch(r"ack /plugin/action/[0-9a-f]{8}\nack /plugin/action", "\n".join(heard)), heard


def without_top_level(reached: dict[str, set[str]]) -> dict[str, set[str]]:
    """What a module does when it is loaded is of whoever loads it first."""
    return {test: left for test, found in reached.items() if (left := found - {"GLOBAL", "<module>"})}


async def test_the_exception_flow_with_ava(ava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = record(monkeypatch)
    (ava / "go").touch()
    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", ava, hook_s=0.2) as service:
        await user.online()
        await user.ask("START", sessionId="s1")
        await run_suite(service, suite_of(ava))
        heard.clear()
        await user.ask("CANCEL", sessionId="s1")
        assert heard[0] == "SESSION_CANCELLED s1"
        assert_acknowledged(heard[1:])
        # Nothing is left behind by it: the next session begins with nothing.
        heard.clear()
        await user.ask("START", sessionId="s2")
        with service.bus.subscribe(CoverageWarning) as warnings:
            await user.ask("STOP", sessionId="s2")
            assert heard[-3] == "SESSION_FINISHED s2"
            with trio.fail_after(30):
                warning = await warnings.__anext__()
        assert "no runner" in warning.text
        assert (await user.finished("s2"))["covered"] == 0
        assert not [line for line in heard if line.startswith("COVERAGE_DATA_PART")]
        await user.ask("STOP_ALL")
        assert heard[-3] == "SESSIONS_FINISHED"


async def test_what_no_admin_should_say_is_acknowledged_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", tmp_path / "project"):
        await user.online()
        link = user.lab.drill.agents[IDENT].link
        assert link is not None
        start = '{"type":"START_AGENT_SESSION","payload":{"sessionId":"s1","isRealtime":"true","isGlobal":"false"}}'
        actions = (start, '{"type":"PAUSE"}', '{"type":"STOP"}', "{", "\0")
        texts = [json.dumps({"id": "test2code", "message": action}) for action in actions]
        with trio.fail_after(30):
            for topic in ("/agent/unheard-of", "/agent/load", "/plugin/togglePlugin", "/plugin/action"):
                await link.say(topic, "{{")
            for text in texts:
                await link.say("/plugin/action", text)
            await link.say("/plugin/state", "")
        assert list(user.lab.drill.agents[IDENT].plugin.sessions) == ["s1"]  # quoted booleans are taken
        # An id that the agent does not know is answered too.
        user.lab.drill.agents[IDENT].plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s9"}}'))
        await user.ask("STOP", sessionId="s9")
        assert (await user.finished("s9"))["covered"] == 0


@pytest.fixture
def java(
    tmp_path: Path, peer_command: Callable[[str], Path], peer: Callable[..., Path], held_port: int
) -> Iterator[tuple[Path, int]]:
    """A running product in Java with JaCoCo's agent, and the port of that."""
    jar = peer(jacoco_agent, str(tmp_path))
    project = tmp_path / "project"
    project.mkdir()
    (project / "Main.java").write_text(JAVA)
    subprocess.run([peer_command("javac"), "--release", "11", "Main.java"], cwd=project, check=True, timeout=120)
    options = f"output=tcpserver,address=127.0.0.1,port={held_port}"
    program = subprocess.Popen([peer_command("java"), f"-javaagent:{jar}={options}", "Main"], cwd=project)
    yield project, held_port
    program.kill()
    program.wait()


def jacoco_agent(folder: str) -> Path:
    """Debian packs the agent's jar into a jar."""
    if not JACOCO.exists():
        raise PeerAbsent(f"no {JACOCO}; packaging/deps peers installs it")
    with zipfile.ZipFile(JACOCO) as outer:
        return Path(outer.extract("jacocoagent.jar", folder))


async def test_the_flow_with_a_product_in_java(
    java: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, (project, port) = record(monkeypatch), java
    settings = {"sources": ["jacoco"], "jacoco": [f"127.0.0.1:{port}"], "flush_s": 0.2}
    settings["build_version"] = "1"  # or the agent would attach anew for the classes that s1 finds, just when s2 begins
    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", project, **settings):
        await user.online()
        probes: dict[str, int] = {}
        for session, called in (("s1", "add"), ("s2", "div")):
            await user.ask("START", sessionId=session, testName=called, isRealtime=True)
            (project / called).touch()

            async def is_seen(session: str = session) -> bool:
                return bool((await user.coverage(session))["reached"])

            await until(is_seen)
            heard.clear()
            await user.ask("STOP", sessionId=session)
            assert heard[-3] == f"SESSION_FINISHED {session}"
            (calc,) = (row for row in (await user.finished(session))["reached"] if row["className"] == "./Calc")
            assert calc["testName"] == called
            probes[session] = sum(flag << number for number, flag in enumerate(calc["probes"]))
        # The constructor, then one probe for each method; no session has what the other reached.
        assert probes == {"s1": 0b0011, "s2": 0b0101}
