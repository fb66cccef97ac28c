"""Every kind of the vocabulary is an Event: the bus and the journal take nothing else."""

from agent.core.event import Event
from agent.core.events import KINDS


def test_every_kind_is_an_event_and_cannot_be_changed() -> None:
    assert all(issubclass(kind, Event) and kind.__struct_config__.frozen for kind in KINDS.values())
