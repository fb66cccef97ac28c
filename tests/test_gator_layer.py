"""What all layers have in common."""

import pytest

from agent.gator.layer import Limits, no_messages, severity_of


@pytest.mark.parametrize(
    ("given", "severity"),
    [("ERROR", "ERROR"), (" warning ", "WARNING"), ("LOUD", "INFO"), (40, "INFO"), (None, "INFO")],
)
def test_an_unknown_severity_means_info(given: object, severity: str) -> None:
    assert severity_of(given) == severity


def test_limits_say_which_messages_were_too_many() -> None:
    counts = no_messages() | {"msg_error": 1, "msg_warning": 3}
    assert Limits().broken_by(counts) == "1 error messages; 0 are allowed"
    assert Limits(error=1).broken_by(counts) is None
    assert Limits(error=None, warning=2).broken_by(counts) == "3 warning messages; 2 are allowed"
