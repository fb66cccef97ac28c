"""The counters as text for Prometheus, and as numbers by name."""

from agent.control.exposition import exposition, numbers
from agent.core.metrics import Metrics


def metrics() -> Metrics:
    built = Metrics()
    built.count("http_refused_total", status="401")
    built.count("http_refused_total", 2, status="403")
    built.gauge("queue", lambda: 1.5, sink='a"b\\c\nd')
    built.count("odd.name-total")
    return built


def test_samples_of_a_name_stand_together_under_their_type() -> None:
    assert exposition(metrics()) == (
        "# TYPE emissary_http_refused_total counter\n"
        'emissary_http_refused_total{status="401"} 1\n'
        'emissary_http_refused_total{status="403"} 2\n'
        "# TYPE emissary_odd_name_total counter\n"
        "emissary_odd_name_total 1\n"
        "# TYPE emissary_queue gauge\n"
        'emissary_queue{sink="a\\"b\\\\c\\nd"} 1.5\n'
    )


def test_nothing_counted_is_no_text() -> None:
    assert exposition([]) == ""


def test_numbers_are_called_by_name_and_labels() -> None:
    shown = numbers(metrics())
    assert shown['http_refused_total{status="401"}'] == 1
    assert shown["odd.name-total"] == 1
