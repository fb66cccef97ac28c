"""kill -9 of an installation at any moment, a step or a system call apart: what `current` names runs.

Source: protocols/packaging.md 8, acceptance 4.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from agent.core import bundle, release
from agent.core.release import pointed, read_pending
from agent.install import steps
from tests.release_folder import install, job, make_release

KILLS = 25
# An installation as a process of its own: image, folder, version.
INSTALL = """
import sys
from pathlib import Path
from tests.release_folder import install, job
print("begins", flush=True)
install(job(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture
def sources(tmp_path: Path) -> list[tuple[Path, str]]:
    """Two versions, and two more builds of the second."""
    return [
        (make_release(tmp_path / "one", "1"), "1"),
        (make_release(tmp_path / "two", "2"), "2"),
        (make_release(tmp_path / "again", "2", code="another build\n"), "2"),
        (make_release(tmp_path / "anew", "2", code="a third build\n"), "2"),
    ]


def check_current(image: Path) -> None:
    """It is whole, and runs; the check before a start does no harm."""
    prefix = image / "opt/agent"
    current = (prefix / "current").resolve()
    assert bundle.damaged(current) == []
    said = subprocess.run([prefix / "current/agent", "--version", "--json"], capture_output=True, text=True, check=True)
    assert said.stdout == f'{{"version": "{release.version_of(current.name)}"}}\n'
    pending = read_pending(prefix)
    if pending is not None and pending.version == current.name and pending.previous is not None:
        assert bundle.damaged(prefix / "releases" / pending.previous) == []
        assert pending.previous != pending.version


def confirm(image: Path) -> None:
    pending = read_pending(image / "opt/agent")
    if pending is not None:
        (image / "var/lib/agent").mkdir(parents=True, exist_ok=True)
        Path(pending.confirm).write_text(pending.id)


def test_stopped_after_any_step_a_whole_release_is_current(tmp_path: Path, sources: list[tuple[Path, str]]) -> None:
    (tmp_path / "image").mkdir()
    install(job(tmp_path / "image"), *sources[0])
    for done in range(100):
        image = tmp_path / f"image{done}"
        subprocess.run(["cp", "-a", tmp_path / "image", image], check=True)
        stopped = 0
        for number, (source, version) in enumerate(sources[1:]):
            if number < 2:  # the third comes over one that has not proven itself
                confirm(image)
            with steps.alone(job(image)):
                for stopped, (_, do) in enumerate(steps.install(job(image), source, version)):
                    if stopped == done:
                        break
                    do()
            check_current(image)
            release.boot_check(image / "opt/agent")
            check_current(image)
        install(job(image), *sources[2])
        check_current(image)
        assert not [path for path in (image / "opt/agent/releases").iterdir() if path.name.startswith(".")]
        if stopped < done:
            return
    raise AssertionError("an installation has no end")


def test_killed_at_any_moment_a_whole_release_is_current(
    tmp_path: Path, sources: list[tuple[Path, str]], soak_s: float
) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    random, image = Random(seed), tmp_path / "image"
    image.mkdir()
    install(job(image), *sources[0])
    until = time.monotonic() + soak_s
    kills = ended = 0
    while kills < KILLS or time.monotonic() < until:
        source, version = random.choice(sources)
        argv = [sys.executable, "-c", INSTALL, str(image), str(source), version]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
            with suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0, 0.08))
            process.kill()
            ended += process.wait() == 0
        kills += 1
        check_current(image)
        if random.random() < 0.3:
            confirm(image)
            release.boot_check(image / "opt/agent")
            check_current(image)
    assert ended < kills, f"no installation was killed, seed={seed}"
    install(job(image), *sources[1])
    assert pointed(image / "opt/agent/current") == "2"
    check_current(image)
