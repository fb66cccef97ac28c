"""`agent demo`: the main job on this machine alone.

A lab and an agent in one process on loopback; the lab's Seneschal hands out one real suite, the agent runs it, tells
Mimir of each test as it ends, and submits the xUnit report to Polarize. Meanwhile it watches a device's log, which the
demo writes: it tells a match with what led to it and with its class, and forecasts it by what it learned from the log's
past, which the demo wrote too. Progress goes to standard error, the result (a table, or with
`--json` the result document) to standard output.

Source: ARCHITECTURE.md, "The commands"; protocols/suites.md, "Records, events, result".
"""

import fcntl
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec
import trio

from agent import loglearn
from agent.app import Service
from agent.core import config
from agent.core.bundle import callers_environ
from agent.core.errors import AgentError
from agent.core.events import (
    ImportFinished,
    LogMatched,
    RunReceived,
    RunRefused,
    RunStarted,
    SuiteFinished,
    TestFinished,
    TestStarted,
)
from agent.core.learned import LogForecast
from agent.lab.server import Lab, serve_lab
from agent.settings import Given, Settings
from agent.suites.prepare import tree_of

SAMPLES = Path(__file__).parent / "lab" / "samples"
IDENT = "demo"
DELIVERY_S = 30.0  # s for Mimir, Polarize and the log after the suite's end; all are in this process
INSTALL_S = 180.0  # s for npm
OLDEST_NODE = (18, 18)  # AVA 6.4's

# A device's log: of these lines only those of vol-3 have to do with the failure; and the failure.
LOG = """\
INFO  opened vol-3 on sdb
INFO  opened vol-7 on sdc
INFO  vol-7: 64 MiB written
WARN  vol-3: 94 % full
INFO  node-2 answers in 3 ms
WARN  vol-3: 97 % full, cleaning up
"""
FAILURE = "ERROR write to vol-3 failed: no space left\n"
STORIES = 200  # in the past that is learned from
FAILURES = r"write to (?<volume>\S+) failed"
MARKS = {"passed": "ok", "failed": "FAILED", "blocked": "BLOCKED", "skipped": "skip", "todo": "todo"}


class NoCache(AgentError):
    """There is no folder that outlives a demo."""


class NoSample(AgentError):
    """A sample suite cannot be run on this machine; the text says why."""


async def run(suite: Path | None, keep: bool, as_json: bool) -> int:
    """Run `suite` (a project's folder) or the best sample; the exit code: 0 iff the verdict is passed."""
    say = Progress(sys.stderr)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    project: Path = suite if suite is not None else await trio.to_thread.run_sync(sample, say)
    tree = tree_of(project)
    folder = await trio.to_thread.run_sync(_folder, keep)
    async with trio.open_nursery() as nursery:
        await nursery.start(_end_at_a_signal)
        lab: Lab = await nursery.start(serve_lab, "127.0.0.1:0", folder / "lab")
        log = folder / "device.log"
        log.touch()
        await trio.to_thread.run_sync(_learn, folder, say)
        settings = _settings(lab, folder, project, log)
        service = Service(settings, lambda: settings, Given())
        say.line(f"lab     {lab.url}")
        watch = Watch(say)
        with service.bus.subscribe(
            RunReceived,
            RunRefused,
            RunStarted,
            TestStarted,
            TestFinished,
            SuiteFinished,
            ImportFinished,
            LogMatched,
            LogForecast,
        ) as events:
            await nursery.start(service.run)
            say.line(
                f"page    {service.control_url.replace('ws', 'http', 1)} token_file={service.store.folder / 'token'}"
            )
            ordered = lab.seneschal.enqueue(tree)
            async for event in events:
                if isinstance(event, RunStarted):
                    log.write_text(LOG)
                if _heard(event, watch, log):
                    break
            if watch.finished is not None:
                await _deliver(service, events, watch, log)
        outcomes = await lab.mimir.outcomes(ordered) if watch.finished else {}
        await service.end_orderly()
        nursery.cancel_scope.cancel()
    if watch.finished is None:
        say.line(f"refused: {watch.refused}")
        return 1
    result = (folder / "agent" / "runs" / watch.finished.run / "result.json").read_bytes()
    if as_json:
        print(result.decode().rstrip("\n"))
    else:
        print(summary(watch, outcomes, folder), end="")
    return 0 if watch.finished.verdict == "passed" else 1


async def _end_at_a_signal(*, task_status: trio.TaskStatus[None]) -> None:
    """As Ctrl-C does, also when the terminal is closed: what the suite has started does not outlive us."""
    ends = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]  # nohup
    with trio.open_signal_receiver(*ends) as signals:
        task_status.started()
        await anext(signals)
        raise KeyboardInterrupt


