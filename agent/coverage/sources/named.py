"""Sources by their names in the settings. Each is imported when it is first wanted.

Source: drill sheet, "Settings" (sources).
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agent.coverage.catalog import Catalog
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources import Asking, Source

if TYPE_CHECKING:
    from agent.coverage.javascript import Script
    from agent.coverage.python import Module
    from agent.coverage.sources.reading import Reading


class Sources:
    """Makes sources. What one has read of the product's files the next of its name need not take apart again."""

    def make(
        self, name: SourceName, settings: CoverageSettings, catalog: Catalog, folder: Path, asking: Asking
    ) -> Source:
        """The source of this name. Its threads wait for the disk in `asking`."""
        match name:
            case "v8":
                from agent.coverage.sources.v8 import V8

                return V8(settings, catalog, folder, asking, self._scripts)
            case "python":
                from agent.coverage.sources.python import Python

                return Python(settings, catalog, folder, asking, self._modules)
            case "jacoco":
                from agent.coverage.sources.jacoco import Jacoco

                return Jacoco(settings, catalog, folder)

    @cached_property
    def _scripts(self) -> "Reading[Script]":
        from agent.coverage.sources.v8 import reading

        return reading()

    @cached_property
    def _modules(self) -> "Reading[Module]":
        from agent.coverage.sources.python import reading

        return reading()
