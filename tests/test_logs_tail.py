"""Tailing: each row of the sheet's table, played on a disk in memory, lines matched by the real scanner."""

import errno
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import pytest

from agent.logs.acts import Act, Close, FindSiblings, Gap, Open, Read, Report, Scan
from agent.logs.identity import HEAD, LAST, Checkpoint, Sibling, Stat, fits, is_copy
from agent.logs.regex import Regex
from agent.logs.scanner import LIMIT, LINE_MAX, End, Scanner, Worker
from agent.logs.tail import BLOCK, PARTIAL_S, QUIET_S, Tail

PATH = "/var/log/x"
SCANNER = Scanner([Regex("(?s)^.*")], [[]])  # every line


class Node:
    """A file; its name may change."""

    def __init__(self, ino: int, data: bytes, written: float) -> None:
        self.ino, self.data, self.written = ino, bytearray(data), written

    @property
    def stat(self) -> Stat:
        return Stat(1, self.ino, len(self.data), written=self.written)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.data[at : at + size])

    def sibling(self, path: str, known: Sequence[Checkpoint], own: "Node | None") -> Sibling:
        its = [at for at, done in enumerate(known) if fits(done, len(self.data), self.read(0, HEAD), self.read)]
        copies = path != PATH and own is not None and is_copy(len(self.data), self.read, len(own.data), own.read)
        return Sibling(path, self.stat, path != PATH, frozenset(its), copies)


class Machine:
    """A folder and an agent that tails PATH in it: carries out the acts, and keeps what was matched and told.

    `hears`: what was only written to is not looked at by its path.
    """

    def __init__(self, *, hears: bool = False) -> None:
        self.hears = hears
        self.names: dict[str, Node] = {}
        self.inodes, self.writes = itertools.count(100), itertools.count(1)
        self.now = 0.0
        self.lines: list[bytes] = []
        self.ids: list[tuple[tuple[int, int], int, int]] = []  # origin, generation, offset
        self.told: list[Report | Gap] = []
        self.open: dict[int, Node] = {}
        self.worker = Worker(SCANNER)
        self.came = 0  # as inotify tells it
        self.fail_with = 0
        self.fail_reads = 0
        self.blocks = 0
        self.before_scan: Callable[[], None] = lambda: None
        self.when_told: Callable[[], None] = lambda: None
        self.tail = Tail(PATH, start="start")

    def create(self, data: bytes = b"", path: str = PATH) -> Node:
        self.names[path] = Node(next(self.inodes), data, next(self.writes))
        self.came += path == PATH
        return self.names[path]

    def write(self, data: bytes, path: str = PATH) -> None:
        self.names[path].data += data
        self.names[path].written = next(self.writes)

    def rename(self, to: str, path: str = PATH) -> None:
        self.names[to] = self.names.pop(path)
        self.came += to == PATH

    def start(
        self,
        checkpoints: Sequence[Checkpoint] = (),
        start: Literal["start", "end"] | int = "start",
        generation: int = 0,
        past: Sequence[Checkpoint] = (),
        begun: float | None = None,
        again: bool = False,
    ) -> "Machine":
        self.open.clear()
        self.came = 0
        self.tail = Tail(PATH, checkpoints, start, generation=generation, past=past, begun=begun, again=again)
        return self.look()

    def restart(self) -> "Machine":
        return self.start(self.tail.checkpoints(), past=self.tail.past)

    def look(self, after: float = 0.0) -> "Machine":
        """Time passes; the path and what is drained are looked at, and the timers run."""
        until = self.now + after
        while (due := self.tail.due()) is not None and due < until:
            self.now = max(self.now, due)
            self.do(self.tail.tick(self.now))
            if self.tail.due() == due:
                break
        self.now = until
        node = self.names.get(PATH)
        place = self.tail.next_read() if self.hears and not self.came and not self.fail_reads else None
        if node and place and self.open[place[0]] is node:
            scan = self.grown(node, place[1])
            if scan:
                self.do([scan])
                return self
        came, self.came = self.came, 0
        self.do(self.tail.look(node.stat if node else None, self.now, came))
        for number in self.tail.draining():
            node = self.open[number]
            found = node.stat._replace(is_deleted=node not in self.names.values())
            self.do(self.tail.look_at(number, found, self.now))
        return self

    def grown(self, node: Node, at: int) -> Scan | None:
        """The file is read on, without a look at its path."""
        return self.tail.grown(len(node.data), node.written, bytes(node.data[at:]), bytes(node.data[:HEAD]), self.now)

    def do(self, acts: list[Act]) -> None:
        for act in acts:
            self.do(self.one(act))

    def one(self, act: Act) -> list[Act]:
        match act:
            case Open(file, path):
                node = self.names.get(path)
                if self.fail_with or node is None:
                    return self.tail.failed(file, self.fail_with or errno.ENOENT, self.now)
                self.open[file] = node
                return self.tail.opened(file, node.stat, bytes(node.data[:HEAD]), self.now)
            case Close(file):
                del self.open[file]
            case Read(file, at, size):
                if self.fail_reads:
                    return self.tail.failed(file, self.fail_reads, self.now)
                self.blocks += 1
                data = self.open[file].data
                return self.tail.read(file, bytes(data[at : at + size]), bytes(data[:HEAD]), self.now)
            case Scan():
                self.before_scan()
                return self.tail.scanned(act.file, *self.scan(act), self.now)
            case FindSiblings(known):
                own = self.names.get(PATH)
                found = [node.sibling(name, known, own) for name, node in sorted(self.names.items())]
                return self.tail.siblings(found, self.now)
            case Report() | Gap():
                self.told.append(act)
                self.when_told()
        return []

    def scan(self, act: Scan) -> tuple[int, int]:
        at, before = 0, act.before
        while at < len(act.data):
            part = act.data[at:]
            found = self.worker.scan(part, before=before, end=act.end)
            for match in found:
                assert not match.flags & LIMIT
                line = act.offset + at + match.line_at - match.window_at
                if self.tail.is_new(act, line, str(match.rule), match.flags):
                    self.lines.append(bytes(part[match.line_at : match.line_at + match.line_size]))
                    self.ids.append((act.origin, act.generation, line))
            at, before = at + found.consumed, found.before
            if not found.consumed:
                break
        return at, before

    def words(self) -> list[str]:
        return [act.what if isinstance(act, Report) else "gap" for act in self.told]


