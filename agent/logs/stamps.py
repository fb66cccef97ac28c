"""The time at the beginning of a log line, in the forms that logs have.

    2026-01-05T08:00:00.288+01:00   ISO 8601, also with a blank, a comma, slashes, or as 2005-06-03-15.42.50.675872
    20171223-22:15:29:606, 20171223T221529    the same with fewer signs
    17/06/09 20:10:40, 081109 203615, 03-17 16:13:38.811     short years, or none
    Jan  5 10:00:00, [Sun Dec 04 04:47:44 2005], [10/Oct/2000:13:55:36 -0700]       syslog, httpd
    1117838570, 1117838570.25, 1117838570123, [ 12.345678]   epoch, in ms; the kernel's, since boot

Source: protocols/logs.md 2.4: "Times come from the lines' own stamps".
"""

import re
from datetime import date
from functools import lru_cache

NO_YEAR = 2000  # of stamps that have none; a leap year

_NEAR = 96  # bytes from the beginning
_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")
_MONTH = b"|".join(_MONTHS)
_ZONE = rb"(?: ?(?:(?P<z>[+-]\d\d):?(?P<zm>\d\d)|Z\b))?"
_FRACTION = rb"(?:[.,:](?P<f>\d{1,9}))?"

# Anywhere near the beginning, for nothing else looks like it: other fields may stand before.
_FULL = re.compile(
    rb"(?<![^\s\[<(|])(?P<y>\d{4})(?P<s>[-/.])(?P<m>\d\d)(?P=s)(?P<d>\d\d)[T _-]"
    rb"(?P<H>\d\d)[:.](?P<M>\d\d)[:.](?P<S>\d\d)" + _FRACTION + _ZONE
)
_HTTPD = re.compile(rb"\[(?P<d>\d\d)/(?P<b>" + _MONTH + rb")/(?P<y>\d{4}):(?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d)" + _ZONE)
# Only at the beginning.
_FORMS = [
    re.compile(rb"[\[<(]?" + form)
    for form in (
        rb"(?P<y>\d{4})(?P<m>\d\d)(?P<d>\d\d)[-T ](?P<H>\d\d)(?P<M>\d\d)(?P<S>\d\d)" + _FRACTION + _ZONE,
        rb"(?P<y>\d{4})(?P<m>\d\d)(?P<d>\d\d)[-T ](?P<H>\d\d?):(?P<M>\d\d?):(?P<S>\d\d?)(?::(?P<ms>\d{1,3}))?"
        + _FRACTION
        + _ZONE,
        rb"(?P<yy>\d\d)/(?P<m>\d\d)/(?P<d>\d\d) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d)" + _FRACTION,
        rb"(?P<m>\d\d)[-/](?P<d>\d\d) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d)" + _FRACTION,
        rb"(?P<yy>\d\d)(?P<m>\d\d)(?P<d>\d\d) (?P<H>\d\d)(?P<M>\d\d)(?P<S>\d\d)(?!\d)",
        rb"(?:\d+>)?(?P<b>" + _MONTH + rb") +(?P<d>\d\d?) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d)" + _FRACTION,
        rb"[A-Z][a-z]{2} (?P<b>"
        + _MONTH
        + rb") +(?P<d>\d\d?) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d)"
        + _FRACTION
        + rb" (?P<y>\d{4})",
    )
]
_EPOCH = re.compile(rb"(?P<e>\d{10})(?P<ms>\d{3})?(?:\.(?P<f>\d{1,9}))?(?![\w.:-])")
_BOOT = re.compile(rb"\[ *(?P<e>\d{1,9})\.(?P<f>\d{1,9})\]")


def at(line: bytes) -> float | None:
    """The line's time in seconds since 1970, UTC where it names no zone; of NO_YEAR where it names no year.

    None: it begins with no time, or with one that cannot be, as of 30 February.
    """
    found = _find(line)
    if found is None:
        return None
    field = found.groupdict()
    seconds = float(b"0." + (field.get("f") or b"0"))
    seconds += int(field.get("ms") or 0) / 1000
    if (epoch := field.get("e")) is not None:
        return int(epoch) + seconds
    if field.get("yy"):
        year = int(field["yy"]) + (1900 if field["yy"] >= b"70" else 2000)
    else:
        year = int(field.get("y") or NO_YEAR)
    month = _MONTHS.index(field["b"]) + 1 if field.get("b") else int(field["m"])
    day = _days(year, month, int(field["d"]))
    hour, minute, second = int(field["H"]), int(field["M"]), int(field["S"])
    if day is None or hour > 23 or minute > 59 or second > 60:
        return None
    zone = 0
    if (hours := field.get("z")) is not None:
        zone = int(hours) * 3600 + int(hours[:1] + field["zm"]) * 60
    return day * 86400 + hour * 3600 + minute * 60 + second - zone + seconds


def without(line: bytes) -> bytes:
    """The line less its time."""
    found = _find(line)
    return line if found is None else line[: found.start()] + line[found.end() :]


def _find(line: bytes) -> "re.Match[bytes] | None":
    found = _FULL.search(line, 0, _NEAR) or _EPOCH.match(line) or _BOOT.match(line)
    if found is None:
        for form in _FORMS:
            if (found := form.match(line)) is not None:
                return found
        found = _HTTPD.search(line, 0, _NEAR)
    return found


@lru_cache(maxsize=4096)
def _days(year: int, month: int, day: int) -> int | None:
    try:
        return date(year, month, day).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        return None
