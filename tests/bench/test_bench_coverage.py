"""What coverage costs: a flush of many classes, sessions that start and stop, and suites under each source."""

import resource
import shutil
import statistics
import time
import tracemalloc
from collections.abc import Callable
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from agent.coverage.attach import Attachment
from agent.coverage.catalog import Catalog, Delta, Method, Unit
from agent.coverage.messages import parts, read_asked
from agent.coverage.sessions import Act, Machine, Part
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources.named import Sources
from agent.demo import SAMPLES
from agent.lab.drill import Attached
from tests.drill_house import admin, agent_of, run_suite
from tests.interop.conftest import find_command, install_monitored_python, install_npm

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]
CLASSES, PROBES = 65_535, 8


def units(count: int) -> list[Unit]:
    method = Method("f", (), "", tuple(range(PROBES)), "0")
    return [Unit(f"src/pkg{n % 100}", f"Class{n}", (method,), tuple(range(1, PROBES + 1))) for n in range(count)]


def session(machine: Machine) -> None:
    """A running session whose first flush is due at 2 s."""
    for topic, text in (("/agent/load", '{"meta":{"id":"test2code"}}'), ("/plugin/togglePlugin", "{}")):
        machine.do(read_asked(_frame(topic, text)), 0.0)
    start = '{"type":"START_AGENT_SESSION","payload":{"sessionId":"s1","testType":"AUTO"}}'
    machine.do(read_asked(_frame("/plugin/action", f'{{"id":"test2code","message":{_quoted(start)}}}')), 0.0)
    machine.collected(0.0, 0.0)


def _frame(topic: str, text: str) -> str:
    return f'{{"type":"MESSAGE","destination":"{topic}","text":{_quoted(text)}}}'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def enabled() -> Machine:
    machine = Machine(alive=lambda: False, clock=time.time)
    machine.announce(units(CLASSES))
    machine.attached()
    session(machine)
    return machine


def encoded(machine: Machine, acts: list[Act]) -> list[str]:
    (part,) = (act for act in acts if isinstance(act, Part))
    return list(parts(part.session, part.batches, machine.counts))


def test_a_flush_of_all_classes(figure: Figure) -> None:
    walls, cpus, size = [], [], 0
    for _ in range(7):
        machine = enabled()
        deltas = [Delta(name, 0b1010_0101, "t1.test.js") for name in machine.units]
        began, began_cpu = time.perf_counter(), time.process_time()
        machine.saw(deltas)
        frames = encoded(machine, machine.collected(2.0, 2.0))
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - began_cpu)
        (size,) = map(len, frames)
    wall, cpu = statistics.median(walls) * 1000, statistics.median(cpus) * 1000
    what = f"coverage: merge and encode a flush of {CLASSES:,} classes of {PROBES} probes, median of 7"
    figure(what, f"{wall:.0f} ms ({cpu:.0f} of CPU), {size / 2**20:.1f} MiB", "< 100 ms")