class Progress:
    """Lines for a person: on a terminal the last one is rewritten while a test runs, elsewhere each is a line.

    Titles and logs are others' words: nothing of them steers the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._tty, self._open = stream, stream.isatty(), False

    def line(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()

    def now(self, text: str) -> None:
        """What is going on now; only a terminal shows it."""
        if self._tty:
            self._clear()
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(printable(text[:width]))
            self._stream.flush()
            self._open = True

    def _clear(self) -> None:
        if self._open:
            self._stream.write("\r\x1b[K")
            self._open = False


class Watch:
    """What was heard of the run so far."""

    def __init__(self, say: Progress) -> None:
        self._say = say
        self.finished: SuiteFinished | None = None
        self.imported: ImportFinished | None = None
        self.matched: LogMatched | None = None
        self.forecast: LogForecast | None = None
        self.refused: str | None = None
        self.records: dict[str, TestFinished] = {}

    def feed(self, event: Any) -> bool:
        """Take an event; true when the run is over."""
        match event:
            case RunReceived():
                self._say.line(f"run     {event.run}")
            case RunRefused():
                self.refused = event.reason
            case TestStarted():
                self._say.now(f"        {event.case} ...")
            case TestFinished():
                before = self.records.get(event.case)
                self.records[event.case] = event
                if before is not None and before.state == event.state:
                    return False  # a correction that adds its log or details
                took = f"  ({event.duration * 1000:.0f} ms)" if event.duration is not None else ""
                is_news = event.state not in ("passed", "todo") and event.message != event.case
                note = f"  {event.message}" if event.message and is_news else ""
                self._say.line(f"{MARKS.get(event.state, event.state.upper()):7} {event.case}{took}{note}")
            case SuiteFinished():
                self.finished = event
            case ImportFinished():
                self.imported = event
            case LogForecast():
                self.forecast = event
                told = {
                    "open": f"{event.key} will probably fail ({event.probability:.0%} within {event.horizon_s:.0f} s)",
                    "hit": f"{event.key} failed, as was foretold",
                    "expired": f"{event.key} did not fail within {event.horizon_s:.0f} s",
                }
                self._say.line(f"log     forecast: {told[event.state]}")
            case LogMatched():
                self.matched = event
                what = f"class {event.class_} by {event.class_by}, " if event.class_ else ""
                self._say.line(f"log     {event.text}  ({what}rule {event.rule}, {Path(event.path).name})")
                for anchor in event.context.anchors if event.context else ():
                    self._say.line(f"before  {anchor.text}")
        return self.refused is not None or self.finished is not None

    @property
    def is_foretold(self) -> bool:
        """A failure came that was forecast."""
        return self.forecast is not None and self.forecast.state == "hit"


def _heard(event: Any, watch: Watch, log: Path) -> bool:
    """Take an event; true when the run is over. The volume of the device fails when that was foretold."""
    if isinstance(event, LogForecast) and event.state == "open":
        with log.open("a") as file:
            file.write(FAILURE)
    return watch.feed(event)


def _learn(folder: Path, say: Progress) -> None:
    """Learn from the device's past what the agent is to know: volumes that fill up and fail, or are cleaned up."""
    past, labels, model = folder / "past.log", folder / "labels.jsonl", folder / "agent" / "logs.model"
    model.parent.mkdir(parents=True, exist_ok=True)
    chance, lines = random.Random(1), list[str]()
    for _ in range(STORIES):
        volume, noise = f"vol-{chance.randrange(20)}", iter(range(chance.randrange(3, 9)))
        told = LOG.replace("vol-3", volume).replace("vol-7", f"vol-{20 + chance.randrange(20)}").splitlines()
        end = FAILURE.strip().replace("vol-3", volume) if chance.random() < 0.8 else f"INFO  {volume}: cleaned up"
        lines += [*told, *(f"INFO  node-{chance.randrange(9)} answers in {n + 1} ms" for n in noise), end]
    past.write_text("".join(f"{line}\n" for line in lines))
    labels.write_bytes(
        b"".join(
            msgspec.json.encode({"line": n, "class": "volume.full" if line.startswith("ERROR") else None}) + b"\n"
            for n, line in enumerate(lines, 1)
        )
    )
    learned = loglearn.learn(model, [str(past)], str(labels), [FAILURES])
    say.line(f"log     learned from {learned['failures']} failures in {learned['lines']} lines of the device's past")


async def _deliver(service: Service, events: Any, watch: Watch, log: Path) -> None:
    """Wait until Polarize has answered, the log was read, and Mimir knows all."""
    with trio.move_on_after(DELIVERY_S):
        while watch.imported is None or watch.matched is None or not watch.is_foretold:
            _heard(await anext(events), watch, log)
        await service.store.commit()
        await service.deliver()


