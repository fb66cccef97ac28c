"""A file read, scanned, and every match written as JSON: CPU seconds per GiB. Goals: protocols/logs.md 9.3."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core import toml
from agent.logs import rules
from agent.logs.format import Formatter
from agent.logs.scanner import End, Scanner, Worker
from tests.bench.corpus import make

pytestmark = pytest.mark.bench

BLOCK = 1 << 18


@pytest.mark.parametrize("count", [10, 100])
def test_read_scan_and_write(count: int, tmp_path: Path, figure: Callable[[str, str, str], None]) -> None:
    corpus = make("corpus", tmp_path / "corpus.log", "--size", "128M")
    path = make("rules", tmp_path / "rules.toml", "-n", str(count), "--captures")
    loaded = rules.from_documents([(str(path), toml.read(path))]).rules
    worker = Worker(Scanner([rule.regex for rule in loaded], [rule.clauses for rule in loaded]))
    formatter = Formatter(loaded, str(corpus), (1, 2), 1)
    buffer, held, at, found = memoryview(bytearray(BLOCK)), 0, 0, 0
    started = time.process_time()
    with corpus.open("rb", buffering=0) as file, open("/dev/null", "wb", buffering=0) as out:
        while (got := file.readinto(buffer[held:])) or held:
            held += got
            result = worker.scan(buffer[:held], end=End.OPEN if got else End.LINE)
            for piece in formatter.lines(result, buffer[:held], at):
                out.write(piece)
            found, at = found + result.count, at + result.consumed
            buffer[: held - result.consumed] = buffer[result.consumed : held]
            held -= result.consumed
    seconds = (time.process_time() - started) / at * (1 << 30)
    assert found > 50_000
    figure(f"read, scanned and all matches written, {count} rules", f"{seconds:.2f} CPU s/GiB", "<= 1.0")
