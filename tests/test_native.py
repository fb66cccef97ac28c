"""The C sources compiled with the sanitizers and warnings as errors, run apart from Python."""

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from agent.core.engine import available_engines
from tests.test_core_lines import twin

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "native"
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", *SANITIZED]


@pytest.fixture(scope="module")
def line_harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("native") / "lines"
    sources = [ROOT / "tests/native/lines.c", NATIVE / "lines.c"]
    built = subprocess.run(["cc", *FLAGS, f"-I{NATIVE}", *sources, "-o", program], capture_output=True, text=True)
    if "cannot find" in built.stderr and os.environ.get("CI") != "true":
        pytest.skip("sanitizers: the C compiler came without their libraries")
    assert built.returncode == 0, built.stderr
    return program


def test_line_ends_stays_inside_its_memory_and_agrees_with_the_twin(line_harness: Path) -> None:
    rng = random.Random(20)
    cases: list[tuple[int, bytes, int, int]] = []
    for engine in available_engines().values():
        for size in [*range(70), 1000, 4096]:
            block = bytes(rng.choices(b"\n\x8aab", k=size))
            cases += [(engine, block, start, cap) for start in (0, 1, 17, size) for cap in (0, 1, size // 5, size)]
    stdin = b"".join(struct.pack("@4N", e, s, len(b), c) + b for e, b, s, c in cases)
    done = subprocess.run([line_harness], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    answers = [list(map(int, line.split())) for line in done.stdout.decode().splitlines()]
    assert answers == [twin(block, start, capacity) for _, block, start, capacity in cases]
