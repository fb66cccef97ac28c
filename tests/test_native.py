"""The C sources compiled with the sanitizers and warnings as errors, run apart from Python."""

import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from agent._native import lib
from agent.core.engine import available_engines
from agent.logs.classify import Classifier
from agent.logs.literals import Literal, clauses
from agent.logs.scanner import End
from tests.patterns import line, pattern
from tests.test_core_lines import twin

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "native"
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", *SANITIZED]


PCRE2 = [*(f"-L{path.parent}" for path in ROOT.glob(".deps/usr/lib/*/libpcre2-8.a")), "-lpcre2-8"]


def build(program: Path, *sources: str) -> Path:
    """Compile a harness of tests/native with the C files that it tests."""
    paths = [ROOT / "tests/native" / sources[0], *(NATIVE / name for name in sources[1:])]
    includes = [f"-I{NATIVE}", f"-I{ROOT}/.deps/usr/include"]
    built = subprocess.run(["cc", *FLAGS, *includes, *paths, "-o", program, *PCRE2], capture_output=True, text=True)
    if "cannot find" in built.stderr and os.environ.get("CI") != "true":
        pytest.skip("sanitizers: the C compiler came without their libraries")
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="module")
def line_harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native") / "lines", "lines.c", "lines.c")


@pytest.fixture(scope="module")
def scanner_harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("native") / "scanner"
    return build(program, "scanner.c", "scanner.c", "prefilter.c", "lines.c", "count.c", "regex.c", "format.c")


