"""How good, how fast and how small the miner is: what tests and benches of templates share."""

import csv
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest

from agent.logs.templates import LIMIT, Miner

DATA = Path(os.environ.get("EMISSARY_DATA", Path(__file__).parent.parent / "../shared/data"))
SETS = ("Android", "BGL", "HDFS", "Hadoop", "HealthApp", "Linux", "OpenStack", "Spark")

_FILL = """
import sys
from pathlib import Path
from agent.logs.templates import Miner
def used():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
lines = sys.stdin.buffer.read()
Miner(limit=16).mine(lines[:1000])
before, miner = used(), Miner()
miner.mine(lines)
print(used() - before, len(miner))
"""


def texts(lines: Sequence[bytes]) -> list[str]:
    """The template of each line, at the end."""
    miner = Miner()
    ids = [miner.mine_line(line) for line in lines]
    return [miner.text(id) for id in ids]


def accuracy(groups: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """The share of lines whose group is that of their true event."""
    ours, theirs = defaultdict(list), defaultdict(list)
    for n, (group, event) in enumerate(zip(groups, truth, strict=True)):
        ours[group].append(n)
        theirs[event].append(n)
    right = set(map(tuple, theirs.values()))
    return sum(len(group) for group in ours.values() if tuple(group) in right) / len(truth)


def structured(name: str) -> tuple[list[bytes], list[str]]:
    """The messages of a set of the development data, and their true events. Skips where they are not here."""
    path = DATA / f"loghub/{name}/{name}_2k.log_structured.csv"
    if not path.exists():
        pytest.skip("development data: EMISSARY_DATA does not name its folder")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["Content"].encode() for row in rows], [row["EventId"] for row in rows]


def accuracies() -> dict[str, float]:
    """The grouping accuracy of each set, of a miner that sees its messages in order."""
    return {name: accuracy(texts(lines), truth) for name in SETS for lines, truth in [structured(name)]}


def strange(count: int) -> bytes:
    """So many lines of which no two have a word in common: as many templates."""
    rng = random.Random(1)
    words = ("".join(rng.choices("ghijklmnopqrstuvwxyz", k=rng.randrange(4, 12))) for _ in range(8 * count))
    return b"".join(" ".join(next(words) for _ in range(8)).encode() + b"\n" for _ in range(count))


def lines_per_second(block: bytes, turns: int = 3) -> float:
    """Of whole lines, on one core: the best of some turns, each by a miner that knows nothing yet."""
    took = []
    for _ in range(turns):
        miner, began = Miner(), time.thread_time()
        miner.mine(block)
        took.append(time.thread_time() - began)
    return block.count(b"\n") / min(took)


def memory_mib(count: int = LIMIT) -> tuple[float, int]:
    """What a miner adds to the memory of a process that mines so many templates, and how many it knows then."""
    argv = [sys.executable, "-c", _FILL]
    root = Path(__file__).parent.parent
    done = subprocess.run(argv, cwd=root, input=strange(count), capture_output=True, check=True)
    grown, known = done.stdout.split()
    return float(grown), int(known)
