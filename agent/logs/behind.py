"""What comes behind a match: the lines that follow it, block by block, over the end of a file into the next.

Source: protocols/logs.md 2.1 (`after`, `multiline`) and 2.3 (`LogContext`).
"""

from agent.logs.context import Following, Place


class Behind:
    """A match whose context is not complete: its `id`, and the lines of its `record` so far."""

    def __init__(self, id: str, following: Following, record: list[bytes], place: Place) -> None:
        self.id, self.following, self.record = id, following, record
        self.generation, self.next = place
        self.skips = True  # the matched line itself

    def feed(self, data: bytes, generation: int, offset: int) -> None:
        """The bytes from an offset on, up to the end of a line or window."""
        if generation > self.generation:
            self.generation, self.next, self.skips = generation, 0, False
        if generation < self.generation:
            return
        at = max(0, self.next - offset)
        while at < len(data) and not self.following.is_complete:
            end = data.find(b"\n", at)
            if end < 0:
                at = len(data)
                break
            if not self.skips:
                self.following.feed(data[at:end].removesuffix(b"\r"))
            self.skips, at = False, end + 1
        self.next = max(self.next, offset + at)

    def takes(self, rule: str, data: bytes, generation: int, offset: int, line_at: int) -> bool:
        """Is the line at `line_at` of the data, which matched that rule, the next of its multi-line record?"""
        spec = self.following.rule.spec
        if not spec.multiline or spec.id != rule:
            return False
        self.feed(data[:line_at], generation, offset)
        known = len(self.following.record)
        self.feed(data[: data.find(b"\n", line_at) + 1], generation, offset)
        return len(self.following.record) > known
