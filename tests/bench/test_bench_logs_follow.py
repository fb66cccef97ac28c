"""A log that grows: what following it costs, beside rsyslog, mtail and SEC in the same run. Goals: logs.md 9.3."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.logs.rules import read_files
from agent.logs.scanner import End, Scanner, Worker
from tests.bench import log_peers
from tests.bench.corpus import make
from tests.bench.log_peers import Follower, Rules
from tests.bench.test_bench_agent import cpu_s
from tests.faults.station import peak_mib

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]

RATE = 100 << 20  # bytes written in a second
PIECE = 1 << 18
WARM = b"Jan  5 10:00:01 host12 sshd[2817]: authentication failure; logname= rhost=10.0.0.1\n"
LIMIT_S = 60.0
GIB = 1 << 30
# Bytes that each follows, by the number of rules: what takes it a few seconds.
OURS = 256 << 20
THEIRS = {10: 8 << 20, 100: 1 << 20}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make("corpus", tmp_path_factory.mktemp("corpus") / "corpus.log", "--size", "128M").read_bytes()


def written(corpus: bytes, size: int) -> bytes:
    """So many bytes of it, whole lines."""
    text = corpus * (size // len(corpus) + 1)
    return text[: text.rindex(b"\n", 0, size) + 1]


def matches(toml: Path, text: bytes) -> int:
    rules = read_files([toml]).rules
    worker, count, at = Worker(Scanner([rule.regex for rule in rules], [rule.clauses for rule in rules])), 0, 0
    while at < len(text):
        found = worker.scan(memoryview(text)[at : at + PIECE], end=End.OPEN)
        count, at = count + found.count, at + found.consumed
    return count


def wait_until(condition: Callable[[], bool], every_s: float = 0.1) -> None:
    until, pause = time.monotonic() + LIMIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < until
        pause.wait(every_s)


@contextmanager
def started(follower: Follower, log: Path) -> Iterator[tuple[int, int]]:
    """It follows a log and has found its first lines; its process, and how many matches it has told of them."""
    with log.with_name(f"{follower.name}.err").open("wb") as said:
        process = subprocess.Popen(follower.argv, stdout=subprocess.DEVNULL, stderr=said)

    def has_begun() -> bool:
        assert process.poll() is None, f"{follower.name} ended"
        with log.open("ab") as file:
            file.write(WARM)
        return follower.told() > 0

    try:
        wait_until(has_begun, every_s=0.5)
        threading.Event().wait(1)
        yield process.pid, follower.told()
    finally:
        process.kill()
        process.wait()


def cost(follower: Follower, log: Path, text: bytes, expected: int) -> tuple[float, float]:
    """CPU seconds for a GiB of a log that grows by `text`, and the most memory in MiB."""
    pause = threading.Event()
    with started(follower, log) as (pid, before):
        used, began = cpu_s(pid), time.monotonic()
        with log.open("ab", buffering=0) as file:
            for at in range(0, len(text), PIECE):
                pause.wait(max(0, began + at / RATE - time.monotonic()))
                file.write(text[at : at + PIECE])
        wait_until(lambda: follower.told() >= before + expected)
        return (cpu_s(pid) - used) / len(text) * GIB, peak_mib(pid)


@pytest.mark.parametrize("count", [10, 100])
def test_following_a_log_that_grows(count: int, corpus: bytes, tmp_path: Path, figure: Figure) -> None:
    regexes, posix = (
        make("rules", tmp_path / kind, "-n", str(count), "--format", kind).read_text().splitlines()
        for kind in ("txt", "ere")
    )
    rules = Rules(make("rules", tmp_path / "rules.toml", "-n", str(count), "--captures"), regexes, posix)
    for follow in (log_peers.ours, log_peers.rsyslog, log_peers.mtail, log_peers.sec):
        log = tmp_path / f"{follow.__name__}.log"
        log.touch()
        what = f"a log that grows followed by {follow.__name__}, {count} rules"
        if not (follower := follow(tmp_path, log, rules)):
            figure(what, "not installed: packaging/deps peers", "-")
            continue
        text = written(corpus, OURS if follower.name == "agent" else THEIRS[count])
        s_gib, mib = cost(follower, log, text, matches(rules.toml, text))
        goal = "<= 1.0 CPU s/GiB, < 40 MiB" if follower.name == "agent" else "-"
        figure(what, f"{s_gib:.3g} CPU s/GiB, {mib:.0f} MiB", goal)
