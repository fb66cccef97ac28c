"""The `[logs]` table of the configuration. Source: protocols/settings.md."""

from typing import Annotated, ClassVar

import msgspec


class LogWatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[logs.watch]]`: one file, the files of a glob, the journal, or the kernel's messages.

    `rules` are names of rule sets or rule files; empty: all rules that fit.
    """

    ONE_OF: ClassVar = ("path", "glob", "journal", "kmsg")

    name: str
    path: str = ""
    glob: str = ""
    journal: bool = False
    kmsg: bool = False
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if sum(bool(getattr(self, key)) for key in self.ONE_OF) != 1:
            raise ValueError(f"{self.name} has to watch one thing. Set one of {', '.join(self.ONE_OF)}.")
        for key, text in (("path", self.path), ("glob", self.glob)):
            if text and not text.startswith("/"):
                raise ValueError(f"{key}: {text!r} is relative. Write the whole path.")


class LogsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is monitored, by which rules. Remote actions look below `roots`. `model` "auto" is state.dir/logs.model."""

    rules: tuple[str, ...] = ("/etc/agent/rules/*.toml",)
    roots: Annotated[tuple[str, ...], msgspec.Meta(max_length=100)] = ("/var/log",)
    model: str = "auto"
    watch: tuple[LogWatch, ...] = ()
