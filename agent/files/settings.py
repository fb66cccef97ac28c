"""The `[files]` and `[entitlement]` tables of the configuration. Source: protocols/settings.md."""

from typing import Annotated, Literal

import msgspec

from agent.files.messages import Path


class FileWatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `[[files.watch]]`: a file, a directory (`recursive`: all below it), or a glob."""

    path: Path
    recursive: bool = False
    content: bool = False


class FilesSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Events carry content only of files below `content_allow`, wherever it is asked for."""

    content_allow: tuple[Path, ...] = ("/etc/rhsm", "/etc/pki/product")
    watch: Annotated[tuple[FileWatch, ...], msgspec.Meta(max_length=256)] = ()


class EntitlementSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`auto`: silent until the D-Bus service or /etc/pki/consumer is there. `bus`: a D-Bus address."""

    enabled: bool | Literal["auto"] = "auto"
    bus: Annotated[
        str, msgspec.Meta(pattern=r"^(unix:(path|abstract)=\S+)?$", description="unix:path=... or unix:abstract=...")
    ] = ""
