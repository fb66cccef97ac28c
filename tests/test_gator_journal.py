"""A layer's messages: counted, kept, told upward."""

from pathlib import Path

import pytest

from agent.gator.journal import MAX_MESSAGE, Journal
from agent.gator.layer import Options
from tests.gator_tree import Above, shared_of


async def journal_of(folder: Path, above: Above, *, forward: bool = True, least: str = "INFO") -> Journal:
    shared = shared_of(options=Options(least=least))  # type: ignore[arg-type]  # a literal
    journal = Journal(folder, shared, above, is_tier=False, is_many=False, forward=forward)
    await journal.open("!Job {}\n")
    return journal


async def test_messages_are_counted_kept_and_told(tmp_path: Path) -> None:
    above = Above()
    journal = await journal_of(tmp_path / "j", above)
    journal.say("DEBUG", "quiet")
    journal.say("WARNING", "x" * (MAX_MESSAGE + 5))
    assert (journal.counts["msg_debug"], journal.counts["msg_warning"], journal.counts["msg_error"]) == (1, 1, 0)
    assert [severity for severity, _ in above.messages] == ["WARNING"]  # DEBUG only with --verbose
    assert above.messages[0][1].endswith("… (5 characters cut)")
    assert [row.severity for row in await journal.read(1, 10)] == [10, 30]
    await journal.close()
    assert (tmp_path / "j/spec.yaml").read_text() == "!Job {}\n"
    assert len((tmp_path / "j/messages.log").read_text().splitlines()) == 2
    journal.say("ERROR", "after the end")  # is told, and has no place any more
    assert above.messages[-1] == ("ERROR", "after the end")
    assert await journal.read(1, 10) == []


async def test_a_folder_that_is_used_again_has_the_messages_of_the_last_layer(tmp_path: Path) -> None:
    for text in ("old", "new"):
        journal = await journal_of(tmp_path, Above())
        journal.say("INFO", text)
        await journal.close()
    assert [line.partition("] [INFO   ] ")[2] for line in (tmp_path / "messages.log").read_text().splitlines()] == [
        "new"
    ]


async def test_what_is_kept_has_an_end_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.gator.layerdb.MAX_LOGS", 3)
    monkeypatch.setattr("agent.gator.journal.MAX_LOGS", 3)
    monkeypatch.setattr("agent.gator.journal.MAX_TEXT", 200)
    journal = await journal_of(tmp_path, Above())
    for number in range(20):
        journal.say("INFO", f"message {number}")
    assert [row.message[:9] for row in await journal.read(1, 10)] == ["message 0", "message 1", "more than"]
    assert (journal.counts["msg_info"], journal.counts["msg_warning"]) == (20, 2)
    await journal.close()
    text = (tmp_path / "messages.log").read_text()
    assert len(text) < 400
    assert text.endswith("… messages.log ends here\n")


async def test_what_comes_from_below_is_neither_counted_nor_kept(tmp_path: Path) -> None:
    above = Above()
    journal = await journal_of(tmp_path, above)
    journal.pass_on("ERROR", "from below", 1.0)
    assert (journal.counts["msg_error"], journal.logs) == (0, 0)
    assert above.messages == [("ERROR", "from below")]
    await journal.close()


async def test_a_quiet_layer_tells_nothing(tmp_path: Path) -> None:
    above = Above()
    journal = await journal_of(tmp_path, above, forward=False)
    journal.say("CRITICAL", "x")
    assert above.messages == []
    await journal.close()


async def test_a_disk_that_takes_no_more_is_told_once_upward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = Above()
    journal = await journal_of(tmp_path, above, forward=False)

    def full(batch: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.db, "flush", full)
    for _ in range(2):
        journal.say("INFO", "x")
        await journal.flush()
    assert above.messages == [("CRITICAL", f"{tmp_path}: cannot be written: [Errno 28] No space left on device")]
    await journal.close()
