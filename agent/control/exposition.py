"""The counters as Prometheus reads them, and as the `metrics` action answers them. Pure.

Source: protocols/emissary.md, "Control server" (`/metrics`, `metrics`); Prometheus, "Exposition formats", text 0.0.4.
"""

import re
from collections.abc import Iterable

from agent.core.metrics import Labels

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "emissary_"

Sample = tuple[str, Labels, float]

_NO_NAME = re.compile(r"[^a-zA-Z0-9_]")


def exposition(samples: Iterable[Sample]) -> str:
    """The text of all samples, those of a name together under its type: `_total` only grows."""
    names: dict[str, list[str]] = {}
    for name, labels, value in samples:
        full = PREFIX + _NO_NAME.sub("_", name)
        names.setdefault(full, []).append(f"{full}{_labels(labels)} {value!r}")
    lines: list[str] = []
    for name, shown in sorted(names.items()):
        lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
        lines += sorted(shown)
    return "".join(f"{line}\n" for line in lines)


def numbers(samples: Iterable[Sample]) -> dict[str, float]:
    """Each number by its name and labels, `http_refused_total{status="401"}`."""
    return {f"{name}{_labels(labels)}": value for name, labels, value in samples}


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{_NO_NAME.sub("_", name)}="{_escaped(value)}"' for name, value in labels)
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