def check_line_ends(harness: Sequence[str | Path], engines: Iterable[int]) -> None:
    rng = random.Random(20)
    cases: list[tuple[int, bytes, int, int]] = []
    for engine in engines:
        for size, often in [*((size, 1.0) for size in range(70)), (1000, 1.0), (1000, 0.02), (4096, 0.02), (4096, 0.0)]:
            block = bytes(rng.choices(b"\n\x8aab", (often, 1, 1, 1), k=size))
            cases += [(engine, block, start, cap) for start in (0, 1, 17, size) for cap in (0, 1, size // 5, size)]
    stdin = b"".join(struct.pack("@4N", e, s, len(b), c) + b for e, b, s, c in cases)
    done = subprocess.run(harness, input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    answers = [list(map(int, line.split())) for line in done.stdout.decode().splitlines()]
    assert answers == [twin(block, start, capacity) for _, block, start, capacity in cases]


def test_line_ends_stays_inside_its_memory_and_agrees_with_the_twin(line_harness: Path) -> None:
    check_line_ends([line_harness], available_engines().values())


def number(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def sized(data: bytes) -> bytes:
    return number(len(data)) + data


def scanner_case(rng: random.Random, engine: int) -> bytes:
    """A random rule set over random lines, as tests/native/scanner.c reads it."""
    pieces = [pattern(rng) for _ in range(rng.choice([0, 1, 3, 10, 40, 120]))]
    literals: dict[Literal, int] = {}
    rules = []
    for regex, _ in pieces:
        utf = rng.random() < 0.2
        found = rng.choice(clauses(regex, utf=utf) or [()])
        members = [literals.setdefault(literal, len(literals)) for literal in found]
        # Interpreted, for the sanitizers to see PCRE2 at work, or as machine code.
        flags = utf | 2 * (rng.random() < 0.5)
        rules.append(number(flags) + sized(regex.encode()) + number(len(members), *members))
    texts = [text for _, text in pieces]
    lines = [line(rng, texts) for _ in range(rng.randrange(40))]
    block = b"\n".join(lines) + rng.choice([b"", b"\n"])
    return b"".join(
        [
            number(engine, rng.choice(list(End)), rng.choice([0, 7, 5000]), len(rules)),
            *rules,
            number(len(literals)),
            *(number(literal.caseless) + sized(literal.text) for literal in literals),
            sized(block),
            sized(rng.choice([b"", b"ab", block, b"error at rack\n" * 2000])),
        ]
    )


def test_the_scanner_stays_inside_its_memory_and_agrees_with_pcre2_alone(scanner_harness: Path, soak_s: float) -> None:
    rng, count = random.Random(21), 0
    until = time.monotonic() + soak_s
    while count < 150 or time.monotonic() < until:
        cases = [scanner_case(rng, engine) for engine in available_engines().values() for _ in range(25)]
        done = subprocess.run([scanner_harness], input=b"".join(cases), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[:4000]
        matches = list(map(int, done.stdout.split()))
        assert len(matches) == len(cases)
        assert sum(matches) > len(cases)
        count += len(cases)


def test_the_model_stays_inside_its_memory(tmp_path: Path) -> None:
    rng, cases = random.Random(23), []
    known = Classifier()
    known.learn(1, b"a line of words", "a")
    dumped = known.dump()
    for turn in range(600):
        size = rng.choice([0, 1, 7, 8, 9, 80, 300, 5000, 70_000 if turn % 50 == 0 else 3])
        line = bytes(rng.choices(rng.choice([b"ab .", b"a0 ", b".", bytes(range(256))]), k=size))
        classes = 1 + turn // 10 % 64
        cases.append(number(classes, rng.randrange(classes), rng.choice([turn, 5, lib.TEMPLATE_NONE])) + sized(line))
        kept = bytearray(dumped)
        kept[rng.randrange(len(kept))] = rng.randrange(256)
        cases.append(number(2, 0, lib.TEMPLATE_NONE - 1) + sized(bytes(kept[: rng.randrange(len(kept) + 1)])))
    harness = build(tmp_path / "model", "model.c", "model.c")
    done = subprocess.run([harness], input=b"".join(cases), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    answers = list(map(int, done.stdout.split()))
    assert (len(answers), max(answers) < 64) == (1200, True)


def miner_case(rng: random.Random) -> bytes:
    """Blocks of lines that are alike, of any words, or noise, as tests/native/miner.c reads them."""
    words = ["user", "at", "a=b", "x:", "(", ")", "...", "<*>", "/a/b", "c.d.e", "Jun", "MB", "é", '"', "--", "<"]
    words += ["".join(rng.choices("ghijk", k=rng.choice([1, 2, 70]))) for _ in range(30)] + ["." * 70]
    blocks = []
    for _ in range(rng.randrange(1, 4)):
        frame = rng.choices(words, k=rng.choice([1, 3, 8, 20, 200]))
        lines = []
        for _ in range(rng.randrange(60)):
            kind = rng.random()
            if kind < 0.7:
                line = [rng.choice([word] * 5 + words + [str(rng.randrange(99))]) for word in frame]
                lines.append(rng.choice([" ", "", "  "]).join(line).encode())
            elif kind < 0.8:
                lines.append(rng.randbytes(rng.choice([0, 1, 9, 300])))
            elif kind < 0.83:
                lines.append(" ".join([rng.choice(words)] * 200).encode())
            else:
                lines.append(" ".join(rng.choices(words, k=rng.randrange(12))).encode())
        if rng.random() < 0.02:
            lines.append(rng.choice([b"x", b"x ", b". ", b"1,", b"(", b"ab=c "]) * 300_000)
        blocks.append(b"\n".join(lines))
    head = number(rng.choice([16, 17, 50, 1000]), rng.choice([1, 1, 3]), rng.choice([1, 7, 100]), len(blocks))
    return head + b"".join(map(sized, blocks))


def test_the_miner_stays_inside_its_memory_and_can_be_kept(tmp_path: Path) -> None:
    rng = random.Random(24)
    harness = build(tmp_path / "miner", "miner.c", "miner.c", "words.c")
    cases = [miner_case(rng) for _ in range(150)]
    done = subprocess.run([harness], input=b"".join(cases), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    answers = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases)
    assert all(templates <= ids <= lines for lines, templates, ids in answers)


def prefilter_case(rng: random.Random, engine: int, count: int) -> bytes:
    """Random literals in random text, as tests/native/prefilter.c reads them."""
    letters = bytes(rng.sample(range(256), rng.choice([4, 12, 60])))
    literals = [bytes(rng.choices(letters, k=rng.choice([2, 3, 5, 8, 30, 64]))) for _ in range(count)]
    pieces = [bytes(rng.choices(letters, k=rng.randrange(200))) for _ in range(40)]
    block = b"".join(piece + rng.choice(literals) for piece in pieces)
    sample = rng.choice([b"", block])
    return b"".join(
        [
            number(engine, count),
            *(number(rng.randrange(2)) + sized(literal) for literal in literals),
            sized(block),
            sized(sample),
        ]
    )


def check_prefilter(harness: Sequence[str | Path], engines: Iterable[int]) -> None:
    rng = random.Random(22)
    cases = [prefilter_case(rng, engine, count) for engine in engines for count in [1, 20, 90, 150, 300, 1100] * 3]
    done = subprocess.run(harness, input=b"".join(cases), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    hits = list(map(int, done.stdout.split()))
    assert (len(hits), min(hits) >= 40) == (len(cases), True)


def test_neon_finds_the_same_on_an_emulated_machine(tmp_path: Path) -> None:
    """Where the tests run on ARM, NEON is one of the available engines."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("NEON: no aarch64-linux-gnu-gcc, or no qemu-aarch64; packaging/deps peers installs them")
    for name, check in (("lines", check_line_ends), ("prefilter", check_prefilter)):
        sources = [ROOT / f"tests/native/{name}.c", NATIVE / f"{name}.c", NATIVE / "engine.c"]
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", f"-I{NATIVE}"]
        subprocess.run([compiler, *flags, *sources, "-o", tmp_path / name], check=True)
        check([emulator, tmp_path / name], [lib.ENGINE_NEON])