@pytest.fixture(params=[False, True], ids=["looks", "hears"])
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(hears=request.param)


def test_a_file_that_only_grew_needs_no_look_at_its_path(machine: Machine) -> None:
    node, looks = machine.create(b"one\n"), Machine()
    machine.start()

    def grown() -> Scan | None:
        place = machine.tail.next_read()
        return machine.grown(node, place[1]) if place else None

    assert grown() is None  # nothing is new
    machine.write(b"two\n")
    scan = grown()
    assert scan
    assert (scan.offset, bytes(scan.data)) == (4, b"two\n")
    assert machine.tail.next_read() is None  # it is being matched
    machine.do([scan])
    assert machine.lines == [b"one", b"two"]
    machine.tail.pause()
    machine.write(b"three\n")
    assert grown() is None
    machine.do(machine.tail.resume(machine.now))
    del node.data[5:]
    assert grown() is None  # it was cut
    machine.rename(f"{PATH}.1")
    assert looks.start().tail.next_read() is None  # there is none
    machine.look()
    machine.create(b"four\n")
    machine.look()
    assert len(machine.tail.draining()) == 1
    machine.write(b"five\n")
    assert grown() is None
    machine.look()
    assert machine.lines[-2:] == [b"four", b"five"]


def test_lines_come_as_they_are_written(machine: Machine) -> None:
    machine.create(b"one\ntwo\r\n")
    machine.start()
    assert machine.tail.state == "IDLE"
    machine.write(b"three\n")
    machine.look()
    assert machine.lines == [b"one", b"two", b"three"]
    assert machine.words() == ["found"]


def test_a_file_that_is_there_is_followed_from_its_end_by_lines(machine: Machine) -> None:
    machine.create(b"old\nhalf")
    machine.start(start="end")
    machine.write(b" new\nlast\n")
    machine.look()
    assert machine.lines == [b"half new", b"last"]


@pytest.mark.parametrize("more", [-LAST - 1, -LAST, -1, 0, 1])
def test_a_long_line_at_the_end_makes_it_no_other_file(machine: Machine, more: int) -> None:
    machine.create(b"a" * 99 + b"\n" + b"x" * (LINE_MAX + more))
    machine.start(start="end")
    machine.write(b"y\nb\n")
    machine.look()
    assert machine.lines[-1:] == [b"b"]
    assert [report.what for report in machine.told if isinstance(report, Report)] == ["found"]