def test_the_memory_of_that_flush(figure: Figure) -> None:
    machine = enabled()
    deltas = [Delta(name, 0b1010_0101, "t1.test.js") for name in machine.units]
    tracemalloc.start()
    machine.saw(deltas)
    encoded(machine, machine.collected(2.0, 2.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    figure("coverage: peak of memory for that flush", f"{peak / 2**20:.0f} MiB", "< 100 MiB")


def test_a_flush_that_finds_nothing(figure: Figure) -> None:
    machine = enabled()
    seconds = []
    for number in range(1, 1001):
        began = time.perf_counter()
        acts = machine.collected(2.0 * number, 2.0 * number)
        seconds.append(time.perf_counter() - began)
        assert not acts
    figure("coverage: a flush that finds nothing", f"{statistics.median(seconds) * 1000:.3f} ms", "< 1 ms")


@pytest.mark.parametrize("name", ["v8", "python"])
async def test_a_poll_that_finds_nothing(figure: Figure, tmp_path: Path, name: SourceName) -> None:
    source = Sources().make(name, CoverageSettings(), Catalog(), tmp_path, nullcontext)
    await source.prepare([tmp_path])
    await source.start()
    seconds = []
    for _ in range(501):
        began = time.perf_counter()
        assert await source.collect() == []
        seconds.append(time.perf_counter() - began)
    await source.stop()
    what = f"coverage: a poll of {type(source).__name__} that finds nothing, median of 501"
    figure(what, f"{statistics.median(seconds) * 1000:.2f} ms", "< 1 ms")


class Answers:
    """How long the agent took from an action's frame to the frame of its answer, by the answer's type; in seconds.

    What the admin then does with it is its own, though it is in the same process here.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.took: dict[str, list[float]] = {"SESSION_STARTED": [], "SESSION_FINISHED": []}
        self._asked = 0.0
        say, send = Attached.say, Attachment._send

        async def saying(attached: Attached, topic: str, text: str, *acks: str) -> None:
            self._asked = time.perf_counter()
            await say(attached, topic, text, *acks)

        async def sending(attachment: Attachment, frame: str) -> None:
            await send(attachment, frame)
            for kind in self.took:
                if kind in frame[:200]:
                    self.took[kind].append(time.perf_counter() - self._asked)

        patch.setattr(Attached, "say", saying)
        patch.setattr(Attachment, "_send", sending)

    def p99_ms(self, kind: str) -> float:
        """The slowest but one in a hundred."""
        return sorted(self.took[kind])[int(len(self.took[kind]) * 0.99) - 1] * 1000


async def test_a_start_is_answered(figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(monkeypatch)
    (tmp_path / "project").mkdir()
    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", tmp_path / "project"):
        await user.online()
        for number in range(500):
            await user.ask("START", sessionId=f"s{number}")
            await user.ask("STOP", sessionId=f"s{number}")
    figure("coverage: START to SESSION_STARTED, p99", f"{answers.p99_ms('SESSION_STARTED'):.1f} ms", "< 20 ms")


async def test_a_stop_with_10_000_classes(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: Callable[..., Path]
) -> None:
    peer(find_command, "node")
    answers = Answers(monkeypatch)
    project = tmp_path / "project"
    for number in range(10_000):
        (project / f"p{number % 100}").mkdir(parents=True, exist_ok=True)
        (project / f"p{number % 100}/c{number}.js").write_text("exports.f = () => {\n\treturn 1;\n};\n")
    load = "for (let n = 0; n < 10000; n++) require(`./p${n % 100}/c${n}.js`).f();"
    (project / "all.test.js").write_text(f"{load}\nconsole.log('1..1\\nok 1');\n")
    suite = {"id": "all", "runner": "tap", "command": ["node", "all.test.js"], "source": {"dir": str(project)}}
    async with (
        admin(tmp_path / "lab") as user,
        agent_of(user.lab, tmp_path / "agent", project, flush_s=600, sources=["v8"]) as service,
    ):
        await user.online()
        for number in range(3):
            await user.ask("START", sessionId=f"s{number}")
            await run_suite(service, suite)
            await user.ask("STOP", sessionId=f"s{number}")
            assert (await user.finished(f"s{number}"))["sessions"][0]["classes"] >= 10_000
    took = statistics.median(answers.took["SESSION_FINISHED"]) * 1000
    figure("coverage: STOP to SESSION_FINISHED, 10,000 classes to tell, median of 3", f"{took:.0f} ms", "< 200 ms")


async def test_what_a_suite_of_ava_takes_longer(figure: Figure, tmp_path: Path, peer: Callable[..., Path]) -> None:
    peer(find_command, "node")
    project = Path(shutil.copytree(SAMPLES / "ava", tmp_path / "project"))
    (project / "node_modules").symlink_to(peer(install_npm, "ava@6.4.1") / "node_modules")
    suite = {"id": "ava", "runner": "ava", "files": ["test/*.js"]}
    bare = suite | {"env": {"NODE_V8_COVERAGE": str(tmp_path / "bare")}}
    await overhead(figure, tmp_path, project, suite, bare, "AVA's sample suite", "NODE_V8_COVERAGE alone")


PRODUCT = """\
def words(text):
    found, word = [], ""
    for char in text + " ":
        if char.isalpha():
            word += char
        elif word:
            found.append(word)
            word = ""
    return found


def counted(words):
    counts = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


def ranked(counts):
    return sorted(counts, key=lambda word: (-counts[word], word))
"""
TEST = """\
import pytest

from product import counted, ranked, words


@pytest.mark.parametrize("number", range(50))
def test_ranks(number):
    text = "the lab runs the suite and the suite tells the lab " * (10 + number)
    assert ranked(counted(words(text)))[0] == "the"
"""


async def test_what_a_suite_of_pytest_takes_longer(figure: Figure, tmp_path: Path, peer: Callable[..., Path]) -> None:
    """Twenty files with fifty tests each, a millisecond of the product's own work in a test."""
    python = str(peer(install_monitored_python, "pytest==9.0.3", "coverage==7.11.0"))
    project = tmp_path / "project"
    project.mkdir()
    (project / "product.py").write_text(PRODUCT)
    for number in range(20):
        (project / f"test_{number}.py").write_text(TEST)
    suite = {"id": "pytest", "runner": "pytest", "command": [python, "-m", "pytest"]}
    bare = suite | {"command": [python, "-m", "coverage", "run", "-m", "pytest"]}
    await overhead(figure, tmp_path, project, suite, bare, "1000 tests of pytest", "coverage.py alone")


async def overhead(
    figure: Figure, folder: Path, project: Path, suite: dict[str, Any], bare: dict[str, Any], what: str, other: str
) -> None:
    """Wall time and CPU of the suite with a session, and with another tool, over those with none: medians of 5."""
    source = {"source": {"dir": str(project)}}
    variants = {"plain": suite | source, "session": suite | source, "bare": bare | source}
    walls: dict[str, list[float]] = {name: [] for name in variants}
    users: dict[str, list[float]] = {name: [] for name in variants}
    async with AsyncExitStack() as stack:
        user = await stack.enter_async_context(admin(folder / "lab"))
        service = await stack.enter_async_context(agent_of(user.lab, folder / "agent", project))
        await user.online()
        for number in range(6):
            for name, document in variants.items():
                if name == "session":
                    await user.ask("START", sessionId=f"s{number}", isRealtime=True)
                before, began = _user_s(), time.perf_counter()
                await run_suite(service, document)
                wall, cpu = time.perf_counter() - began, _user_s() - before
                if name == "session":
                    await user.ask("STOP", sessionId=f"s{number}")
                    assert (await user.finished(f"s{number}"))["covered"] > 0
                if number:  # the first of each warms what the others use
                    walls[name].append(wall)
                    users[name].append(cpu)
    plain, plain_user = statistics.median(walls["plain"]), statistics.median(users["plain"])
    for name, tool, goal in (("session", "a session", "<= 10 %"), ("bare", other, "beside it")):
        wall = statistics.median(walls[name]) / plain - 1
        cpu = statistics.median(users[name]) / plain_user - 1
        figure(f"coverage: {what} ({plain:.2f} s) with {tool}", f"wall {wall:+.0%}, user CPU {cpu:+.0%}", goal)


def _user_s() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
