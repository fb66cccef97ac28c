"""The time at the beginning of log lines: each form, zones, times that cannot be, any bytes."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs.stamps import at, without


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2026-01-05T08:00:00.288 host a", "2026-01-05T08:00:00.288Z"),
        ("2026-01-05T08:00:00Z a", "2026-01-05T08:00:00Z"),
        ("2026-01-05T08:00:00.5+0130 a", "2026-01-05T06:30:00.5Z"),
        ("2026-01-05 08:00:00,123 -08:00 a", "2026-01-05T16:00:00.123Z"),
        ("2015/10/18 18:01:47 [error] a", "2015-10-18T18:01:47Z"),
        ("api.log.2017-05-16_13:53:08 2017-05-16 00:00:00.008 25746 INFO", "2017-05-16T00:00:00.008Z"),
        ("1117838570 2005.06.03 R02-M1 2005-06-03-15.42.50.675872 R02-M1 RAS", "2005-06-03T15:42:50.675872Z"),
        ("20171223-22:15:9:6|Step|a", "2017-12-23T22:15:09.006Z"),
        ("20171223T221529Z a", "2017-12-23T22:15:29Z"),
        ("17/06/09 20:10:40 INFO a", "2017-06-09T20:10:40Z"),
        ("99/06/09 20:10:40 INFO a", "1999-06-09T20:10:40Z"),
        ("081109 203615 148 INFO a", "2008-11-09T20:36:15Z"),
        ("03-17 16:13:38.811  1702 D a", "2000-03-17T16:13:38.811Z"),
        ("Jun  4 15:16:01 combo sshd: a", "2000-06-04T15:16:01Z"),
        ("<34>Oct 11 22:14:15 host su: a", "2000-10-11T22:14:15Z"),
        ("[Sun Dec 04 04:47:44 2005] [error] a", "2005-12-04T04:47:44Z"),
        ('10.0.0.1 - - [10/Oct/2000:13:55:36 -0700] "GET /"', "2000-10-10T20:55:36Z"),
        ("1117838570 a", "2005-06-03T22:42:50Z"),
        ("1117838570.25 a", "2005-06-03T22:42:50.25Z"),
        ("1117838570123 a", "2005-06-03T22:42:50.123Z"),
        ("[   12.345678] usb 1-1: a", "1970-01-01T00:00:12.345678Z"),
    ],
)
def test_every_form_is_read(line: str, expected: str) -> None:
    assert at(line.encode()) == pytest.approx(datetime.fromisoformat(expected).timestamp(), abs=1e-6)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "no time",
        "2026-02-30 00:00:00 a",
        "2026-01-05 24:00:00 a",
        "11178385701 a",
        "4294967296 a b".replace(" ", "x"),
    ],
)
def test_what_cannot_be_a_time_is_none(line: str) -> None:
    assert at(line.encode()) is None


def test_the_rest_of_a_line_is_what_does_not_change_with_time() -> None:
    assert without(b"node7 2026-01-05T08:00:00Z vol-3 failed") == b"node7  vol-3 failed"
    assert without(b"vol-3 failed") == b"vol-3 failed"


@given(st.datetimes(datetime(1970, 1, 2), datetime(2199, 12, 31)), st.sampled_from("T _"))
def test_iso_times_are_those_of_datetime(time: datetime, between: str) -> None:
    line = f"{time.isoformat(sep=between, timespec='microseconds')} host a".encode()
    assert at(line) == pytest.approx(time.replace(tzinfo=UTC).timestamp(), abs=1e-5)


@given(st.binary(max_size=200) | st.text("0123456789-/: .,[]<>JanT+Z", max_size=60).map(str.encode))
def test_any_bytes_have_a_time_or_none(line: bytes) -> None:
    time = at(line)
    assert time is None or -1e12 < time < 1e12
    assert len(without(line)) <= len(line)
