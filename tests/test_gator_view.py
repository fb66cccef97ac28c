"""What a tier tells of below, where its children do not answer or speak otherwise."""

from pathlib import Path
from typing import Any

from tests.gator_tree import dialled, tier_of

TEXT = '!JobGroup {ident: g, jobs: [!JobGroup {ident: t, jobs: [!Job {ident: x, command: "true"}]}]}'


async def test_a_tier_below_that_repeats_its_own_name_is_unwrapped_and_one_that_refuses_has_its_state(
    tmp_path: Path,
) -> None:
    answers: dict[str, Any] = {}

    async def get_tree(payload: dict[str, Any]) -> dict[str, Any]:
        return {"t": {"x": "STARTED"}}

    async with tier_of(TEXT, tmp_path, ends=False) as (tier, hands, above):
        await hands.started("t")
        async with dialled(above.address, answers) as child:
            await child.ask("register", {"ident": "t", "server": "h:1"})
            assert await tier.states() == {"t": "STARTED"}
            answers["get_tree"] = get_tree
            assert await tier.states() == {"t": {"x": "STARTED"}}


async def test_a_tier_of_ours_is_asked_for_what_is_below_it_and_others_are_not(tmp_path: Path) -> None:
    async def resolve(payload: dict[str, Any]) -> dict[str, Any]:
        assert "path" not in payload
        return {
            "uidx": 1, "root": 0, "path": ["g", "t"], "ident": payload["root_path"][0], "status": 2, "metrics": {},
            "server_url": "", "db_file": "", "started": None, "updated": None, "stopped": None, "result": 0,
            "owner": None, "children": [], "expected_children": 0,
        }  # fmt: skip

    async with tier_of(TEXT, tmp_path, ends=False) as (_, hands, above):
        await hands.started("t")
        async with dialled(above.address, {"resolve": resolve}) as child, dialled(above.address) as user:
            await child.ask("register", {"ident": "t", "server": "h:1"})
            assert (await user.ask("resolve", {"root_path": ["t"]}))["ident"] == "t"
            await child.ask("register", {"ident": "t", "server": "h:1", "emissary": {}})
            assert (await user.ask("resolve", {"root_path": ["t", "x"]}))["ident"] == "x"
