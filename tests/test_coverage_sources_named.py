"""A source by its name; the next of its name knows what it has read."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from agent.coverage.catalog import Catalog
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources.jacoco import Jacoco
from agent.coverage.sources.named import Sources
from agent.coverage.sources.python import Python
from agent.coverage.sources.v8 import V8


@pytest.mark.parametrize(("name", "kind", "file"), [("v8", V8, "a.js"), ("python", Python, "a.py")])
async def test_sources_of_a_name_share_what_they_read(
    tmp_path: Path, name: SourceName, kind: type[V8 | Python], file: str
) -> None:
    (tmp_path / file).write_text("x = 1\n")
    sources, units = Sources(), []
    for run in ("r-1", "r-2"):
        catalog = Catalog()
        source = sources.make(name, CoverageSettings(), catalog, tmp_path / run, nullcontext)
        assert isinstance(source, kind)
        await source.prepare([tmp_path])
        units.append(catalog.units[f"./{file}"])
    assert units[0] is units[1]


def test_jacoco_reads_no_files(tmp_path: Path) -> None:
    assert isinstance(Sources().make("jacoco", CoverageSettings(), Catalog(), tmp_path, nullcontext), Jacoco)
