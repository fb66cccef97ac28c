"""What a log file is known by: names of rotations, contents."""

import pytest

from agent.logs.identity import HEAD, Checkpoint, File, Stat, fits, is_rotation, rotated_from

DATA = b"".join(b"line %d\n" % n for n in range(1000))


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("x.1", "x"), ("x.12", "x"), ("x.1.gz", "x"), ("x-20260105", "x"), ("x-20260105.xz", "x"), ("x.old", "x"),
        ("x.2026-01-05T10:00:00Z", "x"), ("a.log.1", "a.log"), ("a-1.log", "a.log"), ("a.2026-01-05.log.gz", "a.log"),
    ],
)  # fmt: skip
def test_names_of_rotations(name: str, of: str) -> None:
    assert is_rotation(name, of)
    assert of in rotated_from(name)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("x", "x"), ("y.1", "x"), ("x.bak", "x"), ("x.log", "x"), ("x1", "x"), ("xx.1", "x"), ("x.1.tmp", "x"),
        ("a-b.log", "a.log"), ("a.log", "a.log"), ("aXlog.1", "a.log"), ("x.1\n", "x"),
    ],
)  # fmt: skip
def test_other_names(name: str, of: str) -> None:
    assert not is_rotation(name, of)


def done(offset: int) -> Checkpoint:
    file = File(1, Stat(1, 2, len(DATA)), 1, 0.0)
    assert file.knows(DATA[:HEAD], memoryview(b""))
    file.go_on(offset, 0, memoryview(DATA)[:offset])
    return file.checkpoint()


def has(checkpoint: Checkpoint, data: bytes) -> bool:
    return fits(checkpoint, len(data), data[:HEAD], lambda at, size: data[at : at + size])


@pytest.mark.parametrize("offset", [8, 64, 2000, len(DATA)])
def test_a_file_is_known_by_what_was_matched_of_it(offset: int) -> None:
    assert has(done(offset), DATA)
    assert has(done(offset), DATA + b"more\n")
    assert has(done(offset), DATA[:offset])
    assert not has(done(offset), DATA[: offset - 1])
    assert not has(done(offset), DATA[: offset - 3] + b"???" + DATA[offset:])
    assert not has(done(offset), b"L" + DATA[1:])


def test_an_unread_file_is_known_by_its_beginning_and_not_without_one() -> None:
    file = File(1, Stat(1, 2, 8), 1, 0.0)
    assert not has(file.checkpoint(), DATA)
    file.head = DATA[:8]
    assert has(file.checkpoint(), DATA)
    file.head = b"\0" * 8  # NFS shows zeros before it shows data
    assert not has(file.checkpoint(), b"\0" * 8)
