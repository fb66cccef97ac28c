"""Tailing under random writers, rotations of every kind, crashes and restarts: no line lost, none under two ids."""

import random

from hypothesis import given
from hypothesis import strategies as st

from agent.logs.acts import Gap
from tests.test_logs_tail import PATH, Machine

OPS = [
    *("write", "write", "write", "half", "look", "wait", "rename", "copytruncate", "save", "crash", "remove", "huge"),
    *("stop", "unseen", "unseen"),
]
NAME = 11  # bytes by which a line is known, also when it is matched before it has its end


class Story:
    """A machine, a writer, and what must come of it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.machine = rng, Machine()
        self.written: list[bytes] = []
        self.half = b""
        self.kept: list[bytes] = []  # matched, and committed with a checkpoint
        self.seen: dict[bytes, set[object]] = {}
        self.is_up, self.is_looking = True, True
        self.machine.create()
        self.machine.start()
        self.machine.before_scan, self.machine.when_told = self.remember_heads, self.commit
        self.remember()

    def remember(self) -> None:
        tail = self.machine.tail
        self.checkpoints, self.generation, self.past = tail.checkpoints(), tail.generation, tail.past

    def remember_heads(self) -> None:
        """A checkpoint that knows nothing of the content is followed by one that does, before the first event."""
        if not all(checkpoint.head_size for checkpoint in self.checkpoints):
            self.commit()

    def commit(self) -> None:
        """What is reported is committed, and checkpoints with it."""
        self.kept = list(self.machine.lines)
        self.remember()

    def look(self, after: float = 0.0) -> None:
        """Unless it is down, or is slow to notice."""
        if self.is_up and self.is_looking:
            self.machine.look(after)

    def line(self) -> bytes:
        self.written.append(b"line %06d %s" % (len(self.written), b"x" * self.rng.choice([0, 5, 100, 2000])))
        return self.written[-1]

    def write(self) -> None:
        if PATH not in self.machine.names:
            self.machine.create()
            self.look()
        for _ in range(self.rng.randint(1, 5)):
            text, self.half = (self.half or self.line()) + b"\n", b""
            self.machine.write(text)

    def half_line(self) -> None:
        self.write()
        self.half = self.line()
        cut = self.rng.randrange(NAME, len(self.half))
        self.machine.write(self.half[:cut])
        self.half = self.half[cut:]

    def huge(self) -> None:
        self.write()
        self.machine.write(self.line() + b"y" * self.rng.choice([70_000, 300_000]) + b"\n")

    def finish_half(self) -> None:
        """Who rotates ends its line first."""
        if self.half and PATH in self.machine.names:
            self.machine.write(self.half + b"\n")
            self.half = b""

    def rename(self) -> None:
        self.finish_half()
        if PATH in self.machine.names:
            self.machine.rename(f"{PATH}.{len(self.machine.names)}-{self.rng.random()}")
            self.machine.create()
            self.look()

    def copytruncate(self) -> None:
        """With a quiet writer: nothing is written between the copy and the cut."""
        self.finish_half()
        if PATH in self.machine.names:
            data = self.machine.names[PATH].data
            self.machine.create(bytes(data), f"{PATH}.{len(self.machine.names)}-{self.rng.random()}")
            self.look()
            data[:] = b""
            self.look()

    def unseen(self) -> None:
        """Rotations that are noticed only when the next has come. It has read a line of the first file."""
        self.write()
        self.look()
        self.is_looking = False
        for _ in range(self.rng.randint(1, 3)):
            self.write()
            self.rng.choice([self.rename, self.copytruncate])()
        self.is_looking = True
        self.look()

    def remove(self) -> None:
        """Noticed by inotify before anything comes in its place."""
        self.finish_half()
        self.up()
        self.machine.look()
        self.machine.names.pop(PATH, None)
        self.machine.look()

    def save(self) -> None:
        self.up()
        self.collect()
        self.commit()

    def crash(self) -> None:
        self.stop()
        self.up()

    def stop(self) -> None:
        """What was matched since the last checkpoint was never committed."""
        if self.is_up:
            self.collect()
            self.machine.lines, self.machine.ids = list(self.kept), []
            self.is_up = False

    def up(self) -> None:
        """It goes on from the last checkpoint."""
        if self.is_up:
            return
        self.is_up = True
        self.machine.start(self.checkpoints, generation=self.generation, past=self.past)

    def collect(self) -> None:
        lines = self.machine.lines[len(self.machine.lines) - len(self.machine.ids) :]
        for line, id in zip(lines, self.machine.ids, strict=True):
            self.seen.setdefault(line[:NAME], set()).add(id)
        self.machine.ids = []

    def run(self, op: str) -> None:
        match op:
            case "look":
                self.up()
                self.machine.look()
            case "wait":
                self.up()
                self.machine.look(self.rng.choice([0.5, 3, 10]))
            case "half":
                self.half_line()
            case _:
                getattr(self, op)()


@given(rng=st.randoms(use_true_random=False), ops=st.lists(st.sampled_from(OPS), max_size=25))
def test_no_line_is_lost_and_none_has_two_ids(rng: random.Random, ops: list[str]) -> None:
    story = Story(rng)
    for op in ops:
        story.run(op)
    story.finish_half()
    story.up()
    for _ in range(4):
        story.machine.look(3)
    story.collect()
    got = {line[:NAME] for line in story.machine.lines}
    assert [line[:NAME] for line in story.written if line[:NAME] not in got] == []
    assert {line: ids for line, ids in story.seen.items() if len(ids) > 1} == {}
    lost = [act for act in story.machine.told if isinstance(act, Gap) and act.to is not None]
    assert lost == []
