"""The scanner beside Hyperscan literals + PCRE2 and beside rg, interleaved in one run over one corpus.

Hyperscan gets the literals that ours chose. Both read the file into a buffer of 256 KiB, as the agent does, eight times
in each round, which makes the GiB that the goals are of; and both count the CPU time of scanning alone. Ours gives
captures too. Goals: protocols/logs.md 9.2.
"""

import os
import shutil
import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core import toml
from agent.core.engine import native_engine
from agent.logs import rules
from agent.logs.literals import Frequencies, Literal, choose
from agent.logs.rules import RuleSet
from agent.logs.scanner import End, Scanner, Worker
from tests.bench.corpus import make

pytestmark = pytest.mark.bench

BLOCK = 1 << 18
ROUNDS = 5
PASSES = 8
Figure = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("corpus", tmp_path_factory.mktemp("corpus") / "corpus.log", "--size", "128M")


@pytest.fixture(scope="module")
def hyperscan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("hyperscan") / "hyperscan"
    source = Path(__file__).with_name("hyperscan.c")
    built = subprocess.run(["cc", "-O2", source, "-o", program, "-lhs", "-lpcre2-8"], capture_output=True)
    if built.returncode:
        pytest.skip("peer libhyperscan-dev: not installed; packaging/deps peers installs it")
    return program


def rule_set(folder: Path, count: int) -> RuleSet:
    path = make("rules", folder / f"{count}.toml", "-n", str(count), "--captures")
    return rules.from_documents([(str(path), toml.read(path))])


def sampled(path: Path) -> bytes:
    text = path.read_bytes()
    return b"".join(text[at : at + 4096] for at in range(0, len(text), len(text) // 64))


def scan(worker: Worker, path: Path) -> tuple[int, float]:
    """Matches, and seconds of CPU."""
    buffer = memoryview(bytearray(BLOCK))
    found, held, seconds = 0, 0, 0.0
    with path.open("rb", buffering=0) as file:
        while (got := file.readinto(buffer[held:])) or held:
            held += got
            started = time.process_time()
            result = worker.scan(buffer[:held], end=End.OPEN if got else End.LINE)
            seconds += time.process_time() - started
            found += result.count
            buffer[: held - result.consumed] = buffer[result.consumed : held]
            held -= result.consumed
    return found, seconds


def for_hyperscan(loaded: RuleSet, sample: bytes, path: Path) -> Path:
    """The rules and the literals chosen for them, as hyperscan.c reads them."""
    users: dict[Literal, list[int]] = {}
    for number, clause in enumerate(choose([rule.clauses for rule in loaded.rules], Frequencies(sample))):
        for literal in clause:
            users.setdefault(literal, []).append(number)
    parts = [struct.pack("=I", len(loaded.rules))]
    for rule in loaded.rules:
        regex = rule.spec.regex.encode()
        parts += [struct.pack("=I", len(regex)), regex]
    parts.append(struct.pack("=I", len(users)))
    for literal, using in users.items():
        parts += [struct.pack("=II", literal.caseless, len(literal.text)), literal.text]
        parts.append(struct.pack(f"={len(using) + 1}I", len(using), *using))
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize(("count", "goal"), [(10, 2.3), (100, 1.5), (1000, 1.6)])
def test_scanner_beside_hyperscan(
    count: int, goal: float, corpus: Path, hyperscan: Path, tmp_path: Path, figure: Figure
) -> None:
    sample = sampled(corpus)
    loaded = rule_set(tmp_path, count)
    worker = Worker(Scanner([rule.regex for rule in loaded.rules], [rule.clauses for rule in loaded.rules], sample))
    theirs = for_hyperscan(loaded, sample, tmp_path / "rules")
    ratios, speeds = [], []
    for _ in range(ROUNDS):
        ours = [scan(worker, corpus) for _ in range(PASSES)]
        done = subprocess.run([hyperscan, theirs, corpus, str(PASSES)], capture_output=True, text=True, check=True)
        passes = [line.split() for line in done.stdout.splitlines()[1:]]
        assert [found for found, _ in ours] == [int(pairs) for pairs, _ in passes]
        seconds = sum(took for _, took in ours)
        ratios.append(sum(float(took) for _, took in passes) / seconds)
        speeds.append(PASSES * corpus.stat().st_size / seconds / 1e9)
    figure(
        f"scanner, {count} rules, ids + captures ({native_engine()})",
        f"{statistics.median(speeds):.2f} GB/s, {statistics.median(ratios):.2f}x Hyperscan literals + PCRE2",
        f">= {goal}x",
    )


@pytest.mark.parametrize(("count", "goal"), [(10, 2.5), (100, 7), (1000, 14)])
def test_scanner_beside_rg(count: int, goal: float, corpus: Path, tmp_path: Path, figure: Figure) -> None:
    if not (rg := shutil.which("rg")):
        pytest.skip("peer rg: not installed; packaging/deps peers installs it")
    loaded = rule_set(tmp_path, count)
    scanner = Scanner([rule.regex for rule in loaded.rules], [rule.clauses for rule in loaded.rules], sampled(corpus))
    patterns = make("rules", tmp_path / "rules.txt", "-n", str(count), "--format", "txt")
    worker, ratios = Worker(scanner), []
    for _ in range(ROUNDS):
        _, ours = scan(worker, corpus)
        started = sum(os.times()[2:4])  # CPU of children that ended
        subprocess.run([rg, "-j1", "-c", "-f", patterns, corpus], check=True, capture_output=True)
        ratios.append((sum(os.times()[2:4]) - started) / ours)
    figure(f"scanner, {count} rules, beside rg -j1 -c", f"{statistics.median(ratios):.1f}x", f">= {goal}x")


def test_a_thousand_rules_are_compiled_and_loaded(tmp_path: Path, figure: Figure) -> None:
    path = make("rules", tmp_path / "rules.toml", "-n", "1000", "--captures")
    started = time.process_time()
    loaded = rules.from_documents([(str(path), toml.read(path))])
    Scanner([rule.regex for rule in loaded.rules], [rule.clauses for rule in loaded.rules])
    figure("1000 rules compiled and loaded", f"{time.process_time() - started:.2f} s", "< 0.5 s")


def test_the_scalar_engine(corpus: Path, tmp_path: Path, figure: Figure) -> None:
    loaded = rule_set(tmp_path, 100)
    regexes, found = [rule.regex for rule in loaded.rules], [rule.clauses for rule in loaded.rules]
    _, seconds = scan(Worker(Scanner(regexes, found, sampled(corpus), engine=0)), corpus)
    figure(
        "scanner, 100 rules, scalar engine",
        f"{corpus.stat().st_size / seconds / 1e9:.2f} GB/s",
        "no SIMD, same results",
    )