def test_a_file_that_comes_later_is_read_from_its_beginning(machine: Machine) -> None:
    machine.start(start="end")
    assert machine.tail.state == "ABSENT"
    machine.create(b"first\n")
    machine.look(1)
    assert machine.lines == [b"first"]


def test_it_can_start_at_an_offset(machine: Machine) -> None:
    machine.create(b"one\ntwo\n")
    assert machine.start(start=4).lines == [b"two"]


def test_a_reused_inode_is_a_new_generation(machine: Machine) -> None:
    machine.create(b"one\ntwo\n")
    machine.start()
    checkpoints = machine.tail.checkpoints()
    machine.names[PATH].data[:] = b"other content, longer than before\n"
    machine.start(checkpoints)
    assert machine.lines[2:] == [b"other content, longer than before"]
    assert machine.words() == ["found", "replaced", "gap", "found"]
    assert [generation for _, generation, _ in machine.ids] == [1, 1, 2]


def test_a_checkpoint_beyond_the_size_starts_at_0(machine: Machine) -> None:
    machine.create(b"one\ntwo\n")
    machine.start()
    checkpoints = machine.tail.checkpoints()
    machine.names[PATH].data[:] = b"one\n"
    machine.start(checkpoints)
    assert machine.lines[2:] == [b"one"]
    assert machine.words() == ["found", "truncated", "gap", "found"]


def test_equal_beginnings_are_not_the_same_file(machine: Machine) -> None:
    machine.create(b"# log of x\n")
    machine.start()
    machine.rename("/var/log/x.1")
    machine.create(b"# log of x\n")
    machine.look()
    assert machine.lines == [b"# log of x"] * 2
    assert len(set(machine.ids)) == 2


