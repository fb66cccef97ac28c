"""The `[lab]` table of the configuration. Source: protocols/settings.md."""

from typing import Annotated

import msgspec


class LabSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where `agent lab` listens, and the folder it keeps its state in (default: state.dir/lab)."""

    listen: Annotated[str, msgspec.Meta(pattern=r"^\S+:[0-9]{1,5}$", description="HOST:PORT")] = "127.0.0.1:13180"
    data: str = ""
