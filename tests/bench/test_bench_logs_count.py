"""`agent logs scan --count`, the whole process on 1 GiB, beside rg and grep. Goals: the log monitor's issue."""

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.bench.corpus import make

pytestmark = pytest.mark.bench

ROUNDS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 GiB."""
    path = make("corpus", tmp_path_factory.mktemp("corpus") / "corpus.log", "--size", "128M")
    text = path.read_bytes()
    with path.open("ab") as file:
        for _ in range(7):
            file.write(text)
    return path


def seconds(argv: Sequence[str | Path]) -> tuple[str, float]:
    """What it printed, and how long it took."""
    started = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return done.stdout, time.perf_counter() - started


def test_counting_the_lines_of_a_gibibyte(
    corpus: Path, tmp_path: Path, figure: Callable[[str, str, str], None]
) -> None:
    rules = make("rules", tmp_path / "rules.toml", "-n", "10", "--captures")
    patterns, posix = (make("rules", tmp_path / kind, "-n", "10", "--format", kind) for kind in ("txt", "ere"))
    programs: dict[str, Sequence[str | Path]] = {
        "agent logs scan --count": [sys.executable, "-m", "agent", "logs", "scan", "--count", "--rules", rules, corpus],
        "rg -c -f": ["rg", "-c", "-f", patterns, corpus],
        "LC_ALL=C grep -cE -f": ["env", "LC_ALL=C", "grep", "-cE", "-f", posix, corpus],
    }
    for name, argv in programs.items():
        if not shutil.which(argv[0]):
            figure(f"{name}, 10 rules, 1 GiB", "not installed: packaging/deps peers", "-")
            continue
        took = [seconds(argv)[1] for _ in range(1 if "grep" in name else ROUNDS)]
        goal = "faster than rg and grep" if name.startswith("agent") else "-"
        figure(f"{name}, 10 rules, 1 GiB", f"{statistics.median(took):.2f} s", goal)
