"""Writes what is left of a run in its folder: result.json and xunit.xml, from the records in the journal.

Source: protocols/suites.md, "Records, events, result", "A run" (reporting: on disk before it is told).
"""

import hashlib
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.core.events import Artifact, SuiteFinished, TestFinished
from agent.core.store import Store
from agent.suites import result, xunit
from agent.suites.messages import Suite

ARTIFACTS = (".xml", ".log", ".info")


def write_report(store: Store, suite: Suite, finished: SuiteFinished, folder: Path, hostname: str) -> SuiteFinished:
    """Complete `finished` with verdict, counts and artifacts, and write it down. Runs in a thread; raises OSError.

    The records are read from the journal, once for each pass: a large suite is never held in memory.
    """

    def records() -> Iterator[TestFinished]:
        for data in store.scan(finished.run, "TestFinished"):
            yield msgspec.json.decode(data, type=TestFinished)

    folder.mkdir(parents=True, exist_ok=True)  # it may have been removed while the agent was down
    tally = result.Tally(suite.min_tests)
    for record in records():
        tally.add(record)
    finished = tally.finish(finished)
    with _durably(folder / "xunit.xml") as file:
        file.writelines(xunit.document(suite, finished, lambda: tally.last(records()), hostname=hostname))
    finished = msgspec.structs.replace(finished, artifacts=dict(_artifacts(folder)))
    with _durably(folder / "result.json") as file:
        file.writelines(result.document(finished, tally.newest(records())))
    return finished


def _artifacts(folder: Path) -> Iterator[tuple[str, Artifact]]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in ARTIFACTS:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield path.name, Artifact(path=str(path), sha256=digest, size=path.stat().st_size)


@contextmanager
def _durably(path: Path) -> Generator[BinaryIO, None, None]:
    """A file that appears under its name only whole and on the disk."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