def test_a_renamed_file_is_read_to_its_end_and_the_new_one_from_0(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.rename("/var/log/x.1")
    machine.write(b"2\n", "/var/log/x.1")
    machine.create(b"4\n")
    machine.look()
    machine.write(b"3\n", "/var/log/x.1")  # a writer that has not opened the new file yet
    machine.look(1)
    assert machine.lines == [b"1", b"2", b"4", b"3"]
    machine.look(4)
    assert len(machine.open) == 2
    machine.look(5)
    assert len(machine.open) == 1
    assert machine.words() == ["found", "rotated", "found"]


def test_a_renamed_file_is_read_again_before_it_is_closed(machine: Machine) -> None:
    """The agent was stopped for longer than that is waited: nothing told it that the old writer went on."""
    machine.create(b"1\n")
    machine.start()
    machine.rename("/var/log/x.1")
    machine.look()
    machine.write(b"2\n", "/var/log/x.1")
    machine.look(QUIET_S + 1)
    assert machine.lines == [b"1", b"2"]
    assert len(machine.open) == 1
    machine.look(QUIET_S)
    assert len(machine.open) == 0


def test_a_file_that_came_and_went_between_two_looks_is_told(machine: Machine) -> None:
    machine.create(b"1\n2\n")
    machine.start()
    del machine.names[PATH]
    machine.look()
    machine.create(b"3\n")
    del machine.names[PATH]
    machine.look()
    assert machine.told[-1] == Gap(1, 4, None, "a file came and went before it was looked at")
    machine.create(b"4\n")
    machine.look(10)
    assert machine.lines == [b"1", b"2", b"4"]
    assert machine.words() == ["found", "removed", "gap", "found"]


def test_one_that_was_rotated_between_two_looks_is_read_beside(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.rename("/var/log/x.2")
    machine.create(b"2\n")
    machine.rename("/var/log/x.1")
    machine.create(b"3\n")
    machine.look(1)
    assert sorted(machine.lines) == [b"1", b"2", b"3"]
    assert machine.words().count("gap") == 1  # that of the one which was rotated before it was seen


def test_one_that_came_and_went_before_a_rotation_between_two_looks_is_told(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    for _ in range(2):
        del machine.names[PATH]
        machine.create(b"2\n")
    machine.rename("/var/log/x.1")
    machine.create(b"3\n")
    machine.look(1)
    assert sorted(machine.lines) == [b"1", b"2", b"3"]
    assert machine.told[-1] == Gap(1, 2, None, "a file came and went before it was looked at")


def test_files_that_came_before_the_start_are_none_that_come(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    checkpoints = machine.tail.checkpoints()
    machine.rename("/var/log/x.1")
    for number in (b"2", b"3"):
        machine.create(number + b"\n")
        machine.rename("/var/log/x-2026010" + number.decode())
    machine.create(b"4\n")
    machine.start(checkpoints)
    assert machine.lines == [b"1", b"2", b"3", b"4"]
    for _ in range(2):
        del machine.names[PATH]
        machine.create()
    machine.look()
    assert machine.told[-1] == Gap(4, 2, None, "a file came and went before it was looked at")


def test_a_file_that_is_opened_again_did_not_come(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.write(b"2\n")
    machine.fail_reads = errno.EIO
    machine.look()
    machine.fail_reads = 0
    machine.look(1)
    assert machine.lines == [b"1", b"2"]
    for _ in range(2):
        del machine.names[PATH]
        machine.create()
    machine.look()
    assert machine.told[-1] == Gap(1, 4, None, "a file came and went before it was looked at")


def test_the_event_of_a_file_may_come_after_it_was_seen(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.rename("/var/log/x.1")
    machine.create(b"2\n")
    machine.came = 0
    machine.look()
    machine.came = 1
    machine.look(1)
    assert machine.words() == ["found", "rotated", "found"]
    machine.create(b"3\n")  # twice, but only one is seen and its event comes first
    machine.came = 1
    machine.look()
    machine.came = 1
    machine.look(1)
    assert machine.words()[3:] == ["rotated", "found", "gap"]
    assert machine.told[-1] == Gap(2, 2, None, "a file came and went before it was looked at")


@pytest.mark.parametrize("is_told", [True, False])
def test_the_event_of_the_first_file_may_come_after_it_was_seen_or_never(machine: Machine, is_told: bool) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.came = int(is_told)
    machine.look(1)
    assert machine.words() == ["found"]
    machine.rename("/var/log/x.1")
    machine.look()
    machine.create(b"2\n")
    del machine.names[PATH]
    machine.look()
    assert machine.words() == ["found", "removed", "gap"]


def test_rotated_while_down_the_old_one_is_finished_first(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    checkpoints = machine.tail.checkpoints()
    machine.write(b"2\n")
    machine.rename("/var/log/x-20260105")
    machine.create(b"3\n")
    machine.start(checkpoints)
    assert machine.lines == [b"1", b"2", b"3"]
    assert machine.words() == ["found", "found"]


def test_a_first_file_that_came_and_was_rotated_while_down_is_read(machine: Machine) -> None:
    machine.look()
    begun = float(next(machine.writes))
    machine.create(b"1\n")
    machine.rename("/var/log/x.1")
    machine.create(b"2\n")
    machine.start(begun=begun, again=True)
    assert machine.lines == [b"1", b"2"]


def test_first_files_that_were_rotated_between_two_looks_are_read_beside(machine: Machine) -> None:
    machine.create(b"old\n", "/var/log/x.1")
    machine.rename("/var/log/x.2", "/var/log/x.1")
    machine.start(begun=float(next(machine.writes)))
    for number in (b"1\n", b"2\n"):
        machine.create(number)
        machine.rename(f"/var/log/x-2026010{number[:1].decode()}")
    machine.create(b"3\n")
    machine.look()
    machine.look()
    assert sorted(machine.lines) == [b"1", b"2", b"3"]


def test_gone_while_down_is_told_at_once_and_a_gap(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    node = machine.names.pop(PATH)
    machine.restart()
    gone = [Report("removed", 1), Gap(1, 2, None, "gone while no agent ran")]
    assert machine.told[1:] == gone
    machine.restart()
    assert machine.told[3:] == []  # once
    machine.names[PATH] = node
    machine.write(b"2\n")
    machine.look()
    assert machine.told[3:] == [Report("recovered", 1)]
    assert machine.lines == [b"1", b"2"]
    machine.names.pop(PATH)
    machine.restart()
    assert machine.told[4:] == [Report("removed", 1), Gap(1, 4, None, "gone while no agent ran")]
    machine.create(b"other\n")
    machine.restart()
    assert machine.told[6:] == [Report("found", 2)]  # its gap is told


@pytest.mark.parametrize(("now", "what"), [(b"2\n", "truncated"), (b"another\n", "replaced")])
def test_cut_while_down_is_told(machine: Machine, now: bytes, what: Literal["truncated", "replaced"]) -> None:
    node = machine.create(b"first\n")
    machine.start()
    node.data[:] = now
    machine.restart()
    assert machine.told[1:] == [
        Report(what, 1), Gap(1, 6, None, "its file was not found again"), Report("found", 2)
    ]  # fmt: skip


def test_rotated_away_while_down_is_a_gap(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.create(b"2\n")
    machine.restart()
    assert machine.lines == [b"1", b"2"]
    assert machine.told[1] == Gap(1, 2, None, "its file was not found again")


def test_a_file_that_came_and_went_unseen_is_read_between(machine: Machine) -> None:
    machine.create(b"0\n", "/var/log/x.3")  # older than all that is followed
    machine.create(b"1\n")
    machine.start()
    machine.write(b"2\n")
    machine.rename("/var/log/x.2")
    machine.create(b"3\n")
    machine.rename("/var/log/x.1")
    machine.create(b"4\n")
    machine.look()
    assert machine.lines == [b"1", b"2", b"3", b"4"]
    assert machine.told[1:] == [
        Report("rotated", 1),
        Report("found", 2, "rotated before it was seen"),
        Gap(2, 2, None, "rotated before it was seen"),  # perhaps a copy
        Report("found", 3),
    ]
    machine.look(10)
    machine.restart()
    assert machine.lines == [b"1", b"2", b"3", b"4"]


def test_rotated_twice_while_down_both_are_finished_first(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.write(b"2\n")
    machine.rename("/var/log/x.2")
    machine.create(b"3\n")
    machine.rename("/var/log/x.1")
    machine.create(b"4\n")
    machine.restart()
    assert machine.lines == [b"1", b"2", b"3", b"4"]
    assert machine.words() == ["found", "found", "gap", "found"]


@pytest.mark.parametrize("is_up", [True, False])
def test_copied_and_cut_twice_unseen(machine: Machine, is_up: bool) -> None:
    machine.create(b"1\n")
    machine.start()
    node = machine.names[PATH]
    for number, more in ((2, b"2\n"), (1, b"3\n")):
        machine.write(more)
        machine.create(bytes(node.data), f"/var/log/x.{number}")
        node.data[:] = b""
    machine.write(b"4\n")
    (machine.look if is_up else machine.restart)()
    assert sorted(machine.lines) == [b"1", b"2", b"3", b"4"]
    assert len(set(machine.ids)) == 4
    assert Gap(1, 4, None, "written after the copy") in machine.told


def test_a_copy_in_the_making_is_not_read_before_the_cut(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.rename("/var/log/x.2")
    machine.create(b"2\n3\n")
    machine.create(b"2\n", "/var/log/x.1")
    machine.restart()
    machine.write(b"4\n")
    machine.names["/var/log/x.1"].data[:] = b"2\n3\n4\n"
    machine.names[PATH].data[:] = b"5\n"
    machine.look()
    assert machine.lines == [b"1", b"2", b"3", b"4", b"5"]
    assert machine.words() == ["found", "found", "truncated", "gap"]


def test_what_is_cut_before_it_is_opened_is_looked_for_in_its_copy(machine: Machine) -> None:
    machine.create(b"1\n")
    checkpoints = machine.start().tail.checkpoints()
    machine.rename("/var/log/x.2")
    node = machine.create(b"2\n3\n")
    machine.create(b"2\n3\n", "/var/log/x.1")
    machine.tail, machine.open = Tail(PATH, checkpoints), {}
    (search,) = machine.tail.look(node.stat, 0)
    acts = machine.one(search)
    node.data[:] = b"4\n"
    machine.do(acts)
    machine.look()
    assert machine.lines == [b"1", b"2", b"3", b"4"]


def test_cut_and_then_renamed_before_the_cut_is_noticed(machine: Machine) -> None:
    machine.create(b"1\n2\n")
    machine.start()
    machine.names[PATH].data[:] = b""
    machine.write(b"3\n")
    machine.rename("/var/log/x.1")
    machine.create(b"4\n")
    machine.look()
    machine.look(1)
    assert machine.lines == [b"1", b"2", b"3", b"4"]
    assert machine.words() == ["found", "rotated", "found", "replaced", "gap"]
    assert len(set(machine.ids)) == 4


def test_files_that_are_renamed_again_before_they_are_opened_are_looked_for_again(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    checkpoints = machine.tail.checkpoints()
    machine.write(b"2\n")
    machine.rename("/var/log/x.1")
    machine.create(b"3\n")
    tail = Tail(PATH, checkpoints)
    machine.tail, machine.open, machine.came = tail, {}, 0
    (search,) = tail.look(machine.names[PATH].stat, 0)
    (opening,) = machine.one(search)
    assert opening == Open(1, "/var/log/x.1")
    machine.rename("/var/log/x.2", "/var/log/x.1")
    machine.rename("/var/log/x.1")
    machine.create(b"4\n")
    machine.do([opening])  # it is another file now
    machine.look()
    assert machine.lines == [b"1", b"2", b"3", b"4"]
    assert [gap for gap in machine.told if isinstance(gap, Gap) and gap.generation == 1] == []


def test_a_copy_for_safety_is_not_taken_for_the_file(machine: Machine) -> None:
    machine.create(b"1\n2\n")
    machine.start()
    machine.create(b"1\n2\n", "/var/log/x.bak")
    machine.write(b"3\n")
    machine.restart()
    assert machine.lines == [b"1", b"2", b"3"]
    assert machine.words() == ["found"]


def test_copytruncate_reads_the_rest_of_the_copy_and_nothing_twice(machine: Machine) -> None:
    machine.create(b"1\n2\n")
    machine.start()
    machine.write(b"3\n")
    machine.create(bytes(machine.names[PATH].data), "/var/log/x.1")
    machine.names[PATH].data[:] = b""
    machine.look()
    machine.write(b"4\n")
    machine.look()
    assert machine.lines == [b"1", b"2", b"3", b"4"]
    assert machine.told[1:] == [Report("truncated", 2), Gap(1, 6, None, "written after the copy")]
    machine.restart()  # while the copy is still kept open
    assert machine.words() == ["found", "truncated", "gap"]
    assert machine.ids[2] == ((1, 100), 1, 4)  # as if it had been read before the cut


def test_a_cut_without_a_copy_may_have_lost_something(machine: Machine) -> None:
    machine.create(b"1\n2\n")
    machine.start()
    machine.names[PATH].data[:] = b"3\n"
    machine.look()
    assert machine.lines == [b"1", b"2", b"3"]
    assert machine.told[1:] == [Report("truncated", 2), Gap(1, 4, None, "cut off, and no copy is found")]


@pytest.mark.parametrize("new", [b"x\n" * 40, b"1\n2\nother, and longer than before\n"])
def test_a_cut_is_seen_even_when_the_file_has_grown_past_the_offset(machine: Machine, new: bytes) -> None:
    machine.create(b"1\n2\n3333\n")
    machine.start()
    machine.names[PATH].data[:] = new
    machine.look()
    assert b"\n".join(machine.lines[3:]) + b"\n" == new
    assert machine.words() == ["found", "replaced", "gap"]


def test_a_partial_last_line_is_held_and_then_matched_once(machine: Machine) -> None:
    machine.create(b"one\nhalf")
    machine.start()
    assert machine.lines == [b"one"]
    machine.look(1.9)
    assert machine.lines == [b"one"]
    machine.look(0.2)
    assert machine.lines == [b"one", b"half"]
    assert machine.tail.checkpoints()[0].offset == 4
    machine.look(10)
    machine.write(b" more\nlast\n")
    machine.look(1)
    assert machine.lines == [b"one", b"half", b"last"]  # the rule is told of that line already


def test_a_partial_last_line_is_matched_at_once_when_nobody_waits_for_its_end(machine: Machine) -> None:
    machine.create(b"1\nhalf")
    machine.start()
    machine.do(machine.tail.hurry(machine.now))
    assert machine.lines == [b"1", b"half"]
    machine.do(machine.tail.hurry(machine.now))
    assert machine.lines == [b"1", b"half"]


def test_a_partial_last_line_that_grows_is_held_longer(machine: Machine) -> None:
    machine.create(b"a")
    machine.start()
    for _ in range(5):
        machine.look(1.5)
        machine.write(b"a")
        machine.look()
    assert machine.lines == []
    machine.look(2.1)
    assert machine.lines == [b"a" * 6]


def test_a_partial_last_line_of_a_removed_file_is_matched_at_its_end(machine: Machine) -> None:
    machine.create(b"one\nhalf")
    machine.start()
    del machine.names[PATH]
    machine.look()
    machine.look(6)
    machine.look(6)
    assert machine.lines == [b"one", b"half"]
    assert machine.open == {}
    assert machine.words() == ["found", "removed"]


def test_a_huge_line_is_read_by_windows_and_told_once(machine: Machine) -> None:
    machine.create(b"one\n" + b"x" * (3 * BLOCK + 17))
    machine.start()
    assert [len(line) for line in machine.lines] == [3, 65_536]
    assert machine.tail.checkpoints()[0].offset == 4  # the start of the line
    machine.write(b"x\nlast\n")
    machine.look()
    assert [len(line) for line in machine.lines] == [3, 65_536, 4]
    assert machine.ids[1:] == [((1, 100), 1, 4), ((1, 100), 1, 3 * BLOCK + 17 + 4 + 2)]


def test_a_huge_line_is_begun_again_after_a_restart_and_keeps_its_id(machine: Machine) -> None:
    machine.create(b"one\n" + b"x" * 300_000)
    machine.start().restart()
    machine.write(b"\nlast\n")
    machine.look()
    assert len(machine.ids) - len(set(machine.ids)) == 1
    assert machine.lines[-1] == b"last"


def test_a_hole_left_by_a_cut_is_skipped_and_counted(machine: Machine) -> None:
    machine.create(b"1\n2\n" * 100)
    machine.start()
    machine.names[PATH].data[:] = b"\0" * 400 + b"3\n"
    machine.look()
    machine.look(1.1)
    assert machine.lines[200:] == [b"3"]
    assert machine.told[-1] == Report("truncated", 2, "400 NUL bytes skipped")


def test_zeros_that_nfs_shows_first_are_read_again(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.write(b"\0" * 4)
    machine.look(1)
    machine.names[PATH].data[2:] = b"two\n"
    machine.look(1.1)
    assert machine.lines == [b"1", b"two"]


def test_a_nul_within_a_line_is_a_byte(machine: Machine) -> None:
    machine.create(b"a\0b\n\0c\n\xff\n")
    assert machine.start().lines == [b"a\0b", b"\0c", b"\xff"]


def test_what_cannot_be_opened_is_tried_again_ever_later(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.fail_with = errno.EACCES
    machine.start()
    assert machine.tail.state == "ERROR"
    tries = []
    for _ in range(100):
        before = machine.tail._numbers
        machine.look(1)
        if machine.tail._numbers > before:
            tries.append(machine.now)
    assert tries[:5] == [1, 3, 7, 15, 31]
    assert tries[-1] - tries[-2] == 30
    machine.fail_with = 0
    machine.look(30)
    assert machine.lines == [b"1"]
    assert machine.words() == ["unreadable", "recovered", "found"]
    assert machine.told[0] == Report("unreadable", 0, "cannot be read: Permission denied")


def test_a_file_that_cannot_be_read_any_more_goes_on_where_it_was(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.fail_reads = errno.EIO
    machine.write(b"2\n")
    machine.look(1)
    machine.fail_reads = 0
    machine.look(5)
    assert machine.lines == [b"1", b"2"]
    assert machine.words() == ["found", "unreadable", "recovered"]


@pytest.mark.parametrize("kind", ["directory", "FIFO", "character device"])
def test_what_is_no_file_is_told_and_not_opened(machine: Machine, kind: str) -> None:
    acts = machine.tail.look(Stat(1, 2, 0, kind), 0)
    assert acts == [Report("unreadable", 0, f"is a {kind}")]
    assert machine.tail.look(Stat(1, 2, 0, kind), 1) == []


def test_no_permission_to_look_is_an_error_too(machine: Machine) -> None:
    assert machine.tail.look(errno.EACCES, 0) == [Report("unreadable", 0, "Permission denied")]


def test_under_backpressure_nothing_is_read_and_rotation_is_noticed(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.tail.pause()
    machine.write(b"2\n")
    machine.look()
    machine.rename("/var/log/x.1")
    machine.create(b"3\n")
    machine.look(100)
    assert machine.lines == [b"1"]
    assert machine.tail.state == "PAUSED"
    assert (machine.tail.lag, machine.tail.held) == (4, 0)
    machine.do(machine.tail.resume(machine.now))
    assert machine.lines == [b"1", b"2", b"3"]


def test_too_much_that_is_held_is_given_up_and_told(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.tail.pause()
    machine.write(b"2\n")
    del machine.names[PATH]
    machine.look()
    assert machine.tail.held == 2
    machine.do(machine.tail.give_up(machine.now))
    assert machine.told[-1] == Gap(1, 2, None, "deleted, and too much is waiting: 2 bytes were there")
    assert machine.open == {}


def test_a_renamed_file_is_never_given_up(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.tail.pause()
    machine.write(b"2\n")
    machine.rename("/var/log/x.1")
    machine.look()
    assert machine.tail.held == 0
    machine.do(machine.tail.give_up(machine.now))
    machine.do(machine.tail.resume(machine.now))
    assert machine.lines == [b"1", b"2"]


def test_lines_that_there_was_no_room_for_are_matched_once_there_is(machine: Machine) -> None:
    machine.create()
    machine.start()
    machine.write(b"1\n2\n3\n")
    scan = machine.scan

    def scan_one(act: Scan) -> tuple[int, int]:
        machine.tail.pause()
        return scan(act._replace(data=act.data[:2]))

    machine.scan = scan_one  # type: ignore[method-assign]  # it stops in mid-block
    machine.look()
    machine.scan = scan  # type: ignore[method-assign]
    machine.look(2 * PARTIAL_S)
    assert machine.lines == [b"1"]
    machine.do(machine.tail.resume(machine.now))
    assert machine.lines == [b"1", b"2", b"3"]
    machine.write(b"4\n")
    machine.look(2 * PARTIAL_S)
    assert machine.lines == [b"1", b"2", b"3", b"4"]


def test_lag_is_told_once_and_so_is_its_end(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    machine.tail.pause()
    machine.write(b"x\n" * (33 << 20))
    machine.look()
    machine.look()
    assert machine.told[1:] == [Report("lagging", 1, f"{66 << 20} bytes behind")]


def test_a_checkpoint_goes_on_without_reading_anything_twice(machine: Machine) -> None:
    machine.create(b"1\n2\nhalf")
    machine.start()
    machine.restart()
    machine.write(b" 3\n")
    machine.restart()
    assert machine.lines == [b"1", b"2", b"half 3"]


def test_a_lost_checkpoint_reads_again_under_the_same_ids(machine: Machine) -> None:
    machine.create(b"1\n2\n")
    early = machine.start().tail.checkpoints()
    machine.write(b"3\n")
    machine.look()
    machine.start(early)
    assert machine.lines == [b"1", b"2", b"3", b"3"]
    assert machine.ids[2] == machine.ids[3]


def test_a_cut_while_a_block_is_matched_is_seen_afterwards(machine: Machine) -> None:
    machine.create(b"1\n2\n")

    def cut() -> None:
        machine.names[PATH].data[:] = b"3\n"
        assert machine.tail.look(machine.names[PATH].stat, machine.now) == []
        machine.before_scan = lambda: None

    machine.start()
    machine.write(b"more\n")
    machine.before_scan = cut
    machine.look()
    machine.look(1)
    assert machine.lines == [b"1", b"2", b"more", b"3"]
    assert machine.words() == ["found", "truncated", "gap"]


def test_what_replaced_a_longer_file_is_read_once(machine: Machine) -> None:
    node = machine.create(b"%063d\n" % 1 * (3 * BLOCK // 64))

    def replace() -> None:
        machine.before_scan = lambda: None
        node.data[:] = b"%063d\n" % 2 * (2 * BLOCK // 64)
        machine.when_told = look_once

    def look_once() -> None:
        machine.when_told = lambda: None
        machine.look()

    machine.before_scan = replace
    machine.start()
    machine.look(10)
    assert machine.words() == ["found", "replaced", "gap"]
    assert machine.lines.count(b"%063d" % 2) == 2 * BLOCK // 64


def test_an_idle_file_costs_no_read(machine: Machine) -> None:
    machine.create(b"1\n")
    machine.start()
    blocks = machine.blocks
    for _ in range(100):
        machine.look(1)
    assert machine.blocks == blocks
    assert machine.tail.due() is None


def test_end_is_that_of_the_scanner() -> None:
    assert {End.LINE, End.OPEN, End.PARTIAL} == set(End)
