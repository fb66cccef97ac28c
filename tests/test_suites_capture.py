"""A run's output in a bounded file: its beginning, its end, and how much is gone between them."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agent.suites.capture import Capture


def written(path: Path, limit: int, blocks: list[bytes]) -> tuple[bytes, int]:
    capture = Capture(path, limit)
    for block in blocks:
        capture.write(block)
    cut = capture.cut
    capture.close()
    return path.read_bytes(), cut


def test_what_fits_is_kept_whole(tmp_path: Path) -> None:
    assert written(tmp_path / "f", 10, [b"01234", b"56789"]) == (b"0123456789", 0)


def test_without_a_limit_all_is_kept(tmp_path: Path) -> None:
    assert written(tmp_path / "f", 0, [b"x" * 100_000]) == (b"x" * 100_000, 0)


def test_the_middle_is_cut_and_told(tmp_path: Path) -> None:
    assert written(tmp_path / "f", 10, [b"01234567", b"89abcdef"]) == (b"01234\n[6 bytes cut here]\nbcdef", 6)


def test_what_is_larger_than_a_block_is_put_in_order_too(tmp_path: Path) -> None:
    whole = b"".join(b"%07d\n" % n for n in range(500_000))
    limit = 1_800_001
    got, cut = written(tmp_path / "f", limit, [whole[at : at + 65_536] for at in range(0, len(whole), 65_536)])
    head, tail = limit // 2, limit - limit // 2
    assert got == whole[:head] + b"\n[%d bytes cut here]\n" % cut + whole[-tail:]


@given(st.integers(1, 20), st.lists(st.binary(max_size=30), max_size=8))
def test_the_two_ends_are_right_for_any_blocks(limit: int, blocks: list[bytes]) -> None:
    whole = b"".join(blocks)
    with tempfile.TemporaryDirectory() as folder:
        got, cut = written(Path(folder) / "f", limit, blocks)
    if len(whole) <= limit:
        assert (got, cut) == (whole, 0)
    else:
        head, tail = limit // 2, limit - limit // 2
        assert cut == len(whole) - limit
        assert got == whole[:head] + b"\n[%d bytes cut here]\n" % cut + whole[-tail:]
