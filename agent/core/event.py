"""What every event is: core/events.py has the vocabulary."""

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. A subclass with fields `run` and `test` is shown under them in streams."""
