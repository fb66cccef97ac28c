"""Templates: grouping, ids that stay, values, bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs.model import ModelDamaged
from agent.logs.templates import LIMIT, NONE, Miner
from tests.logs_templates_house import accuracies, memory_mib, structured, texts
from tests.logs_templates_model import Model


def test_lines_that_differ_in_values_are_one_template() -> None:
    lines = [
        b"Jun  9 06:06:20 combo sshd[3182]: connection from 10.0.0.1 (host.example.org) at Thu Jun  9 06:06:20 2005",
        b"Jul 17 23:21:54 combo sshd[1]: connection from 220.117.241.7 () at Sun Jul 17 23:21:54 2005",
    ]
    expected = "<*> combo sshd[<*>]: connection from <*> (<*>) at <*>"
    assert texts(lines) == [expected, expected]


def test_what_is_a_value() -> None:
    lines = {
        b"copy /a/b.txt to C:\\temp\\c.txt": "copy <*> to <*>",
        b"GET http://x/y?a=b&c=d done": "GET <*> done",
        b"took 5 ms of 1.5 KB": "took <*> of <*>",
        b"lifetime <1 sec": "lifetime <*>",
        b"mask ffffffff or deadbeefcafe": "mask <*> or <*>",
        b"mac FF:F2:9F:16:EA:46 up": "mac <*> up",
        b"peer a.example.org or x.y.de": "peer <*> or <*>",
        b"x.y is a word of com.example.Thing": "x.y is a word of com.example.Thing",
        b"fan ( 12 13 **** 14 )": "fan ( <*> )",
        b"nodes:node-[40-63] left": "nodes:<*> left",
        b"run[17] of cpu [1-4]": "run[<*>] of cpu [<*>]",
        b"input/output error": "input/output error",
        b"sent by a@b": "sent by <*>",
        b"1, 2, 3 and 4:5": "<*> and <*>",
        b"depth......17 of wait...": "depth......<*> of wait...",
        b" ".join([b"." * 70] * 64): " ".join(["." * 64] * 16) + " <*>",  # what is kept of a line is bounded
        b"\xff\xfe\x80 noise": "<*> noise",
        "grün".encode(): "grün",
        b"q" * 65 + b" end": "<*> end",
        b"": "",
        b"a <*> b": "a <*> b",
    }
    for line, expected in lines.items():
        assert texts([line]) == [expected]


def test_a_word_that_varies_joins_templates_and_ids_stay() -> None:
    miner = Miner()
    ids = [miner.mine_line(f"service {name} was started again".encode()) for name in ("a", "b", "c", "d", "e", "f")]
    assert [miner.resolve(id) for id in ids] == [ids[0]] * 6
    assert miner.text(ids[3]) == "service <*> was started again"
    assert miner.values(ids[0], b"service web was started again") == [b"web"]
    assert ids[4:] == [ids[0]] * 2
    again = miner.mine(b"\n".join(f"disk {name} was found at last".encode() for name in "abcdefg"))
    assert sorted(again.joined) == [(id, again.ids[0]) for id in again.new if id != again.ids[0]]
    assert len(again.joined) == 4


def test_a_word_where_others_have_a_value_is_one() -> None:
    lines = [b"pod started on node 7 by the scheduler", b"pod started on node edge by the scheduler"]
    for order in (lines, lines[::-1]):
        assert texts(order) == ["pod started on node <*> by the scheduler"] * 2
    assert texts([b"link 7", b"link down"]) == ["link <*>", "link down"]  # where little else stays, both are meant
    assert texts([b"7 is up again", b"edge is up again"]) == ["<*> is up again", "edge is up again"]


def test_a_sign_far_behind_ends_no_head() -> None:
    lines = [f"I0105 kind.go:17] Starting to watch controller={name} source: *v1.1".encode() for name in "abcdef"]
    assert set(texts(lines)) == {"<*> kind.go:<*>] Starting to watch controller=<*> source: <*>"}


def test_words_that_vary_together_join_templates() -> None:
    people, files, shelves = (
        ("ada", "bob", "eve", "kim", "lea"),
        ("plan", "text", "note"),
        ("left", "mid", "top", "low"),
    )
    lines = [
        f"user {people[n % 5]}{'abcdefg'[n % 7]} copied {files[n % 3]}{'hijklmno'[n % 8]} to the shelf {shelves[n % 4]}"
        for n in range(40)
    ]
    assert texts([line.encode() for line in lines]) == ["user <*> copied <*> to the shelf <*>"] * 40


def test_what_joined_one_not_seen_for_long_may_join_others_too() -> None:
    """The line has a value where the first one has a word, and four others differ from it in two words each."""

    letters = str.maketrans("0123456789", "ghijklmnop")

    def words(first: int, count: int) -> list[str]:
        return [str(number).translate(letters) for number in range(first, first + count)]

    shared = words(100, 20)
    unlike = [[shared[0], *words(1000 + 100 * n, 20)] for n in range(16)]
    four = [[*shared[: 2 * n + 1], *words(5000 + 100 * n, 2), *shared[2 * n + 3 :], "7"] for n in range(4)]
    between = [words(10_000 + 10 * n, 5) for n in range(300)]
    found = [" ".join(each).encode() for each in [[*shared, "last"], *unlike, *four, *between, [*shared, "7"]]]
    miner, model = Miner(limit=1024), Model()
    assert [miner.mine_line(line) for line in found] == [model.mine(line) for line in found]
    assert miner.text(1) == " ".join([shared[0], "<*>", *shared[9:], "<*>"])
    assert [miner.resolve(id) for id in range(18, 22)] == [1] * 4


def test_messages_behind_a_head_are_apart() -> None:
    lines = [
        f"03-17 16:13:38.811  1702  2395 D Bar: {word}".encode() for word in ["hide", "show", "close", "open", "stay"]
    ]
    assert len(set(texts(lines))) == 5


def test_ids_are_the_same_after_a_restart() -> None:
    miner = Miner()
    lines = [f"session opened for user {user} by (uid={uid})".encode() for uid, user in enumerate("abcd")]
    ids = [miner.mine_line(line) for line in [*lines, b"something else"]]
    data, left_out = miner.dump()
    again = Miner.load(data)
    assert left_out == 0
    assert [again.resolve(id) for id in ids] == [miner.resolve(id) for id in ids]
    assert list(again.counts()) == list(miner.counts())
    assert again.mine_line(b"session opened for user z by (uid=9)") == ids[0]
    assert again.mine_line(b"another") == max(ids) + 1


def test_the_rarest_are_left_out_of_a_dump_without_room() -> None:
    miner = Miner()
    ids = miner.mine(b"often\noften\nrare\noften too\noften too\n").ids
    data, left_out = miner.dump(85)
    assert (len(data) <= 85, left_out) == (True, 1)
    assert Miner.load(data).resolve(ids[2]) is None
    assert Miner.load(data).text(ids[0]) == "often"


def test_the_template_seen_longest_ago_is_forgotten() -> None:
    miner = Miner(limit=16)
    names = [f"{chr(97 + n)}{chr(97 + n)}" for n in range(20)]
    ids = [miner.mine_line(name.encode()) for name in names]
    assert len(set(ids)) == 20
    assert [miner.resolve(id) for id in ids] == [None] * 4 + ids[4:]
    with pytest.raises(KeyError):
        miner.text(ids[0])
    assert miner.mine_line(names[0].encode()) == max(ids) + 1


def test_lines_of_a_block() -> None:
    mined = Miner().mine(b"a\r\nb\n\na")
    assert list(mined.ids) == [1, 2, 3, 1]
    assert list(mined.starts) == [0, 3, 5, 6, 7]
    assert mined.new == range(1, 4)
    assert mined.having({1, 7}) == [0, 3]
    assert list(Miner().mine(b"").starts) == [0]


def test_every_nth_line_of_a_block() -> None:
    block = b"".join(b"%d x\n" % n for n in range(50_000))
    mined = Miner().mine(block, every=3)
    assert [block[start : start + 7].split(b"\n")[0] for start in mined.starts[:-1]] == [
        b"%d x" % n for n in range(0, 50_000, 3)
    ]


@given(st.lists(st.text("ab1 :,.<>*()/=\n\xe9", max_size=20).map(str.encode) | st.binary(max_size=40), max_size=40))
def test_any_bytes_are_mined_and_kept(lines: list[bytes]) -> None:
    block = b"\n".join(lines)
    miner, single = Miner(limit=16), Miner(limit=16)
    mined = miner.mine(block)
    pieces = block.split(b"\n") if block else []
    if pieces and not pieces[-1]:
        pieces.pop()
    assert list(mined.ids) == [single.mine_line(line) for line in pieces]
    assert NONE not in mined.ids
    again = Miner.load(miner.dump()[0], limit=16)
    assert list(again.counts()) == list(miner.counts())
    assert [again.text(id) for id, _ in again.counts()] == [miner.text(id) for id, _ in miner.counts()]
    assert [again.find(line) for line in pieces] == [miner.find(line) for line in pieces]
    for id, line in zip(mined.ids, pieces, strict=True):
        assert miner.resolve(id) in (None, miner.find(line))
        assert again.resolve(id) == miner.resolve(id)
        assert all(value in line for value in miner.values(id, line))


@given(st.binary(max_size=200))
def test_what_is_no_dump_is_told(data: bytes) -> None:
    with pytest.raises(ModelDamaged):
        Miner.load(data)


@given(st.data())
def test_a_damaged_dump_is_told_or_gives_a_miner(data: st.DataObject) -> None:
    miner = Miner(limit=16)
    for word in "abcdef":
        miner.mine_line(f"user {word} is here".encode())
    dump = bytearray(miner.dump()[0])
    dump[data.draw(st.integers(0, len(dump) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = Miner.load(bytes(dump), limit=16)
    except ModelDamaged:
        return
    assert again.mine_line(b"user x is here") != NONE


def test_grouping_accuracy() -> None:
    found = accuracies()
    assert sum(found.values()) / len(found) >= 0.86, found


def test_memory_is_bounded() -> None:
    grown, known = memory_mib(LIMIT + 1000)
    assert (grown < 32, known) == (True, LIMIT)


WORDS = st.sampled_from(
    [
        *(
            "user",
            "ada",
            "bob",
            "eve",
            "kim",
            "lea",
            "mia",
            "is",
            "was",
            "at",
            "disk",
            "a.b.c",
            "d/e/f",
            "x=y",
            "v=",
            ",",
        ),
        *(
            "Jun",
            "Sun",
            "9",
            "10:31",
            "MB",
            "ff",
            "FF:",
            "ab:cd:1",
            ":",
            ",",
            "-",
            "(",
            ")",
            "()",
            '"',
            "'",
            "...",
            "k...9",
        ),
        *("/a/b", "./c", "~/d", "http://x/y?a=b", "C:\\e f", '"/g h"', "h.example.org", "i.jk.de", "l@m", "deadbeef"),
        *("<*>", "n-[1-3]", "m_[4", " ", "<5", "> 6", "****", "é", "[1]", "n/a", "1%", "o" * 64, "p" * 65),
    ]
)
FRAMES = st.lists(WORDS, min_size=1, max_size=9)


@st.composite
def alike(draw: st.DrawFn) -> list[bytes]:
    """Lines of a few frames, in which some words are others; and some of any bytes."""
    lines = []
    for frame in draw(st.lists(FRAMES, min_size=1, max_size=3)):
        varying = draw(st.sets(st.integers(0, len(frame) - 1), max_size=3))
        for _ in range(draw(st.integers(1, 30))):
            words = [draw(WORDS) if n in varying else word for n, word in enumerate(frame)]
            lines.append(draw(st.sampled_from([" ", " ", " ", ""])).join(words).encode())
    return [*lines, *draw(st.lists(st.binary(max_size=30), max_size=3))]


@given(alike())
def test_the_model_in_python_finds_the_same(lines: list[bytes]) -> None:
    miner, model = Miner(limit=1024), Model()
    lines = [line.replace(b"\n", b" ") for line in lines]
    assert [miner.mine_line(line) for line in lines] == [model.mine(line) for line in lines]
    assert dict(miner.counts()) == model.counts
    for id in model.counts:
        assert miner.text(id) == model.text(id).decode(errors="backslashreplace")


def test_the_model_in_python_finds_the_same_in_logs() -> None:
    for name in ("Android", "Linux"):
        lines, _ = structured(name)
        miner, model = Miner(), Model()
        assert [miner.mine_line(line) for line in lines] == [model.mine(line) for line in lines]
        assert dict(miner.counts()) == model.counts
