"""The `[lab]` table of the configuration. Source: protocols/settings.md."""

import msgspec

from agent.control.settings import Address


class LabSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where `agent lab` listens, and the folder it keeps its state in (default: state.dir/lab)."""

    listen: Address = "127.0.0.1:13180"
    data: str = ""
