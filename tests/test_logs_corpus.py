"""Logs as they are learned from: numbered through, in the order of time, each line with its label."""

import os
from pathlib import Path

import pytest

from agent.core.errors import AgentError
from agent.logs.corpus import CHUNK, LINE_MAX, Corpus, Line


def write(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines))
    return str(path)


def flat(corpus: Corpus, cut: int = 0) -> list[Line]:
    return [line for chunk in corpus.chunks(cut) for line in chunk]


def test_one_log_is_in_its_own_order(tmp_path: Path) -> None:
    log = write(tmp_path / "a", b"9 nine", b"", b"3 three\r")
    corpus = Corpus([log], None, wants_times=False)
    assert flat(corpus) == [Line(0, 0, b"9 nine"), Line(1, 0, b""), Line(2, 0, b"3 three\r")]
    assert (corpus.lines, len(corpus.times)) == (3, 0)


def test_several_logs_are_put_together_by_time(tmp_path: Path) -> None:
    one = write(tmp_path / "a", b"2026-01-05 10:00:01 a", b"    at trace", b"2026-01-05 10:00:05 b")
    two = write(tmp_path / "b", b"Traceback", b"2026-01-05T10:00:03 c", b"2026-01-05T10:00:02 out of order", b"")
    corpus = Corpus([one, two], None, wants_times=False)
    assert [line.number for line in flat(corpus)] == [0, 1, 3, 4, 5, 2]
    assert [line.log for line in flat(corpus)] == [0, 0, 1, 1, 1, 0]
    first = corpus.times[0]
    assert [at - first for at in corpus.times] == [0, 0, 4, 2, 2, 1]


def test_lines_without_times_are_a_second_apart(tmp_path: Path) -> None:
    corpus = Corpus([write(tmp_path / "a", b"x", b"y", b"z")], None, wants_times=True)
    assert list(corpus.times) == [0, 1, 2]


def test_labels_belong_to_lines_through_all_logs(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", b"x", b"y", b""), write(tmp_path / "b", b"z")
    labels = write(tmp_path / "labels", b'{"line": 3, "class": "late"}', b'{"line": 1, "class": null}')
    corpus = Corpus([one, two], labels, wants_times=False)
    assert [(line.text, corpus.class_of(line)) for line in flat(corpus)] == [(b"x", None), (b"z", "late"), (b"y", None)]
    assert [corpus.label(Line(number, 0, b"")) for number in range(3)] == [0, 255, 1]


def test_the_label_is_no_part_of_the_line(tmp_path: Path) -> None:
    log = write(tmp_path / "a", b"- 1117838570 2005.06.03 fine", b"KERN 1117838573 2005.06.03 dead", b"KERN")
    corpus = Corpus([log], "first-token", wants_times=True)
    assert [line.text for line in flat(corpus)] == [b"1117838570 2005.06.03 fine", b"1117838573 2005.06.03 dead", b""]
    assert [corpus.class_of(line) for line in flat(corpus)] == [None, "KERN", "KERN"]
    assert list(corpus.times) == [1117838570, 1117838573, 1117838573]


@pytest.mark.parametrize("cut", [0, 1, 7, CHUNK, CHUNK + 5, 2 * CHUNK])
def test_the_cut_is_between_two_chunks(tmp_path: Path, cut: int) -> None:
    corpus = Corpus([write(tmp_path / "a", *(b"%d" % n for n in range(2 * CHUNK + 100)))], None, wants_times=False)
    sizes = [len(chunk) for chunk in corpus.chunks(cut)]
    assert cut in {sum(sizes[:n]) for n in range(len(sizes) + 1)}
    assert [line.number for line in flat(corpus, cut)] == list(range(2 * CHUNK + 100))


def test_a_line_of_any_length_is_one_line(tmp_path: Path) -> None:
    corpus = Corpus([write(tmp_path / "a", b"x" * (LINE_MAX + 5), b"y")], None, wants_times=False)
    assert [len(line.text) for line in flat(corpus)] == [LINE_MAX, 1]


def test_what_grows_meanwhile_does_not_confuse_it(tmp_path: Path) -> None:
    log = write(tmp_path / "a", b"x", b"")
    corpus = Corpus([log], None, wants_times=False)
    with open(log, "ab") as file:
        file.write(b"more\n")
    assert [line.text for line in flat(corpus)] == [b"x"]


def test_what_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("-", str(tmp_path / "pipe"), str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(AgentError, match=f"{path}(: No such file or directory| is no file)"):
            Corpus([path], None, wants_times=False)