def summary(watch: Watch, outcomes: dict[str, int], folder: Path) -> str:
    """The table at the end."""
    finished = watch.finished
    if finished is None:
        return ""
    counts = {name: n for name, n in msgspec.structs.asdict(finished.counts).items() if n and name != "total"}
    in_mimir = ", ".join(f"{n} {result}" for result, n in sorted(outcomes.items())) or "nothing"
    imported = watch.imported
    polarize = imported.outcome if imported else f"no answer within {DELIVERY_S:g} s"
    if imported and imported.unmatched:
        polarize += f" (unmatched: {', '.join(imported.unmatched)})"
    xunit = finished.artifacts.get("xunit.xml")
    rows = [
        ("suite", f"{finished.suite} by {finished.runner} in {finished.ended - finished.started:.1f} s"),
        ("verdict", finished.verdict + (f" ({finished.reason})" if finished.reason else "")),
        ("tests", f"{finished.counts.total}: " + ", ".join(f"{n} {name}" for name, n in counts.items())),
        ("Mimir", f"outcomes: {in_mimir}"),
        ("Polarize", f"import {polarize}"),
        ("xUnit", xunit.path if xunit else "none"),
        ("folder", str(folder)),
        *(("warning", f"{warning.code}: {warning.text}") for warning in finished.warnings),
    ]
    return "\n" + "".join(f"{name:9} {printable(text)}\n" for name, text in rows)


def printable(text: str) -> str:
    """Without control characters: a test's title must not steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def sample(say: Progress) -> Path:
    """The best sample that this machine can run, ready to run; the choice is told. Blocks; raises NoSample for none."""
    for prepare in (_ava_sample, _pytest_sample):
        try:
            project, why = prepare(say)
        except NoSample as err:
            say.line(f"sample  not {prepare.__name__.split('_')[1]}: {err.what}")
        else:
            say.line(f"sample  {project}: {why}")
            return project
    say.line("sample  command: a shell is all it needs")
    return SAMPLES / "command"


def _ava_sample(say: Progress) -> tuple[Path, str]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NoSample("node and npm are not both here", remedy="Install Node to see it.")
    version = _output([node, "--version"]).strip().removeprefix("v")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_NODE:
        raise NoSample(f"node {version} is older than AVA wants", remedy="Install Node 20.")
    project = _cache() / "sample-ava"
    shutil.copytree(SAMPLES / "ava", project, dirs_exist_ok=True)
    wanted = msgspec.json.decode((project / "package.json").read_bytes())["devDependencies"]["ava"]
    if _installed(project) != wanted:
        say.line(f"sample  installing ava {wanted} from npm into {project}, once")
        _output([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"], cwd=project)
    return project, f"AVA {wanted} on node {version}"


def _installed(project: Path) -> str | None:
    try:
        installed: str = msgspec.json.decode((project / "node_modules/ava/package.json").read_bytes())["version"]
    except (OSError, msgspec.DecodeError, KeyError):
        return None
    # npm writes this file last: without it an install was cut short
    return installed if (project / "node_modules/.package-lock.json").exists() else None


def _pytest_sample(say: Progress) -> tuple[Path, str]:
    python = shutil.which("python3")
    if python is None:
        raise NoSample("python3 is not here", remedy="Install Python to see it.")
    version = _output([python, "-m", "pytest", "--version"]).strip()
    project = _cache() / "sample-pytest"  # pytest writes its cache beside the tests: not into a release
    shutil.copytree(SAMPLES / "pytest", project, dirs_exist_ok=True)
    return project, version


def _output(argv: list[str], cwd: Path | None = None) -> str:
    env = callers_environ(os.environ)
    try:
        done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=INSTALL_S, check=True)
    except subprocess.CalledProcessError as err:
        last = (err.stderr.strip() or err.stdout.strip() or "no output").splitlines()[-1]
        raise NoSample(f"{' '.join(argv[:3])} ended with {err.returncode}: {last}", remedy="See above.") from err
    except (OSError, subprocess.TimeoutExpired) as err:
        raise NoSample(f"{' '.join(argv[:3])}: {err}", remedy="See above.") from err
    return done.stdout or done.stderr


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        raise NoCache(f"{cache} is no whole path of a folder", remedy="Set HOME or XDG_CACHE_HOME to one.")
    folder = Path(cache) / "emissary"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise NoCache(
            f"{err.filename}: {err.strerror}", remedy="Set XDG_CACHE_HOME to a folder that you may write."
        ) from err
    return folder


def _folder(keep: bool) -> Path:
    """Where lab and agent keep their state: a folder of its own to keep, else one that a later demo replaces."""
    if keep:
        return Path(f"emissary-demo-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    for n in itertools.count(1):
        folder = _cache() / f"demo-{n}"
        lock = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends: two demos do not meet
        except BlockingIOError:
            os.close(lock)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        return folder
    raise AssertionError("the numbers do not end")


def _settings(lab: Lab, folder: Path, project: Path, log: Path) -> config.Effective[Settings]:
    flags = {
        "ident": IDENT,
        "state.dir": str(folder / "agent"),
        "control.listen": ["127.0.0.1:0"],
        "suites.roots": [str(project.resolve())],
        "seneschal.url": f"{lab.ws_url}/seneschal",
        "seneschal.token_file": str(lab.token_file),
        "mimir.url": f"{lab.ws_url}/mimir",
        "mimir.token_file": str(lab.token_file),
        "polarize.url": lab.url,
        "polarize.project": "DEMO",
        "logs.rules": [str(SAMPLES / "log/rules.toml")],
        "logs.watch": [{"name": "device", "path": str(log)}],
    }
    return config.load(Settings, [], env={}, flags=flags)
