"""The `[suites]` table of the configuration. Source: protocols/settings.md."""

from typing import Annotated

import msgspec


class SuitesSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`slots` runs at a time. A document may name a `dir` or path only below `roots`. `keep_runs` folders are kept."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    roots: tuple[Annotated[str, msgspec.Meta(pattern="^/", description="an absolute path")], ...] = ()
    keep_runs: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 50
