"""What stands between fork and exec, and what need not."""

import signal
from collections.abc import Iterator

import pytest

from agent.core.forked import ignored_signals


@pytest.fixture
def ignores_sigint() -> Iterator[None]:
    """As a shell without job control starts what it puts into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_pythons_own_ignored_signals_are_set_back_by_subprocess() -> None:
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
    assert signal.SIGPIPE not in ignored_signals()


def test_an_inherited_one_is_found(ignores_sigint: None) -> None:
    assert signal.SIGINT in ignored_signals()
