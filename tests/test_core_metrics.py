"""Counters and gauges."""

from agent.core.metrics import Metrics


def test_counters_add_up_for_each_set_of_labels_and_come_sorted() -> None:
    metrics = Metrics()
    metrics.count("frames_total", role="b")
    metrics.count("frames_total", role="a", dir="in")
    metrics.count("frames_total", 2.5, dir="in", role="a")
    metrics.count("bytes_total", 10)
    assert list(metrics) == [
        ("bytes_total", (), 10),
        ("frames_total", (("dir", "in"), ("role", "a")), 3.5),
        ("frames_total", (("role", "b"),), 1),
    ]


def test_a_gauge_is_read_when_it_is_asked_for_and_the_last_reader_counts() -> None:
    metrics, waiting = Metrics(), [1, 2]
    metrics.gauge("waiting", lambda: 99, sink="mimir")
    metrics.gauge("waiting", lambda: len(waiting), sink="mimir")
    waiting.append(3)
    assert list(metrics) == [("waiting", (("sink", "mimir"),), 3)]


def test_a_gauge_that_has_no_number_yet_is_left_out() -> None:
    metrics = Metrics()
    metrics.gauge("precision", lambda: None)
    assert list(metrics) == []


def test_what_is_gone_has_no_numbers_any_more() -> None:
    metrics = Metrics()
    for monitor in ("a", "b"):
        metrics.count("runs_total", monitor=monitor)
        metrics.gauge("seconds", lambda: 1.0, monitor=monitor, step="A")
    metrics.count("runs_total")
    metrics.forget(monitor="a")
    metrics.forget(monitor="never there")
    assert [labels for _, labels, _ in metrics] == [(), (("monitor", "b"),), (("monitor", "b"), ("step", "A"))]
