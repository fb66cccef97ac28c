"""What every layer answers: messages by uid, a layer in two forms."""

from pathlib import Path

import pytest

from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.gator.answers import asker_dialect, told_layer, told_messages
from agent.gator.journal import Journal
from agent.gator.messages import ApiJob, Dialect, Resolve
from tests.gator_tree import Above, shared_of


async def test_d2_counts_after_from_the_last_it_has_and_d1_from_the_first_it_wants(tmp_path: Path) -> None:
    journal = Journal(tmp_path, shared_of(), Above(), is_tier=False, is_many=True, forward=False)
    await journal.open("")
    for text in "abc":
        journal.say("INFO", text, 1.9)

    async def uids(dialect: Dialect | None, **payload: object) -> list[int]:
        return [row["uid"] for row in (await told_messages(journal, payload, 2, dialect))["messages"]]

    told = await told_messages(journal, {"after": 2}, 2, None)
    assert told == {
        "messages": [{"uid": 3, "severity": 20, "message": "c", "timestamp": 1}],
        "total": 3,
        "status": 2,
    }
    assert await uids("d0", after=2) == await uids("d1", after=2) == await uids(None, after=2, format="d1") == [2, 3]
    assert await uids("d2", after=2) == await uids("emissary", after=2) == await uids("d1", after=2, format="d2") == [3]
    assert await uids(None, limit=1) == [1]
    assert await uids(None, after=2**63 - 2) == []
    for wrong in ({"limit": 0}, {"after": -1}, {"after": 2**63}, {"limit": "all"}):
        with pytest.raises(ActionError, match="get_messages: Expected"):
            await told_messages(journal, wrong, 2, None)
    await journal.close()


@pytest.mark.parametrize(
    ("action", "payload", "dialect"),
    [
        ("resolve", {"path": []}, "d1"),
        ("resolve", {"root_path": []}, "d2"),
        ("resolve", {"nest_path": [], "depth": 1}, "d2"),
        ("resolve", {}, None),
        ("get_tree", {"path": []}, None),
    ],
)
def test_who_asks_for_a_layer_tells_its_dialect(action: str, payload: dict[str, object], dialect: str | None) -> None:
    assert asker_dialect(Request(action, payload, 0, False)) == dialect


async def test_d1_asks_by_path_and_is_told_less() -> None:
    asked: list[Resolve] = []

    async def resolve(request: Resolve) -> ApiJob:
        asked.append(request)
        return ApiJob(1, 0, [], "j", 2, {"lint": 1}, "h:1", "", None, None, None, 0, None, [], 0)

    assert await told_layer(resolve, {"path": ["j"]}) == {
        "ident": "j",
        "server_url": "h:1",
        "metrics": {"lint": 1},
        "children": [],
    }
    assert (await told_layer(resolve, {"root_path": ["j"]}))["status"] == 2
    assert [request.root_path for request in asked] == [["j"], ["j"]]
