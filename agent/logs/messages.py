"""The vocabulary of the log monitor: rule files, and the payloads of its control actions and their answers.

Its events are in core/events.py. Source: protocols/logs.md 2.1, 2.2.
"""

from typing import Annotated, Any, Literal

import msgspec

Severity = Literal["debug", "info", "notice", "warning", "error", "critical"]

RuleId = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="1 to 64 letters, digits, and the signs _ . -")
]
Pattern = Annotated[
    str, msgspec.Meta(min_length=1, max_length=4096, description="a PCRE2 regex of 1 to 4096 characters in quotes")
]
ClassName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Lines = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Bytes = Annotated[int, msgspec.Meta(ge=1024, le=1 << 20)]
Wait = Annotated[float, msgspec.Meta(ge=0, le=60)]


class Rate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token bucket for each rule and file; `per_s` 0: no limit."""

    burst: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 20
    per_s: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 5


class Multiline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record around a matched line: back to `start` while lines match `continuation`, then forward."""

    start: Pattern
    continuation: Pattern
    max_lines: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 200
    max_bytes: Bytes = 65_536
    wait_s: Wait = 2


class Context(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to tell beside a match. `until`: a regex, or a chain of them, nearest first."""

    before: Lines = 0
    after: Lines = 0
    until: Pattern | list[Pattern] = []
    same: list[str] = []
    lines: Literal["all", "same"] = "all"
    max_lines: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 200
    max_bytes: Bytes = 65_536
    wait_s: Wait = 2

    @property
    def chain(self) -> list[str]:
        """`until` as a list."""
        return [self.until] if isinstance(self.until, str) else self.until


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[rule]]`. `class_` is `class` in files; None: it is guessed.

    For the journal and the kernel a group of `regex` or `until` that is named as a field, `(?<_PID>)`, captures that.
    """

    id: RuleId
    regex: Pattern
    severity: Severity = "warning"
    class_: ClassName | None = msgspec.field(name="class", default=None)
    files: list[str] = []
    utf: bool = False
    rate: Rate = Rate()
    multiline: Multiline | None = None
    context: Context = Context()


class RuleFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rule file, as TOML holds it."""

    version: Literal[1]
    rule: list[Rule] = []


class WatchLog(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of `watch_log`: `path` or `glob`; `rules` are tables as in a rule file, or the name of one."""

    path: str | None = None
    glob: str | None = None
    rules: list[dict[str, Any]] | str | None = None
    from_: Literal["end", "start"] | int = msgspec.field(name="from", default="end")


class Watching(msgspec.Struct, frozen=True):
    """Its answer."""

    watch: str
    sources: int


class UnwatchLog(msgspec.Struct, frozen=True):
    """The payload of `unwatch_log`; the answer is empty."""

    watch: str


class SourceState(msgspec.Struct, frozen=True, kw_only=True):
    """One source in the answer to `list_logs`. Sizes, offsets and lag in bytes.

    Of its lines one of `sampled` is looked at for templates, novelties and forecasts; matches always are.
    """

    path: str
    state: str
    generation: int
    size: int
    offset: int
    lag: int
    gaps: int
    sampled: int = 1


class RuleCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One rule in the answer to `list_logs`, over all sources.

    `ns_per_line` is what the rule alone takes for a line of usual text; null where there was no time to measure it.
    """

    rule: str
    matches: int
    suppressed: int
    limit_errors: int
    ns_per_line: float | None = None


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What is learned of logs, in the answer to `list_logs`: templates, classes, and what became of forecasts.

    `open` forecasts wait for their failure, `misses` are failures that had none, since the state directory is there;
    `suppressed` forecasts were not made since the start, for too many were open.
    Precision and recall are shares, null where nothing was forecast, or nothing failed.
    """

    templates: int
    classes: list[str]
    open: int
    hits: int
    expired: int
    misses: int
    suppressed: int
    precision: float | None
    recall: float | None


class Logs(msgspec.Struct, frozen=True):
    """The answer to `list_logs`."""

    sources: list[SourceState]
    rules: list[RuleCounts]
    learned: Learned


class SearchLog(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of `search_log`: one of `regex` and `rule`, whose context holds where none is asked for.

    `from_` is a position, counted from the first byte of the path's own file and so negative in rotated ones. Backward
    has the lines that begin before it, by default before the end; forward those behind it, by default all.
    """

    path: str
    regex: str | None = None
    rule: str | None = None
    before: int = 0
    after: int = 0
    until: str | list[str] = []
    same: list[str] = []
    direction: Literal["backward", "forward"] = "backward"
    from_: int | None = msgspec.field(name="from", default=None)
    rotated: bool = True
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    budget_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer. `scanned` bytes; `next` is the `from` to go on with, null when there is nothing left.

    A match has rule, path, offset, length, template, text, captures, flags and context as in `LogMatched`, its
    `position`, and `after`, the lines behind it, if asked for; `cut` is true where it was too long to be told whole.
    A line of no known template has null for it. The regex gave up on `limit_errors` lines. `stopped` says why there is
    nothing left before all was seen, as a file that is no .gz or .xz.
    """

    matches: list[dict[str, Any]]
    scanned: int
    complete: bool
    next: int | None
    limit_errors: int = 0
    stopped: str | None = None


class LabelLog(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of `label_log`: of which class the line of a `LogMatched` event is, or a text; null: normal."""

    event: str | None = None
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=65_536)] | None = None
    class_: ClassName | None = msgspec.field(name="class")


class Labelled(msgspec.Struct, frozen=True):
    """Its answer: the label was learned."""

    updated: bool


class Reloaded(msgspec.Struct, frozen=True):
    """What the log monitor adds to the answer to `reload`: how many rules hold, and which of them run on every line."""

    rules: int
    slow: list[str]
